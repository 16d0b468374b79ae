"""Spoken digits: files become frames, parts stay apart, and broken files are named."""

import math
import os
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.speech import load_spoken_digits, log_mel, read_wav, resampled

SHARED = Path(os.environ.get("DYNANET_DATA", Path(__file__).parents[3] / "shared" / "data")) / "fsdd"


def write(path, samples, rate=8000, channels=1, width=2):
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, dtype=f"<i{width}").tobytes())
    return path


def tone(hertz, seconds=0.5, rate=8000):
    return torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def test_samples_come_out_as_they_are(tmp_path):
    samples, rate = read_wav(write(tmp_path / "a.wav", [0, 16384, -32768, 32767]))
    assert rate == 8000 and samples.tolist() == [0, 0.5, -1, 32767 / 32768]


def test_a_tone_lies_in_the_band_of_its_pitch():
    top = 2595 * math.log10(1 + 4000 / 700)
    for hertz in (300, 1000, 3000):
        frames = log_mel(tone(hertz), 8000, bands=20)
        place = 2595 * math.log10(1 + hertz / 700) / top * 21 - 1
        assert (frames.argmax(1) - place).abs().max() <= 1


def test_frames_are_apart_by_the_hop_and_do_not_look_ahead():
    sound = tone(500)
    frames = log_mel(sound, 8000)
    assert frames.shape == (1 + (4000 - 256) // 80, 40)
    changed = sound.clone()
    changed[2000:] = 0
    heard = (frames != log_mel(changed, 8000)).any(1)
    assert not heard[: (2000 - 256) // 80].any() and heard[-1]


def test_a_sound_too_short_for_a_frame_is_one():
    assert log_mel(torch.ones(1), 8000).shape == (1, 40)
    assert log_mel(torch.zeros(300), 8000).isfinite().all()


def test_parts_are_the_official_ones(tmp_path):
    for index in (0, 4, 5, 9, 10, 49):
        for digit in (3, 8):
            write(tmp_path / "recordings" / f"{digit}_some_one_{index}.wav", 1000 * np.ones(300 + index))
    write(tmp_path / "recordings" / "noise.wav", np.ones(300))
    for folder in (tmp_path, tmp_path / "recordings"):
        for split in ("train", "val", "test"):
            data = load_spoken_digits(folder, split, bands=8)
            assert data.labels.tolist() == [3, 3, 8, 8] and data.features == 8 and len(data.classes) == 10


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: write(p, [1, 2], channels=2), "2 channels of 16 bits"),
        (lambda p: write(p, [1, 2], width=4), "1 channels of 32 bits"),
        (lambda p: write(p, []), "0 of 0 samples"),
        (lambda p: p.write_bytes(b"RIFF"), "expected a wav file"),
        (lambda p: p.write_bytes(b""), "expected a wav file"),
        (lambda p: p.write_bytes(write(p, range(100)).read_bytes()[:-50]), "75 of 100 samples"),
        (lambda p: None, "No such file"),
    ],
)
def test_what_is_no_recording(tmp_path, make, says):
    make(path := tmp_path / "a.wav")
    with pytest.raises(DataError, match=says):
        read_wav(path)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
def test_a_tone_at_another_rate_is_the_same_tone(rate):
    low = resampled(
        tone(440, rate=rate) + (tone(3900, rate=rate) if rate == 8000 else tone(5000, rate=rate)), rate, 8000
    )
    expected = tone(440) + (tone(3900) if rate == 8000 else 0)
    assert len(low) == 4000 and (low - expected)[400:-400].abs().max() < 0.05
    with pytest.raises(DataError, match="expected 96000 or more"):
        resampled(low, 8000, 96000)


def test_sounds_of_several_rates_are_refused(tmp_path):
    for index, rate in ((10, 8000), (11, 16000)):
        write(tmp_path / f"1_some_{index}.wav", np.ones(900), rate=rate)
    with pytest.raises(DataError, match="2 sample rates .1_some_10.wav of 8000, 1_some_11.wav of 16000"):
        load_spoken_digits(tmp_path, "train")


def chunks(*parts):
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def header(kind=1, rate=8000, more=b""):
    return b"fmt ", struct.pack("<HHIIHH", kind, 1, rate, 2 * rate, 2, 16) + more


def extensible(kind):
    return header(0xFFFE, more=struct.pack("<HHIH", 22, 16, 4, kind) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71")


SAMPLES = b"data", struct.pack("<hh", 16384, -32768)


@pytest.mark.parametrize("first", [header(), extensible(1), header(more=b"\0\0")])
def test_headers_of_several_forms(tmp_path, first):
    (tmp_path / "a.wav").write_bytes(chunks((b"LIST", b"made"), first, (b"fact", b"\2\0\0\0"), SAMPLES))
    samples, rate = read_wav(tmp_path / "a.wav")
    assert samples.tolist() == [0.5, -1] and rate == 8000


@pytest.mark.parametrize(
    "content",
    [
        chunks(header(more=b"\0"), SAMPLES), chunks(SAMPLES), chunks(header()), chunks((b"fmt ", b"\1"), SAMPLES),
        chunks(header(3), SAMPLES), chunks(extensible(3), SAMPLES), chunks(header(rate=0), SAMPLES),
        chunks(header(rate=2**31 - 1), SAMPLES), chunks(header(), (b"data", b"\0\0\0")),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused_in_a_line(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match="a.wav") as caught:
        read_wav(tmp_path / "a.wav")
    assert "\n" not in str(caught.value)


@given(st.integers(0, 47), st.binary(max_size=4))
def test_any_damage_is_samples_or_a_refusal(tmp_path_factory, at, bytes_):
    whole = chunks(header(), SAMPLES)
    path = tmp_path_factory.getbasetemp() / "damaged.wav"
    path.write_bytes(whole[:at] + bytes_ + whole[at + 1 :])
    try:
        samples, rate = read_wav(path)
    except DataError:
        return
    assert samples.isfinite().all() and rate > 0


def test_what_it_refuses(tmp_path):
    with pytest.raises(DataError, match="split must be one of .* got 'dev'"):
        load_spoken_digits(tmp_path, "dev")
    with pytest.raises(DataError, match="no recordings of the test part"):
        load_spoken_digits(tmp_path, "test")
    with pytest.raises(DataError, match="at least one"):
        log_mel(torch.zeros(0), 8000)
    with pytest.raises(ConfigError, match="give fewer"):
        log_mel(torch.zeros(500), 8000, bands=100)
    with pytest.raises(ConfigError, match="rate must be above 50 samples per second, got 10"):
        log_mel(torch.zeros(500), 10)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the Free Spoken Digit Dataset")
def test_the_real_recordings():
    data = load_spoken_digits(SHARED, "test")
    assert len(data) == 300 and data.labels.bincount().tolist() == [30] * 10
    assert data.features == 40 and 10 < data.longest < 250
