"""The conversion tables of data2vec audio 1.0 (`examples/data2vec` in fairseq, `Data2VecAudioModel`).

It is wav2vec 2.0 with a layer norm on every feature convolution, a projection at any width, and several positional
convolutions without weight norm, each followed by a norm that has no parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from convert.errors import PlanError, Problem
from convert.mapping import wav2vec2
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Drop, Edit, Rename, Table

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
DROPS = {
    "classification": wav2vec2.CLASSIFICATION_DROPS,
    "pretraining": (
        *(Drop(rule.source, _NO_CLASS, rule.shape, True) for rule in (*PRETRAINING_HEAD, *PRETRAINING_HEAD_OLD)),
        Drop(TEACHER, "the running mean of the encoder, which is the teacher in pretraining", optional=True),
    ),
}
HEADS = {"ctc": wav2vec2.CTC_HEAD}


@dataclass(frozen=True, slots=True)
class Layout(wav2vec2.Layout):
    """The geometry of a data2vec audio model: that of wav2vec 2.0, where `conv_pos` is the kernel of each of several.

    Args:
        depth: the number of positional convolutions.
    """

    depth: int


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one data2vec audio model; see `convert.mapping.table`."""
    rules = wav2vec2.encoder_rules(layout, POSITIONS)
    axes = wav2vec2.axes(layout) | {"depth": tuple(range(layout.depth))}
    dims = wav2vec2.dims(layout)
    return wav2vec2.assemble(layout, head, edits, encoder=rules, heads=HEADS, drops=DROPS, axes=axes, dims=dims)


def head_table(layout: Layout, source: Iterable[str]) -> Table:
    """Make the table of the file that keeps the pretraining head, as far as a checkpoint has it.

    Args:
        layout: the model's geometry.
        source: fairseq's keys.
    """
    there = set(source)
    rules = [rule for rule in (*PRETRAINING_HEAD, *PRETRAINING_HEAD_OLD) if rule.source in there]
    return Table.build("data2vec_audio pretraining head", rules, {}, wav2vec2.dims(layout))


def infer_layout(shapes: Shapes) -> Layout:
    """Read the geometry of a data2vec audio model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-source`, when it is no data2vec audio model.
    """
    first = wav2vec2.PREFIXES[wav2vec2.kind_of(shapes)] + "encoder.pos_conv.0.0.weight"
    if len(shapes.get(first, ())) != 3:
        problem = Problem("missing-source", first, f"3 axes expected, source {shapes.get(first, 'without it')}")
        raise PlanError("this is no data2vec audio state_dict", code="missing-source", problems=[problem])
    alike = {key.replace("encoder.pos_conv.0.0.", "encoder.pos_conv.0."): shape for key, shape in shapes.items()}
    found = re.compile(r"encoder\.pos_conv\.(\d{1,3})\.0\.weight$")
    depth = max(int(match[1]) for key in shapes if (match := found.search(key))) + 1
    return Layout(**asdict(wav2vec2.infer_layout(alike)) | {"family": "data2vec_audio", "depth": depth})


FAMILY = Family("data2vec_audio", r"encoder\.pos_conv\.1\.0\.weight$", infer_layout, table)
