"""`evaluate` on the bundled checkpoint: the word error rate is fairseq's own, and a model that differs is reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import BUNDLED, HELDOUT, ROOT
from evaluate_fixtures import run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("jiwer")
pytest.importorskip("fairseq", reason="fairseq is not installed: evaluation was not compared with fairseq")

from convert import package  # noqa: E402
from convert.errors import ConvertError  # noqa: E402
from convert.evaluation import evaluate  # noqa: E402
from convert.evaluation.fairseq_reference import FairseqReference  # noqa: E402
from convert.sources import open_source  # noqa: E402


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "espeak"
    package.convert(BUNDLED, out)
    return out


@pytest.fixture
def model(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(converted, tmp_path / "espeak"))


def counts_of_fairseq(checkpoint: Path) -> dict[str, Any]:
    """The errors that fairseq's CTC criterion counts when it validates, one utterance at a time."""
    import soundfile
    from fairseq import checkpoint_utils

    load = torch.load
    torch.load = lambda *arguments, **named: load(*arguments, **{**named, "weights_only": False})
    try:
        (fairseq_model,), settings, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    finally:
        torch.load = load
    criterion = task.build_criterion(settings.criterion).eval()
    fairseq_model.eval()
    lines = HELDOUT.read_text().splitlines()[1:]
    labels = HELDOUT.with_suffix(".ltr").read_text().splitlines()
    total: dict[str, Any] = {"w_errors": 0, "w_total": 0}
    for index, (line, label) in enumerate(zip(lines, labels, strict=True)):
        samples = torch.from_numpy(soundfile.read(HELDOUT.parent / line.split("\t")[0], dtype="float32")[0])
        if settings.task.normalize:
            samples = torch.nn.functional.layer_norm(samples, samples.shape)
        target = task.target_dictionary.encode_line(label, append_eos=False, add_if_not_exist=False).long()
        sample = {
            "id": torch.tensor([index]),
            "net_input": {"source": samples[None], "padding_mask": torch.zeros(1, len(samples), dtype=torch.bool)},
            "target": target[None],
            "target_lengths": torch.tensor([len(target)]),
            "ntokens": len(target),
        }
        with torch.no_grad():
            found = criterion(fairseq_model, sample)[2]
        total = {key: total[key] + found[key] for key in total}
    return total


def test_the_rate_is_fairseqs_own_to_the_last_digit(model: Path) -> None:
    result = evaluate(model, manifest=HELDOUT, reference="fairseq", checkpoint=BUNDLED)
    assert result.ok and result.differing == () and result.problems == ()
    assert result.reference == result.scores
    assert all(row.fairseq == row.hypothesis for row in result.rows) and len(result.rows) == 8
    counted = counts_of_fairseq(BUNDLED)
    assert (result.scores.word_errors, result.scores.words) == (counted["w_errors"], counted["w_total"])
    assert result.scores.wer == counted["w_errors"] / counted["w_total"] < 0.05


def test_the_rate_of_a_model_that_errs_is_fairseqs_own_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model makes hardly an error, so that its rate alone would prove little."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = torch.load(BUNDLED, weights_only=False)
    weight = state["model"]["w2v_encoder.proj.weight"]
    weight += 3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    blurred = tmp_path / "blurred.pt"
    torch.save(state, blurred)
    package.convert(blurred, tmp_path / "blurred")
    result = evaluate(tmp_path / "blurred", manifest=HELDOUT, reference="fairseq", checkpoint=blurred)
    counted = counts_of_fairseq(blurred)
    assert result.ok and result.reference == result.scores
    assert (result.scores.word_errors, result.scores.words) == (counted["w_errors"], counted["w_total"])
    assert 0.1 < result.scores.wer == counted["w_errors"] / counted["w_total"] < 1


def test_the_transcripts_do_not_depend_on_the_batch(model: Path) -> None:
    texts = [[r.hypothesis for r in evaluate(model, manifest=HELDOUT, batch_size=size).rows] for size in (1, 3, 8)]
    assert texts[0] == texts[1] == texts[2]


