"""Spoken digits as frames: wav files of the Free Spoken Digit Dataset, its official split, log-mel spectra.

3,000 recordings of the digits 0 to 9, 8 kHz, mono, by six speakers (github.com/Jakobovski/free-spoken-digit-dataset,
CC BY-SA 4.0). The official test part has the recordings of index 0 to 4 of every speaker and digit. All speakers
are in all parts, so accuracies are optimistic for new voices.
"""

import math
import re
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynanet.core.errors import ConfigError, DataError, check_sizes
from dynanet.data.ragged import SequenceSet

PARTS = {"test": range(0, 5), "val": range(5, 10), "train": range(10, 10**9)}
WINDOW_S = 0.025  # of a frame, as is usual for speech
HOP_S = 0.010


def load_spoken_digits(folder: str | Path, split: str, *, bands: int = 40) -> SequenceSet:
    """One part of the digits, as log-mel frames 10 ms apart (`speech.HOP_S`).

    Args:
        folder: contains the files {digit}_{speaker}_{index}.wav, or a folder `recordings` with them.
        split: "train", "val" or "test". The official training part begins at index 5; here 5 to 9 are "val".
        bands: features of a frame.

    Raises:
        DataError: no such split, no such files, or one that cannot be read.
        ConfigError: as `log_mel`.
    """
    if split not in PARTS:
        raise DataError(f"split must be one of {', '.join(PARTS)}, got {split!r}")
    folder = Path(folder)
    within = folder / "recordings" if (folder / "recordings").is_dir() else folder
    found = [(path, re.fullmatch(r"(\d)_(\w+)_(\d+)", path.stem)) for path in sorted(within.glob("*.wav"))]
    rows = [(path, int(name[1])) for path, name in found if name and int(name[3]) in PARTS[split]]
    if not rows:
        raise DataError(f"{within} has no recordings of the {split} part; expected files such as 7_jackson_32.wav")
    sequences = [log_mel(*read_wav(path), bands=bands) for path, _ in rows]
    return SequenceSet(sequences, torch.tensor([digit for _, digit in rows]), [str(digit) for digit in range(10)])


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """A mono wav file of 16-bit samples.

    Returns:
        (samples,) float32 from -1 to 1, and the samples per second.

    Raises:
        DataError: no such file, another format, or no samples.
    """
    try:
        with wave.open(str(path), "rb") as file:
            header = file.getparams()
            content = file.readframes(header.nframes)
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"cannot read {path} ({error}); expected a wav file") from error
    if header.nchannels != 1 or header.sampwidth != 2:
        raise DataError(
            f"{path} has {header.nchannels} channels of {8 * header.sampwidth} bits; expected one of 16: convert it"
        )
    if not content or len(content) != 2 * header.nframes:
        raise DataError(f"{path} holds {len(content) // 2} of {header.nframes} samples; it is empty or truncated")
    return torch.from_numpy(np.frombuffer(content, dtype="<i2").astype(np.float32) / 32768), header.framerate


def log_mel(samples: Tensor, rate: int, *, bands: int = 40) -> Tensor:
    """Logarithmic power in mel bands per frame; a shorter sound is padded with silence to one frame.

    Triangular filters at even distances on the mel scale 2595 log10(1 + f / 700) (O'Shaughnessy 1987) from 0 to half
    the rate; frames of 25 ms, a Hann window, 10 ms apart. No frame looks ahead of its own window.

    Args:
        samples: (samples,) from -1 to 1.
        rate: samples per second.
        bands: number of mel bands.

    Returns:
        (frames, bands).

    Raises:
        ConfigError: a rate too low for such frames, or more bands than the spectrum resolves.
        DataError: no samples.
    """
    window = round(WINDOW_S * rate)
    hop = round(HOP_S * rate)
    check_sizes(bands=bands)
    if hop < 1:
        raise ConfigError(f"rate must be above {0.5 / HOP_S:g} samples per second, got {rate}")
    if samples.dim() != 1 or samples.shape[0] == 0:
        raise DataError(f"a sound of shape {tuple(samples.shape)}; expected (samples,), at least one")
    size = 2 ** math.ceil(math.log2(window))
    filters = _mel_filters(size // 2 + 1, rate, bands)
    if samples.shape[0] < size:
        samples = torch.nn.functional.pad(samples, (0, size - samples.shape[0]))
    hann = torch.hann_window(window, device=samples.device)
    spectrum = torch.stft(samples, size, hop, window, hann, center=False, return_complex=True)
    return (filters.to(samples.device) @ spectrum.abs().square() + 1e-6).log().T.contiguous()


def _mel_filters(bins: int, rate: int, bands: int) -> Tensor:
    """(bands, bins): the weight of each frequency in a band."""
    mel = torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = torch.linspace(0, rate / 2, bins, dtype=torch.float64)[None]
    low = edges[:-2, None]
    peak = edges[1:-1, None]
    high = edges[2:, None]
    filters = torch.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak)).clamp(min=0)
    empty = int((filters.sum(1) == 0).sum())
    if empty:
        raise ConfigError(f"{empty} of {bands} mel bands lie between the {bins} frequencies of a frame; give fewer")
    return filters.float()
