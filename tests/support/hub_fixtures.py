"""What the publisher's tests share: the Hub, a tiny verified model, the publisher as a user starts it, a plain loader."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import COMMANDS, ROOT, objects
from hub_server import Hub

from convert.publishing.facts import Stated, gather
from convert.publishing.files import read
from convert.publishing.verified import Verified

TOKEN = "hf_" + "AliceWritesHere" * 3
READ = "hf_" + "AliceOnlyReads" * 3
OTHER = "hf_" + "CarolWritesToo" * 3
SECRETS = (TOKEN, READ, OTHER, "secret-of-the-storage")
CHECKPOINT = hashlib.sha256(b"the checkpoint").hexdigest()

LOADER = """
import hashlib, sys, tempfile
import torch
from transformers import AutoProcessor, Wav2Vec2ForCTC
torch.manual_seed(0)
signal = torch.randn(16000).numpy()
for line in sys.stdin:
    source, _, revision = line.strip().partition(" ")
    with tempfile.TemporaryDirectory() as cache:
        where = {"revision": revision or "main", "cache_dir": cache} if "/" != source[0] else {}
        model = Wav2Vec2ForCTC.from_pretrained(source, **where).eval()
        processor = AutoProcessor.from_pretrained(source, **where)
        inputs = processor(signal, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
    print("answer", hashlib.sha256(logits.numpy().tobytes()).hexdigest(), flush=True)
"""


# `fairseq-to-hf`, with shorter pauses between its questions
PACE = "import convert.publishing.hub as hub; hub.PACE = 0.05\n"
START = f"{PACE}from convert.cli import main; main()"


class Publisher:
    """Runs `fairseq-to-hf publish` as a process of its own, against the tests' Hub."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.said: list[str] = []

    def environment(self, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        mine = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        mine |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
        return kept | mine | more

    def start(self, *arguments: object, token: str | None = TOKEN, **more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", START, "publish", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        return subprocess.Popen(command, env=self.environment(token, **more), **pipes)

    def finish(self, process: subprocess.Popen, status: int | None = 0) -> tuple[str, str]:
        out, err = process.communicate(timeout=120)
        self.said += [out, err]
        assert status is None or process.returncode == status, f"exit {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return out, err

    def run_all(self, lines: list[list[str]]) -> list[dict]:
        """Run several with `--json` in one process; return the objects."""
        words = json.dumps([["publish", *line, "--json"] for line in lines])
        command = [sys.executable, "-c", PACE + COMMANDS]
        done = subprocess.run(command, input=words, env=self.environment(), capture_output=True, text=True, timeout=300)
        self.said += [done.stdout, done.stderr]
        assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
        return objects(done.stdout)

    def told_nobody(self) -> None:
        """Check that the token went to the API and nowhere else."""
        for text in self.said:
            assert not any(secret in text for secret in SECRETS)
        for row in self.hub.seen:
            assert not (row.authorized and "localhost" in row.host)
            assert not any(secret.encode() in row.body or secret in row.path for secret in (TOKEN, READ, OTHER))

    def run(self, *arguments: object, status: int = 0, token: str | None = TOKEN, **more: str) -> dict:
        """Run with `--json` and return the object."""
        out, err = self.finish(self.start(*arguments, "--json", token=token, **more), status)
        assert err == ""
        answer = json.loads(out)
        assert answer["ok"] is (status == 0)
        return answer


class Loader:
    """A process that loads models with plain transformers, one after the other."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADER],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def logits(self, source: object, revision: str = "") -> str:
        """Return the digest of what a model computes."""
        self.process.stdin.write(f"{source} {revision}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return line.split()[1]
        raise AssertionError(self.process.stderr.read())


@pytest.fixture(scope="session")
def session_hub() -> Iterator[Hub]:
    hub = Hub()
    hub.store.users = {
        TOKEN: {"name": "alice", "role": "write", "orgs": ["lab"]},
        READ: {"name": "alice", "role": "read", "orgs": ["lab"]},
        OTHER: {"name": "carol", "role": "write"},
    }
    yield hub
    hub.close()


@pytest.fixture
def hub(session_hub: Hub) -> Iterator[Hub]:
    """The Hub with an empty record of requests; what is left of its faults is released at the end."""
    session_hub.seen.clear()
    session_hub.faults.clear()
    session_hub.store.objects.clear()
    session_hub.store.repositories.clear()
    yield session_hub
    for fault in session_hub.faults:
        fault.release.set()


@pytest.fixture
def publisher(hub: Hub, tmp_path: Path) -> Iterator[Publisher]:
    made = Publisher(hub, tmp_path / "hf-home")
    yield made
    made.told_nobody()


@pytest.fixture(scope="session")
def loader(session_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    home = tmp_path_factory.mktemp("loader")
    made = Loader(Publisher(session_hub, home).environment())
    yield made
    made.process.stdin.close()
    made.process.wait(10)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny verified model directory."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_model(directory)
    prove(directory)
    return directory


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "my-model"))


def make_model(directory: Path, seed: int = 0) -> None:
    """Write a random model as `convert` writes one."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    directory.mkdir()
    symbols = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAOINHSRDLUMWCFGYPBVK'XJQZ"]
    torch.manual_seed(seed)
    geometry = {
        "conv_dim": (32,) * 3,
        "conv_kernel": (10, 8, 4),
        "conv_stride": (5, 8, 4),
        "num_feat_extract_layers": 3,
    }
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **geometry,
    )
    Wav2Vec2ForCTC(config).save_pretrained(directory)
    vocabulary = directory / "vocab.json"
    vocabulary.write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(directory)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(directory)
    rows = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(directory.iterdir())}
    settings = {
        "model": {"_name": "wav2vec_ctc", "encoder_layers": 2, "layer_norm_first": False, "extractor_mode": "default"},
        "task": {"_name": "audio_finetuning", "normalize": True, "sample_rate": 16000, "labels": "ltr"},
        "criterion": {"_name": "ctc"},
    }
    source = {"name": "checkpoint_best.pt", "size": 123456, "sha256": CHECKPOINT, "container": "zip"}
    conversion = {
        "schema": 1,
        "tool": {"name": "fairseq-to-hf", "version": "0.1.0"},
        "source": source,
        "architecture": {"fairseq": "wav2vec_ctc", "class": "Wav2Vec2ForCTC", "head": "ctc"},
        "settings": settings,
        "dictionary": {"symbols": ["<s>", "<pad>", *symbols[2:]], "counts": [1] * len(symbols)},
        "tensors": {},
        "table": {"name": "wav2vec2-ctc", "digest": "0" * 64},
        "drops": [{"key": "w2v_encoder.w2v_model.quantizer.vars", "reason": "pretraining only"}],
        "fills": [],
        "dtype": "keep",
        "files": rows,
    }
    write(directory / "conversion.json", conversion)


def prove(directory: Path, **changes: object) -> None:
    """Write a verification of the directory as `verify` writes one."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    skip = {"verification.json", "README.md", "evaluation.json"}
    run = {"device": "cpu", "dtype": "float32", "max_abs_difference": 0.0, "allowed": 0.0, "stage": None}
    runs = [run | {"input": name, "verdict": "identical"} for name in ("speech, 201 frames", "silence")]
    runs.append(run | {"input": "padded batch", "verdict": "rounding", "max_abs_difference": 4.2e-7, "allowed": 1.1e-6})
    source = json.loads((directory / "conversion.json").read_text("utf-8"))["source"]
    proof = {
        "schema": 1,
        "passed": True,
        "files": {name: sha256(directory / name) for name in names if name not in skip and name[0] != "."},
        "checkpoint": {key: source[key] for key in ("name", "size", "sha256")},
        "reference": {"kind": "this process", "fairseq": "0.12.2"},
        "environment": {"python": "3.11", "torch": "2.13.0", "transformers": "5.24.0"},
        "runs": runs,
        "controls": [{"name": name, "caught": True, "by": "logits"} for name in ("query-key-swap", "weight-g-lost")],
        "end_to_end": [],
    }
    write(directory / "verification.json", proof | changes)


def evaluate(directory: Path, wer: float = 0.0345, config: str = "clean") -> None:
    """Write an evaluation as `evaluate` writes one."""
    data = {
        "type": "openslr/librispeech_asr",
        "name": "LibriSpeech",
        "config": config,
        "split": "test",
        "revision": "a1b2",
    }
    row = {"dataset": data, "metrics": {"wer": wer, "cer": 0.0123}, "utterances": 2620, "words": 52576}
    row |= {"normalizer": "none", "decoder": "greedy", "command": "fairseq-to-hf evaluate my-model --dataset …"}
    write(directory / "evaluation.json", {"schema": 1, "results": [row]})


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def settled(
    hub: Hub, loader: Loader, model: Path, name: str = "alice/tiny", commits: int = 2, revision: str = "main"
) -> None:
    """Nothing is lost and nothing twice: the commits, the bytes, and what plain transformers computes from the Hub."""
    repository = hub.store.repositories[name]
    assert len(repository.history(revision)) == commits
    files = repository.files(revision)
    here = {path.name for path in model.iterdir() if path.is_file() and path.name[0] != "."}
    assert set(files) - {".gitattributes"} == here
    for file in here:
        blob, content = files[file], (model / file).read_bytes()
        assert (hub.store.objects[blob.sha256] if blob.sha256 else blob.content) == content, file
    assert loader.logits(name, revision) == loader.logits(model)


def facts_of(directory, repo_id="me/tiny", *, verified=True, pin="v1", **stated):
    inventory = read(directory)
    proof = Verified.of(inventory.json("verification.json")) if verified else None
    return gather(inventory, repo_id, verification=proof, pin=pin, stated=Stated(**stated))


RUN = """
import re, sys
for card in sys.argv[1:]:
    for code in re.findall(r"```python\\n(.*?)```", open(card, encoding="utf-8").read(), re.S):
        print("#", card)
        exec(compile(code, card, "exec"), {"__name__": "__main__"})
"""


NAME = "alice/tiny"


def codes(answer: dict) -> set[tuple[str, str]]:
    return {(problem["code"], problem["key"]) for problem in answer["problems"]}
