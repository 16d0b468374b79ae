"""Spoken digits as frames: wav files of the Free Spoken Digit Dataset, its official split, log-mel spectra.

3,000 recordings of the digits 0 to 9, 8 kHz, mono, by six speakers (github.com/Jakobovski/free-spoken-digit-dataset,
CC BY-SA 4.0). The official test part has the recordings of index 0 to 4 of every speaker and digit. All speakers
are in all parts, so accuracies are optimistic for new voices.
"""

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynanet.core.errors import ConfigError, DataError, check_sizes
from dynanet.data.ragged import SequenceSet

PARTS = {"test": range(0, 5), "val": range(5, 10), "train": range(10, 10**9)}
WINDOW_S = 0.025  # of a frame, as is usual for speech
HOP_S = 0.010
HIGHEST_RATE = 1_000_000  # samples per second; what a header says beyond is damage
_PCM = 1
_EXTENSIBLE = 0xFFFE


def load_spoken_digits(folder: str | Path, split: str, *, bands: int = 40) -> SequenceSet:
    """One part of the digits, as log-mel frames 10 ms apart (`speech.HOP_S`).

    Args:
        folder: contains the files {digit}_{speaker}_{index}.wav, or a folder `recordings` with them.
        split: "train", "val" or "test". The official training part begins at index 5; here 5 to 9 are "val".
        bands: features of a frame.

    Raises:
        DataError: no such split, no such files, one that cannot be read, or several sample rates.
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
    sequences = []
    rates: dict[int, Path] = {}
    for path, _ in rows:
        samples, rate = read_wav(path)
        rates.setdefault(rate, path)
        sequences.append(log_mel(samples, rate, bands=bands))
    if len(rates) > 1:
        listed = ", ".join(f"{path.name} of {rate}" for rate, path in sorted(rates.items())[:3])
        raise DataError(f"{within} has sounds of {len(rates)} sample rates ({listed}); convert all to one")
    labels = torch.tensor([digit for _, digit in rows])
    return SequenceSet(sequences, labels, [str(digit) for digit in range(10)], rate=next(iter(rates)))


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """A mono wav file of 16-bit samples, with a plain or an extensible header.

    Returns:
        (samples,) float32 from -1 to 1, and the samples per second.

    Raises:
        DataError: no such file, another format, or no samples.
    """
    try:
        kind, channels, rate, bits, samples, size = _wav(Path(path).read_bytes())
    except (OSError, ValueError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {path} ({reason}); expected a wav file") from error
    if (kind, channels, bits) != (_PCM, 1, 16):
        what = "whole numbers" if kind == _PCM else f"format {kind}"
        raise DataError(
            f"{path} has {channels} channels of {bits} bits, {what}; expected one of 16, whole numbers: convert it"
        )
    if not 1 <= rate <= HIGHEST_RATE:
        raise DataError(f"{path} has {rate} samples per second; expected 1 to {HIGHEST_RATE}: its header is damaged")
    if not samples or size % 2 or len(samples) != size:
        raise DataError(f"{path} holds {len(samples) // 2} of {size // 2} samples; it is empty or truncated")
    return torch.from_numpy(np.frombuffer(samples, dtype="<i2").astype(np.float32) / 32768), rate


def resampled(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """A sound at a lower rate, without the frequencies that this rate cannot hold.

    Args:
        samples: (samples,).
        rate: samples per second.
        wanted: the same afterwards, at most `rate`.

    Raises:
        DataError: a higher rate: frequencies that were not recorded cannot be made.
    """
    if rate == wanted:
        return samples
    if rate < wanted:
        raise DataError(f"a sound has {rate} samples per second; expected {wanted} or more, to hold all frequencies")
    step = rate // math.gcd(rate, wanted)  # samples after which both rates meet
    whole = torch.nn.functional.pad(samples.double(), (0, -len(samples) % step))
    count = len(whole) * wanted // rate
    sound = torch.fft.irfft(torch.fft.rfft(whole)[: count // 2 + 1], count) * (wanted / rate)
    return sound[: math.ceil(len(samples) * wanted / rate)].to(samples.dtype)


def _wav(content: bytes) -> tuple[int, int, int, int, bytes, int]:
    """Kind, channels, rate, bits, samples, and the bytes that these should have (RIFF; WAVE_FORMAT_EXTENSIBLE too)."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError("no RIFF header")
    at = 12
    header = None
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        if name == b"fmt ":
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content, at + 8)
            if kind == _EXTENSIBLE and size >= 26:  # the kind proper begins a longer identifier
                (kind,) = struct.unpack_from("<H", content, at + 8 + 24)
            header = kind, channels, rate, bits
        if name == b"data" and header is not None:
            return *header, content[at + 8 : at + 8 + size], size
        at += 8 + size + size % 2
    raise ValueError("no samples behind a format" if header else "no format")


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
