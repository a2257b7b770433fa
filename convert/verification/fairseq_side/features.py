"""Log-mel features, an input that both sides are given alike."""

from __future__ import annotations

from typing import Any

import numpy
import torch


def features(waveforms: Any, lengths: Any, bins: int) -> tuple[Any, Any]:
    """Make the features of waveforms, (batch, samples) -> (batch, frames, bins) padded with zeros, and count the frames.

    They are an input and nothing else: the same numbers for both sides, whatever either would have extracted itself. They
    are made as Kaldi does (windows of 25 ms every 10 ms), each utterance with mean 0 and variance 1, in float64.
    """
    waveforms = torch.as_tensor(waveforms)
    lengths = [waveforms.shape[1]] * len(waveforms) if lengths is None else list(lengths)
    cut = [wave[:count].cpu().double().numpy() for wave, count in zip(waveforms, lengths)]
    made = [_log_mel(wave, bins) for wave in cut]
    counts = torch.tensor([len(value) for value in made])
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(value) for value in made], batch_first=True), counts


def _log_mel(waveform: Any, bins: int) -> Any:
    starts = numpy.arange(0, len(waveform) - 399, 160)
    windows = waveform[starts[:, None] + numpy.arange(400)] * 32768
    windows = windows - windows.mean(1, keepdims=True)
    windows = windows - 0.97 * numpy.concatenate([windows[:, :1], windows[:, :-1]], 1)
    power = numpy.abs(numpy.fft.rfft(windows * numpy.hanning(400) ** 0.85, 512)) ** 2
    mels = 1127 * numpy.log(1 + numpy.arange(257) * 31.25 / 700)
    edges = numpy.linspace(1127 * numpy.log(1 + 20 / 700), mels[-1], bins + 2)[:, None]
    rise, fall = (mels - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - mels) / (edges[2:] - edges[1:-1])
    made = numpy.log(numpy.maximum(power @ numpy.clip(numpy.minimum(rise, fall), 0, None).T, 1e-7))
    made = (made - made.mean(0)) / numpy.maximum(made.std(0), 1e-5)
    return made.astype(numpy.float32)
