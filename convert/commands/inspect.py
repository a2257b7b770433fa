"""`fairseq-to-hf inspect`."""

from __future__ import annotations

from typing import Any

import click

from convert.cli import Outcome
from convert.cli import command as make
from convert.commands.options import planning, source
from convert.errors import Problem
from convert.inspection import inspect
from convert.report import fold, problem_lines, size

_SHAPE = {"encoder_layers": "layers", "encoder_embed_dim": "wide", "encoder_attention_heads": "heads"}
_SHAPE |= {"num_encoder_layers": "layers", "model_dim": "wide", "num_encoder_attn_heads": "heads"}
_NEVER = ("unsupported-architecture", "unsupported-setting")  # what no option helps


@make(
    "inspect",
    "fairseq-to-hf inspect checkpoint_best.pt",
    "fairseq-to-hf inspect -v checkpoint_best.pt",
    "fairseq-to-hf inspect model_state.pt --base wav2vec_small.pt",
    "fairseq-to-hf inspect --json checkpoint_best.pt",
)
@source
@planning()
def command(checkpoint: str, **asked: Any) -> Outcome:
    """Say what a file is, what it holds, and whether it can be converted; if not, why, and which option helps.

    Reads no tensors and executes nothing in the file. Names the architecture, its size, the task, the dictionary, what
    else the file holds, and with -v every tensor and every global of the pickle.
    """
    data = inspect(checkpoint, **asked)
    return Outcome(True, _text(data), data)


def _text(data: dict[str, Any]) -> list[str]:
    settings = data["settings"]
    packed = ", compressed" if data["file"]["compressed"] else ""
    rows = {
        "file": f"{data['file']['name']}, {size(data['file']['size'])}, {data['file']['container']} container{packed}"
    }
    if data["writer"]:
        rows["written by"] = data["writer"]
    if data["prefix"] or data["where"] != "model":
        rows["model"] = " ".join(
            part
            for part in (
                f"under `{data['prefix']}`" if data["prefix"] else "",
                f"in `{data['where']}`" if data["where"] else "at the top of the file",
                f"(beside it: {len(data['outside'])} of another model)" if data["outside"] else "",
            )
            if part
        )
    rows["settings"] = f"{data['layout']} layout" if settings else "none in the file"
    if settings:
        inner = settings["model"].get("w2v_args")
        model = (inner if isinstance(inner, dict) else settings)["model"]
        shape = [f"{model[key]} {word}" for key, word in _SHAPE.items() if key in model]
        rows["architecture"] = str(data["architecture"]) + (f" ({', '.join(shape)})" if shape else "")
        rows["task"] = str(data["task"])
        rows["normalize"] = str(settings["task"].get("normalize"))
    rows["parameters"] = f"{data['parameters']:,} in {len(data['tensors'])} tensors, {', '.join(data['dtypes'])}"
    rows["dictionary"] = _dictionary(data)
    beside = ", ".join(f"{key} {size(count)}" for key, count in data["training_state"].items())
    rows["beside it"] = beside or "nothing"
    if data["averages"]:
        rows["averages"] = f"of the weights, in {' and '.join(data['averages'])}: --ema takes them"
    unknown = [row["name"] for row in data["globals"] if not row["known_harmless"]]
    verdict = f"unknown: {', '.join(unknown)}" if unknown else "all known to be harmless"
    rows["globals"] = f"{len(data['globals'])}, {verdict}"
    if data["languages"]:
        rows["languages"] = f"{len(data['languages'])}: {' '.join(data['languages'])}"
    context = click.get_current_context(silent=True)
    lines = [f"{key:<13} {value}" for key, value in rows.items()]
    first, *more = _conversion(data["conversion"])
    lines += [f"{'conversion':<13} {first}", *more]
    if context is not None and context.obj and context.obj.verbose:
        tensors = [f"  {line}" for line in fold(data["tensors"])]
        lines += ["", "tensors", *tensors, "", "globals", *(f"  {row['name']}" for row in data["globals"])]
    return lines


def _dictionary(data: dict[str, Any]) -> str:
    symbols = data["dictionary"]
    if symbols:
        return f"{len(symbols)} symbols: {' '.join(symbols[:12])}{' ...' if len(symbols) > 12 else ''}"
    listed = " and ".join(f"{len(one)} symbols of the pretraining" for one in data["pretraining_dictionaries"])
    return listed or "none in the file"


def _conversion(answer: dict[str, Any]) -> list[str]:
    if answer["ok"]:
        return [f"to {answer['class']}", *(f"  note: {note}" for note in answer["notes"])]
    message = answer["message"].removesuffix("; nothing was written")
    problems = [Problem(**row) for row in answer["problems"]]
    never = any(problem.code in _NEVER for problem in problems)
    lines = [f"{'not supported' if never else 'not as it is'}: {message}"]
    if [problem.detail for problem in problems] != [answer["message"]]:
        lines += [f"  {line}" for line in problem_lines(problems)]
    return [*lines, *([f"  hint: {answer['hint']}"] if answer["hint"] else [])]
