"""data2vec audio, whose pretraining head and teacher are left out as in fine-tuning."""

from __future__ import annotations

from .building import Encoder
from .reference import HeadlessReference


class Data2VecReference(HeadlessReference):
    """data2vec audio, alone or inside of another model."""

    head = ("final_proj.",)


ENCODERS = {
    "data2vec_audio": Encoder(
        "fairseq.examples.data2vec.models.data2vec_audio",
        "Data2VecAudioConfig",
        "Data2VecAudioModel",
        Data2VecReference,
        "audio_pretraining",
        {},
    )
}
