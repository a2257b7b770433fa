"""Options that several commands share; each is an argument of `convert.package.plan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from convert.families import HEADS

F = TypeVar("F", bound=Callable[..., Any])
# a path, a name of the catalogue, https://... or hf://USER/REPO/FILE.pt
source = click.argument("checkpoint", metavar="SOURCE")


def planning(function: F) -> F:
    """Add the options that decide what a conversion does."""
    options = [
        click.option(
            "--head",
            type=click.Choice(HEADS),
            help="Default: what the checkpoint is; `encoder` leaves its head out.",
        ),
        click.option("--dict", "dictionary", metavar="FILE", help="dict.*.txt, or the tokenizer's .model."),
        click.option(
            "--base",
            metavar="SOURCE",
            help="Pretrained checkpoint, or model.yaml, where the settings are only there.",
        ),
        click.option(
            "--arch",
            default="",
            metavar="NAME",
            help="Registered name of the architecture, where a checkpoint should have a model.yaml and has none.",
        ),
        click.option(
            "--normalize/--no-normalize",
            default=None,
            help="Whether waveforms were normalised, where a checkpoint should have a config.yaml and has none.",
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