def base_checkpoint(path: Path) -> Path:
    """A small random model in the style of wav2vec 2.0 base, as fairseq saves it, that writes many letters."""
    from fairseq import tasks
    from omegaconf import OmegaConf

    state = torch.load(BUNDLED, weights_only=False)
    architecture = {"extractor_mode": "default", "layer_norm_first": False, "conv_bias": False}
    state["cfg"]["model"]["w2v_args"]["model"].update(architecture)
    settings = OmegaConf.create(state["cfg"])
    task = tasks.setup_task(settings.task)
    task.load_state_dict(state["task_state"])
    torch.manual_seed(5)
    made = task.build_model(settings.model)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith("feature_extractor.conv_layers.0.2.weight"):
                value.uniform_(0.5, 1.5)
        made.w2v_encoder.w2v_model.post_extract_proj.weight.mul_(20)
        made.w2v_encoder.proj.weight.normal_(0, 1)
        made.w2v_encoder.proj.bias[:4] = -20
    torch.save({**state, "model": made.state_dict()}, path)
    return path


def test_a_model_with_a_group_norm_writes_what_fairseq_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = base_checkpoint(tmp_path / "base.pt")
    package.convert(checkpoint, tmp_path / "base")
    result = evaluate(tmp_path / "base", manifest=HELDOUT, reference="fairseq", checkpoint=checkpoint)
    assert result.problems == () and result.reference == result.scores
    assert len({row.hypothesis for row in result.rows}) == 8 and min(len(row.hypothesis) for row in result.rows) > 10


def test_settings_from_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = torch.load(BUNDLED, weights_only=False)["model"]
    torch.save({"state_dict": {f"model.{key}": value for key, value in weights.items()}}, tmp_path / "held.ckpt")
    dictionary = tmp_path / "dict.ltr.txt"
    with open_source(BUNDLED) as opened:
        assert opened.dictionary is not None
        symbols = opened.dictionary.symbols[len(opened.dictionary.special) :]
    dictionary.write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    package.convert(tmp_path / "held.ckpt", tmp_path / "model", base=BUNDLED, dictionary=dictionary)
    asked: dict[str, Any] = {"manifest": HELDOUT, "reference": "fairseq", "checkpoint": tmp_path / "held.ckpt"}
    result = evaluate(tmp_path / "model", **asked, base=BUNDLED)
    assert result.ok and result.differing == ()
    with pytest.raises(ConvertError, match="without its settings"):
        evaluate(tmp_path / "model", **asked)


def test_the_command_reports_both_and_its_result_is_stable(model: Path) -> None:
    asked = ("evaluate", model, "--manifest", HELDOUT, "--reference", "fairseq", "--checkpoint", BUNDLED)
    status, out, err = run(*asked)
    assert (status, err) == (0, "")
    rates = re.findall(r"^(transformers|fairseq) +(WER .*)$", out, re.MULTILINE)
    assert [name for name, _ in rates] == ["transformers", "fairseq"] and rates[0][1] == rates[1][1]
    assert "transcripts that differ: 0 of 8\nwritten: evaluation.json\n" in out
    first = (model / "evaluation.json").read_bytes()
    (entry,) = json.loads(first)["results"]
    assert entry["reference"] == {"name": "fairseq", **entry["metrics"]}
    assert run(*asked, "--batch-size", "2", "-q") == (0, "", "")
    assert (model / "evaluation.json").read_bytes() == first


def test_a_model_that_is_not_the_same_is_a_no(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][[5, 6]] = weights["lm_head.weight"][[6, 5]]  # two letters exchanged
    weights["lm_head.bias"][[5, 6]] = weights["lm_head.bias"][[6, 5]]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    asked = ("evaluate", model, "--manifest", HELDOUT, "--reference", "fairseq", "--checkpoint", BUNDLED)
    status, out, _ = run(*asked)
    assert status == 1 and "evaluation.json was not written" in out
    assert not (model / "evaluation.json").exists()
    status, printed, _ = run(*asked, "--json")
    answer = json.loads(printed)
    assert (status, answer["ok"]) == (1, False)
    assert {problem["code"] for problem in answer["problems"]} == {"transcript"}
    assert len(answer["problems"]) == len(answer["differing"]) > 0
    for row in answer["differing"]:
        assert row["fairseq"] != row["transformers"]
        assert f"  {row['name']}\n    fairseq       {row['fairseq']}\n    transformers  {row['transformers']}" in out


