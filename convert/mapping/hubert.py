"""The conversion tables of HuBERT (`fairseq.models.hubert.HubertModel`, `HubertCtc`), one line a tensor.

It is wav2vec 2.0 with another pretraining head, and sometimes with batch norm on the positional convolution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from convert.mapping import wav2vec2
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Drop, Edit, Rename, Table

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
# fmt: on
_NO_CLASS = (
    "only the loss of HuBERT's pretraining uses it, which transformers has no class for; --keep-final-proj keeps it"
)
DROPS = tuple(Drop(rule.source, _NO_CLASS, rule.shape, optional=True) for rule in PRETRAINING_HEAD)
HEADS = {"ctc": wav2vec2.CTC_HEAD}


@dataclass(frozen=True, slots=True)
class Layout(wav2vec2.Layout):
    """The geometry of a HuBERT model: that of wav2vec 2.0 without its quantizer.

    Args:
        batch_norm: whether the positional convolution has batch norm instead of weight norm.
        clusters, label: the rows of `label_embs_concat`, and its width: `final_dim`. The rows of `final_proj`, `final`,
            are as many, or with `untie_final_proj` as many for each dictionary.
    """

    batch_norm: bool
    clusters: int
    label: int


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one HuBERT model; see `convert.mapping.table`."""
    positions = POSITIONS_BATCH_NORM if layout.batch_norm else None
    rules = [*wav2vec2.encoder_rules(layout, positions), *DROPS]
    nothing = {"pretraining": ()}  # the drops are among the rules: a fine-tuned model may have relics of that head, too
    return wav2vec2.assemble(
        layout, head, edits, encoder=rules, heads=HEADS, drops=nothing, axes=_axes(layout), dims=_dims(layout)
    )


def head_table(layout: Layout, source: Iterable[str]) -> Table:
    """Make the table of the file that keeps the pretraining head, as far as a checkpoint has it.

    Args:
        layout: the model's geometry.
        source: fairseq's keys.
    """
    prefix, there = wav2vec2.PREFIXES[layout.kind], set(source)
    rules = [replace(rule, source=prefix + rule.source) for rule in PRETRAINING_HEAD if prefix + rule.source in there]
    return Table.build("hubert pretraining head", rules, {}, _dims(layout))


def infer_layout(shapes: Shapes) -> Layout:
    """Read the geometry of a HuBERT model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-source`, when it is no such model.
    """
    prefix = wav2vec2.PREFIXES[wav2vec2.kind_of(shapes)]
    norm, convolution = f"{prefix}encoder.pos_conv.0.", f"{prefix}encoder.pos_conv.1."
    batch_norm = f"{convolution}weight" in shapes
    alike = dict(shapes)
    if batch_norm:
        alike = {key: shape for key, shape in shapes.items() if not key.startswith(norm)}
        alike[f"{norm}weight"] = alike.pop(f"{convolution}weight")
    seen = asdict(wav2vec2.infer_layout(alike))
    clusters, label = [*shapes.get(f"{prefix}label_embs_concat", ()), 0, 0][:2]
    return Layout(**seen | {"family": "hubert", "batch_norm": batch_norm, "clusters": clusters, "label": label})


def _axes(layout: Layout) -> dict[str, tuple[object, ...]]:
    return wav2vec2.axes(layout) | {"statistic": ("mean", "var")}


def _dims(layout: Layout) -> dict[str, int]:
    return wav2vec2.dims(layout) | {"clusters": layout.clusters, "label": layout.label, "2label": 2 * layout.label}


FAMILY = Family("hubert", r"(^|\.)label_embs_concat$", infer_layout, table)
