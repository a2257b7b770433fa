"""Models with adapters, one language or many: what fairseq computes in each language, transformers computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mms_models
import pytest
import soundfile
import torch
import transformers
from environments import recorded_elsewhere
from mms_models import ONE, REFUSED, VARIANTS, Adapted, build, logits, save, speak
from safetensors.torch import load_file, save_file
from verify_models import computed_once, few_inputs, short_inputs

import convert
from convert.errors import ConvertError, PlanError
from convert.evaluation.run import evaluate
from convert.mapping import map_state_dict, rename_key
from convert.verification import inputs, record, verify

CLIP = inputs.bundled()
WAVES = [torch.randn(1, samples, generator=torch.Generator().manual_seed(samples)) for samples in (4120, 4160)]
LANGUAGES = {name: [key for key, _ in model.languages] for name, model in VARIANTS.items() if model.languages}
KEYS = {"several": ["eng", "hin", "azj-script_latin"], "several_some_layers": ["hin", "eng"]}
DEFAULT = {"mms_without_english": "azj-script_latin"}  # the first of the file; elsewhere English


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Save and convert a variant once."""
    folder = tmp_path_factory.mktemp("mms")

    def make(name: str) -> tuple[Path, Path]:
        if not (folder / name).exists():
            convert.convert(save(name, folder / f"{name}.pt"), folder / name)
        return folder / f"{name}.pt", folder / name

    return make


def load(folder: Path, **options: Any) -> Any:
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder, attn_implementation="sdpa", **options)
    return model.eval()


def same(theirs: Callable[[torch.Tensor], torch.Tensor], ours: Any) -> bool:
    with torch.no_grad():
        return all(torch.equal(theirs(wave), ours(wave).logits) for wave in WAVES)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("one")])
def test_one_language_computes_the_same(name: str, made: Any) -> None:
    _, folder = made(name)
    reference, model = build(name), load(folder)
    if name == "one_blank_add":  # fairseq adds to the logit, the converted model has it in its bias
        reference.blank_weight = 0
        with torch.no_grad():
            model.lm_head.bias[0] = reference.w2v_encoder.proj.bias[0]
    assert same(lambda wave: logits(reference, wave), model)
    assert "target_lang" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert not list(folder.glob("adapter.*"))


@pytest.mark.parametrize("name", KEYS)
def test_stacked_languages_compute_the_same(name: str, made: Any) -> None:
    _, folder = made(name)
    reference, switched = build(name), load(folder)
    assert same(lambda wave: logits(reference, wave, KEYS[name].index("eng")), switched)  # without being asked
    for row, key in enumerate(KEYS[name]):
        switched.load_adapter(key)
        loaded = load(folder, target_lang=key, ignore_mismatched_sizes=True)
        for model in (switched, loaded):
            assert same(lambda wave, row=row: logits(reference, wave, row), model), key
            assert not same(lambda wave, row=row: logits(reference, wave, row - 1), model)  # the control


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_language_of_mms_computes_what_fairseq_computes(name: str, made: Any) -> None:
    checkpoint, folder = made(name)
    state = torch.load(checkpoint, weights_only=False)
    reference, switched = build(name), load(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.target_lang == DEFAULT.get(name, "eng")
    speak(reference, state, processor.tokenizer.target_lang)
    assert same(lambda wave: logits(reference, wave), switched)  # without being asked
    for key in LANGUAGES[name]:
        assert load_file(folder / f"adapter.{key}.safetensors").keys() == switched._get_adapters().keys()
        dictionary = speak(reference, state, key)
        switched.load_adapter(key)
        processor.tokenizer.set_target_lang(key)
        loaded = load(folder, target_lang=key, ignore_mismatched_sizes=True)
        assert same(lambda wave: logits(reference, wave), switched)
        assert same(lambda wave: logits(reference, wave), loaded)
        symbols = ["<pad>", "<s>", *dictionary.symbols[2:]]
        assert processor.tokenizer.convert_ids_to_tokens(list(range(len(symbols)))) == symbols
        assert len(processor.tokenizer) == switched.config.vocab_size == len(symbols)
    other = load(folder, target_lang=LANGUAGES[name][0], ignore_mismatched_sizes=True)
    assert not same(lambda wave: logits(reference, wave), other)  # the control: the reference speaks the last one


def test_one_language_of_many(made: Any, tmp_path: Path) -> None:
    """`--lang` makes a directory like that of any other CTC model; the way back gives a checkpoint of that language."""
    checkpoint, _ = made("mms")
    folder = convert.convert(checkpoint, tmp_path / "hin", language="hin").path
    state, reference = torch.load(checkpoint, weights_only=False), build("mms")
    speak(reference, state, "hin")
    assert same(lambda wave: logits(reference, wave), load(folder))
    assert not list(folder.glob("*adapter*"))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert {vocabulary["<pad>"], vocabulary["ा"], len(vocabulary)} == {0, 5, 14}
    assert convert.compare_weights(checkpoint, folder) == []
    back = torch.load(convert.restore(folder, tmp_path / "back.pt").path, weights_only=False)
    assert "adapter" not in back and len(back["task_state"]["target_dictionary"]) == 14
    equal(back["model"], reference.state_dict())
    with pytest.raises(PlanError, match="no language 'fra'") as caught:
        convert.plan(checkpoint, language="fra")
    assert caught.value.hint == "it has: azj-script_latin, eng, hin"
    with pytest.raises(PlanError, match="no language 'eng'"):
        convert.plan(mms_models.fairseq_models.save("pretrained_base", tmp_path / "base.pt"), language="eng")


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        convert.plan(save(REFUSED[name], tmp_path / "m.pt"))
    assert {problem.key for problem in caught.value.problems} == {name}


def changed(folder: Path, change: Callable[[dict[str, Any]], Any], model: str = "mms") -> Path:
    path = save(model, folder / "m.pt")
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)
    return path