def test_one_differing_transcript_is_enough(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FairseqReference.transcribe
    texts: list[str] = []

    def once(self: FairseqReference, samples: Any) -> str:
        texts.append(real(self, samples))
        return texts[-1] + ("S" if len(texts) == 4 else "")

    monkeypatch.setattr(FairseqReference, "transcribe", once)
    result = evaluate(model, manifest=HELDOUT, reference="fairseq", checkpoint=BUNDLED)
    assert not result.ok and len(result.differing) == len(result.problems) == 1
    assert result.differing[0].fairseq == result.differing[0].hypothesis + "S"


@pytest.mark.parametrize("module", ["os", "my_project.tasks"])
def test_nothing_in_a_checkpoint_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """A call of `os` is refused, as by `convert`; a class or function of somebody's own is not called."""
    folder = str(tmp_path / "made")

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return make, (folder,)

    def make(path: str) -> None:
        Path(path).mkdir()

    make.__module__, make.__qualname__ = module, "mkdir"
    if module == "os":
        make = os.mkdir  # type: ignore[assignment]
    else:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(mkdir=make))
        monkeypatch.setitem(sys.modules, "my_project", SimpleNamespace(tasks=sys.modules[module]))
    hostile = tmp_path / "hostile.pt"
    torch.save({**torch.load(BUNDLED, weights_only=False), "extra": Harm()}, hostile)
    asked = ("evaluate", model, "--manifest", HELDOUT, "--reference", "fairseq", "--checkpoint", hostile, "--json")
    status, out, _ = run(*asked)
    assert not Path(folder).exists()
    if module == "os":
        assert status == 2
        assert [(one["code"], one["key"]) for one in json.loads(out)["problems"]] == [("hostile-pickle", "posix.mkdir")]
    else:
        assert status == 0, out
    torch.load(hostile, weights_only=False)  # the control: it does run where nobody looks first
    assert Path(folder).exists()


def test_an_interrupted_comparison_asks_fairseq_only_for_the_rest(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = FairseqReference.transcribe

    def counted(self: FairseqReference, samples: Any) -> str:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(samples))
        return real(self, samples)

    with monkeypatch.context() as patched:
        patched.setattr(FairseqReference, "transcribe", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, manifest=HELDOUT, reference="fairseq", checkpoint=BUNDLED, batch_size=2)
    rest: list[int] = []
    monkeypatch.setattr(FairseqReference, "transcribe", lambda self, s: rest.append(len(s)) or real(self, s))
    assert evaluate(model, manifest=HELDOUT, reference="fairseq", checkpoint=BUNDLED, batch_size=2).ok
    assert len(rest) == 5 and not set(rest) & set(asked)


def test_the_examples_of_the_help_run(model: Path, tmp_path: Path) -> None:
    """The manifest examples as they stand, in a folder that has what they name; the Hub's is parsed only."""
    (tmp_path / "data").mkdir()
    for suffix in (".tsv", ".ltr", ".wrd"):
        shutil.copyfile(HELDOUT.with_suffix(suffix), tmp_path / "data" / f"test{suffix}")
    for path in HELDOUT.parent.glob("*.wav"):
        shutil.copyfile(path, tmp_path / "data" / path.name)
    shutil.copyfile(BUNDLED, tmp_path / "checkpoint_best.pt")
    model.rename(tmp_path / "my-model")
    help_text = run("evaluate", "--help")[1]
    examples = re.findall(r"^ +fairseq-to-hf (evaluate .*)$", help_text, re.MULTILINE)
    assert len(examples) == 3 and "--dataset openslr/librispeech_asr" in examples[2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for example in examples[:2]:
        command = [sys.executable, "-m", "convert", *example.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.startswith("test: 8 utterances")


def test_the_documentation_runs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of `docs/evaluation.md` is run; its command lines are understood as they stand."""
    from convert.commands.evaluate import command

    text = (ROOT / "docs" / "evaluation.md").read_text()
    lines = re.findall(r"^(?:fairseq-to-hf|accelerate launch .* -m convert) evaluate (.*)$", text, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert command.make_context("evaluate", line.split()).params["model_dir"] == Path("my-model")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (snippet,) = (snippet for snippet in snippets if "pyctcdecode" not in snippet)  # which is not installed for tests
    shutil.copytree(HELDOUT.parent, tmp_path / "data")
    for suffix in (".tsv", ".ltr", ".wrd"):
        (tmp_path / "data" / f"heldout{suffix}").rename(tmp_path / "data" / f"test{suffix}")
    model.rename(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/evaluation.md", "exec"), {})
    assert (tmp_path / "my-model" / "evaluation.json").exists()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, convert.commands.evaluate as c; print({'torch', 'transformers', 'jiwer', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")
