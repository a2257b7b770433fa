"""data2vec audio 1.0 (`examples/data2vec` in fairseq): wav2vec 2.0's encoder with several positional convolutions.

It has a layer norm on every feature convolution, a projection at any width, and after each positional convolution, which
has no weight norm, a norm without parameters. Settings: `examples/data2vec/models/data2vec_audio.py` and
`transformers.Data2VecAudioConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.errors import PlanError, Problem
from convert.families.base import Family, Kind, Part, Restoring, Shapes, Sidecar, Sources
from convert.families.classification import CLASSIFICATION
from convert.families.ctc import CTC
from convert.families.damages import Converted, Damages, encoder_damages, pair
from convert.families.encoder import Layout, assemble, encoder_rules, infer_encoder, kind_of
from convert.families.encoder_settings import ABSENT, CHOICES, COUNTS, DEFAULTS, FLAGS, READ, SAME, TRAINING_ONLY
from convert.families.planning import describe_encoder, kept_head
from convert.families.settings import Limit, Reader, Settings, Value, must_be, only
from convert.rules import Drop, Edit, Fill, Rename, Table, Zeros

# fmt: off
POSITIONS = (
    Rename("encoder.pos_conv.{depth}.0.weight",                    "encoder.pos_conv_embed.layers.{depth}.conv.weight",            "hidden pos_group conv_pos"),
    Rename("encoder.pos_conv.{depth}.0.bias",                      "encoder.pos_conv_embed.layers.{depth}.conv.bias",              "hidden"),
)
PRETRAINING_HEAD = (  # no class of transformers has it; a file beside the model keeps it under the names of fairseq's released code
    Rename("final_proj.weight",                                    "final_proj.weight",                                            "hidden hidden"),
    Rename("final_proj.bias",                                      "final_proj.bias",                                              "hidden"),
)
PRETRAINING_HEAD_OLD = (  # in the released files it is a Sequential of one
    Rename("final_proj.0.weight",                                  "final_proj.weight",                                            "hidden hidden"),
    Rename("final_proj.0.bias",                                    "final_proj.bias",                                              "hidden"),
)
# fmt: on
_NO_CLASS = "predicts the teacher in pretraining, and transformers has no class for that"
TEACHER = "_ema"  # a dict of tensors among the tensors
PRETRAINING = Kind(
    name="pretraining",
    drops=(
        *(Drop(rule.source, _NO_CLASS, rule.shape, True) for rule in (*PRETRAINING_HEAD, *PRETRAINING_HEAD_OLD)),
        Drop(TEACHER, "the running mean of the encoder, which is the teacher in pretraining", optional=True),
    ),
)
KINDS = {kind.name: kind for kind in (CTC, CLASSIFICATION, PRETRAINING)}


@dataclass(frozen=True, slots=True)
class Positions(Part):
    """What only data2vec audio has; the encoder's `conv_pos` is the kernel of each.

    Args:
        depth: the number of positional convolutions.
    """

    depth: int

    @property
    def axes(self) -> Mapping[str, tuple[object, ...]]:
        """The values of the axis that the positions' rules name."""
        return {"depth": tuple(range(self.depth))}


