"""HuBERT (`fairseq.models.hubert`): wav2vec 2.0's encoder, another pretraining head, and sometimes batch norm on the positions.

Settings: `fairseq.models.hubert.hubert.HubertConfig`, `hubert_asr.HubertCtcConfig` and `transformers.HubertConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from convert.families.base import KEPT_HEAD, Family, Kind, Part, Restoring, Shapes, Sidecar, Sources
from convert.families.classification import CLASSIFICATION
from convert.families.ctc import CTC as WAV2VEC_CTC
from convert.families.ctc import from_config
from convert.families.damages import Change, Converted, Damages, encoder_damages, ones
from convert.families.encoder import Layout, assemble, encoder_rules, infer_encoder, kind_of
from convert.families.encoder_settings import ABSENT, CHOICES, COUNTS, DEFAULTS, FLAGS, READ, SAME, TRAINING_ONLY
from convert.families.planning import describe_encoder, kept_head
from convert.families.settings import Limit, Settings, Value, at_most_one, only
from convert.rules import Drop, Edit, Fill, Rename, Table, Zeros

# fmt: off
POSITIONS_BATCH_NORM = (  # conv_pos_batch_norm: a norm before the convolution, which has no weight norm then
    Rename("encoder.pos_conv.0.{p}",                               "encoder.pos_conv_embed.batch_norm.{p}",                        "hidden"),
    Rename("encoder.pos_conv.0.running_{statistic}",               "encoder.pos_conv_embed.batch_norm.running_{statistic}",        "hidden"),
    Rename("encoder.pos_conv.0.num_batches_tracked",               "encoder.pos_conv_embed.batch_norm.num_batches_tracked",        "", "I64"),
    Rename("encoder.pos_conv.1.bias",                              "encoder.pos_conv_embed.conv.bias",                             "hidden"),
    Rename("encoder.pos_conv.1.weight",                            "encoder.pos_conv_embed.conv.weight",                           "hidden pos_group conv_pos"),
)
PRETRAINING_HEAD = (  # no class of transformers has it; a file beside the model keeps it under fairseq's names
    Rename("final_proj.weight",                                    "final_proj.weight",                                            "final hidden"),
    Rename("final_proj.bias",                                      "final_proj.bias",                                              "final"),
    Rename("label_embs_concat",                                    "label_embs_concat",                                            "clusters label"),
    Rename("target_glu.0.weight",                                  "target_glu.0.weight",                                          "2label label"),
    Rename("target_glu.0.bias",                                    "target_glu.0.bias",                                            "2label"),
)
_SPEAKER = "depends on the speaker, in ContentVec's pretraining only; the features come from the layers before it"
SPEAKER_LAYERS = (  # of ContentVec: layers behind the others, whose norms are made of an embedding of the speaker
    Drop("encoder.layers.{speaker}.self_attn.{qkvo}_proj.{p}",              _SPEAKER, optional=True, relic=True),
    Drop("encoder.layers.{speaker}.self_attn_layer_norm.{part}_ln.weight",  _SPEAKER, optional=True, relic=True),
    Drop("encoder.layers.{speaker}.fc1.{p}",                                _SPEAKER, optional=True, relic=True),
    Drop("encoder.layers.{speaker}.fc2.{p}",                                _SPEAKER, optional=True, relic=True),
    Drop("encoder.layers.{speaker}.final_layer_norm.{part}_ln.weight",      _SPEAKER, optional=True, relic=True),
    Drop("encoder.cond_layer_norm.{part}_ln.weight",                        _SPEAKER, optional=True, relic=True),
    Drop("layer_proj.{p}",                                                  _SPEAKER, optional=True, relic=True),
)
# fmt: on
_NO_CLASS = (
    "only the loss of HuBERT's pretraining uses it, which transformers has no class for; --keep-final-proj keeps it"
)
DROPS = tuple(Drop(rule.source, _NO_CLASS, rule.shape, optional=True) for rule in PRETRAINING_HEAD)


@dataclass(frozen=True, slots=True)
class Own(Part):
    """What only HuBERT has.

    Args:
        batch_norm: whether the positional convolution has batch norm instead of weight norm.
        clusters, label: the rows of `label_embs_concat`, and its width: `final_dim`.
        final: the rows of `final_proj`: `label`, or with `untie_final_proj` as many for each dictionary.
        speaker: the indices of ContentVec's layers that depend on the speaker.
    """

    batch_norm: bool
    clusters: int
    label: int
    final: int
    speaker: tuple[int, ...] = ()

    @property
    def axes(self) -> Mapping[str, tuple[object, ...]]:
        """The values of the axes that the batch norm's rules name, and ContentVec's."""
        return {"statistic": ("mean", "var"), "speaker": self.speaker, "part": ("weight", "bias")}

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes that the pretraining head's rules name."""
        labels = {"clusters": self.clusters, "label": self.label, "2label": 2 * self.label}
        return {**labels, "final": self.final}


