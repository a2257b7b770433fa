"""One tiny checkpoint of every kind, layout and container that fairseq's trainers have written, with what converting it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import classification_models
import conformer_models
import data2vec_models
import fairseq_models
import hubert_models
import mms_models
import seq2seq_models
import speech_to_text_models
import wavlm_models

Kind = tuple[Path, dict[str, Any]]


def _of(save: Callable[..., Path], variant: str, **options: Any) -> Callable[[Path], Kind]:
    return lambda folder: (save(variant, folder / "model.pt", **options), {})


def _with_dictionary(folder: Path) -> Kind:
    """The layout of 2020, whose files carry no dictionary."""
    symbols = folder / "dict.ltr.txt"
    symbols.write_text("".join(f"{symbol} 1\n" for symbol in fairseq_models.VARIANTS["ctc_large"].symbols))
    path = fairseq_models.save("ctc_large", folder / "model.pt", layout="namespace", container="legacy")
    return path, {"dictionary": symbols}


def _speech_to_text(layout: str) -> Callable[[Path], Kind]:
    def make(folder: Path) -> Kind:
        path = speech_to_text_models.save("to_many", folder, layout=layout)[0]
        return path, {"data_config": folder / "config.yaml", "language": "de"}

    return make


KINDS: dict[str, Callable[[Path], Kind]] = {
    "ctc": _of(fairseq_models.save, "ctc_base", adam=True),
    "ctc-legacy": _of(fairseq_models.save, "ctc_base", container="legacy", adam=True),
    "ctc-omegaconf": _of(fairseq_models.save, "ctc_large", layout="omegaconf"),
    "ctc-interpolated": _of(fairseq_models.save, "ctc_large", layout="interpolated", container="legacy"),
    "ctc-2020": _with_dictionary,
    "pretrained": _of(fairseq_models.save, "pretrained_base"),
    "pretrained-2020": _of(fairseq_models.save, "pretrained_large", layout="namespace", container="legacy"),
    "hubert": _of(hubert_models.save, "hubert_large_batch_norm"),
    "hubert-ctc": _of(hubert_models.save, "hubert_ctc_base"),
    "hubert-in-wav2vec-ctc": _of(hubert_models.save, "wav2vec_ctc_around_hubert"),
    "data2vec": _of(data2vec_models.save, "pretrained"),
    "data2vec-ctc": _of(data2vec_models.save, "ctc", container="legacy"),
    "conformer": _of(conformer_models.save, "ctc_relative"),
    "wavlm": _of(wavlm_models.save, "wavlm_large"),
    "adapters": _of(mms_models.save, "several"),
    "mms": _of(mms_models.save, "mms", container="legacy"),
    "classifier": _of(classification_models.save, "classification_base"),
    "seq2seq": _of(seq2seq_models.save, "sinusoidal"),
    "speech-to-text": _speech_to_text("cfg"),
    "speech-to-text-2020": _speech_to_text("namespace"),
}
