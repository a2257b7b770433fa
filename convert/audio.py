"""Reading recordings as they are: never resampled, never mixed down."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from convert.errors import ConvertError
from convert.reading import open_file

if TYPE_CHECKING:
    import numpy as np

Waveform: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

SUFFIXES = (".flac", ".wav")
LONGEST = 4 * 3600  # seconds
_UNKNOWN_FORMAT = 1  # SF_ERR_UNRECOGNISED_FORMAT of sndfile.h


def read_audio(file: Path | BinaryIO, rate: int, *, name: str) -> Waveform:
    """Read one recording as fairseq's `RawAudioDataset` does.

    Args:
        file: a wav or flac file, or its content.
        rate: the model's sampling rate in Hz.
        name: what to call it in errors.

    Returns:
        A float32 array of shape (samples,), between -1 and 1.

    Raises:
        ConvertError: `bad-audio`: the file is missing or not audio, has another sampling rate or several channels, or
            holds a value that is not finite.
    """
    import numpy as np
    import soundfile

    try:
        with (
            open_file(file) if isinstance(file, Path) else contextlib.nullcontext(file) as opened,
            # by its descriptor: libsndfile reads faster so than by Python's methods
            soundfile.SoundFile(opened.fileno() if isinstance(file, Path) else opened, closefd=False) as sound,
        ):
            if sound.frames > LONGEST * sound.samplerate:  # silence is compressed more than a thousandfold
                raise bad_audio(name, f"is longer than {LONGEST // 3600} hours", "cut it into pieces")
            samples, found = sound.read(dtype="float32", always_2d=True), sound.samplerate
    except FileNotFoundError:
        raise bad_audio(name, "no such file", "name a wav or flac file, or a folder of them") from None
    except soundfile.LibsndfileError as error:
        what = (
            "not a WAV or FLAC file" if error.code == _UNKNOWN_FORMAT else f"damaged: {error.error_string.strip('.')}"
        )
        raise bad_audio(name, what, f"write it anew, for example: ffmpeg -i IN -ac 1 -ar {rate} OUT.wav") from error
    except OSError as error:
        raise bad_audio(name, f"cannot be read: {error.strerror or error}", "check its permissions") from error
    if found != rate:
        detail = f"its sampling rate is {found} Hz, the model's is {rate} Hz; nothing was resampled"
        raise bad_audio(name, detail, f"resample it, for example: sox IN.wav -r {rate} OUT.wav")
    if samples.shape[1] != 1:
        detail = f"{samples.shape[1]} channels, expected 1; nothing was mixed"
        raise bad_audio(name, detail, "write one channel to a file, for example: sox IN.wav OUT.wav remix 1")
    if not np.isfinite(samples).all():
        raise bad_audio(name, "NaN or infinite samples", "leave it out")
    return np.ascontiguousarray(samples[:, 0])


def bad_audio(name: str, detail: str, hint: str) -> ConvertError:
    """Return the error of a recording that cannot be used."""
    return ConvertError(f"{name}: {detail}", code="bad-audio", key=name, hint=hint)