# its drops are among the encoder's: a fine-tuned model may have relics of that head, too
PRETRAINING = Kind("pretraining", mark=r"^label_embs_concat$", task="hubert_pretraining", label_list=True)
CTC = replace(
    WAV2VEC_CTC,
    read=WAV2VEC_CTC.read - {"blank_mode", "blank_weight"},  # HubertCtc.get_logits does not know them
    edits=lambda sources: [],
    task=PRETRAINING.task,
    label_list=True,
    from_config=lambda config: from_config(config) | {"task": {"fine_tuning": True, "labels": ["ltr"]}},
)
# `Wav2VecEncoder.forward` takes a dict, and `HubertModel.extract_features` gives a tuple: no way back to such a classifier
_CLASSIFIER = replace(CLASSIFICATION, from_config=None)
KINDS = {kind.name: kind for kind in (CTC, _CLASSIFIER, PRETRAINING)}

# The pretraining head's, or `dropout_features`, which acts before what nothing reads; those of ContentVec's pretraining,
# which its author leaves in files that are plain HuBERT
_TRAINING_ONLY = {"dropout_features", "label_rate", "logit_temp", "skip_masked", "skip_nomask", "target_glu"}
_TRAINING_ONLY |= {"ctr_layers", "encoder_layers_1", "logit_temp_ctr", "num_negatives"}
# fmt: off
SETTINGS = Settings(
    same=SAME | {"conv_pos_batch_norm": "conv_pos_batch_norm"},
    choices=CHOICES,
    limits=(
        Limit("layer_type",     only("transformer"), "HubertModel has transformer layers; Wav2Vec2Conformer leaves out the positional convolution, which HuBERT's conformer has"),
        Limit("pos_conv_depth", at_most_one,         "HubertModel has one positional convolution"),
        Limit("crop_seq_to_multiple", at_most_one,   "HubertModel does not crop frames"),
    ),
    read=READ | {"final_dim", "untie_final_proj"},
    training_only=TRAINING_ONLY | _TRAINING_ONLY,
    defaults=DEFAULTS | {"conv_pos_batch_norm": False},
    counts=COUNTS,
    flags=FLAGS | {"conv_pos_batch_norm"},
    absent={**ABSENT, "conv_pos_batch_norm": False, "feat_proj_layer_norm": True},
)
# fmt: on


def infer(shapes: Shapes) -> Layout[Own]:
    """Read the geometry of a HuBERT model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, when it is not such a model.
    """
    prefix = kind_of(shapes)[1]
    norm, convolution = f"{prefix}encoder.pos_conv.0.", f"{prefix}encoder.pos_conv.1."
    batch_norm = f"{convolution}weight" in shapes
    alike = dict(shapes)
    if batch_norm:
        alike = {key: shape for key, shape in shapes.items() if not key.startswith(norm)}
        alike[f"{norm}weight"] = alike.pop(f"{convolution}weight")
    speaker = _speaker_layers(shapes)
    behind = tuple(f"encoder.layers.{layer}." for layer in speaker)
    alike = {key: shape for key, shape in alike.items() if not key.startswith(behind)} if behind else alike
    clusters, label = [*shapes.get(f"{prefix}label_embs_concat", ()), 0, 0][:2]
    final = [*shapes.get(f"{prefix}final_proj.bias", ()), 0][0]
    return Layout("hubert", *infer_encoder(alike, KINDS), Own(batch_norm, clusters, label, final, speaker))


def _speaker_layers(names: Iterable[str]) -> tuple[int, ...]:
    pattern = re.compile(r"encoder\.layers\.(\d{1,3})\.self_attn_layer_norm\.weight_ln\.weight")
    return tuple(sorted(int(found[1]) for key in names if (found := pattern.fullmatch(key))))


