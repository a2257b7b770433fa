"""HuBERT: as it was pretrained, with a CTC head, with a decoder."""

from __future__ import annotations

import types
from typing import Any

from .building import classes_of, complete, fine_tuned, outer
from .ctc import CtcReference
from .reference import HeadlessReference
from .seq2seq import Seq2SeqReference
from .tokens import dictionary_of


def build_hubert(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build HuBERT as for fine-tuning: without the dictionaries of its pretraining, whose head is left out."""
    from omegaconf import OmegaConf

    configuration, model = classes_of("hubert")
    made = complete(configuration, outer(settings), ignored)
    task = types.SimpleNamespace(cfg=types.SimpleNamespace(sample_rate=16000), dictionaries=[None])
    return model.build_model(OmegaConf.create(dict(made, label_rate=made["label_rate"] or 50.0)), task)


def fine_tuned_hubert(settings: Any, cls: Any, ignored: list[str], patches: list[str]) -> Any:
    """The configuration of a fine-tuned HuBERT, for a task whose state has no dictionaries of the pretraining."""
    made = fine_tuned(settings, cls, ignored)
    made.w2v_args.task = {"_name": "hubert_pretraining", "data": "", "normalize": made.normalize, "sample_rate": 16000}
    made.w2v_args.model.label_rate = made.w2v_args.model.label_rate or 50.0
    patches.append("no dictionaries of the pretraining, which fairseq would look for in files beside the training data")
    return made


def build_hubert_ctc(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `HubertCtc`."""
    from fairseq.models.hubert import hubert_asr

    made = fine_tuned_hubert(settings, hubert_asr.HubertCtcConfig, ignored, patches)
    if "autoregressive" not in made:
        made.autoregressive = False
        patches.append(
            "autoregressive=False given to HubertCtcConfig: HubertEncoder reads it, and there is no such field"
        )
    task = types.SimpleNamespace(target_dictionary=range(symbols), state_dict=lambda: {"dictionaries": [None]})
    return hubert_asr.HubertCtc.build_model(made, task)


def build_hubert_seq2seq(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `HubertSeq2SeqModel`."""
    from fairseq.models.hubert import hubert_asr

    configuration = fine_tuned_hubert(settings, hubert_asr.HubertSeq2SeqConfig, ignored, patches)
    configuration.autoregressive, configuration.seq2seq_path = True, ""
    task = types.SimpleNamespace(source_dictionary=None, target_dictionary=dictionary_of(range(symbols)))
    task.state_dict = lambda: {"dictionaries": [None]}
    return hubert_asr.HubertSeq2SeqModel.build_model(configuration, task)


class HubertReference(HeadlessReference):
    """HuBERT as it was pretrained."""

    head = ("final_proj.", "label_embs_concat", "target_glu.")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True  # in every version it splits the mask evenly, and is asked where that agrees


class HubertCtcReference(HubertReference, CtcReference):
    """HuBERT with a CTC head."""


class HubertSeq2SeqReference(HubertReference, Seq2SeqReference):
    """HuBERT with a decoder."""


ENCODERS = {"hubert": ("fairseq.models.hubert.hubert", "HubertConfig", "HubertModel")}
ARCHITECTURES = {
    "hubert": (build_hubert, HubertReference),
    "hubert_ctc": (build_hubert_ctc, HubertCtcReference),
    "hubert_seq2seq": (build_hubert_seq2seq, HubertSeq2SeqReference),
}
