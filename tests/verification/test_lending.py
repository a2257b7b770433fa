"""What a model computes with is made a layer at a time; what is needed again lies in files; both leave no trace."""

from __future__ import annotations

import gc
import hashlib
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conformer_models
import fairseq_models
import pytest
import torch
from verify_models import converted, short_inputs, subject_of

from convert.package import convert
from convert.verification import record, verify
from convert.verification.devices import steady
from convert.verification.fairseq_side import blocks, numerics, shelf
from convert.verification.fairseq_side.lending import Lending
from convert.verification.inputs import bundled
from convert.verification.reference import Live
from convert.verification.target import load


class Model(torch.nn.Module):
    """Two layers, a table of positions, and a head that has the embeddings' weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(4)
        self.norm.running_var += 0.3
        self.register_buffer("table", torch.full((4,), 1 / 3), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, tokens: torch.Tensor) -> Any:
        value = self.embed(tokens) + self.table
        for layer in self.layers:
            value = layer(value)
        return self.head(self.norm(value))


TOKENS = torch.arange(5)


@pytest.fixture
def lending() -> Lending:
    torch.manual_seed(0)
    made = Lending(Model())
    for index, layer in enumerate(made.model.layers):
        made.watch(layer, f"layer.{index}")
    return made


def kept(model: torch.nn.Module) -> list[tuple[int, torch.dtype]]:
    return [(value.data_ptr(), value.dtype) for value in [*model.parameters(), *model.buffers()]]


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float32])
def test_it_computes_as_a_model_of_another_type(kind: torch.dtype, lending: Lending) -> None:
    before = kept(lending.model)
    lending.kind = kind
    with lending.lent():
        found = lending.model(TOKENS)
        assert lending.model.head.weight.dtype == kind
    assert kept(lending.model) == before
    assert found.dtype == kind
    assert torch.equal(found, lending.model.to(kind)(TOKENS))


def test_no_two_layers_have_their_tensors_at_once(lending: Lending) -> None:
    seen = []
    for layer in lending.model.layers:
        layer.register_forward_hook(
            lambda *_: seen.append([one.weight.dtype == torch.float64 for one in lending.model.layers])
        )
    lending.kind = torch.float64
    lending.model.layers[1].register_forward_pre_hook(
        lambda *_: seen.append([one.weight.dtype == torch.float64 for one in lending.model.layers])
    )
    with lending.lent():
        lending.model(TOKENS)
    assert seen[1] == [False, True]
    assert all(sum(row) <= 1 for row in seen)


def test_weights_are_rounded_first_and_tables_are_not(lending: Lending) -> None:
    lending.kind, lending.rounded, lending.unrounded = torch.float64, torch.bfloat16, (lending.model,)
    with lending.lent():
        found, table = lending.model(TOKENS), lending.model.table
    model = lending.model
    whole = model.table.clone()
    model.to(torch.bfloat16).to(torch.float64)
    model.table = whole.double()
    assert torch.equal(table, model.table)
    assert torch.equal(found, model(TOKENS))


def test_a_half_type_is_kept_as_it_is_stored(lending: Lending) -> None:
    lending.model.to(torch.float16)
    before = kept(lending.model)
    with lending.lent():
        found = lending.model(TOKENS)
    assert kept(lending.model) == before
    assert torch.equal(found, lending.model.float()(TOKENS))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("over_time", [False, True])
def test_a_convolution_of_float64_lays_out_a_block_of_frames_at_a_time(
    over_time: bool, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "FRAMES", 7)
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 4) if over_time else torch.nn.GELU()
    layer = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 5, stride=3), norm).to(kind).requires_grad_(False)
    source, seen = torch.randn(2, 2, 101, dtype=kind), []
    whole = layer(source)
    layer[0].register_forward_hook(lambda *given: seen.append(given[-1].shape[-1]))
    blocks.in_blocks(layer)
    assert torch.allclose(layer(source), whole, rtol=0, atol=1e-14 if kind == torch.float64 else 0)
    assert seen == ([7, 7, 7, 7, 5] if kind == torch.float64 and not over_time else [33])


def test_what_fails_gives_everything_back(lending: Lending) -> None:
    before = kept(lending.model)
    lending.kind = torch.float64

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of a layer")

    lending.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), lending.lent():
        lending.model(TOKENS)
    assert kept(lending.model) == before


@pytest.mark.parametrize("variant", ["ctc_large", "pretrained_base"])
def test_both_sides_keep_what_the_files_hold(variant: str, tmp_path: Path) -> None:
    with short_inputs():
        checkpoint, model = converted(variant, tmp_path)
        reference, target = Live(subject_of(checkpoint)[0], {}, "cpu").inner, load(model, "cpu")
        waveform = torch.from_numpy(bundled())[None]
    before = [kept(reference.model), kept(target.model)]
    kinds: dict[str, torch.dtype] = {}
    with reference.arithmetic("float64"), target.arithmetic("float64"):
        reference.run(waveform)
        target.run(waveform, None, lambda stage, values: kinds.update({stage: values.dtype}))
    assert [kept(reference.model), kept(target.model)] == before
    assert set(kinds.values()) - {torch.int64} == {torch.float64}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is measured on Linux alone")
def test_the_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    """Neither while both sides are opened, nor while they compute in float64."""
    wide = {"encoder_embed_dim": 512, "encoder_ffn_embed_dim": 4096, "encoder_layers": 12}
    checkpoint = fairseq_models.save(fairseq_models.Variant("ctc", fairseq_models.BASE | wide), tmp_path / "model.pt")
    model = convert(checkpoint, tmp_path / "out").path
    subject, weights = subject_of(checkpoint)[0], checkpoint.stat().st_size
    waveform = torch.from_numpy(bundled()[:4000])[None]

    def both_sides() -> None:
        reference, target = Live(subject, {}, "cpu").inner, load(model, "cpu")
        with reference.arithmetic("float64"), target.arithmetic("float64"):
            reference.run(waveform)
            target.run(waveform, None, lambda stage, values: None)

    with steady():
        both_sides()  # what is imported and allocated once is there
        gc.collect()
        before, peak, done = anonymous(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            both_sides()
        finally:
            done.set()
            watcher.join()
    assert before < peak < before + weights * 2 / 3


def anonymous() -> int:
    """This process's anonymous memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_a_checkpoint_of_another_type_is_the_same_model_rounded(kind: torch.dtype, tmp_path: Path) -> None:
    """Weights that the conversion rounded again are so on fairseq's side too, whatever type the file has them in."""
    state = torch.load(fairseq_models.save("ctc_base", tmp_path / "float32.pt"), weights_only=False)
    state["model"] = {name: value.to(kind) for name, value in state["model"].items()}
    torch.save(state, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "out", dtype="bfloat16")
    with short_inputs():
        done = verify(tmp_path / "model.pt", tmp_path / "out", devices=["cpu"], write=False, long=False)
    assert done.problems == ()
    runs = {run["input"]: run["verdict"] for run in done.report["runs"] if run["dtype"].startswith("float32 with")}
    assert runs["speech-even"] == runs["shortest"] == "identical"


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_shelf_keeps_numbers_and_strides(kind: torch.dtype, folder: Path) -> None:
    value = torch.arange(1 << 20).reshape(512, 1, 2048).transpose(0, 1).to(kind)
    found = shelf.shelved(value)
    assert torch.equal(found, value)
    assert found.stride() == value.stride()
    assert found.data_ptr() != value.data_ptr()
    assert shelf.shelved(value[:, ::2]).is_contiguous()
    assert list(folder.iterdir()) == []


