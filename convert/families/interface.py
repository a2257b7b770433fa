"""How a model is fed and how its output is read: what fairseq's side and the inputs of a verification need to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from convert.families.base import Conversion, Sources
from convert.families.planning import choose
from convert.families.tokenizers import post_process_of

BLANK = "<s>"  # the name of CTC's blank


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What surrounds a model.

    Args:
        symbols: fairseq's dictionary; empty without one.
        special: ids of its special symbols.
        blank: the id of CTC's blank; -1 for a model with a decoder, which has none.
        post_process: how fairseq makes text of symbols.
        rate: samples a second.
        normalize: whether waveforms are normalised.
        convolutions: (kernel, stride) of everything that makes frames of samples.
        multiple: what fairseq pads the number of frames to, `required_seq_len_multiple`.
        splits: whether fairseq cuts the mask of a padded batch into as many equal pieces as there are frames.
        language: the language of the weights, where the checkpoint names it.
        languages: where there are several: the symbols of each, and its index among the stacked adapters.
        beam: how many texts a decoder follows, where the checkpoint says so; 1 where it does not.
        length_penalty: the power of its length that the score of a text is divided by.
    """

    symbols: tuple[str, ...]
    special: tuple[int, ...]
    blank: int
    post_process: str
    rate: int
    normalize: bool
    convolutions: tuple[tuple[int, int], ...] = ()
    multiple: int = 1
    splits: bool = False
    language: str = ""
    languages: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    beam: int = 1
    length_penalty: float = 1.0


def encoder_interface(sources: Sources, made: Conversion) -> Interface:
    """Describe the surroundings of a model that is an encoder, perhaps with a head; see `Family.interface`."""
    checkpoint, request, kind, family = sources.checkpoint, sources.request, sources.kind, sources.family
    reader, task = sources.reader, sources.checkpoint.settings["task"]
    known = request.dictionary or checkpoint.dictionary
    if known and request.dictionary and not kind.text:
        known = known.labels
    found = family.languages(checkpoint, reader.values, []) if family.languages else {}
    chosen = choose(found, request.language, checkpoint.path.name) if found else None
    known = (chosen and chosen.dictionary) or known
    symbols, special = (known.symbols, known.special) if known and (kind.nested or kind.symbols) else ((), ())
    several = {one.name: (one.dictionary.symbols, one.row) for one in found.values() if one.dictionary}
    multiple = reader.values.get("required_seq_len_multiple", 2) if family.pads else 1
    return Interface(
        symbols=symbols,
        special=tuple(index for index, symbol in enumerate(symbols) if symbol in special),
        # to fairseq, a symbol that is listed again is the last of its ids
        blank=max((index for index, symbol in enumerate(symbols) if symbol == BLANK), default=0),
        post_process=post_process_of(checkpoint.settings["criterion"], task, request.post_process),
        rate=int(task.get("sample_rate") or 16000),
        normalize=bool(task.get("normalize", False)),
        convolutions=tuple((kernel, stride) for _, kernel, stride in family.convolutions(reader)),
        multiple=int(multiple or 1),
        splits=family.splits_masks,
        language=chosen.name if chosen else "",
        languages=several if len(found) > 1 else {},
    )
