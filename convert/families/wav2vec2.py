"""wav2vec 2.0 (`fairseq.models.wav2vec.wav2vec2`): the encoder that all share, and a pretraining head with a quantizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.families.base import NO_HEAD, Family, Kind, Part, Restoring, Shapes, Sources
from convert.families.classification import CLASSIFICATION
from convert.families.ctc import CTC
from convert.families.damages import Change, Converted, Damages, roll
from convert.families.encoder import Layout, assemble, encoder_rules, infer_encoder
from convert.families.encoder_settings import (
    ABSENT,
    CHOICES,
    COUNTS,
    DEFAULTS,
    FLAGS,
    READ,
    SAME,
    TRAINING_ONLY,
)
from convert.families.planning import describe_encoder
from convert.families.settings import Limit, Reader, Settings, Value, at_most_one, must_be, off, only
from convert.rules import Drop, Edit, Fill, Rename, Table, Zeros

# fmt: off
HEAD = (
    Rename("quantizer.vars",                                       "quantizer.codevectors",                                        "1 codes code_width"),
    Rename("quantizer.weight_proj.weight",                         "quantizer.weight_proj.weight",                                 "codes features"),
    Rename("quantizer.weight_proj.bias",                           "quantizer.weight_proj.bias",                                   "codes"),
    Rename("project_q.weight",                                     "project_q.weight",                                             "final codevector"),
    Rename("project_q.bias",                                       "project_q.bias",                                               "final"),
    Rename("final_proj.weight",                                    "project_hid.weight",                                           "final hidden"),
    Rename("final_proj.bias",                                      "project_hid.bias",                                             "final"),
)
DROPS = (
    Drop("quantizer.vars",                          NO_HEAD, optional=True),
    Drop("quantizer.weight_proj.{p}",               NO_HEAD, optional=True),
    Drop("quantizer.weight_proj.{depth}.{p}",       NO_HEAD, optional=True),  # quantizer_depth > 1: the last projection
    Drop("quantizer.weight_proj.{depth}.0.{p}",     NO_HEAD, optional=True),  # and the ones before it
    Drop("project_q.{p}",                           NO_HEAD, optional=True),
    Drop("final_proj.{p}",                          NO_HEAD, optional=True),
    Drop("target_glu.0.{p}",                        NO_HEAD, optional=True),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Quantizer(Part):
    """The geometry of the pretraining head.

    Args:
        codes: rows of the codebook: groups x variables.
        code_width: width of one code.
        codevector: width of a quantized vector.
        final: width of the contrastive space.
    """

    codes: int
    code_width: int
    codevector: int
    final: int

    @property
    def axes(self) -> Mapping[str, tuple[object, ...]]:
        """The values of the axis that the head's drops name."""
        return {"depth": tuple(range(8))}

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes that the head's rules name."""
        widths = {"code_width": self.code_width, "codevector": self.codevector, "final": self.final}
        return {"codes": self.codes, **widths}


def _measure(shapes: Shapes) -> Quantizer:
    _, codes, width = shapes.get("quantizer.vars", (0, 0, 0))
    codevector = shapes.get("project_q.weight", (0, 0))[1]
    return Quantizer(codes, width, codevector, shapes.get("final_proj.bias", (0,))[0])