def unlike(state: dict[str, Any]) -> None:
    """Everything at once: a tensor less, one more, a smaller dictionary, none, no word delimiter, another width."""
    azeri, english, hindi = state["adapter"].values()
    layer = "w2v_encoder.w2v_model.encoder.layers."
    del azeri["model"][f"{layer}1.adapter_layer.W_a"]
    azeri["model"]["w2v_encoder.w2v_model.encoder.layer_norm.weight"] = torch.zeros(64)
    english["task_state"]["target_dictionary"] = mms_models.dictionary(("a", "b"))
    del hindi["task_state"]
    hindi["model"][f"{layer}0.adapter_layer.W_b"] = torch.zeros(1, 64, 9)
    state["cfg"]["model"]["blank_weight"] = 1.0


def test_every_language_is_proved_complete(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        convert.plan(changed(tmp_path, unlike))
    found = {(problem.code, problem.key) for problem in caught.value.problems}
    layer = "w2v_encoder.w2v_model.encoder.layers."
    assert found == {
        ("missing-tensor", f"adapter.azj-script_latin.safetensors: {layer}1.adapter_layer.W_a[0]"),
        ("unexpected-tensor", "adapter.azj-script_latin.safetensors: w2v_encoder.w2v_model.encoder.layer_norm.weight"),
        ("dictionary-size", "dictionary"),
        ("no-dictionary", "adapter[hin]"),
        ("shape", f"adapter.hin.safetensors: {layer}0.adapter_layer.W_b[0]"),
        ("unsupported-setting", "blank_weight"),
    }
    alone, letters = (
        "--lang LANG takes one language alone",
        "pass the dictionary the model was trained with: --dict dict.ltr.txt",
    )
    assert caught.value.hint == f"{letters}; {alone}"


def test_languages_that_one_tokenizer_cannot_have(tmp_path: Path) -> None:
    three = ("x", "y", "z")
    model = replace(VARIANTS["mms"], languages=(*VARIANTS["mms"].languages[1:], ("xyz", three)))
    with pytest.raises(PlanError) as caught:
        convert.plan(save(model, tmp_path / "m.pt"))
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("languages", "adapter[xyz]") and "no word delimiter" in problem.detail
    assert convert.plan(tmp_path / "m.pt", language="xyz").language == "xyz"


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("adp_num", lambda state: state["cfg"]["model"].update(adp_num=2)),
        ("adp_num", lambda state: state["cfg"]["model"].update(adp_num=10**9)),
        ("adp_trf_idx", lambda state: state["cfg"]["model"].update(adp_trf_idx="first")),
        ("layer_type", lambda state: state["cfg"]["model"].update(layer_type="transformer")),
        ("multi_corpus_keys", lambda state: state["cfg"]["task"].update(multi_corpus_keys="eng,eng,../hin")),
    ],
)
def test_settings_that_contradict_the_tensors(setting: str, change: Any, tmp_path: Path) -> None:
    model = "several" if setting == "multi_corpus_keys" else "mms"
    with pytest.raises(PlanError) as caught:
        convert.plan(changed(tmp_path, change, model))
    assert setting in {problem.key for problem in caught.value.problems} or setting == "layer_type"


