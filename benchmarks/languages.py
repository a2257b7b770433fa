"""Time and memory of every command on checkpoints of many languages, as MMS's: narrow layers, the real names and number of tensors.

Prints each command's processor time and its peak of anonymous memory at each number of languages, and what 100 further languages
cost. `verify` runs two languages and compares the bytes of all; at the smallest number, it runs all of them once, too.
Usage: `python benchmarks/languages.py [--languages N ...] [--layers N] [--width N] [--directory DIR] [--small]`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import ROOT, describe
from verify import Ran, measured

sys.path.insert(0, str(ROOT / "tests/support"))
COUNTS = (100, 300, 1162)
TOKEN = "hf_" + "AliceWritesHere" * 3
LOAD = """
import sys, torch
from transformers import AutoProcessor, Wav2Vec2ForCTC
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = Wav2Vec2ForCTC.from_pretrained(sys.argv[1]).eval()
for language in sys.argv[2:]:
    processor.tokenizer.set_target_lang(language)
    model.load_adapter(language, force_load=True)
    with torch.no_grad():
        shape = model(torch.randn(1, 16000)).logits.shape
    assert shape[-1] == len(processor.tokenizer.encoder), (language, shape)
"""


def measure(work: Path, languages: int, layers: int, width: int, every: bool) -> dict[str, Ran]:
    """Run every command on one checkpoint."""
    checkpoint, model, back = work / "mms.pt", work / "model", work / "back.pt"
    shape = ["--layers", str(layers), "--width", str(width)]
    large = [sys.executable, str(Path(__file__).with_name("large.py"))]
    subprocess.run([*large, checkpoint, "--languages", str(languages), *shape], check=True, capture_output=True)
    tool = [sys.executable, "-m", "convert"]
    verify = [*tool, "verify", checkpoint, model, "--no-long", "--device", "cpu", "-q"]
    done = {
        "inspect": measured(*tool, "inspect", checkpoint, "-q"),
        "plan": measured(*tool, "plan", checkpoint, "-q"),
        "convert": measured(*tool, "convert", checkpoint, model, "-q"),
        "verify": measured(*verify, "--lang", "baa"),
        **({"verify all": measured(*verify)} if every else {}),
        "restore": measured(*tool, "restore", model, back, "-q"),
    }
    back.unlink()
    checkpoint.unlink()
    with Served() as where:
        home = {"HF_ENDPOINT": where, "HF_HOME": str(work / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        home |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        done["publish"] = measured(*tool, "publish", model, "alice/mms", "-q", **home)
        done["publish again"] = measured(*tool, "publish", model, "alice/mms", "-q", **home)
        done["load_adapter"] = measured(sys.executable, "-c", LOAD, "alice/mms", "baa", "eng", **home)
    return done


class Served:
    """The tests' Hub, in a process of its own, so that its memory is not the publisher's."""

    def __enter__(self) -> str:
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests/support')!r}); import languages; languages.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Serve until the standard input ends."""
    import hub_server

    hub_server.PAGE = 1000  # rows of a listing, as the Hub's
    hub_server.CHUNK = 1 << 24
    hub = hub_server.Hub()
    hub.store.users = {TOKEN: {"name": "alice", "role": "write"}}
    print(hub.endpoint, flush=True)
    sys.stdin.read()
    hub.close()


def report(found: dict[int, dict[str, Ran]]) -> None:
    """Print processor times and peaks, and the growth between the smallest and the largest count."""
    counts = sorted(found)
    first, last = counts[0], counts[-1]
    for name in found[first]:
        row = [found[count][name] for count in counts if name in found[count]]
        print(f"{name:<14}" + "".join(f"{f'{one.processor:.1f} s {one.peak / 1e6:.0f} MB':>24}" for one in row))
    print()
    for name in [name for name in found[first] if name in found[last] and first != last]:
        few, many = found[first][name], found[last][name]
        more = (many.peak - few.peak) / (last - first) * 100 / 1e6
        each = many.processor / last / (few.processor / first)
        print(f"{name + ', time a language':<32} {each:6.2f}   of that with {first}; aim: at most 1")
        print(f"{name + ', 100 more languages':<32} {more:6.1f} MB   aim: at most 20 MB")


def main() -> None:
    """Measure at each number of languages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--languages", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    parser.add_argument("--small", action="store_true", help="two layers, to see that this runs")
    asked = parser.parse_args()
    counts = (3, 6) if asked.small else asked.languages
    found = {}
    for count in sorted(counts):
        with tempfile.TemporaryDirectory(dir=asked.directory) as name:
            found[count] = measure(Path(name), count, 2 if asked.small else asked.layers, asked.width, not found)
    print(describe())
    print(" " * 14 + "".join(f"{f'{count} languages':>24}" for count in sorted(found)))
    report(found)


if __name__ == "__main__":
    main()
