"""HuBERT: as it was pretrained, with a CTC head, with a decoder."""

from __future__ import annotations

import contextlib
import types
from typing import Any

from .building import Encoder, fine_tuned
from .ctc import CtcReference
from .reference import HeadlessReference
from .seq2seq import Seq2SeqReference
from .tokens import dictionary_of


def build_hubert_ctc(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `HubertCtc`."""
    from fairseq.models.hubert import hubert_asr

    made = fine_tuned(settings, hubert_asr.HubertCtcConfig, ignored)
    if "autoregressive" not in made:
        made.autoregressive = False
        patches.append(
            "autoregressive=False given to HubertCtcConfig: HubertEncoder reads it, and there is no such field"
        )
    task = types.SimpleNamespace(target_dictionary=range(symbols), state_dict=dict)
    return hubert_asr.HubertCtc.build_model(made, task)


def build_hubert_seq2seq(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `HubertSeq2SeqModel`."""
    from fairseq.models.hubert import hubert_asr

    made = fine_tuned(settings, hubert_asr.HubertSeq2SeqConfig, ignored, autoregressive=True, seq2seq_path="")
    task = types.SimpleNamespace(source_dictionary=None, target_dictionary=dictionary_of(range(symbols)))
    task.state_dict = dict
    return hubert_asr.HubertSeq2SeqModel.build_model(made, task)


@contextlib.contextmanager
def patched(patches: list[str]) -> Any:
    """Let HuBERT be built inside of a fine-tuned model without the dictionaries of its pretraining."""
    try:
        from fairseq.tasks.hubert_pretraining import HubertPretrainingTask
    except ImportError:  # fairseq 0.10
        yield
        return
    original = HubertPretrainingTask.load_dictionaries
    patch = "no dictionaries of the pretraining, which fairseq would look for in files beside the training data"

    def without(_: Any) -> Any:
        patches.append(patch)
        return [None]

    HubertPretrainingTask.load_dictionaries = without
    try:
        yield
    finally:
        HubertPretrainingTask.load_dictionaries = original


class HubertReference(HeadlessReference):
    """HuBERT, alone or inside of another model."""

    head: tuple[str, ...] = ("final_proj.", "label_embs_concat", "target_glu.")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True  # in every version it splits the mask evenly, and is asked where that agrees
        if any(type(module).__name__ == "Wav2VecEncoder" for module in self.model.modules()):
            self._answer_with_a_dict()

    def _answer_with_a_dict(self) -> None:
        """Let `extract_features` answer as `Wav2VecEncoder.forward` reads it since 2021; HuBERT's own encoder reads a tuple."""
        original = self.w2v.extract_features

        def extract_features(*arguments: Any, **options: Any) -> Any:
            x, padding_mask = original(*arguments, **options)
            return {"x": x, "padding_mask": padding_mask, "layer_results": None}

        self.w2v.extract_features = extract_features
        self.info["patches"].append("HuBERT's features handed to Wav2VecEncoder by name: it takes no tuple")


class ContentVecReference(HubertReference):
    """ContentVec without the layers of the speaker: HuBERT."""

    def fill(self, weights: Any) -> None:
        """Load what HuBERT has too."""
        layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
        behind = tuple("encoder.layers.%s." % i for i in layers if int(i) >= len(self.w2v.encoder.layers))
        self.head = (*self.head, *behind, "encoder.cond_layer_norm.", "layer_proj.")
        super().fill(weights)


_MODEL = ("fairseq.models.hubert.hubert", "HubertConfig", "HubertModel")
_TASK = ("hubert_pretraining", {"label_rate": 50.0})
ENCODERS = {
    "hubert": Encoder(*_MODEL, HubertReference, *_TASK),
    "contentvec": Encoder(*_MODEL, ContentVecReference, *_TASK),
}
ARCHITECTURES = {
    "hubert_ctc": (build_hubert_ctc, CtcReference),
    "hubert_seq2seq": (build_hubert_seq2seq, Seq2SeqReference),
}