def test_the_encoder_alone(made: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be converted"):
        convert.plan(made("mms")[0], head="encoder")
    folder = convert.convert(made("mms")[0], tmp_path / "encoder", head="encoder", language="hin").path
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    whole = load(made("mms")[1], target_lang="hin", ignore_mismatched_sizes=True)
    with torch.no_grad():
        assert torch.equal(model(WAVES[0]).last_hidden_state, whole.wav2vec2(WAVES[0]).last_hidden_state)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("name", ["several_some_layers", "mms", "one_first_layers", "one_blank_add"])
def test_the_way_back_gives_every_tensor(name: str, made: Any, tmp_path: Path) -> None:
    checkpoint, folder = made(name)
    back = convert.restore(folder, tmp_path / "back.pt").path
    theirs, ours = (torch.load(path, weights_only=False) for path in (checkpoint, back))
    equal(theirs["model"], ours["model"])
    assert ours["task_state"]["target_dictionary"].symbols == theirs["task_state"]["target_dictionary"].symbols
    assert list(theirs.get("adapter", {})) == LANGUAGES.get(name, []) == list(ours.get("adapter", {}))
    for key in LANGUAGES.get(name, []):
        equal(theirs["adapter"][key]["model"], ours["adapter"][key]["model"])
        dictionaries = [state["adapter"][key]["task_state"]["target_dictionary"] for state in (theirs, ours)]
        assert dictionaries[0].symbols == dictionaries[1].symbols and dictionaries[0].count == dictionaries[1].count
    again = convert.convert(back, tmp_path / "again").path
    for file in folder.glob("*.safetensors"):
        equal(load_file(file), load_file(again / file.name))


def test_names_for_other_scripts() -> None:
    weights = build("several").state_dict()
    mapped = map_state_dict(weights)
    key = "encoder.layers.1.adapter_layer"
    assert torch.equal(mapped[f"wav2vec2.{key}.linear_1.weight"], weights[f"w2v_encoder.w2v_model.{key}.W_a"][0])
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert rename_key(f"w2v_encoder.w2v_model.{key}.ln_b", shapes) == f"wav2vec2.{key}.norm.bias"


# Verification


@pytest.fixture(autouse=True)
def _short() -> Iterator[None]:
    with short_inputs(), few_inputs("speech-even", "quiet", "padded-batch"):
        yield


@pytest.mark.parametrize("name", ["mms", "several"])
def test_every_language_is_verified(name: str, made: Any) -> None:
    report = verify(*made(name), devices=["cpu"], write=False)
    assert report.problems == ()
    verdicts = {run["input"]: run["verdict"] for run in report.report["runs"]}
    others = {"azj-script_latin", "hin"}
    assert {f"speech-even in {key}" for key in others} <= verdicts.keys()
    assert {verdicts[f"speech-even in {key}"] for key in others} == {"identical"}
    controls = [control for control in report.report["controls"] if control["name"].startswith("the adapters of ")]
    assert [control["caught"] for control in controls] == [True]
    one = verify(*made(name), devices=["cpu"], write=False, languages=["hin"])
    assert "speech-even in hin" in {run["input"] for run in one.report["runs"]}
    assert one.report["skipped"] == {"language azj-script_latin": "its bytes only, as asked"}
    with pytest.raises(ConvertError, match="no language 'fra'"):
        verify(*made(name), devices=["cpu"], write=False, languages=["fra"])


def test_a_recording_answers_in_every_language(made: Any, tmp_path: Path) -> None:
    checkpoint, folder = made("mms")
    kept = record(checkpoint, tmp_path / "all.safetensors", long=False)
    report = verify(checkpoint, folder, reference=kept, devices=["cpu"], write=False)
    assert report.problems == () and "speech-even in hin" in {run["input"] for run in report.report["runs"]}
    alone = convert.convert(checkpoint, tmp_path / "hin", language="hin").path
    with pytest.raises(ConvertError, match="recorded in the language 'eng', the model is of 'hin'"):
        verify(checkpoint, alone, reference=kept, devices=["cpu"], write=False)
    kept = record(checkpoint, tmp_path / "hin.safetensors", long=False, language="hin")
    assert verify(checkpoint, alone, reference=kept, devices=["cpu"], write=False).problems == ()


def test_rounded_weights_are_verified_in_every_language(made: Any, tmp_path: Path) -> None:
    checkpoint, _ = made("mms")
    folder = convert.convert(checkpoint, tmp_path / "half", dtype="float16").path
    assert verify(checkpoint, folder, devices=["cpu"], write=False, long=False).problems == ()


def test_every_fault_in_a_language_is_reported(made: Any) -> None:
    """Each tensor of one language perturbed on its own: seen in the bytes, and in the outputs of that language alone."""
    checkpoint, folder = made("mms")
    file = folder / "adapter.hin.safetensors"
    whole = file.read_bytes()
    missed: list[str] = []
    with computed_once():
        for name in (name for name in load_file(file) if "layers.1." in name or "layers" not in name):
            tensors = load_file(file)
            tensors[name].view(-1)[tensors[name].numel() // 2] += 0.5
            save_file(tensors, file, metadata={"format": "pt"})
            for reference in (None, recorded_elsewhere(checkpoint, folder)):
                asked: dict[str, Any] = {"reference": reference, "languages": ["hin"], "write": False}
                found = verify(checkpoint, folder, devices=["cpu"], **asked).problems
                different = {problem.key for problem in found if problem.code == "different"}
                if "bytes" not in {one.code for one in found} or different != {"cpu, float32, speech-even in hin"}:
                    missed.append(name)
            file.write_bytes(whole)
    assert missed == []
    file.unlink()
    assert "load" in {problem.code for problem in _problems(checkpoint, folder)}
    file.write_bytes(whole)


def _problems(checkpoint: Path, folder: Path) -> Any:
    try:
        return verify(checkpoint, folder, devices=["cpu"], write=False).problems
    except ConvertError as error:
        return [*error.problems, error]


def test_evaluation_and_fairseq_write_the_same_in_a_language(made: Any, tmp_path: Path) -> None:
    """Two recordings; the transcripts are of a random model, and still the same on both sides."""
    checkpoint, folder = made("mms")
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    clip = CLIP  # whole: of a shorter one, this model writes symbols that the two sides write differently
    for name in ("one", "two"):
        soundfile.write(tmp_path / f"{name}.wav", clip[: 4000 + 800 * len(name)], 16000)
        (tmp_path / f"{name}.txt").write_text("ह न")
    asked: dict[str, Any] = {"folder": tmp_path, "reference": "fairseq", "checkpoint": checkpoint, "device": "cpu"}
    written = {key: evaluate(copy, language=key, **asked) for key in ("hin", None)}
    for row in written["hin"].rows + written[None].rows:  # fairseq leaves out </s>, which no trained model writes
        assert row.hypothesis.replace("</s>", "") == row.fairseq != ""
    assert "--lang hin" in written["hin"].command and "--lang" not in written[None].command
    assert written["hin"].rows[0].hypothesis != written[None].rows[0].hypothesis
    with pytest.raises(ConvertError, match="model has no language 'fra'"):
        evaluate(copy, language="fra", folder=tmp_path, device="cpu")


def test_all_files_are_published(made: Any, hub: Any, publisher: Any, tmp_path: Path) -> None:
    checkpoint, folder = made("mms")
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    report = verify(checkpoint, copy, devices=["cpu"], long=False).report
    assert (
        report["weights"]["tensors"] == 94 + 20 * 4
    )  # the weights, three languages, and what the checkpoint's own model had
    answer = publisher.run(copy, "alice/mms")
    assert answer["committed"] and {name for name, *_ in answer["files"]} == {file.name for file in copy.iterdir()}
    card = (copy / "README.md").read_text()
    assert "By default its language is `eng`" in card and "`azj-script_latin`" in card


def test_the_commands(command: Any, made: Any, tmp_path: Path) -> None:
    checkpoint, _ = made("mms")
    done = command("plan", checkpoint, "--lang", "hin")
    assert done.status == 0
    assert done.data["language"] == "hin" and done.data["languages"] == []
    done = command("plan", checkpoint)
    assert "3 languages: the weights are of eng" in done.text
    assert done.data["language"] == "eng" and done.data["languages"] == sorted(LANGUAGES["mms"])
    assert "languages     3: azj-script_latin eng hin" in command("inspect", checkpoint).text
    assert "languages     3: eng hin azj-script_latin" in command("inspect", made("several")[0]).text
    assert "adapter.hin.safetensors" in done.data["files"]
    done = command("convert", checkpoint, tmp_path / "out", "--lang", "xx")
    assert done.status == 1 and done.data["problems"][0]["code"] == "unknown-language"


def test_unknown_names_of_adapters_are_dropped_with_a_reason(tmp_path: Path) -> None:
    """More adapters than `multi_corpus_keys` names: those without a name cannot be asked for."""
    model = Adapted(replace(ONE, fine_tuned=mms_models.ADAPTERS | {"adp_num": 3}), "eng,hin")
    made = convert.plan(save(model, tmp_path / "m.pt"))
    assert {drop.source[-3:] for drop in made.plan.drops} == {"[1]", "[2]"}
    with pytest.raises(PlanError, match="lacks tensors"):
        convert.restore(convert.convert(tmp_path / "m.pt", tmp_path / "out").path, tmp_path / "back.pt")
