"""Files that other programs made of fairseq's: what is found in them, what converts, and what is said of the rest."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import classification_models
import conformer_models
import data2vec_models
import fairseq_models
import held_models
import hubert_models
import pytest
import seq2seq_models
import speech_to_text_models
import torch
import wavlm_models
from held_models import COMPLETE, INVENTED, WITHOUT_SETTINGS
from safetensors.torch import load_file
from torch_files import read
from verify_models import computed_once, few_inputs, short_inputs

import convert
from convert.errors import ConvertError
from convert.files import sha256_of
from convert.inspection import inspect
from convert.publishing import publish
from convert.verification import record, verify


@dataclass(frozen=True)
class Family:
    """How a model of a family is built and saved, and whether it is a pretrained one."""

    build: Callable[..., torch.nn.Module]
    save: Callable[..., Path]
    variant: str


FAMILIES = {
    "wav2vec2": Family(fairseq_models.build, fairseq_models.save, "pretrained_base"),
    "wav2vec2-ctc": Family(fairseq_models.build, fairseq_models.save, "ctc_large"),
    "hubert": Family(hubert_models.build, hubert_models.save, "hubert_base"),
    "hubert-ctc": Family(hubert_models.build, hubert_models.save, "hubert_ctc_base"),
    "data2vec": Family(data2vec_models.build, data2vec_models.save, "pretrained"),
    "data2vec-ctc": Family(data2vec_models.build, data2vec_models.save, "ctc"),
    "conformer": Family(conformer_models.build, conformer_models.save, "pretrained_relative"),
    "classifier": Family(classification_models.build, classification_models.save, "classification_base"),
    "seq2seq": Family(seq2seq_models.build, seq2seq_models.save, "sinusoidal"),
    "wavlm": Family(wavlm_models.build, wavlm_models.save, "wavlm_base"),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint as fairseq's trainer wrote it, the model in it, and what a plain conversion makes of it."""

    path: Path
    model: torch.nn.Module
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes]
    dictionary: Path | None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            folder, family = tmp_path_factory.mktemp(name), FAMILIES[name]
            model = family.build(family.variant)
            path = family.save(family.variant, folder / "trainer.pt", model=model)
            done = convert.convert(path, folder / "plain")
            dictionary = None
            if done.model.dictionary is not None:
                dictionary = folder / "dict.ltr.txt"
                symbols = done.model.dictionary.symbols[len(done.model.dictionary.special) :]
                dictionary.write_text("".join(f"{symbol} 1\n" for symbol in symbols))
            files = {
                file.name: file.read_bytes() for file in done.path.glob("*.json") if file.name != "conversion.json"
            }
            tensors = load_file(done.path / "model.safetensors")
            known[name] = Made(path, model, read(path), tensors, files, dictionary)
        return known[name]

    return make


# what `config.json` has from the criterion
CRITERION = {"ctc_zero_infinity", "diversity_loss_weight"}


def converted(
    path: Path, out: Path, like: Made, *, ignored: AbstractSet[str] = frozenset(), **options: Any
) -> dict[str, Any]:
    """Convert a file; every tensor and every file is what the trainer's own file gives. Return conversion.json."""
    convert.convert(path, out, **options)
    assert convert.compare_weights(path, out, **{k: v for k, v in options.items() if k in ("dictionary", "base")}) == []
    found = load_file(out / "model.safetensors")
    assert found.keys() == like.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in like.tensors.items())
    for name, content in like.files.items():
        ours, theirs = (
            {key: value for key, value in json.loads(text).items() if key not in ignored}
            for text in ((out / name).read_bytes(), content)
        )
        assert ours == theirs, name
    record: dict[str, Any] = json.loads((out / "conversion.json").read_text())
    return record


