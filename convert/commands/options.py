"""Options that several commands share; each is an argument of `convert.package.plan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
# a path, a name of the catalogue, https://... or hf://USER/REPO/FILE.pt
source = click.argument("checkpoint", metavar="SOURCE")


def planning(function: F) -> F:
    """Add the options that decide what a conversion does."""
    options = [
        click.option(
            "--head",
            type=click.Choice(["ctc", "pretraining", "classification", "seq2seq", "encoder"]),
            help="Default: what the checkpoint is; `encoder` leaves its head out.",
        ),
        click.option("--dict", "dictionary", metavar="FILE", help="dict.*.txt, or fairseq2's tokenizer .model."),
        click.option(
            "--base",
            metavar="SOURCE",
            help="Pretrained checkpoint (of fairseq2: model.yaml), where the settings are only there.",
        ),
        click.option(
            "--arch",
            default="",
            metavar="NAME",
            help="fairseq2's name of the architecture, where no model.yaml is beside.",
        ),
        click.option(
            "--normalize/--no-normalize",
            default=None,
            help="Whether waveforms were normalised, where the settings do not say it.",
        ),
        click.option(
            "--post-process",
            metavar="NAME",
            help="How text is made of the symbols, where the recipe is wrong: letter, sentencepiece, wordpiece, ...",
        ),
        click.option("--ema", is_flag=True, help="Take the moving average of the weights that stands beside them."),
        click.option(
            "--training-only",
            multiple=True,
            metavar="SETTING",
            help="A setting unknown to this version that acts while training only. If it does not, the model is wrong.",
        ),
        click.option(
            "--keep-final-proj",
            is_flag=True,
            help="Keep a pretraining head that the class has no place for, in final_proj.safetensors.",
        ),
        click.option(
            "--lang",
            "language",
            metavar="LANG",
            help="The one language to take of an MMS checkpoint, or to translate into.",
        ),
        click.option(
            "--data-config",
            type=click.Path(path_type=Path),
            help="config.yaml of a speech-to-text model, its dictionary and sentencepiece model beside it.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function
