"""Answers of a saved model for files: arrays, images, sounds and sentences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynanet.core.architecture import architecture_of
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import ConfigError, DataError, InputError
from dynanet.core.halt import Halt
from dynanet.data.images import SUFFIXES, ImageFiles, Images, to_float
from dynanet.data.lines import read_lines
from dynanet.data.ragged import Sequences, pad
from dynanet.data.speech import log_mel, read_wav, resampled
from dynanet.data.text import UNKNOWN, Sentences, Vocabulary
from dynanet.datamodules.inputs import WORDS
from dynanet.export.bundles import Bundle
from dynanet.session.session import Session
from dynanet.tasks.task import spent_macs
from dynanet.zoo.saved import read


def predict(model: Path, inputs: Path) -> list[dict[str, Any]]:
    """Classify the inputs of a file or folder.

    Args:
        model: a bundle, or a run that holds one in model/.
        inputs: an .npy file, (C, H, W) or (N, C, H, W), as the model takes it; an image file or a folder of images; a
            .wav file or a folder of them, for a model of sounds; a .txt file with a sentence per line, for a run on
            sentences.

    Returns:
        One row per input: input, class, index, probability, exit (from 1), macs.

    Raises:
        BundleError: the model cannot be loaded.
        ConfigError: a run that is not trained yet.
        DataError: images that cannot be decoded; single ones among many are left out, and named in the log.
        InputError: inputs that cannot be read, or that the model cannot take.
    """
    is_run = (model / "config.yaml").exists()
    if is_run and not (model / "model").exists():
        raise ConfigError(f"{model} holds no trained model yet; run: dynanet train {model}")
    bundle = read(model / "model" if is_run else model)
    x, names = _read_inputs(inputs, bundle, model / WORDS if is_run else None)
    if not names:
        return []
    return [
        {"input": name, "class": bundle.classes[index] if bundle.classes else str(index), "index": index, **rest}
        for name, (index, rest) in zip(names, _answers(bundle.model, x, len(names)), strict=True)
    ]


def _answers(model: nn.Module, x: Any, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The class of every input, with its probability, exit and MACs."""
    session = Session(model, x, batches=(64,), engines="eager" if count < 64 else "fastest")
    cost = CostModel(model, _largest(model, x))
    halt = next((name for name, layer in session.named_modules() if isinstance(layer, Halt)), None)
    for start in range(0, count, 256):
        with record(session) as trace:
            logits = session(_rows(x, slice(start, start + 256)))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise InputError(
                f"{type(model).__name__} answers maps, of shape {tuple(logits.shape)}, and predict needs one class per "
                f"input; take a model that classifies inputs, or `tasks.detection.decode` for boxes"
            )
        spent = spent_macs(trace, cost, len(logits)).tolist()
        exits = torch.zeros(len(logits))
        for keep in trace[halt] if halt is not None else ():
            exits = exits + keep[:, 0]
        probability, index = logits.softmax(-1).max(-1)
        for i in range(len(logits)):
            row = {"probability": round(float(probability[i]), 6), "exit": int(exits[i]) + 1, "macs": spent[i]}
            yield int(index[i]), row


def _largest(model: nn.Module, x: Any) -> Any:
    """One input of the largest size that the model takes: prices are the same whatever input comes first."""
    made = architecture_of(model)
    known = 0 if made is None else made.arguments.get("longest", 0)
    if isinstance(x, Sequences):
        steps = known or x.x.shape[1]
        return Sequences(x.x.new_zeros(1, steps, *x.x.shape[2:]), torch.tensor([steps]))
    if not x.is_floating_point():
        return torch.full((1, known or x.shape[1]), UNKNOWN)
    return _rows(x, slice(0, 1))


def _rows(x: Any, rows: slice) -> Any:
    return tree_map(lambda t: t[rows], x)


def _read_inputs(place: Path, bundle: Bundle, words: Path | None) -> tuple[Any, list[str]]:
    if place.suffix == ".txt" and place.exists():
        return _sentences(place, bundle, words)
    inside = [place] if place.is_file() else sorted(place.rglob("*"))
    sounds = [path for path in inside if path.suffix.lower() == ".wav"]
    if sounds:
        return _sounds(sounds, bundle)
    if place.suffix == ".npy" and place.exists():
        x = _array(place, bundle)
        return x, [str(i) for i in range(len(x))]
    files = sorted((path for path in inside if path.suffix.lower() in SUFFIXES), key=str)
    if not files:
        what = "holds no inputs" if place.exists() else "does not exist"
        kinds = ", ".join(SUFFIXES)
        raise InputError(
            f"{place} {what}; expected an .npy file, an image ({kinds}), a folder of images, a sound (.wav), a folder "
            f"of sounds, or sentences (.txt)"
        )
    return _images(files, bundle)