def table(layout: Layout[Own], head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one HuBERT model; see `convert.mapping.table`."""
    positions = POSITIONS_BATCH_NORM if layout.own.batch_norm else None
    rules = [*encoder_rules(layout.encoder, positions), *DROPS, *(SPEAKER_LAYERS if layout.own.speaker else ())]
    return assemble(layout, head, edits, rules, KINDS)


def _head_table(layout: Layout[Own], source: Iterable[str]) -> Table:
    """Make the table of the file that keeps the pretraining head, as far as a checkpoint has it."""
    prefix, there = layout.prefix, set(source)
    rules = [replace(rule, source=prefix + rule.source) for rule in PRETRAINING_HEAD if prefix + rule.source in there]
    return Table.build("hubert pretraining head", rules, {}, layout.dims)


def _state(sources: Sources, layout: Layout[Own]) -> Layout[Own]:
    """State what HuBERT alone has; how many clusters and dictionaries there were, only its pretraining head tells."""
    reader = sources.reader
    seen = layout.own if isinstance(layout.own, Own) else Own(False, 0, 0, 0)  # of config.json alone
    label = reader.get("final_dim", int, 0)
    label = label if label > 0 else layout.encoder.hidden
    separate = reader.get("untie_final_proj", bool, False)
    own = Own(
        batch_norm=reader.get("conv_pos_batch_norm", bool, False),
        clusters=seen.clusters,
        label=label,
        final=label * max(1, seen.final // label) if separate else label,
        speaker=tuple(range(layout.encoder.layers, layout.encoder.layers + len(seen.speaker))),
    )
    return replace(layout, own=own)


def _values(sources: Sources) -> list[Value]:
    """What only HuBERT's configuration has."""
    made = [Value("feat_proj_layer_norm", True, "HubertModel always has layer_norm")]
    rows = sources.checkpoint.inventory.get("final_proj.bias")
    if (
        sources.request.keep_final_proj and rows and rows.shape
    ):  # what people's own classes build their `final_proj` with
        made.append(Value("classifier_proj_size", rows.shape[0], f"the rows of final_proj in {KEPT_HEAD}"))
    return made


def _contentvec(sources: Sources) -> list[Value]:
    """ContentVec without the layers of the speaker is HuBERT; with it, there is no class."""
    reader, count = sources.reader, len(_speaker_layers(sources.checkpoint.tensors))
    if sources.request.head != "encoder":
        detail = "transformers has no class for the layers that depend on the speaker; --head encoder leaves them out, as its "
        sources.refuse("unsupported-setting", "encoder_layers_1", detail + "author's own `legacy` files do")
    if reader.get("encoder_layers_1", int, 3) != count and count:  # in some files they were removed
        detail = f"is {reader.values.get('encoder_layers_1')}, and {count} of the layers have norms that depend on the speaker"
        sources.refuse("conflict", "encoder_layers_1", detail)
    if reader.values.get("layer_norm_first"):
        detail = "is True: ContentVec has its last norm behind the layers that depend on the speaker, HubertModel before them"
        sources.refuse("unsupported-setting", "layer_norm_first", detail)
    return []


CONTENTVEC = replace(PRETRAINING, mark=r"^layer_proj\.", values=_contentvec, restored="hubert")


def _sidecars(sources: Sources) -> list[Sidecar]:
    return kept_head(sources, _head_table)


def _damages(model: Converted) -> Damages:
    made = encoder_damages(model)
    variance = f"{model.prefix}encoder.pos_conv_embed.batch_norm.running_var"
    if variance in model.weights:
        made["running_var of the positional convolution lost"] = Change(variance, ones)
    return made


FAMILY = Family(
    name="hubert",
    architectures={"hubert_ctc": CTC, "contentvec": CONTENTVEC, "hubert": PRETRAINING},
    encoders=(("hubert", "transformer"), ("contentvec", "transformer")),
    refused={
        "av_hubert": "AV-HuBERT, which sees video too, and for which transformers has no class",
        "multires_hubert": "HuBERT at several frame rates, for which transformers has no class",
        "multires_hubert_ctc": "HuBERT at several frame rates, for which transformers has no class",
    },
    mark=r"^(w2v_encoder\.w2v_model\.)?label_embs_concat$",
    infer=infer,
    table=table,
    describe=describe_encoder,
    model_type="hubert",
    classes={
        "ctc": "HubertForCTC",
        "classification": "HubertForSequenceClassification",
        "encoder": "HubertModel",
    },
    kinds=KINDS,
    settings=SETTINGS,
    state=_state,
    values=_values,
    sidecars=_sidecars,
    paper="2106.07447",
    splits_masks=True,
    damages=_damages,
    from_config=lambda config: {"label_rate": -1.0},  # no labels
    restoring=Restoring(
        made=tuple(
            Fill(rule.source, Zeros(), "the pretraining that comes next learns it", rule.shape)
            for rule in PRETRAINING_HEAD[:2]
        )
    ),
)