# What acts while training only, or is never read by `Data2VecAudioModel`
_TRAINING_ONLY = {
    *("average_top_k_layers", "batch_norm_target_layer", "ema_anneal_end_step", "ema_decay", "ema_end_decay"),
    *("ema_layers_only", "ema_transformer_only", "group_norm_target_layer", "instance_norm_target_layer"),
    *("instance_norm_targets", "layer_norm_target_layer", "layer_norm_targets", "loss_beta", "loss_scale"),
    *("max_update", "min_pred_var", "min_target_var"),
    *("crop_seq_to_multiple", "dropout_features", "final_dim", "latent_dim", "latent_groups", "latent_vars"),
    *("logit_temp", "num_negatives", "quantize_input", "quantize_targets", "quantizer_depth", "target_glu"),
    *("diversity_weight",),  # of the released files, as is the next
    *("conv_feature_no_norm_on_1d",),  # a norm that it left out would be a missing tensor
}
# fmt: off
SETTINGS = Settings(
    same={name: field for name, field in SAME.items() if name not in ("conv_pos", "layer_norm_first")},
    choices={"activation_fn": CHOICES["activation_fn"]},
    limits=(
        must_be("extractor_mode",   "layer_norm", "Data2VecAudioModel has a layer norm on every feature convolution"),
        must_be("layer_norm_first", False,        "Data2VecAudioModel has its layer norms after each block"),
        Limit("pos_conv_depth",   lambda value: isinstance(value, int) and value > 1,
              "Data2VecAudioModel has norms after its positional convolutions, and fairseq has them from two on",              required=True),
        Limit("layer_type",       only("transformer"),                 "Data2VecAudioModel has transformer layers"),
    ),
    read=READ | {"conv_pos"},
    training_only=TRAINING_ONLY | _TRAINING_ONLY,
    defaults=DEFAULTS,
    counts=COUNTS,
    flags=FLAGS,
    min_masks=1,
    absent={**ABSENT, "num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19},
)
# fmt: on


def infer(shapes: Shapes) -> Layout[Positions]:
    """Read the geometry of a data2vec audio model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, when it is not a data2vec audio model.
    """
    first = kind_of(shapes)[1] + "encoder.pos_conv.0.0.weight"
    if len(shapes.get(first, ())) != 3:
        problem = Problem("missing-tensor", first, f"3 axes expected, source {shapes.get(first, 'without it')}")
        raise PlanError("this is not a data2vec audio state_dict", code="missing-tensor", problems=[problem])
    alike = {key.replace("encoder.pos_conv.0.0.", "encoder.pos_conv.0."): shape for key, shape in shapes.items()}
    found = re.compile(r"encoder\.pos_conv\.(\d{1,3})\.0\.weight$")
    depth = max(int(match[1]) for key in shapes if (match := found.search(key))) + 1
    return Layout("data2vec_audio", *infer_encoder(alike, KINDS), Positions(depth))


def table(layout: Layout[Positions], head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one data2vec audio model; see `convert.mapping.table`."""
    return assemble(layout, head, edits, encoder_rules(layout.encoder, POSITIONS), KINDS)


def _head_table(layout: Layout[Positions], source: Iterable[str]) -> Table:
    """Make the table of the file that keeps the pretraining head, as far as a checkpoint has it."""
    there = set(source)
    rules = [rule for rule in (*PRETRAINING_HEAD, *PRETRAINING_HEAD_OLD) if rule.source in there]
    return Table.build("data2vec_audio pretraining head", rules, {}, layout.dims)


def _state(sources: Sources, layout: Layout[Positions]) -> Layout[Positions] | None:
    depth, kernel = _positions(sources)
    if depth > len(sources.checkpoint.tensors):  # or the table would be as long as it says
        detail = f"{depth} convolutions of a checkpoint with {len(sources.checkpoint.tensors)} tensors"
        sources.refuse("bad-setting", "pos_conv_depth", detail)
        return None
    encoder = replace(layout.encoder, projection=True, weight_norm=False, conv_pos=kernel)
    return replace(layout, encoder=encoder, own=Positions(depth))


def _values(sources: Sources) -> list[Value]:
    """What only data2vec audio's configuration has: its positional convolutions."""
    depth, kernel = _positions(sources)
    origin = sources.reader.origin
    return [
        Value("num_conv_pos_embeddings", depth, origin("pos_conv_depth")),
        Value("conv_pos_kernel_size", kernel, f"{origin('conv_pos')} // pos_conv_depth, and 3 at least"),
    ]


def _positions(sources: Sources) -> tuple[int, int]:
    """`TransformerEncoder.__init__`: the number of positional convolutions, and the kernel of each."""
    depth = sources.reader.get("pos_conv_depth", int, 1)
    return depth, max(3, sources.reader.count("conv_pos") // max(1, depth))


def _from_config(config: Reader) -> dict[str, Any]:
    depth, kernel = (
        config.count(name, SETTINGS.absent[name]) for name in ("num_conv_pos_embeddings", "conv_pos_kernel_size")
    )
    if depth == 1:
        detail = "is 1: fairseq has norms after its positional convolutions from two on, Data2VecAudioModel always"
        config.problems.append(Problem("unsupported-setting", "num_conv_pos_embeddings", detail))
    # the dataclass takes the last two from the section of the optimizer, where it has one
    return {"pos_conv_depth": depth, "conv_pos": depth * kernel, "max_update": 0, "ema_anneal_end_step": 0}


def _taught(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, str]:
    """`Data2VecAudioModel.make_ema_teacher`: the teacher starts as the model itself."""
    whole = not settings.get("ema_transformer_only", True) and not settings.get("ema_layers_only", True)
    start = "" if whole else "encoder."
    return {name.removeprefix(start): name for name in names if name.startswith(start)}


def _sidecars(sources: Sources) -> list[Sidecar]:
    return kept_head(sources, _head_table)


def _damages(model: Converted) -> Damages:
    one, other = (f"{model.prefix}encoder.pos_conv_embed.layers.{index}.conv" for index in (0, 1))
    return encoder_damages(model) | {"two positional convolutions exchanged": pair(one, other)}


FAMILY = Family(
    name="data2vec_audio",
    architectures={"data2vec_audio": PRETRAINING},
    encoders=(("data2vec_audio", "transformer"),),
    refused={
        "audio_classification": "the classifier of examples/data2vec; of classifiers, wav2vec_classification is converted",
        "data2vec_multi": "data2vec 2.0, for which transformers has no class",
    },
    mark=r"^(w2v_encoder\.w2v_model\.)?encoder\.pos_conv\.1\.0\.weight$",
    infer=infer,
    table=table,
    describe=describe_encoder,
    model_type="data2vec-audio",
    classes={
        "ctc": "Data2VecAudioForCTC",
        "classification": "Data2VecAudioForSequenceClassification",
        "encoder": "Data2VecAudioModel",
    },
    kinds=KINDS,
    settings=SETTINGS,
    state=_state,
    values=_values,
    sidecars=_sidecars,
    from_config=_from_config,
    restoring=Restoring(
        made=tuple(
            Fill(rule.source, Zeros(), "the pretraining that comes next learns it", rule.shape)
            for rule in PRETRAINING_HEAD
        ),
        renamed={"final_proj.0.": "final_proj."},
        teacher=TEACHER,
        taught=_taught,
        notes=(f"{TEACHER}: the teacher of the pretraining starts anew, as the model itself",),
    ),
    paper="2202.03555",
    damages=_damages,
)
