"""Recording fairseq's answers."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy
import torch

from .importing import CannotBuildError
from .machine import bits
from .numerics import digest, distance, environment, step_of
from .opening import open_reference
from .tensorfile import read, write


def record(request: Any, arrays: Any, reference: Any = None, tell: Any = lambda what, left: None) -> None:
    """Run everything that is asked for and write the answers.

    Args:
        request: what `open_reference` takes, and `threads`, `rate`, `special` and `blank` (ids), `out` (the file to write),
            `description` (kept as it is), and `runs`: a list of `{"arrays": [names], "multiple": number or None,
            "padded": whether the arrays are a padded batch with a mask, "weights": "" or the type they are rounded to,
            "arithmetic": a type, "language": the language to set, empty for the model's own, "raw": whether fairseq is to
            normalise them}`, whatever else they hold is kept.
        arrays: the waveforms by name, float32, one dimension each.
        reference: an opened reference; by default one is opened.
        tell: called before each run with what it is, and how many more follow.
    """
    torch.set_num_threads(request["threads"])
    reference = reference or open_reference(request)
    tensors: dict[str, Any] = {"waveform." + name: value for name, value in arrays.items()}
    runs: list[Any] = []
    rounded = ""
    ordered = sorted(enumerate(request["runs"]), key=lambda pair: pair[1]["weights"])
    for left, (number, wanted) in zip(range(len(ordered), 0, -1), ordered):
        what = "from the raw waveform" if wanted["raw"] else wanted.get("probe", {}).get("name", "")
        tell("%s: %s" % (wanted["arithmetic"], what), left - 1)
        if wanted["weights"] != rounded:
            rounded = wanted["weights"]
            reference.round_weights(rounded)
        runs.append(dict(wanted, number=number, **_answer(reference, wanted, arrays, tensors, "run.%d." % number)))
    about = dict(reference.info, environment=environment(), bits=bits(), multiple=reference.multiple, schema=1)
    about["padded_batches"] = reference.masks_like_main
    about["blank"] = reference.blank
    about["spelling"] = reference.spell()
    about["spellings"] = {}
    for language in sorted({wanted["language"] for wanted in request["runs"] if wanted["language"]}):
        about["spellings"][language] = reference.spell(language)
    about = dict(about, description=request["description"], runs=sorted(runs, key=lambda run: run["number"]))
    write(request["out"], tensors, json.dumps(about, sort_keys=True))


def _answer(reference: Any, wanted: Any, arrays: Any, tensors: Any, prefix: str) -> dict[str, Any]:
    signals = [torch.as_tensor(arrays[name]) for name in wanted["arrays"]]
    if wanted["raw"]:
        signals = [reference.normalise(signal, reference.request["rate"]) for signal in signals]
    batch = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)
    reference.set_language(wanted["language"])
    lengths = [len(signal) for signal in signals] if wanted["padded"] else None
    with reference.arithmetic(wanted["arithmetic"]):
        frames, stages = reference.run(batch, lengths, wanted["multiple"])
    with reference.arithmetic("float64"):
        _, exact = reference.run(batch, lengths, wanted["multiple"])
    kept = []
    for name, value in stages.items():
        sure = exact.get(name, value)  # what is generated, is in the run's own arithmetic
        outcomes = ("encoder", "logits", "project_hid", "decoder.logits", "generated")
        if wanted["raw"] and name not in outcomes:  # of a raw waveform, the outcome is kept
            continue
        step = step_of(name, value.numel())
        same = (stages["codes"] == exact["codes"]).all(-1) if name == "project_q" else slice(None)
        chosen = name == "codes" or name.startswith("generated")
        floor = None if chosen else distance(value[same], sure[same])
        kept.append({"name": name, "shape": list(value.shape), "sha256": digest(value), "step": step, "floor": floor})
        tensors[prefix + name] = numpy.array(value.reshape(-1)[::step].float().cpu())
        tensors[prefix + name + ".float64"] = numpy.array(sure.reshape(-1)[::step].double().cpu())
    answer: dict[str, Any] = {"frames": frames, "stages": kept}
    beams = reference.beams() if wanted["raw"] else []
    answer.update({"beams": beams} if beams else {})
    texts = [reference.transcribe(path.tolist()) for path in reference.paths(stages, frames)]
    return dict(answer, texts=texts) if texts else answer


def main(path: str) -> int:
    """Answer the request in a file, and say on stderr why not."""
    with open(path, "rb") as file:
        request = json.loads(file.read().decode())
    arrays, _ = read(request["waveforms"])
    try:
        record(request, arrays)
    except CannotBuildError as error:
        sys.stderr.write("%s\n" % error)
        return 3
    except Exception as error:
        reason = ("%s: %s" % (type(error).__name__, error)).split("\n")[0]
        sys.stderr.write("fairseq cannot run the model: %s\n" % reason)
        return 3
    return 0
