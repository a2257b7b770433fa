"""The probe waveforms: speech of several lengths, silence, quiet speech and a padded batch, made from one clip and from the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convert.audio import SUFFIXES, Waveform, bad_audio, read_audio

SPEECH = "speech"  # the clip that ships: probe.wav
QUIET = -50.0  # dBFS
LONG = 30  # seconds
EPSILON = 1e-5  # torch.nn.functional.layer_norm's, which fairseq's tasks normalise with


@dataclass(frozen=True, slots=True)
class Geometry:
    """How samples become frames, and what fairseq's encoder pads frames to.

    Args:
        convolutions: (kernel, stride) of every feature convolution.
        multiple: fairseq's `required_seq_len_multiple`.
        splits: whether fairseq cuts a padded batch's mask into as many equal pieces as there are frames, instead of counting
            with the convolutions, as transformers does.
    """

    convolutions: tuple[tuple[int, int], ...]
    multiple: int = 2
    splits: bool = False

    def frames(self, samples: int) -> int:
        """Count the frames of a waveform.

        Example:
            >>> Geometry(((10, 5), (3, 2), (2, 2))).frames(400)
            19
        """
        for kernel, stride in self.convolutions:
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def samples(self, frames: int) -> int:
        """Count the fewest samples that give so many frames."""
        for kernel, stride in reversed(self.convolutions):
            frames = (frames - 1) * stride + kernel
        return frames

    def agreeing(self, frames: int) -> tuple[int, ...]:
        """Find lengths in samples, the longest first, of which equal pieces make the frames that the convolutions make.

        fairseq takes a frame for valid when any sample of its piece is. A frame of the convolutions overlaps the next, so that
        they make fewer; a piece is the larger for the rest of the longest utterance, and that evens it out where frames are
        few enough.

        Args:
            frames: of the longest utterance, at most.

        Example:
            >>> Geometry(((10, 5), (3, 2), (3, 2), (2, 2))).agreeing(100)
            (2379, 1580, 820)
        """
        fewest = [self.samples(number) for number in range(1, frames + 2)]
        for count in range(frames // self.multiple * self.multiple, 1, -self.multiple):
            longest = fewest[count] - 1  # one sample more would make another frame
            piece = longest // count
            fitting = [length for number, length in enumerate(fewest[: count - 1], 1) if -(-length // piece) == number]
            if fitting:
                return longest, fitting[len(fitting) // 2], fitting[0]
        return ()


@dataclass(frozen=True, slots=True)
class Cut:
    """A piece of a clip: repeated or cut to a number of samples, and multiplied.

    Args:
        clip: the clip's name.
        samples: the length.
        gain: what every sample is multiplied with; 0 is silence.
    """

    clip: str
    samples: int
    gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Probe:
    """One input of both models.

    Args:
        name: such as `speech-even`.
        cuts: one utterance each; several are padded to the longest and masked.
        multiple: replaces fairseq's `required_seq_len_multiple`, so that it adds no frame; `None` leaves it as built.
        exact: whether both sides do the same arithmetic, so that their bits can be the same.
        why: why they cannot be.
        follows: whether transformers is given an attention mask of as many frames as fairseq counts.
        language: the language, of models with several; their own, if it is empty.
    """

    name: str
    cuts: tuple[Cut, ...]
    multiple: int | None = None
    exact: bool = True
    why: str = ""
    follows: bool = False
    language: str = ""

    @property
    def padded(self) -> bool:
        """Whether it is a padded batch."""
        return len(self.cuts) > 1


def probes(geometry: Geometry, clips: dict[str, Waveform], *, rate: int, masks: bool = True) -> list[Probe]:
    """List the inputs for a model.

    Args:
        geometry: the model's.
        clips: the clips by name, `SPEECH` among them.
        rate: samples a second.
        masks: whether this fairseq counts a padded utterance's valid frames as its newer versions do.

    Returns:
        The probes, shortest legal input and 30 seconds among them; every clip of the user's as it is.
    """
    count = geometry.frames(len(clips[SPEECH]))
    step = geometry.multiple
    pair = max(step, 2)
    even = count // pair * pair or pair
    odd = even - 1
    long = geometry.frames(LONG * rate) // step * step
    loudness = _level(clips[SPEECH])
    quiet = float(10 ** ((QUIET - loudness) / 20))

    def single(name: str, frames: int, gain: float = 1.0, clip: str = SPEECH) -> Probe:
        return _single(name, Cut(clip, geometry.samples(frames), gain), frames, step)

    made = [
        single("speech-even", even),
        single("speech-odd", odd),
        single("shortest", 1),
        single("silence", max(step, even // 2 // step * step), 0.0),
        single("quiet", even, quiet),
    ]
    if step > 1:
        why = f"fairseq pads {odd} frames to a multiple of {step} and masks what it added"
        made.append(Probe("speech-odd-as-built", (Cut(SPEECH, geometry.samples(odd)),), None, False, why))
    if masks:
        lengths = tuple(geometry.samples(n) for n in (even, max(1, even * 2 // 3), max(1, even // 3)))
        plain = geometry.agreeing(even) if geometry.splits else lengths
        why = "the two sides multiply padded batches in another order"
        if plain:
            made.append(Probe("padded-batch", tuple(Cut(SPEECH, n) for n in plain), None, False, why))
        if geometry.splits:
            cuts = tuple(Cut(SPEECH, n) for n in lengths)
            made.append(Probe("padded-batch-any-lengths", cuts, None, False, why, follows=True))
    made.append(single("30-seconds", long))
    for name, waveform in clips.items():
        if name != SPEECH:
            made.append(_single(name, Cut(name, len(waveform)), geometry.frames(len(waveform)), step))
    return made


def in_languages(made: Iterable[Probe], languages: Iterable[str], geometry: Geometry) -> list[Probe]:
    """Add the first quarter of the first input in further languages, each of which has adapters of its own in the same model.

    Every frame passes through every adapter, so that a few show a fault in one as many do, and there may be 1,000 languages.
    """
    made = list(made)
    whole = made[0].cuts[0]
    step = geometry.multiple
    frames = max(step, geometry.frames(whole.samples) // 4 // step * step)
    first = replace(made[0], cuts=(replace(whole, samples=geometry.samples(frames)),))
    return made + [replace(first, name=f"{first.name} in {name}", language=name) for name in languages]


def _single(name: str, cut: Cut, frames: int, step: int) -> Probe:
    return Probe(name, (cut,), None if frames % step == 0 else 1)


def cut(clips: dict[str, Waveform], piece: Cut) -> Waveform:
    """Cut, repeat and scale a clip."""
    import numpy as np

    return (np.resize(clips[piece.clip], piece.samples) * np.float32(piece.gain)).astype(np.float32)


def normalised(waveform: Waveform) -> Waveform:
    """Give a waveform mean 0 and variance 1 as fairseq's tasks do, computed in float64 so that every machine gets the same.

    Example:
        >>> import numpy as np
        >>> [round(float(x), 3) for x in normalised(np.array([1, -1, 1, -1], np.float32))]
        [1.0, -1.0, 1.0, -1.0]
    """
    import numpy as np

    wide = waveform.astype(np.float64)
    made: Waveform = ((wide - wide.mean()) / np.sqrt(wide.var() + EPSILON)).astype(np.float32)
    return made


def bundled() -> Waveform:
    """Read the clip that ships: two seconds of speech by espeak-ng, 16 kHz."""
    return read_audio(Path(__file__).with_name("probe.wav"), 16000, name="probe.wav")


def collect(paths: Sequence[str | Path], rate: int, geometry: Geometry) -> dict[str, Waveform]:
    """Read the user's recordings.

    Args:
        paths: wav or flac files, or folders of them.
        rate: the model's sampling rate.
        geometry: the model's; a recording must be long enough for one frame.

    Returns:
        The bundled clip, then the recordings by file name; two files of one name get a number.

    Raises:
        ConvertError: status 2: a file is missing, not audio, too short, of another sampling rate or of several channels.
    """
    clips = {SPEECH: bundled()}
    for path in _files(paths):
        name, number = path.name, 2
        while name in clips:
            name, number = f"{path.name} ({number})", number + 1
        clips[name] = read_audio(path, rate, name=path.name)
        if not geometry.frames(len(clips[name])):
            detail = f"{len(clips[name])} samples, the model needs at least {geometry.samples(1)}"
            raise bad_audio(path.name, detail, "leave it out")
    return clips


def _files(paths: Iterable[str | Path]) -> Iterable[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise bad_audio(path.name, "no wav or flac files in it", "name a folder with recordings")
            yield from found
        else:
            yield path


def _level(waveform: Waveform) -> float:
    """The level of a waveform in dBFS (root mean square)."""
    import numpy as np

    return float(10 * np.log10(max(float((waveform.astype(np.float64) ** 2).mean()), 1e-20)))
