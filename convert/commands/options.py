"""Options that several commands share: those of `convert.package.plan`, and those of what runs fairseq."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from convert.families import HEADS

F = TypeVar("F", bound=Callable[..., Any])
# a path, a name of the catalogue, https://... or hf://USER/REPO/FILE.pt
source = click.argument("checkpoint", metavar="SOURCE")

fairseq_python = click.option(
    "--fairseq-python", metavar="PYTHON", help="Run fairseq in this interpreter, which has torch and fairseq."
)
audio = click.option(
    "--audio",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Your recordings too: a wav or flac file, or a folder; may be repeated.",
)
long = click.option(
    "--long/--no-long", default=True, show_default=True, help="Whether 30 seconds of speech are among the inputs."
)
_OPTIONS = {
    "head": click.option(
        "--head", type=click.Choice(HEADS), help="Default: what the checkpoint is; `encoder` leaves its head out."
    ),
    "dictionary": click.option(
        "--dict",
        "dictionary",
        metavar="FILE",
        help="dict.*.txt, or the sentencepiece model, of a checkpoint that holds none.",
    ),
    "base": click.option(
        "--base",
        metavar="SOURCE",
        help="A checkpoint or model.yaml with the settings, where SOURCE lacks them.",
    ),
    "arch": click.option(
        "--arch",
        default="",
        metavar="NAME",
        help="fairseq2's name of the architecture, for a checkpoint without its model.yaml.",
    ),
    "normalize": click.option(
        "--normalize/--no-normalize",
        default=None,
        help="Whether waveforms were normalised in training, where the settings do not say.",
    ),
    "post_process": click.option(
        "--post-process",
        metavar="NAME",
        help="How symbols become text, where the recipe is wrong: letter, sentencepiece, wordpiece, ...",
    ),
    "ema": click.option("--ema", is_flag=True, help="Take the moving average of the weights in place of the weights."),
    "training_only": click.option(
        "--training-only",
        multiple=True,
        metavar="SETTING",
        help="A setting unknown to this version that acts in training only. If it does not, the model is wrong.",
    ),
    "keep_final_proj": click.option(
        "--keep-final-proj",
        is_flag=True,
        help="Keep a pretraining head that transformers' class lacks, in final_proj.safetensors.",
    ),
    "language": click.option(
        "--lang", "language", metavar="LANG", help="Of several languages, the one to convert, or to translate into."
    ),
    "data_config": click.option(
        "--data-config",
        type=click.Path(path_type=Path),
        help="config.yaml of a speech-to-text model; its dictionary and sentencepiece model are next to it.",
    ),
}


def planning(*without: str, only: Collection[str] = tuple(_OPTIONS)) -> Callable[[F], F]:
    """Add the options that decide what a conversion does.

    Args:
        without: those that are left out.
        only: those that are added.
    """

    def add(function: F) -> F:
        for name in reversed([name for name in _OPTIONS if name in only and name not in without]):
            function = _OPTIONS[name](function)
        return function

    return add
