"""Runs of fairseq2, their steps, shards, settings and tokenizers, as its own code wrote them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fairseq2_models as models
import pytest
import sentencepiece
import torch
import yaml

from convert.checkpoint.container import Container
from convert.checkpoint.fairseq2 import Options, find_tokenizer, read_settings, read_tokenizer
from convert.checkpoint.fairseq2_architectures import ARCHITECTURES, ASR, PRETRAINED
from convert.checkpoint.fairseq2_files import family_of, find_run, join
from convert.checkpoint.layouts import open_container
from convert.checkpoint.sentencepiece import read_model
from convert.checkpoint.stored import StoredTensor
from convert.errors import CheckpointError
from convert.pieces import read_array
from convert.sources import open_source


def joined(path: Path) -> tuple[Container, dict[str, StoredTensor]]:
    run = find_run(path)
    parts = []
    for file in run.files:
        container = open_container(file)
        parts.append((container, container.value))
    return join(parts, run.path.name)


def assert_equal(path: Path, meant: dict[str, torch.Tensor]) -> None:
    container, tensors = joined(path)
    assert list(tensors) == list(meant)
    for key, value in meant.items():
        assert torch.equal(torch.from_numpy(read_array(container, tensors[key])), value), key
    container.close()


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        joined(path)
    return caught.value


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of three shards, the second the best; change copies only."""
    folder = tmp_path_factory.mktemp("fairseq2") / "ws_3.1a2b"
    return models.save_run("ctc_omnilingual", folder, shards=3, scores=(0.5, 1.5, 1.0))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "ws_3.1a2b"))


@pytest.mark.parametrize(("name", "shards"), [("ctc_base", 1), ("ctc_large", 2), ("pretraining_base", 3)])
def test_shards_are_joined_bit_for_bit(name: str, shards: int, tmp_path: Path) -> None:
    models.save_run(name, tmp_path, shards=shards)
    assert_equal(tmp_path, models.build(name).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), [("pretraining_large", "v2"), ("ctc_base", "v1")])
