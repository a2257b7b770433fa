"""What the tests of `evaluate` share: recordings, manifests and tiny random models."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RATE = 16_000
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "|")
SENTENCES = ("THE FOX", "A DOG RUNS", "THE BIRD SINGS", "A KING", "THE COOK SLEEPS NOW")
LONG = tuple(f"{sentence} {number}" for sentence in SENTENCES for number in ("ONE", "TWO", "TEN"))


def noise(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return path


def letters(sentence: str) -> str:
    return " ".join(sentence.replace(" ", "|")) + " |"


def write_manifest(folder: Path, sentences: Sequence[str] = SENTENCES, root: str | None = None) -> Path:
    """Recordings of different lengths in `folder/audio`, with a manifest and both kinds of transcripts."""
    lengths = [6_000 + 1_370 * ((7 * index) % 5) for index in range(len(sentences))]
    names = [f"clip-{index}.wav" for index in range(len(sentences))]
    for index, (name, length) in enumerate(zip(names, lengths, strict=True)):
        write_audio(folder / "audio" / name, noise(length, index))
    rows = [f"{name}\t{length}" for name, length in zip(names, lengths, strict=True)]
    manifest = folder / "set.tsv"
    manifest.write_text("\n".join([root or str(folder / "audio"), *rows]) + "\n")
    manifest.with_suffix(".wrd").write_text("\n".join(sentences) + "\n")
    manifest.with_suffix(".ltr").write_text("\n".join(map(letters, sentences)) + "\n")
    return manifest


def write_model(
    folder: Path, *, norm: str = "layer", delimiter: bool = True, upper: bool = True, seed: int = 0
) -> Path:
    """A random Wav2Vec2ForCTC of two layers, laid out as `convert` lays out a model directory."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    torch.manual_seed(seed)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if upper else "abcdefghijklmnopqrstuvwxyz"
    tokens = [*(SPECIAL if delimiter else SPECIAL[:-1]), *alphabet]
    config = Wav2Vec2Config(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        pad_token_id=0,
        bos_token_id=1,
    )
    model = Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():  # random logits, far enough apart to write many letters and no special token
        model.lm_head.weight.normal_(0, 1)
        model.wav2vec2.feature_projection.projection.weight.mul_(50)  # else every frame is much like the next
        model.lm_head.bias[: len(SPECIAL) - 1] = -20
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Wav2Vec2CTCTokenizer(folder / "vocab.json", **names, word_delimiter_token="|" if delimiter else None)
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    (folder / "processor_config.json").unlink(missing_ok=True)
    return folder


def run(*arguments: Any) -> tuple[int, str, str]:
    """Run the command line in this process; return its status, stdout and stderr."""
    from click.testing import CliRunner

    from convert.cli import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(code: str, *arguments: Any) -> str:
    status, out, _ = run("evaluate", *arguments, "--json")
    printed = json.loads(out)
    assert (status, printed["ok"], printed["problems"][0]["code"]) == (2, False, code)
    return str(printed["problems"][0]["detail"])


def write_dataset(folder: Path, rate: int = RATE, columns: tuple[str, ...] = ("text",)) -> Path:
    """A local dataset as the Hub keeps them: a parquet file with the recordings' bytes."""
    datasets, soundfile = pytest.importorskip("datasets"), pytest.importorskip("soundfile")
    rows = []
    for index, sentence in enumerate(SENTENCES):
        buffer = io.BytesIO()
        soundfile.write(buffer, noise(6000 + 500 * index, index), rate, format="FLAC")
        audio = {"bytes": buffer.getvalue(), "path": f"{index}.flac"}
        rows.append({"id": f"clip-{index}", "audio": audio, **dict.fromkeys(columns, sentence)})
    features = {"id": datasets.Value("string"), "audio": datasets.Audio()}
    features |= {column: datasets.Value("string") for column in columns}
    (folder / "clean").mkdir(parents=True)
    made = datasets.Dataset.from_list(rows).cast(datasets.Features(features))  # `features=` would need torchcodec
    made.to_parquet(folder / "clean" / "test-00000.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: clean\n  data_files:\n  - {split: test, path: clean/test-*.parquet}\n---\n"
    )
    return folder