# kind -> where the model is, its prefix, and how many tensors of another model are beside it
PLACES = {
    "bare": ("", "", 0),
    "model_alone": ("model", "", 0),
    "countermeasure": ("", "module.ssl_model.model.", 7),
    "countermeasure_inside": ("model_state_dict", "module.ssl_model.model.", 7),
    "renamed_by_hand": ("generator", "encoders.speech.0.", 1),
    "lightning": ("state_dict", "feature_extractors.0.ssl_model.", 1),
    "whole_module": ("", "module.ssl_model.model.", 7),
    "safetensors": ("", "", 0),
    "deepspeed": ("module", "ssl.", 0),
    "compiled": ("run.checkpoints.last.net.weights", "module._orig_mod.model.", 0),
    "in_a_list": ("0", "", 0),
    "with_other_values": ("model", "ssl.", 1),
    "before_zip": ("", "", 0),
}
CLASSES_OF_CHOICES = ("wav2vec2-ctc", "hubert-ctc", "data2vec-ctc", "classifier", "seq2seq")


def fits(kind: str, family: str) -> bool:
    """Say whether there are such files of a family."""
    if (
        kind == "whole_module"
    ):  # Python cannot pickle these: fairseq makes the classes of their choices as it is imported
        return family not in CLASSES_OF_CHOICES
    if kind in ("s3prl", "cfg_as_args", "other_key", "settings_elsewhere"):  # need a task, which unilm's files have not
        return family != "wavlm"
    # data2vec has several positional convolutions, each numbered
    return kind != "later_pos_conv" or not family.startswith("data2vec")


def fitting(*kinds: str) -> list[tuple[str, str]]:
    """Every kind of file with every family that it is written for."""
    return [(kind, family) for kind in kinds for family in FAMILIES if fits(kind, family)]