def test_fsdp_writes_such_shards(name: str, version: str, tmp_path: Path) -> None:
    """Three processes of a real run, which save with the checkpoint manager: what the other tests' shards stand for."""
    environment = {**os.environ, "MASTER_PORT": str(20000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, models.__file__, name, str(tmp_path), version]
    ranks = [subprocess.Popen([*line, str(rank), "3"], env=environment) for rank in range(3)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0, 0]
    whole = torch.load(tmp_path / "whole.pt")
    assert_equal(tmp_path, whole)
    for rank, file in enumerate(sorted(tmp_path.rglob("sdp_*.pt"))):
        found, meant = torch.load(file), models.shard(whole, rank, 3)
        assert list(found) == list(meant)
        for key, value in meant.items():  # version 1 pads no storage, and gives what has no rows one axis
            assert torch.equal(found[key], value) or value.numel() == found[key].numel() == 0, key
            if version == "v2":
                assert found[key].untyped_storage().nbytes() == value.untyped_storage().nbytes(), key


@pytest.mark.parametrize("name", ["best", "best_checkpoint", "last", "last_checkpoint", "step_300"])
@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_steps_by_name(name: str, inside: str, run: Path) -> None:
    if (inside, name) == ("", "step_300"):
        return
    found = find_run(run / inside / name)
    assert found.path.name == ("step_200" if name.startswith("best") else "step_300")
    assert [file.name for file in found.files] == ["sdp_00.pt", "sdp_01.pt", "sdp_02.pt"]
    assert run in found.folders


@pytest.mark.parametrize("inside", ["", "model", "model/pp_00", "model/pp_00/tp_00", "model/pp_00/tp_00/sdp_01.pt"])
def test_any_folder_of_a_step(inside: str, run: Path) -> None:
    found = find_run(run / "checkpoints/step_100" / inside)
    assert found.path.name == "step_100" and len(found.files) == 3
    assert find_tokenizer(found, Options()) == run / "tokenizer.model"


def test_an_older_step(tmp_path: Path) -> None:
    """0.3 and 0.4 wrote `step_N/model.pt` and `step_N/score.txt`."""
    for step, score in ((10, "0.25"), (20, "0.125")):
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
        models.save_file("ctc_base", tmp_path / f"checkpoints/step_{step}/model.pt")
        (tmp_path / f"checkpoints/step_{step}/score.txt").write_text(f"{score}\n")
    found = find_run(tmp_path / "best")
    assert found.files == (tmp_path / "checkpoints/step_10/model.pt",)


def test_several_steps_are_listed(run: Path) -> None:
    error = refused(run)
    assert error.code == "several-steps"
    assert str(error) == (
        "checkpoints holds 3 steps: step_100 (score 0.5), step_200 (score 1.5), step_300 (score 1); nothing was written"
    )
    assert error.hint == "name one of them: checkpoints/step_300, or checkpoints/best or checkpoints/last"


def test_no_best_without_scores(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints/scores")
    assert refused(copy / "best").code == "no-score"
    (copy / "checkpoints/scores").mkdir()
    (copy / "checkpoints/scores/step_100.txt").write_text("good\n")
    assert refused(copy / "best").code == "bad-score"


SHARDS = "checkpoints/step_100/model/pp_00/tp_00"


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / SHARDS / "sdp_02.pt").unlink()
    error = refused(copy / "checkpoints/step_100")
    assert error.code == "shard"
    assert str(error) == "step_100: 2 shards: rows 44 to 63 of 64 are missing (sdp_02.pt); nothing was written"
    (copy / SHARDS / "sdp_01.pt").unlink()
    message = "step_100: sdp_00.pt is one shard of 3: rows 22 to 63 of 64 are missing (sdp_01.pt, sdp_02.pt)"
    assert str(refused(copy / SHARDS / "sdp_00.pt")) == f"{message}; nothing was written"


def test_a_gap_among_shards(copy: Path) -> None:
    (copy / SHARDS / "sdp_01.pt").unlink()
    assert str(refused(copy / SHARDS)) == "step_100: sdp_01.pt missing among its 2 shards; nothing was written"


@pytest.mark.parametrize(("source", "target"), [("sdp_02.pt", "sdp_03.pt"), ("sdp_02.pt", "sdp_01.pt")])
def test_shards_that_are_not_of_one_model(source: str, target: str, copy: Path) -> None:
    shutil.copy(copy / SHARDS / source, copy / SHARDS / target)
    error = refused(copy / SHARDS)
    assert error.code == "shard" and "the files are not the shards of one model" in str(error) and target in str(error)


@pytest.mark.parametrize(("folder", "what"), [("tp_01", "tensor"), ("../pp_01", "pipeline")])
def test_other_parallelism_is_refused(folder: str, what: str, copy: Path) -> None:
    (copy / SHARDS / ".." / folder).resolve().mkdir()
    error = refused(copy / "checkpoints/step_100")
    assert error.code == "unsupported-parallelism" and what in str(error)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step_5.tmp").mkdir()
    assert refused(tmp_path).code == "directory"


def test_several_files_have_one_digest(run: Path) -> None:
    container, _ = joined(run / "best")
    done = subprocess.run("sha256sum sdp_*.pt | sha256sum", shell=True, cwd=container.path.parent, capture_output=True)
    assert container.sha256() == done.stdout.decode().split()[0]
    container.close()
    with open_source(run / "best") as opened:
        assert opened.sha256() == done.stdout.decode().split()[0]
        assert opened.size == sum(file.stat().st_size for file in container.path.parent.iterdir())


# --- settings -------------------------------------------------------------------------------------------------------


def settings(path: Path, family: str = ASR, **options: Any) -> dict[str, Any]:
    return read_settings(find_run(path), family, Options(**options))[0]


def test_model_yaml(run: Path) -> None:
    found = settings(run / "best")
    assert found["model"] == {"_name": "fairseq2.wav2vec2_asr"} | models.flat("ctc_omnilingual")
    assert found["task"] == {
        "_name": "fairseq2",
        "sample_rate": 16000,
        "settings_from": "model.yaml",
        "normalize": True,
        "normalize_from": "config.yaml: dataset.asr_task_config.normalize_audio",
    }


def test_model_yaml_of_0_4(copy: Path) -> None:
    file = copy / "checkpoints/model.yaml"
    card = yaml.safe_load(file.read_text())
    inner = card["model_config"].pop("encoder_config")
    inner["feature_gradient_scale"] = inner.pop("feature_grad_scale")
    size = card["model_config"].pop("target_vocab_size")
    card["model_config"] |= {"encoder_config": {"_set_": inner}, "vocab_info": {"size": size, "unk_idx": 3}}
    file.write_text(yaml.safe_dump({**card, "model_config": {"_set_": card["model_config"]}, "num_shards": 1}))
    assert settings(copy / "best")["model"] == {"_name": "fairseq2.wav2vec2_asr"} | models.flat(
        models.config("ctc_omnilingual")[1]
    )


CARDS = """
name: mine
base: omniASR_CTC_300M
checkpoint: /somewhere/alone.pt
model_config: {target_vocab_size: 40}
---
name: omniASR_CTC_300M
model_family: wav2vec2_asr
model_arch: 300m
checkpoint: https://example.org/omniASR-CTC-300M.pt
---
name: omniASR_W2V_1B
model_family: wav2vec2
model_arch: 1b
"""


def test_asset_cards(tmp_path: Path) -> None:
    path = models.save_file("ctc_base", tmp_path / "alone.pt")
    (tmp_path / "cards.yaml").write_text(CARDS)
    found = settings(path)
    assert found["model"] == {"_name": "fairseq2.wav2vec2_asr"} | ARCHITECTURES[ASR]["300m"] | {"target_vocab_size": 40}
    assert found["task"]["settings_from"] == "cards.yaml over architecture 300m"
    assert found["task"]["normalize"] is True and "300m" in found["task"]["normalize_from"]
    assert settings(path, PRETRAINED)["model"]["model_dim"] == 1280
    (tmp_path / "alone.pt").rename(tmp_path / "another.pt")
    with pytest.raises(CheckpointError) as caught:
        settings(tmp_path / "another.pt")
    assert str(caught.value) == "cards.yaml names 2 models of wav2vec2_asr: mine, omniASR_CTC_300M; nothing was written"


def test_architectures_by_name(tmp_path: Path) -> None:
    path = models.save_file("ctc_base", tmp_path / "alone.pt")
    with pytest.raises(CheckpointError) as caught:
        settings(path)
    assert caught.value.code == "no-settings" and "--arch NAME" in caught.value.hint
    with pytest.raises(CheckpointError) as caught:
        settings(path, architecture="300M")
    assert caught.value.code == "unknown-architecture" and "300m, 1b, 3b, 7b" in caught.value.hint
    found = settings(path, architecture="large_lv60k_100h")
    assert found["task"]["settings_from"] == "architecture large_lv60k_100h" and "normalize" not in found["task"]
    assert settings(path, architecture="base_10h", normalize=False)["task"]["normalize"] is False


def test_architectures_are_fairseq2s() -> None:
    from fairseq2.models.wav2vec2 import Wav2Vec2Config
    from fairseq2.models.wav2vec2.asr import Wav2Vec2AsrConfig
    from fairseq2.models.wav2vec2.asr.config import register_wav2vec2_asr_configs
    from fairseq2.models.wav2vec2.config import register_wav2vec2_configs
    from fairseq2.runtime.config_registry import get_config
    from fairseq2.runtime.dependency import DependencyContainer

    container = DependencyContainer()
    register_wav2vec2_configs(container)
    register_wav2vec2_asr_configs(container)
    registered = {
        PRETRAINED: (Wav2Vec2Config, ["base", "large", "large_lv60k"]),
        ASR: (Wav2Vec2AsrConfig, [f"{n}_{h}" for n in ("base", "large", "large_lv60k") for h in ("10h", "100h")]),
    }
    for family, (kind, names) in registered.items():
        for name in names:
            assert ARCHITECTURES[family][name] == models.flat(get_config(container, kind, name)), name


@pytest.mark.parametrize(
    ("dataset", "normalize"),
    [
        ({"asr_task_config": {"normalize_audio": False}}, False),
        ({"ssl_task_config": {"normalize_audio": True}}, True),
        ({"normalize_audio": True}, True),
        ({"name": "mine"}, None),
    ],
)
def test_where_normalisation_is_said(dataset: Any, normalize: bool | None, copy: Path) -> None:
    (copy / "config.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
    assert settings(copy / "best")["task"].get("normalize") is normalize


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("llama_decoder.layers.0.x", "wav2vec2_llama"),
        ("lang_embeddings.weight", "wav2vec2_llama"),
        ("w2v2_model.final_proj.weight", "w2v-BERT"),
    ],
)
def test_other_models_are_refused_by_name(key: str, what: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        family_of(["encoder_frontend.post_extract_layer_norm.weight", "final_proj.weight", key], "model.pt")
    assert caught.value.code == "unsupported-model" and what in str(caught.value)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def assert_as_the_library(path: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = read_model(path.read_bytes())
    count = range(library.vocab_size())
    assert model.pieces == tuple(library.id_to_piece(index) for index in count)
    assert [kind == 3 for kind in model.kinds] == [library.is_control(index) for index in count]
    assert [kind == 2 for kind in model.kinds] == [library.is_unknown(index) for index in count]
    names = {name: getattr(library, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
    assert dict(model.ids) == names
    if names["unk"] >= 0:
        assert library.decode_pieces([library.id_to_piece(names["unk"])] * 2) == model.unk_surface * 2


def test_a_tokenizer_is_read_as_the_library_does(tmp_path: Path) -> None:
    assert_as_the_library(models.save_tokenizer(tmp_path / "a.model"))
    surface = models._field(44, "<?>")
    assert_as_the_library(
        models.save_tokenizer(tmp_path / "b.model", trainer=surface, special=["<s>", "<unk>", "</s>"])
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "good bye", "ñandú árbol"] * 20),
        model_prefix=str(tmp_path / "c"),
        model_type="char",
        vocab_size=22,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    assert_as_the_library(tmp_path / "c.model")
    dictionary, decoding, _ = read_tokenizer(tmp_path / "c.model")
    assert dictionary.special == ("<s>", "<pad>", "</s>") and "▁" in dictionary.symbols
    assert decoding["dummy_prefix"] and decoding["extra_whitespace"]


def test_what_is_not_a_tokenizer(tmp_path: Path, run: Path) -> None:
    (tmp_path / "a.model").write_text("not a model")
    with pytest.raises(CheckpointError, match=r"a\.model is not a sentencepiece model") as caught:
        read_tokenizer(tmp_path / "a.model")
    assert caught.value.code == "bad-dictionary"


def test_several_tokenizers_are_listed(copy: Path) -> None:
    shutil.copy(copy / "tokenizer.model", copy / "other.model")
    found = find_run(copy / "best")
    with pytest.raises(CheckpointError, match=r"holds several tokenizers: other\.model, tokenizer\.model") as caught:
        find_tokenizer(found, Options())
    assert caught.value.code == "several-tokenizers"
    assert find_tokenizer(found, Options(tokenizer=copy / "other.model")) == copy / "other.model"
