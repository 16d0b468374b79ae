"""Spoken digits as frames: wav files of the Free Spoken Digit Dataset, its official split, log-mel spectra.

3,000 recordings of the digits 0 to 9, 8 kHz, mono, by six speakers (github.com/Jakobovski/free-spoken-digit-dataset,
CC BY-SA 4.0). The official test part is the recordings with an index from 0 to 4 of every speaker and digit. All
speakers are in all parts: accuracies flatter a model that will meet new voices.
"""

import math
import re
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.ragged import SequenceSet

PARTS = {"test": range(0, 5), "val": range(5, 10), "train": range(10, 10**9)}
WINDOW_S, HOP_S = 0.025, 0.010  # of a frame; customary for speech


def load_spoken_digits(folder: str | Path, split: str, *, bands: int = 40) -> SequenceSet:
    """One part of the digits, as log-mel frames 10 ms apart (`speech.HOP_S`).

    Args:
        folder: with the files {digit}_{speaker}_{index}.wav; their parent folder will do.
        split: "train", "val" or "test". The official training part begins at index 5; here 5 to 9 are "val".
        bands: features of a frame.

    Raises:
        DataError: no such split, no such files, or one that cannot be read.
        ConfigError: as `log_mel`.
    """
    if split not in PARTS:
        raise DataError(f"the spoken digits have no split {split!r}; choose one of {', '.join(PARTS)}")
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
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            announced, content = file.getnframes(), file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"cannot read {path} ({error}); expected a wav file") from error
    if channels != 1 or width != 2:
        raise DataError(f"{path} has {channels} channels of {8 * width} bits; expected one of 16: convert it")
    if not content or len(content) != 2 * announced:
        raise DataError(f"{path} holds {len(content) // 2} of {announced} samples announced; it is empty or cut off")
    return torch.from_numpy(np.frombuffer(content, dtype="<i2").astype(np.float32) / 32768), rate


def log_mel(samples: Tensor, rate: int, *, bands: int = 40) -> Tensor:
    """Logarithms of the power in mel bands, frame by frame; the sound is padded with silence to one frame at least.

    Triangular filters evenly apart on the mel scale 2595 log10(1 + f / 700) (O'Shaughnessy 1987) from 0 to half the
    rate; frames of 25 ms, a Hann window, 10 ms apart. No frame looks ahead of its own window.

    Args:
        samples: (samples,) from -1 to 1.
        rate: samples per second.
        bands: how many.

    Returns:
        (frames, bands).

    Raises:
        ConfigError: a rate too low for such frames, or more bands than the spectrum can fill.
        DataError: no samples.
    """
    window, hop = round(WINDOW_S * rate), round(HOP_S * rate)
    if hop < 1 or bands < 1:
        raise ConfigError(f"{bands} bands at {rate} samples per second; expected at least 1 band and 100 samples")
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
    """(bands, bins): how much of each frequency a band hears."""
    mel = torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = torch.linspace(0, rate / 2, bins, dtype=torch.float64)[None]
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak)).clamp(min=0)
    deaf = int((filters.sum(1) == 0).sum())
    if deaf:
        raise ConfigError(f"{deaf} of {bands} mel bands lie between the {bins} frequencies of a frame; take fewer")
    return filters.float()
