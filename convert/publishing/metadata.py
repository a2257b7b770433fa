"""The card's metadata: what is known, merged into what people wrote."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from convert.errors import ConvertError, Problem
from convert.publishing.facts import Facts
from convert.publishing.frontmatter import Block

LISTS = ("language", "base_model", "tags", "datasets", "metrics")
NAMES = {"wer": "WER", "cer": "CER"}
UNVERIFIED = "unverified"
TASKS = {  # what a model gives -> the Hub's name of the task
    "ctc": "automatic-speech-recognition",
    "generation": "automatic-speech-recognition",
    "labels": "audio-classification",
    "hidden": "feature-extraction",
}


def wanted(facts: Facts) -> dict[str, Any]:
    """Return the metadata that follows from the facts; what is unknown is not there.

    Keys and forms: the Hub's model card specification. Error rates are percentages there, fractions in
    `evaluation.json`.
    """
    task = TASKS[facts.output]
    tags = ["audio", task] if facts.text else ["audio"]
    tags += ["speech", *([facts.model_type] if facts.model_type else []), "fairseq"]
    tags += ["hf-asr-leaderboard"] if facts.text else []
    tags += [] if facts.verified else [UNVERIFIED]
    values: dict[str, Any] = {
        "language": list(facts.language),
        "license": facts.license,
        "library_name": "transformers",
        "pipeline_tag": task,
        "base_model": facts.base_model,
        "tags": tags,
        "datasets": list(facts.datasets),
        "metrics": ["wer", "cer"] if facts.evaluation else None,
        "widget": [{"src": facts.sample, "example_title": "Sample"}] if facts.sample and facts.text else None,
        "model-index": _model_index(facts),
    }
    return {key: value for key, value in values.items() if value}


def merge(text: str, newline: str, facts: Facts) -> str:
    """Write what we know into a YAML block and leave every other byte as it is.

    Lists grow, results of the same evaluation are brought up to date, a person's own value of a single key stays;
    another license or base model than the known one is a conflict, unless the person who publishes stated it.

    Args:
        text: the block without its `---` lines, empty for a new card.
        newline: the card's line ending.
        facts: what is known.

    Raises:
        ConvertError: with status 1: a conflict, or a block that cannot be edited without harm.
    """
    block = Block(text, newline)
    expected = copy.deepcopy(block.value)
    problems = []
    for key, value in wanted(facts).items():
        known = expected.get(key)
        if key not in expected:
            block.add(key, value)
            expected[key] = value
        elif key in ("license", "base_model") and known != value and [known] != [value] and known != [value]:
            if key not in facts.stated:
                detail = f"the card says {known!r}, the source of the weights says {value!r}"
                problems.append(Problem("card-conflict", key, detail))
                continue
            block.replace(key, value)
            expected[key] = value
        elif key in LISTS and key != "base_model":
            items = known if isinstance(known, list) else [known] if known is not None else []
            missing = [item for item in value if item not in items]
            if missing:
                block.extend(key, missing)
                expected[key] = [*items, *missing]
        elif key == "model-index":
            expected[key] = _add_results(block, value[0]["results"])
    if facts.verified and UNVERIFIED in (expected.get("tags") or ()):
        block.remove("tags", UNVERIFIED)
        expected["tags"] = [tag for tag in expected["tags"] if tag != UNVERIFIED]
    if problems:
        message = "README.md disagrees with what is known about the weights; nothing was sent"
        hint = "correct the card, or say which is right with --license or --base-model"
        raise ConvertError(message, code="card-conflict", key="README.md", status=1, problems=problems, hint=hint)
    if block.value != expected:
        message = "README.md: its metadata cannot be edited without changing other lines; nothing was sent"
        hint = "write the block between the two --- lines more simply, and publish again"
        raise ConvertError(message, code="card", key="README.md", status=1, hint=hint)
    return block.text


def _model_index(facts: Facts) -> list[dict[str, Any]] | None:
    results = []
    for row in facts.evaluation:
        dataset = {key: value for key, value in asdict(row.dataset).items() if value}
        dataset.setdefault("name", dataset["type"])
        how = f"decoder: {row.decoder}, normalizer: {row.normalizer}"
        metrics = [
            {"type": kind, "value": round(100 * value, 4), "name": f"Test {NAMES.get(kind, kind)} ({how})"}
            for kind, value in sorted(row.metrics.items(), key=lambda pair: pair[0] != "wer")
        ]
        task = {"type": "automatic-speech-recognition", "name": "Automatic Speech Recognition"}
        results.append({"task": task, "dataset": dataset, "metrics": metrics})
    return [{"name": facts.repo_id.split("/")[-1], "results": results}] if results else None


def _add_results(block: Block, results: list[dict[str, Any]]) -> list[Any]:
    """Add our results to the card's first model; one that names the same evaluation is replaced."""
    index = copy.deepcopy(block.value["model-index"])
    try:
        present: list[Any] = index[0]["results"]
        known = [_identity(result) for result in present]
    except (TypeError, KeyError, IndexError):
        message = "README.md: its model-index has no list of results; nothing was sent"
        raise ConvertError(message, code="card", key="model-index", status=1, hint="correct it by hand") from None
    for result in results:
        if result in present:
            continue
        node = _results_node(block)
        place = known.index(_identity(result)) if _identity(result) in known else None
        if place is None:
            present.append(result)
            known.append(_identity(result))
        else:
            present[place] = result
        if node is None:
            block.replace("model-index", index)
        elif place is None:
            block.append_item(node, result)
        else:
            block.replace_item(node, place, result)
    return list(index)


def _identity(result: dict[str, Any]) -> tuple[Any, ...]:
    dataset = result["dataset"]
    names = tuple(sorted(str(metric.get("name")) for metric in result["metrics"]))
    return (result["task"]["type"], *(dataset.get(key) for key in ("type", "config", "split", "revision")), names)


def _results_node(block: Block) -> Any:
    """The node of the first model's results, when it is a block list that text can be added to."""
    models = block.nodes["model-index"][1].value
    node = next((value for key, value in models[0].value if key.value == "results"), None)
    return node if node is not None and node.value and not node.flow_style else None
