"""data2vec audio as it was pretrained."""

from __future__ import annotations

from .building import build_pretrained
from .reference import HeadlessReference


class Data2VecReference(HeadlessReference):
    """data2vec audio as it was pretrained; its teacher is a dict of tensors."""

    head = ("final_proj.", "_ema")


MODULE = "fairseq.examples.data2vec.models.data2vec_audio"
ENCODERS = {"data2vec_audio": (MODULE, "Data2VecAudioConfig", "Data2VecAudioModel")}
ARCHITECTURES = {"data2vec_audio": (build_pretrained, Data2VecReference)}
