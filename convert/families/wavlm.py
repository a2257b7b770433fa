"""WavLM (`WavLM.py` of Microsoft's unilm): wav2vec 2.0's encoder with gated relative positions; unilm released encoders only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.families.base import Family, Kind, Part, Restoring, Running, Shapes, Sources
from convert.families.damages import Change, Configure, Converted, Damages, encoder_damages
from convert.families.encoder import LAYERS, Layout, assemble, encoder_rules, infer_encoder
from convert.families.encoder_settings import ABSENT, CHOICES, COUNTS, DEFAULTS, FLAGS, READ, SAME, TRAINING_ONLY
from convert.families.planning import describe_encoder
from convert.families.settings import Limit, Settings, must_be
from convert.rules import Edit, Rename, Table

# fmt: off
GATED_POSITIONS = (
    Rename("encoder.layers.{layer}.self_attn.grep_a",              "encoder.layers.{layer}.attention.gru_rel_pos_const",           "1 heads 1 1"),
    Rename("encoder.layers.{layer}.self_attn.grep_linear.weight",  "encoder.layers.{layer}.attention.gru_rel_pos_linear.weight",   "8 head"),
    Rename("encoder.layers.{layer}.self_attn.grep_linear.bias",    "encoder.layers.{layer}.attention.gru_rel_pos_linear.bias",     "8"),
    Rename("encoder.layers.0.self_attn.relative_attention_bias.weight", "encoder.layers.0.attention.rel_attn_embed.weight",        "buckets heads"),  # layer 0's serves all
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Positions(Part):
    """What only WavLM has.

    Args:
        heads, head: `encoder_attention_heads`, and the width of one.
        buckets: `num_buckets`, of distances between frames.
    """

    heads: int
    head: int
    buckets: int

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes that the positions' rules name."""
        return {"heads": self.heads, "head": self.head, "buckets": self.buckets}


MARK = r"\.self_attn\.grep_(a|linear\.)"
PRETRAINING = Kind("pretraining", mark=MARK, layout="unilm")
KINDS = {"pretraining": PRETRAINING}

_ALWAYS = "every layer of WavLMModel has gated relative positions"
# fmt: off
SETTINGS = Settings(
    same=SAME | {"num_buckets": "num_buckets", "max_distance": "max_bucket_distance"},
    choices=CHOICES,
    limits=(
        must_be("relative_position_embedding", True, _ALWAYS),
        must_be("gru_rel_pos",                 True, _ALWAYS),
        Limit("expand_attention_head_size",  lambda value: value in (None, -1, 0), "the heads of WavLMModel share the width"),
    ),
    read=READ | {"normalize"},
    training_only=TRAINING_ONLY | {"dropout_features"},
    defaults=DEFAULTS,
    counts=COUNTS | {"num_buckets", "max_distance"},
    flags=FLAGS,
    absent={**ABSENT, "num_buckets": 320, "max_bucket_distance": 800},
)
# fmt: on


def infer(shapes: Shapes) -> Layout[Positions]:
    """Read the geometry of a WavLM model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, when it is not such a model.
    """
    kind, prefix, encoder, head = infer_encoder(shapes, KINDS)
    buckets, heads = [*shapes.get("encoder.layers.0.self_attn.relative_attention_bias.weight", ()), 0, 0][:2]
    return Layout("wavlm", kind, prefix, encoder, head, Positions(heads, encoder.hidden // (heads or 1), buckets))


def table(layout: Layout[Positions], head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one WavLM model; see `convert.mapping.table`."""
    rules = encoder_rules(layout.encoder, layers=(*LAYERS, *GATED_POSITIONS))
    return assemble(layout, head, edits, rules, KINDS)


def _state(sources: Sources, layout: Layout[Positions]) -> Layout[Positions]:
    heads = sources.reader.get("encoder_attention_heads", int)
    own = Positions(heads, layout.encoder.hidden // (heads or 1), sources.reader.get("num_buckets", int))
    return replace(layout, own=own)


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"cfg": {key: value for key, value in settings["model"].items() if key != "_name"}}


def _damages(model: Converted) -> Damages:
    config = model.base.config
    gate = f"{model.prefix}encoder.layers.{config.num_hidden_layers // 2}.attention.gru_rel_pos_const"
    return encoder_damages(model, shaped=("rel_attn_embed.weight",)) | {
        "the gate of the positions lost": Change(gate, lambda value: value.zero_()),
        "half as far in the same buckets": Configure({"max_bucket_distance": config.max_bucket_distance // 2}),
    }


FAMILY = Family(
    name="wavlm",
    architectures={"wavlm": PRETRAINING},
    encoders=(("wavlm", "transformer"),),
    mark=MARK,
    infer=infer,
    table=table,
    describe=describe_encoder,
    model_type="wavlm",
    classes={"encoder": "WavLMModel"},
    kinds=KINDS,
    settings=SETTINGS,
    pads=False,
    state=_state,
    from_config=lambda config: {},
    restoring=Restoring(settings=_settings, bare=True),
    trainer="microsoft/unilm",
    paper="2110.13900",
    splits_masks=True,
    damages=_damages,
    running=Running(attention="eager"),
)
