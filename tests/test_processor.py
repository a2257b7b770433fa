"""Vocabularies of every kind decode as fairseq decodes them, with the processor that plain transformers loads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.data.data_utils import post_process
from fairseq.tasks.audio_finetuning import AudioFinetuningConfig, AudioFinetuningTask
from fairseq_models import BASE, Variant, dictionary, save

import convert

LETTERS = tuple("|ETAOIN'")
# name -> (symbols, labels, the criterion's post_process)
VOCABULARIES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "letters": (LETTERS, "ltr", "letter"),
    "lower_case": (tuple("|etaoin'"), "ltr", "letter"),
    "no_delimiter": (tuple("ETAOIN"), "ltr", "letter"),
    "sep_instead": (("<sep>", *"ETAOIN"), "ltr", "letter"),
    "ctc_blank_symbol": ((*LETTERS, "<ctc_blank>"), "ltr", "letter"),
    "multi_character_units": (("|", "ing", "th", "e", "a", "th|"), "ltr", "letter"),
    "unicode": (("|", "ß", "日", "本", "é", "e\u0301", "🙂"), "ltr", "letter"),
    "trailing_spaces": (("|", "E ", "T ", "A"), "ltr", "letter"),
    "madeupwords": ((*LETTERS, "madeupword0000", "madeupword0001"), "ltr", "letter"),
    "phonemes": (("aa", "b", "ch", "sil", "ɜː"), "phn", "letter"),
    "no_post_process": (("aa", "b", "ch"), "ltr", "none"),
    "sentencepiece": (("▁the", "▁c", "at", "s", "▁", "▁a"), "ltr", "sentencepiece"),
}


def made(name: str, path: Path) -> tuple[Any, Any]:
    symbols, labels, decoding = VOCABULARIES[name]
    variant = Variant("ctc", BASE, symbols=symbols, labels=labels, criterion={"post_process": decoding})
    convert.convert(save(variant, path / "m.pt"), path / "out")
    return dictionary(symbols), transformers.AutoProcessor.from_pretrained(path / "out")


def fairseq_text(target: Any, ids: list[int], labels: str, decoding: str) -> str:
    """fairseq's greedy decoding, as `CtcCriterion` does it: collapse, drop the blank, join, post-process."""
    task = AudioFinetuningTask(AudioFinetuningConfig())
    task.state.merge_state_dict({"target_dictionary": target})
    blank = CtcCriterion(CtcCriterionConfig(), task).blank_idx
    kept = [index for at, index in enumerate(ids) if (at == 0 or index != ids[at - 1]) and index != blank]
    return post_process(target.string(torch.tensor(kept)), "none" if labels == "phn" else decoding).strip()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_decodes_as_fairseq_does(name: str, tmp_path: Path) -> None:
    _symbols, labels, decoding = VOCABULARIES[name]
    target, processor = made(name, tmp_path)
    choice = random.Random(name)
    blank = target.bos()
    texts = set()
    for _ in range(50):
        ids = [choice.choice([blank, *range(4, len(target))]) for _ in range(40)]
        ids = [index for index in ids for _ in range(choice.randint(1, 3))]
        expected = fairseq_text(target, ids, labels, decoding)
        texts.add(expected)
        assert processor.batch_decode(torch.tensor([ids]))[0].strip() == expected
    assert len(texts) > 40, "the decoded texts differ, so that the comparison means something"


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_stay_and_none_is_added(name: str, tmp_path: Path) -> None:
    target, processor = made(name, tmp_path)
    tokens = processor.tokenizer.convert_ids_to_tokens(list(range(len(target))))
    assert tokens[:2] == ["<pad>", "<s>"]
    tokens[:2] = ["<s>", "<pad>"]
    assert tokens == target.symbols
    assert len(processor.tokenizer) == len(target)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.pad_token_id == config.pad_token_id == 0
    assert config.vocab_size == len(target)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_feature_extractor_follows_the_task(normalize: bool, tmp_path: Path) -> None:
    convert.convert(save(Variant("ctc", BASE, normalize=normalize), tmp_path / "m.pt"), tmp_path / "out")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (extractor.do_normalize, extractor.sampling_rate, extractor.return_attention_mask) == (
        normalize,
        16000,
        True,
    )


def test_greedy_text_of_the_control(tmp_path: Path) -> None:
    """The comparison above notices a wrong blank: without the exchange of names, blanks would be written out."""
    target, processor = made("letters", tmp_path)
    assert processor.batch_decode(torch.tensor([[1, 5, 5, 1]]))[0] != fairseq_text(
        target, [0, 5, 5, 0], "ltr", "letter"
    )