@pytest.mark.parametrize(("kind", "family"), fitting(*WITHOUT_SETTINGS, *INVENTED))
def test_settings_from_the_base(kind: str, family: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made(family), tmp_path / "held.pt"
    {**WITHOUT_SETTINGS, **INVENTED}[kind](like.state, like.model, path)
    record = converted(path, tmp_path / "out", like, base=like.path, dictionary=like.dictionary)
    where, prefix, others = PLACES[kind]
    source = {key: record["source"].get(key, usual) for key, usual in (("where", "model"), ("prefix", ""))}
    assert source == {"where": where, "prefix": prefix}
    reason = f"does not start with {prefix}, as the model's names do: it belongs to another model"
    assert [drop["reason"] for drop in record["drops"]].count(reason) == others
    assert record["base"]["name"] == "trainer.pt" and record["base"]["whole"] is True


@pytest.mark.parametrize(("kind", "family"), fitting(*COMPLETE))
def test_everything_is_in_the_file(kind: str, family: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made(family), tmp_path / "held.pt"
    COMPLETE[kind](like.state, like.model, path)
    if kind == "s3prl":  # which leaves the criterion out: nothing of it is in the weights
        record = converted(path, tmp_path / "out", like, ignored=CRITERION, dictionary=like.dictionary)
    else:
        record = converted(path, tmp_path / "out", like)
    assert "base" not in record


def problems_of(path: Path, **options: Any) -> dict[str, str]:
    with pytest.raises(ConvertError) as raised:
        convert.plan(path, **options)
    return {problem.key: problem.detail for problem in raised.value.problems}


# --- ContentVec -------------------------------------------------------------------------------------------------------


def test_legacy_contentvec(made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made("hubert"), tmp_path / "checkpoint_best_legacy_500.pt"
    torch.save(held_models.legacy_contentvec(like.state), path)
    record = converted(path, tmp_path / "out", like)
    assert {"encoder_layers_1", "ctr_layers", "logit_temp_ctr"} <= record["training_only"].keys()
    assert verify(path, tmp_path / "out", devices=["cpu"]).problems == ()
    changed = read(path)
    changed["cfg"]["model"]["crop_seq_to_multiple"] = 2
    torch.save(changed, path)
    assert problems_of(path) == {"crop_seq_to_multiple": "is 2: HubertModel does not crop frames"}


def test_contentvec_without_what_hears_the_speaker(made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made("hubert"), tmp_path / "checkpoint_best_500.pt"
    torch.save(held_models.contentvec(like.state, layers=2), path)
    assert problems_of(path) == {
        "encoder_layers_1": "transformers has no class for the layers that depend on the speaker; --head encoder leaves them out, "
        "as its author's own `legacy` files do"
    }
    record = converted(path, tmp_path / "out", like, head="encoder")
    dropped = {drop["key"] for drop in record["drops"] if drop["reason"].startswith("depends on the speaker")}
    assert len(dropped) == 2 * (8 + 4 + 4) + 2 + 2
    assert verify(path, tmp_path / "out", devices=["cpu"]).problems == ()

    convert.convert(path, tmp_path / "with-head", head="encoder", keep_final_proj=True)
    convert.restore(tmp_path / "with-head", tmp_path / "back.pt")
    back = read(tmp_path / "back.pt")
    assert back["cfg"]["model"]["_name"] == "hubert" and back["cfg"]["task"]["_name"] == "hubert_pretraining"
    assert back["model"].keys() == like.state["model"].keys()
    assert all(torch.equal(back["model"][key], value) for key, value in like.state["model"].items())

    changed = read(path)
    changed["cfg"]["model"] |= {"encoder_layers_1": 3, "layer_norm_first": True}
    torch.save(changed, path)
    assert problems_of(path, head="encoder") == {
        "encoder_layers_1": "is 3, and 2 of the layers have norms that depend on the speaker",
        "layer_norm_first": "is True: ContentVec has its last norm behind the layers that depend on the speaker, HubertModel "
        "before them",
    }


# --- what fairseq builds around other encoders ------------------------------------------------------------------------

CLASSES = {
    "hubert": "HubertForSequenceClassification",
    "data2vec": "Data2VecAudioForSequenceClassification",
}


@pytest.mark.parametrize("family", CLASSES)
def test_classifier_on(family: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    outer, path = made("classifier"), tmp_path / "classifier.pt"
    head = {key: value for key, value in outer.state["model"].items() if key.startswith("pooling_layer.")}
    state = held_models.around(made(family).state, "wav2vec_classification", head, outer.state)
    state["cfg"]["task"] = state["cfg"]["task"] | {"normalize": made(family).state["cfg"]["task"]["normalize"]}
    torch.save(state, path)
    done = convert.convert(path, tmp_path / "out")
    assert done.model.target == CLASSES[family]
    with short_inputs():
        checked = verify(path, tmp_path / "out", devices=["cpu"])
    assert checked.problems == ()
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    back = read(tmp_path / "back.pt")["model"]
    assert back.keys() == state["model"].keys() and all(torch.equal(back[key], state["model"][key]) for key in back)


def test_ctc_around_hubert(made: Callable[[str], Made], tmp_path: Path) -> None:
    outer, path = made("wav2vec2-ctc"), tmp_path / "ctc.pt"
    head = {key: value for key, value in outer.state["model"].items() if key.startswith("w2v_encoder.proj.")}
    state = held_models.around(made("hubert").state, "wav2vec_ctc", head, outer.state)
    state["cfg"]["task"] = state["cfg"]["task"] | {"normalize": False}
    torch.save(state, path)
    assert convert.convert(path, tmp_path / "out").model.target == "HubertForCTC"
    with short_inputs():
        assert verify(path, tmp_path / "out", devices=["cpu"]).problems == ()


# --- every command on every kind ----------------------------------------------------------------------------------------

# two families each, so that every family comes up
ROUND = [
    (kind, list(FAMILIES)[(index + shift) % len(FAMILIES)])
    for index, kind in enumerate({**WITHOUT_SETTINGS, **INVENTED, **COMPLETE})
    for shift in (0, 5)
    if fits(kind, list(FAMILIES)[(index + shift) % len(FAMILIES)])
]


@pytest.mark.parametrize(("kind", "family"), ROUND)
def test_every_command(kind: str, family: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made(family), tmp_path / "held.pt"
    {**WITHOUT_SETTINGS, **INVENTED, **COMPLETE}[kind](like.state, like.model, path)
    asked: dict[str, Any] = {} if kind in COMPLETE else {"base": like.path}
    asked |= {"dictionary": like.dictionary} if kind not in COMPLETE or kind == "s3prl" else {}
    all_commands(path, tmp_path, **asked)


def all_commands(path: Path, folder: Path, **asked: Any) -> str:
    """Run every command on a checkpoint; return the card."""
    assert inspect(path, **asked)["conversion"]["ok"]
    target = convert.plan(path, **asked).target
    assert convert.convert(path, folder / "out", **asked).model.target == target
    given = {name: asked[name] for name in ("base", "dictionary") if name in asked}
    with short_inputs(), few_inputs("speech-even", "quiet", "padded-batch"), computed_once():
        record(path, folder / "answers.safetensors", long=False, **asked)
        live = verify(path, folder / "out", devices=["cpu"], long=False, **given)
        recorded = verify(
            path, folder / "out", reference=folder / "answers.safetensors", devices=["cpu"], long=False, **given
        )
    assert live.problems == () and live.passed
    assert recorded.problems == () and recorded.passed
    card = publish(folder / "out", "me/model", dry_run=True).card_diff
    if "base" in asked:
        assert f"- Settings: from `{asked['base'].name}`, sha256 `{sha256_of(asked['base'])}`" in card.replace(
            "+-", "-"
        )
    try:
        convert.restore(folder / "out", folder / "back.pt")
    except ConvertError as error:  # without the head that pretraining had
        assert error.code == "dropped", error
    else:
        kept = {name: asked[name] for name in ("head", "data_config") if name in asked}
        convert.convert(folder / "back.pt", folder / "again", **kept)
        ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("out", "again"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return card


def test_moving_average(made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made("wav2vec2-ctc"), tmp_path / "held.pt"
    average = {key: value * 0.75 if value.is_floating_point() else value for key, value in like.state["model"].items()}
    extra = like.state["extra_state"] | {"ema": average, "ema_fp32_params": average}
    torch.save(like.state | {"extra_state": extra}, path)
    card = all_commands(path, tmp_path, ema=True)
    assert "- The model is in `extra_state.ema`" in card and "--ema`" in card
    torch.save(like.state | {"model": average}, tmp_path / "average.pt")
    convert.convert(tmp_path / "average.pt", tmp_path / "average")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "average"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    convert.convert(path, tmp_path / "weights")
    assert not torch.equal(load_file(tmp_path / "weights/model.safetensors")["lm_head.weight"], ours["lm_head.weight"])


def test_dictionary_of_the_user_s_own_class(made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made("wav2vec2-ctc"), tmp_path / "held.pt"
    own = Lexicon()
    own.__dict__ |= vars(like.state["task_state"]["target_dictionary"])
    own.language = "hi"
    torch.save(like.state | {"task_state": {"target_dictionary": own}, "recipe": Recipe.FINE_TUNING}, path)
    converted(path, tmp_path / "plain", like)
    all_commands(path, tmp_path)


class Lexicon:
    """A dictionary of somebody's own, which has what fairseq's has."""

    language: str


class Recipe(enum.Enum):
    """An enumeration of somebody's own."""

    FINE_TUNING = "fine-tuning"


# --- a model without its head ---------------------------------------------------------------------------------------------

HEADS = ("final_proj.", "quantizer.", "project_q.", "w2v_encoder.proj.", "pooling_layer.")


@pytest.mark.parametrize(
    "family", ["wav2vec2", "wav2vec2-ctc", "hubert-ctc", "data2vec-ctc", "conformer", "classifier"]
)
def test_trimmed_to_its_encoder(family: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made(family), tmp_path / "held.pt"
    torch.save(like.state | {"model": {k: v for k, v in like.state["model"].items() if not k.startswith(HEADS)}}, path)
    with pytest.raises(ConvertError) as raised:
        convert.plan(path)
    assert raised.value.hint == "everything but the head is there: --head encoder converts the model without it"
    assert {problem.code for problem in raised.value.problems} == {"missing-tensor"}
    assert all(problem.key.startswith(HEADS) for problem in raised.value.problems)
    all_commands(path, tmp_path, head="encoder")
    cut = {k: v for k, v in like.state["model"].items() if ".layers.1." not in k and not k.startswith(HEADS)}
    torch.save(like.state | {"model": cut}, path)
    with pytest.raises(ConvertError) as raised:
        convert.plan(path)
    hint = "tensors and settings are not of the same model: convert the file as its trainer wrote it"
    assert raised.value.hint == hint  # more than the head is missing


# --- settings -------------------------------------------------------------------------------------------------------------


def test_settings_of_the_model_alone(made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made("hubert"), tmp_path / "held.pt"
    parameters = {"model": like.state["cfg"]["model"], "lr": 1e-4}
    torch.save({"state_dict": like.state["model"], "hyper_parameters": {"upstream": parameters}}, path)
    with pytest.raises(ConvertError) as raised:
        convert.plan(path)
    assert [str(problem) for problem in raised.value.problems] == [
        "normalize: missing from the checkpoint's settings; it has no safe default"
    ]
    assert raised.value.hint == (
        "say whether the waveforms were normalised, as task.normalize of the recipe does: --normalize or --no-normalize"
    )
    converted(path, tmp_path / "plain", like, normalize=False)
    all_commands(path, tmp_path, normalize=False)
    features = json.loads(
        (convert.convert(path, tmp_path / "yes", normalize=True).path / "preprocessor_config.json").read_text()
    )
    assert features["do_normalize"] is True
    with pytest.raises(ConvertError, match=r"trainer\.pt: its settings say normalize = False") as raised:
        convert.plan(like.path, normalize=True)
    assert raised.value.hint == "leave --normalize out"


def test_settings_of_nobody_knows_which_model(made: Callable[[str], Made], tmp_path: Path) -> None:
    like, path = made("hubert"), tmp_path / "held.pt"
    settings = like.state["cfg"]
    other = settings | {"model": settings["model"] | {"encoder_attention_heads": 8}}
    held = {"net": like.state["model"], "runs": {"teacher": {"config": other}, "student": {"config": settings}}}
    torch.save(held, path)
    with pytest.raises(ConvertError) as raised:
        convert.plan(path)
    assert raised.value.message == (
        "held.pt holds the weights of a fairseq model in `net`, and the settings of several models, of which none is "
        "said to be this one's: `runs.teacher.config`, `runs.student.config`; nothing was written"
    )
    converted(path, tmp_path / "out", like, base=like.path)
    held["runs"]["teacher"]["config"] = settings  # both are the same: whose they are does not matter
    torch.save(held, path)
    converted(path, tmp_path / "same", like)


def test_wrapped_models_of_other_kinds(tmp_path: Path) -> None:
    path, *_ = speech_to_text_models.save("tied", tmp_path)
    state = read(path)["model"]
    torch.save({"state_dict": {f"net.{key}": value for key, value in state.items()}}, tmp_path / "held.pt")
    all_commands(tmp_path / "held.pt", tmp_path, base=path, data_config=tmp_path / "config.yaml")


def test_numpy_arrays(made: Callable[[str], Made], tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in made("hubert").state["model"].items()}
    torch.save({"model": arrays}, tmp_path / "held.pt", pickle_protocol=2)
    with pytest.raises(ConvertError) as raised:
        inspect(tmp_path / "held.pt")
    assert raised.value.message == "held.pt: its model holds no tensor, but arrays of numpy; nothing was written"
    assert raised.value.hint == "save them as tensors: torch.from_numpy(array)"
