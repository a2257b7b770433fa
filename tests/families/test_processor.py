"""Vocabularies of every kind decode as fairseq decodes them, with the processor that plain transformers loads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.data import Dictionary
from fairseq.data.data_utils import post_process
from fairseq.tasks.audio_finetuning import AudioFinetuningConfig, AudioFinetuningTask
from fairseq_models import BASE, Variant, dictionary, save
from verify_models import edit, short_inputs

import convert
from convert.errors import PlanError
from convert.verification import verify

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
    "letters_of_sentencepiece": (("▁the", "▁c", "at", "s", "▁", "▁a"), "ltr", "letter"),
    "wordpiece": (("the", "_", "_c", "at", "s_"), "ltr", "wordpiece"),
    "end_of_word": (("the_EOW", "c", "at_EOW", "s", "_EOW"), "ltr", "_EOW"),
    "silence": (("the", "<SIL>", "cat", "s"), "ltr", "silence"),
    "subword_nmt": (("the", "c@@", "at", "s@@", "e"), "ltr", "subword_nmt"),
    "two_marks": (("the", "c@@", "at", "s@@", "@@"), "ltr", "@@"),
    "two_marks_and_a_space": (("the", "c@@", "at", "s@@", "e"), "ltr", "@@ "),
}
# lines of a dictionary's file in which symbols are listed again -> the criterion's post_process
AGAIN: dict[str, tuple[tuple[str, ...], str]] = {
    "letter": (("| 1", "E 1", "T 1", "E 2 #fairseq:overwrite", "A 1", "T 1 #fairseq:overwrite"), "letter"),
    "three_times": (("| 1", "E 1", "E 2 #fairseq:overwrite", "E 3 #fairseq:overwrite"), "letter"),
    "the_blank": (("| 1", "E 1", "<s> 1 #fairseq:overwrite", "T 1"), "letter"),
    "all_special": (("<s> 1 #fairseq:overwrite", "<pad> 1 #fairseq:overwrite", "| 1", "E 1", "T 1"), "letter"),
    "none": (("a 1", "b 1", "a 1 #fairseq:overwrite", "c 1"), "none"),
    "private": (("\ue000 1", "b 1", "b 1 #fairseq:overwrite"), "letter"),
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


@pytest.mark.parametrize("name", AGAIN)
def test_symbols_that_are_listed_again(name: str, tmp_path: Path) -> None:
    """A dictionary's file with `#fairseq:overwrite`, inside a checkpoint and given: what fairseq reads is what is written."""
    lines, decoding = AGAIN[name]
    (tmp_path / "dict.txt").write_text("\n".join(lines), "utf-8")
    target = Dictionary.load(str(tmp_path / "dict.txt"))
    assert len(set(target.symbols)) < len(target)
    symbols = tuple(f"s{index}" for index in range(len(lines)))
    path = save(Variant("ctc", BASE, symbols=symbols, criterion={"post_process": decoding}), tmp_path / "m.pt")
    state = torch.load(path, weights_only=False)
    torch.save(state | {"task_state": {"target_dictionary": target}}, path)
    convert.convert(path, tmp_path / "out")
    torch.save(state | {"task_state": {}}, path)
    convert.convert(path, tmp_path / "given", dictionary=tmp_path / "dict.txt")
    for file in (tmp_path / "out").glob("*token*"):
        assert file.read_bytes() == (tmp_path / "given" / file.name).read_bytes()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert len(processor.tokenizer) == len(target)
    blank = target.index("<s>")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.pad_token_id == config.pad_token_id == blank
    choice, texts = random.Random(name), set()
    ordinary = [index for index, symbol in enumerate(target.symbols) if symbol not in target.symbols[:4]]
    for _ in range(50):
        ids = [choice.choice([blank, *ordinary]) for _ in range(40)]
        expected = fairseq_text(target, ids, "ltr", decoding)
        texts.add(expected)
        assert processor.batch_decode(torch.tensor([ids]))[0].strip() == expected
    assert len(texts) > 20
    with short_inputs():
        assert verify(path, tmp_path / "given", devices=["cpu"], long=False, write=False).problems == ()


def test_another_way_of_making_text(tmp_path: Path) -> None:
    symbols = ("▁the", "▁c", "at", "s")
    path = save(Variant("ctc", BASE, symbols=symbols, criterion={"post_process": "letter"}), tmp_path / "m.pt")
    convert.convert(path, tmp_path / "as-it-says")
    convert.convert(path, tmp_path / "asked", post_process="sentencepiece")
    ids = torch.tensor([[4, 0, 5, 6, 7]])
    texts = {
        name: transformers.AutoProcessor.from_pretrained(tmp_path / name).batch_decode(ids)[0]
        for name in ("as-it-says", "asked")
    }
    assert texts == {"as-it-says": "▁the▁cats", "asked": "the cats"}
    record = json.loads((tmp_path / "asked" / "conversion.json").read_text())
    assert record["request"]["post_process"] == record["decoding"] == "sentencepiece"
    with short_inputs():
        assert verify(path, tmp_path / "asked", devices=["cpu"], long=False).problems == ()
        edit(tmp_path / "asked" / "conversion.json", request={"head": "", "keep_final_proj": False, "language": ""})
        wrong = verify(path, tmp_path / "asked", devices=["cpu"], long=False, write=False).problems
        assert {"spelling", "file"} <= {problem.code for problem in wrong}


def test_a_way_of_making_text_that_nobody_knows(tmp_path: Path) -> None:
    path = save(Variant("ctc", BASE, criterion={"post_process": "byte_pairs"}), tmp_path / "m.pt")
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    assert [str(problem) for problem in raised.value.problems] == [
        "criterion.post_process: 'byte_pairs' is not one of fairseq's ways to make text: "
        "letter, sentencepiece, wordpiece, _EOW, silence, subword_nmt, @@ , @@, none"
    ]
    assert raised.value.hint == "correct it with --post-process NAME, or leave the vocabulary out: --head encoder"
    assert convert.plan(path, post_process="letter").target == "Wav2Vec2ForCTC"
    assert convert.plan(path, head="encoder").target == "Wav2Vec2Model"


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