def _state(sources: Sources, seen: Part) -> Quantizer:
    reader = sources.reader
    final = reader.get("final_dim", int, 0) or reader.get("encoder_embed_dim", int)
    codevector = reader.get("latent_dim", int, 0) or final
    count = reader.get("latent_groups", int, _DEFAULTS["latent_groups"]) or 1
    codes = reader.get("latent_vars", int, _DEFAULTS["latent_vars"]) * count
    return Quantizer(codes, codevector // count, codevector, final)


def _damages(model: Converted) -> Damages:
    if "quantizer.codevectors" not in model.weights:
        return {}
    return {
        "the codebook moved by one entry": Change("quantizer.codevectors", lambda value: roll(value, dims=1)),
        "a bias of project_hid changed": Change("project_hid.bias", lambda value: value.add_(1.0)),
    }


PRETRAINING = Kind(
    name="pretraining",
    rules=HEAD,
    drops=DROPS,
    mark=r"^quantizer\.vars$",
    ranks={"quantizer.vars": 3, "project_q.weight": 2, "final_proj.bias": 1},
    measure=_measure,
    state=_state,
    damages=_damages,
)
KINDS = {kind.name: kind for kind in (CTC, CLASSIFICATION, PRETRAINING)}

# fmt: off
QUANTIZER = {
    "dropout_features":        "feat_quantizer_dropout",
    "latent_vars":             "num_codevectors_per_group",
    "latent_groups":           "num_codevector_groups",
    "num_negatives":           "num_negatives",
    "logit_temp":              "contrastive_logits_temperature",
}
_DEFAULTS = {"dropout_features": 0.0, "latent_groups": 2, "latent_vars": 320, "logit_temp": 0.1, "num_negatives": 100}
LIMITS = (
    Limit("pos_conv_depth",       at_most_one, "Wav2Vec2Model has one positional convolution"),
    Limit("quantize_input",       off,         "Wav2Vec2Model does not quantize its input"),
    Limit("crop_seq_to_multiple", at_most_one, "Wav2Vec2Model does not crop frames"),
    Limit("conv_pos_batch_norm",  off,         "Wav2Vec2Model has weight norm on the positional convolution"),
    Limit("layer_type",           only("transformer"), "Wav2Vec2Model has transformer layers"),
    Limit("quantizer_depth",      at_most_one, "the quantizer of Wav2Vec2ForPreTraining is one projection", ("pretraining",)),
    Limit("target_glu",           off,         "Wav2Vec2ForPreTraining has no gated linear unit on its targets", ("pretraining",)),
    must_be("quantize_targets",   True,        "Wav2Vec2ForPreTraining always quantizes its targets; --head encoder leaves them out", "pretraining"),
)
# fmt: on
_UNUSED = "the pretraining that comes next learns it"
RESTORING = Restoring(
    made=(
        Fill("project_q.weight", Zeros(), _UNUSED, "final features"),
        Fill("project_q.bias", Zeros(), _UNUSED, "final"),
        Fill("final_proj.weight", Zeros(), _UNUSED, "final hidden"),
        Fill("final_proj.bias", Zeros(), _UNUSED, "final"),
    )
)
SETTINGS = Settings(
    same=SAME | QUANTIZER,
    choices=CHOICES,
    limits=LIMITS,
    read=READ | {"final_dim", "latent_dim", "quantize_targets"},
    training_only=TRAINING_ONLY,
    defaults=DEFAULTS | _DEFAULTS,
    counts=COUNTS | {"latent_groups", "latent_vars", "num_negatives"},
    flags=FLAGS,
    absent=ABSENT,
)


def quantizer_values(sources: Sources) -> list[Value]:
    """The widths of the quantizer, and what its loss weighs: wav2vec 2.0's pretraining head."""
    reader = sources.reader
    hidden, final = reader.get("encoder_embed_dim", int), reader.get("final_dim", int, 0)
    codevector = reader.get("latent_dim", int, 0) or final or hidden
    values = [
        Value("codevector_dim", codevector, f"{reader.origin('latent_dim')}, else final_dim, else encoder_embed_dim"),
        Value("proj_codevector_dim", final or hidden, f"{reader.origin('final_dim')}, else encoder_embed_dim"),
    ]
    weights = sources.criterion.get("loss_weights")
    if isinstance(weights, str):  # argparse kept the text of the list, until 2020
        weights = [part for part in weights.strip("[]() ").split(",") if part.strip()]
    if sources.kind.name == "pretraining" and isinstance(weights, list) and weights:
        first = Reader({"loss_weights": weights[0]}, {"loss_weights": "criterion"}, sources.problems)
        weight = first.get("loss_weights", float)
        values.append(Value("diversity_loss_weight", weight, "criterion.loss_weights[0]"))
    return values


def infer(shapes: Shapes) -> Layout[Part]:
    """Read the geometry of a wav2vec 2.0 model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, when it is not a wav2vec 2.0 model.

    Example:
        >>> infer({})
        Traceback (most recent call last):
        convert.errors.PlanError: this is not a wav2vec 2.0 state_dict: 4 tensors that every such model has are missing
    """
    return Layout("wav2vec2", *infer_encoder(shapes, KINDS), Part())


def table(layout: Layout[Part], head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one wav2vec 2.0 model.

    Args:
        layout: the model's geometry.
        head: `ctc` (target `Wav2Vec2ForCTC`), `classification` (`Wav2Vec2ForSequenceClassification`), `pretraining`
            (`Wav2Vec2ForPreTraining`) or `encoder` (`Wav2Vec2Model`); by default what the checkpoint is.
        edits: changes of single rows, see `Edit`.

    Raises:
        PlanError: `no-head`, when the checkpoint does not have the head that was asked for.

    Example:
        >>> from convert.mapping import infer_layout, table
        >>> # table(infer_layout(shapes)).rename_key("w2v_encoder.proj.bias") gives "lm_head.bias"
    """
    return assemble(layout, head, edits, encoder_rules(layout.encoder), KINDS)


def from_config(config: Reader) -> dict[str, Any]:
    """What `quantizer_values` reads of the settings, of config.json."""
    return {
        "final_dim": config.count("proj_codevector_dim", SETTINGS.absent["proj_codevector_dim"]),
        "latent_dim": config.count("codevector_dim", SETTINGS.absent["codevector_dim"]),
    }


_NO_CODE = "neither fairseq nor s3prl holds its model's code, so that nothing could prove a conversion"
FAMILY = Family(
    name="wav2vec2",
    architectures={"wav2vec_classification": CLASSIFICATION, "wav2vec_ctc": CTC, "wav2vec2": PRETRAINING},
    encoders=(("wav2vec2", "transformer"),),
    refused={"unispeech": _NO_CODE, "unispeech_sat": _NO_CODE},
    mark=r"feature_extractor\.conv_layers\.",
    general=True,
    infer=infer,
    table=table,
    describe=describe_encoder,
    model_type="wav2vec2",
    classes={
        "ctc": "Wav2Vec2ForCTC",
        "classification": "Wav2Vec2ForSequenceClassification",
        "pretraining": "Wav2Vec2ForPreTraining",
        "encoder": "Wav2Vec2Model",
    },
    kinds=KINDS,
    settings=SETTINGS,
    values=quantizer_values,
    from_config=from_config,
    restoring=RESTORING,
    paper="2006.11477",
)