def _sounds(files: list[Path], bundle: Bundle) -> tuple[Sequences, list[str]]:
    """Frames as for training: log-mel bands, standardised."""
    wanted = bundle.inputs
    if wanted is None or wanted.size is not None or wanted.mean is None or wanted.std is None:
        raise InputError(f"{files[0]} is a sound, and the model does not take any; give what it was trained on")
    frames = [_frames(file, wanted.channels, wanted.rate) for file in files]
    mean, std = torch.tensor(wanted.mean), torch.tensor(wanted.std)
    return pad([(each - mean) / std for each in frames]), [str(file) for file in files]


def _frames(file: Path, bands: int, wanted: int | None) -> Tensor:
    """Frames of a sound at the rate of the training sounds, if the bundle knows it."""
    samples, rate = read_wav(file)
    if wanted is None:
        return log_mel(samples, rate, bands=bands)
    if rate < wanted:
        raise InputError(
            f"{file} has {rate} samples per second, and the model was trained on sounds of {wanted}; record it at "
            f"{wanted} or more"
        )
    return log_mel(resampled(samples, rate, wanted), wanted, bands=bands)


def _sentences(place: Path, bundle: Bundle, words: Path | None) -> tuple[Tensor, list[str]]:
    """Every line as numbers of words, by the vocabulary of the run."""
    if words is None or not words.exists():
        raise InputError(
            f"{place} holds sentences, and only a run that was trained on sentences knows the words; give its folder"
        )
    made = architecture_of(bundle.model)
    longest = 64 if made is None else made.arguments.get("longest", 64)
    try:
        lines = [line for line in read_lines(place, "one sentence per line") if line.strip()]
    except DataError as error:
        raise InputError(str(error)) from error
    if not lines:
        raise InputError(f"{place} holds no sentences; expected one per line")
    data = Sentences(lines, torch.zeros(len(lines), dtype=torch.int64), Vocabulary.read(words), longest=longest)
    return Sentences.collate([data[i] for i in range(len(data))], width=longest)[0], lines


def _array(place: Path, bundle: Bundle) -> Tensor:
    try:
        array = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{place} cannot be read as an .npy array ({error}); save it with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim not in (3, 4):
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{place} holds {what}; expected numbers (N, C, H, W) or (C, H, W)")
    x = torch.from_numpy(array.astype(np.float32))
    x = x[None] if x.dim() == 3 else x
    wanted = bundle.inputs
    if wanted is not None and (x.shape[1] != wanted.channels or wanted.size not in (None, tuple(x.shape[2:]))):
        raise InputError(
            f"{place} holds inputs of {tuple(x.shape[1:])}; the model takes {wanted.channels} channels of {wanted.size}"
        )
    broken = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist() if len(x) else []
    if broken:
        which = f"{broken[:5]}{f' and {len(broken) - 5} more' if len(broken) > 5 else ''}"
        raise InputError(f"{place} holds NaN or infinite values in input(s) {which}; fill them in or leave them out")
    return x


def _images(files: list[Path], bundle: Bundle) -> tuple[Tensor, list[str]]:
    """Decoded, cut and scaled as for training."""
    wanted = bundle.inputs
    if wanted is None or wanted.channels not in (1, 3) or wanted.size is None:
        raise InputError(f"{files[0]} is an image, but the model does not say that it takes images; give an .npy file")
    mode = "RGB" if wanted.channels == 3 else "L"
    loaded = Images(ImageFiles(files), torch.zeros(len(files)), ["any"], mode=mode, size=wanted.size).to_memory()
    x = to_float(loaded.images)
    if wanted.mean is not None and wanted.std is not None:
        x = (x - torch.tensor(wanted.mean)[:, None, None]) / torch.tensor(wanted.std)[:, None, None]
    return x, [str(file) for file in files if str(file) not in loaded.corrupt]