def test_without_room_it_is_kept_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf.os, "posix_fallocate", full)
    value = torch.randn(1 << 20)
    assert torch.equal(shelf.shelved(value), value)
    assert list(folder.iterdir()) == []


def test_numbers_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    b = a + torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    apart = (a.double() - b.double()).abs()
    whole = hashlib.sha256(a.numpy().tobytes()).hexdigest()
    for chunk in (1, 10, 77, 1000):
        monkeypatch.setattr(numerics, "CHUNK", chunk)
        assert numerics.greatest(a, b) == (float(apart.max()), int(apart.argmax()))
        assert numerics.digest(a) == whole
        assert numerics.finite(a)
    b[3, 4] = float("nan")
    assert numerics.greatest(a, b) == (float("inf"), 37)
    assert not numerics.finite(b)
    assert numerics.greatest(a[:0], b[:0]) == (0.0, 0)


# --- what runs, and what is said of it ------------------------------------------------------------------------------


@pytest.fixture
def short() -> Iterator[None]:
    with short_inputs():
        yield


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_nothing_is_asked_of_fairseq_twice(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conformer is judged with two implementations of attention, a half type beside float32: each from the same answers."""
    path = conformer_models.save("ctc_relative", tmp_path / "model.pt")
    convert(path, tmp_path / "out", dtype=dtype)
    asked: Counter[tuple[Any, ...]] = Counter()
    run = Live.run

    def counted(self: Live, probe: Any, name: str) -> Any:
        asked[probe.name, name, self.inner.lending.rounded] += 1
        return run(self, probe, name)

    monkeypatch.setattr(Live, "run", counted)
    done = verify(path, tmp_path / "out", devices=["cpu"], write=False, long=False)
    assert done.problems == ()
    twice = {key for key, count in asked.items() if count > 1}
    # float64 measures float32 with rounded weights, and then the half type
    assert {name for _, name, _ in twice} <= ({"float64"} if dtype == "bfloat16" else set())
    assert max(asked.values()) <= 2


@pytest.mark.usefixtures("short")
def test_progress_says_what_is_done(tmp_path: Path) -> None:
    checkpoint, model = converted("ctc_base", tmp_path)
    for command, expected in (
        (lambda **told: verify(checkpoint, model, devices=["cpu"], long=False, **told), "fairseq in float64"),
        (lambda **told: record(checkpoint, tmp_path / "recording", long=False, **told), "float32: padded-batch"),
    ):
        steps: list[tuple[int, int]] = []
        said: list[str] = []
        command(progress=lambda done, total, to=steps: to.append((done, total)), doing=said.append)
        assert any(expected in line for line in said), said
        assert [done for done, _ in steps] == list(range(len(steps)))
        assert all(done < total for done, total in steps[:-1])
        assert steps[-1][0] == steps[-1][1]
        assert len(said) == len(steps) - 1
