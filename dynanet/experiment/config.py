"""What the command line trains and measures: data, model and recipe, as one plain configuration."""

import inspect
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from dynanet import zoo
from dynanet.core.errors import ConfigError, MissingSplitError
from dynanet.core.files import write_atomically
from dynanet.data import detection, parts
from dynanet.data.augment import CropFlip, channel_stats
from dynanet.data.camvid import load_camvid
from dynanet.data.digits import load_digits
from dynanet.data.folder import load_folder
from dynanet.data.images import Images, ImageTensors
from dynanet.data.indian_pines import CLASS_NAMES, IndianPines
from dynanet.data.parquet import load_parquet
from dynanet.data.patch_augment import RotatePaste
from dynanet.data.segmentation import RandomResizedFlip, SegmentationTensors
from dynanet.data.splits import hold_out
from dynanet.data.voc import load_voc
from dynanet.experiment.problem import Problem, of_sentences, of_sequences
from dynanet.tasks.task import Detection, Segmentation
from dynanet.train.batches import Batches


@dataclass(frozen=True)
class Data:
    """Where the data comes from.

    Attributes:
        name: indian_pines and digits come in packages; parquet is the Hugging Face hub's schema for image
            classification; folder is root/split/class/image; camvid is segmentation in SegNet's layout,
            root/split/image with root/splitannot/labels; voc is detection in Pascal VOC's layout; spoken_digits are the
            recordings of the Free Spoken Digit Dataset; time_series is a set of the UEA or UCR archive; sentences are
            lines of a label and a sentence (SST-2, TREC).
        place: the folder (or file, or hf://datasets/owner/name) of parquet, folder, camvid, voc and spoken_digits;
            what the files of time_series and sentences begin with: data/JapaneseVowels, data/stsa.binary, data/TREC.
        split: of Indian Pines: field_cut, whole_fields (harder), or random_pixels_leaky (which leaks, and says so).
        seed: of the split.
        held_out: samples held out of the training split for calibration, where the data has no validation split; a
            tenth, if not given.
        size: side that images of a folder are resized to; height of voc's, whose width follows the first one's shape;
            words that are read of a sentence, 64 if not given.
    """

    name: Literal[
        "indian_pines", "parquet", "folder", "digits", "camvid", "voc", "spoken_digits", "time_series", "sentences"
    ] = "indian_pines"
    place: str | None = None
    split: str = "field_cut"
    seed: int = 0
    held_out: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("seed", self.seed, 0), ("held_out", self.held_out, 1), ("size", self.size, 1)):
            if value is not None and value < least:
                raise ConfigError(f"data.{name} is {value}; expected {least} or more")
        given = {"place": self.place, "held_out": self.held_out, "size": self.size}
        if self.name in ("indian_pines", "digits"):
            unused = [name for name, value in given.items() if value is not None]
        elif self.name in ("camvid", "spoken_digits"):
            unused = [name for name in ("held_out", "size") if given[name] is not None]
        elif self.name == "time_series":
            unused = ["size"] if self.size is not None else []
        else:
            unused = []
        if self.name != "indian_pines" and self.split != "field_cut":
            unused.append("split")
        if unused:
            raise ConfigError(f"data.{unused[0]} says nothing about {self.name}; leave it out")


@dataclass(frozen=True)
class Model:
    """Which network.

    Attributes:
        name: a function of `dynanet.zoo`.
        arguments: its arguments; classes and channels are filled in from the data.
    """

    name: str = "spectral_exit"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How it is trained: with one cycle of the learning rate.

    Attributes:
        epochs: passes over the training data.
        batch: samples per step.
        lr: the highest learning rate.
        weight_decay: of kernels and matrices.
        warmup: share of training in which the rate rises.
        exit_weights: of the exits' losses; equal, summing to 1, if not given.
        distill: how much the last exit teaches the others.
        label_smoothing: spoils confidences; 0 is a good value where exits are calibrated.
        seed: of weights, order and augmentation.
        ponder: weight of the ponder cost, where positions halt.
        rate: share of the images for which every layer that can be skipped is to run; None: whatever the loss likes.
        optimizer: sgd has Nesterov momentum; adamw, with an lr of 1e-3 or so, is for sequences and sentences.
        precision: of training; bf16-mixed is twice as fast on processors that have it.
    """

    epochs: int = 18
    batch: int = 128
    lr: float = 0.05
    weight_decay: float = 2e-3
    warmup: float = 0.25
    exit_weights: list[float] | None = None
    distill: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    ponder: float = 0.0
    rate: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("warmup", 0 <= self.warmup <= 1, "a share from 0 to 1"),
            ("distill", 0 <= self.distill < math.inf, "0 or more"),
            ("ponder", 0 <= self.ponder < math.inf, "0 or more"),
            ("rate", self.rate is None or 0 < self.rate <= 1, "above 0 and at most 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share from 0 to below 1"),
        ):
            if not fits:
                raise ConfigError(f"recipe.{name} is {getattr(self, name)}; expected {expected}")


@dataclass(frozen=True)
class Experiment:
    """Data, model and recipe: all that a run depends on."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    recipe: Recipe = field(default_factory=Recipe)

    def save(self, path: Path) -> None:
        """As YAML, readable by `read`."""
        text = yaml.safe_dump(asdict(self), sort_keys=False)
        write_atomically(path, lambda file: file.write(text.encode()))

    def changes(self, other: "Experiment") -> list[str]:
        """What another experiment has differently."""
        ours, theirs = (yaml.safe_load(yaml.safe_dump(asdict(each))) for each in (self, other))
        return [
            f"{part}.{name} was {was} and is {theirs[part][name]}"
            for part, values in ours.items()
            for name, was in values.items()
            if theirs[part][name] != was
        ]

    @classmethod
    def read(cls, path: Path) -> "Experiment":
        """From YAML.

        Raises:
            ConfigError: no such file, no YAML, or unknown keys.
        """
        try:
            raw = yaml.safe_load(path.read_text())
            return cls(Data(**raw["data"]), Model(**raw["model"]), Recipe(**raw["recipe"]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); a run folder has a config.yaml") from error
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path} is not the configuration of a run: {reason}") from error


def open_problem(data: Data, batch: int = 128, seed: int = 0) -> Problem:
    """Load the data of an experiment.

    Raises:
        ConfigError: data that has to lie somewhere, without a place.
        DataError: the data cannot be used.
    """
    if data.name == "indian_pines":
        return _scene(data, batch, seed)
    if data.name == "digits":
        train, held_out, test = (load_digits(part) for part in ("train", "val", "test"))
        return _images(
            "scikit-learn digits, fixed stratified split", train, held_out, test, batch, seed, crop=0, flip=0
        )
    if data.place is None:
        raise ConfigError(f"data.place is missing: where is the {data.name} data? Give --data.place FOLDER")
    if data.name == "camvid":
        return _segmentation(data.place, batch, seed)
    if data.name == "voc":
        return _detection(data, batch, seed)
    if data.name == "sentences":
        return of_sentences(data.place, data.held_out, data.seed, 64 if data.size is None else data.size, batch, seed)
    if data.name == "spoken_digits":
        return of_sequences(parts.spoken_digits(data.place), batch, seed)
    if data.name == "time_series":
        return of_sequences(parts.time_series(data.place, data.held_out, data.seed), batch, seed)
    train, test = (_load(data, split).to_memory() for split in ("train", "test"))
    name = f"{Path(data.place).name} ({data.name})"
    validation = _validation(data)
    if validation is not None:
        title, held_out = f"{name}, with its validation split", validation.to_memory()
    else:
        count = data.held_out if data.held_out is not None else max(1, len(train) // 10)
        train, held_out = hold_out(train, count, seed=data.seed)
        title = f"{name}, {count} training images held out, seed {data.seed}"
    return _images(title, train, held_out, test, batch, seed, crop=max(1, test.images.shape[-1] // 8), flip=0.5)


def build(model: Model, problem: Problem) -> nn.Module:
    """The network of an experiment, with fresh weights.

    Raises:
        ConfigError: no such model, or arguments it does not take.
    """
    if model.name not in zoo.MODELS:
        raise ConfigError(f"there is no model {model.name!r}; the zoo has {', '.join(zoo.MODELS)}")
    given = problem.arguments
    for name, value in model.arguments.items():
        if name in given and value != given[name]:
            raise ConfigError(f"model.arguments has {name} = {value}, but the data has {given[name]}; leave it out")
    try:
        return zoo.MODELS[model.name](**{**model.arguments, **given})
    except TypeError as error:
        takes = [name for name in inspect.signature(zoo.MODELS[model.name]).parameters if name not in given]
        raise ConfigError(f"model {model.name}: {error}; it takes {', '.join(takes)}") from error


def _validation(data: Data) -> Images | None:
    """The validation split, if the data has one and nothing else was asked for."""
    if data.held_out is not None:
        return None
    try:
        return _load(data, "val")
    except MissingSplitError:
        return None


def _load(data: Data, split: str) -> Images:
    size = None if data.size is None else (data.size, data.size)
    assert data.place is not None
    if data.name == "parquet":
        return load_parquet(data.place, split, size=size)
    return load_folder(data.place, split, size=size)


def _images(
    title: str, train: ImageTensors, held_out: ImageTensors, test: ImageTensors, batch: int, seed: int, *,
    crop: int, flip: float,
) -> Problem:  # fmt: skip
    mean, std = channel_stats(train.images)
    augment, plain = CropFlip(mean, std, padding=crop, flip=flip), CropFlip(mean, std, padding=0, flip=0.0)
    return Problem(
        title=title,
        classes=train.classes,
        channels=train.images.shape[1],
        size=(train.images.shape[2], train.images.shape[3]),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        train=Batches(train, batch, shuffle=True, drop_last=True, seed=seed, collate=augment.collate),
        held_out=Batches(held_out, 256, collate=plain.collate),
        test=Batches(test, 256, collate=plain.collate),
    )


def _scene(data: Data, batch: int, seed: int) -> Problem:
    scene = IndianPines(data.split, data.seed)
    parts = {part: scene.patches(part) for part in ("train", "val", "test")}
    return Problem(
        title=f"Indian Pines, {data.split} split, seed {data.seed}",
        classes=CLASS_NAMES,
        channels=scene.cube.shape[0],
        size=(scene.patch, scene.patch),
        mean=None,
        std=None,
        train=Batches(parts["train"], batch, shuffle=True, drop_last=True, seed=seed, collate=RotatePaste().collate),
        held_out=Batches(parts["val"], 512),
        test=Batches(parts["test"], 512),
        scene=scene,
    )


def _segmentation(place: str, batch: int, seed: int) -> Problem:
    train, held_out, test = (SegmentationTensors(load_camvid(place, split)) for split in ("train", "val", "test"))
    mean, std = channel_stats(train.images)
    augment, plain = (
        RandomResizedFlip(mean, std, train.void),
        RandomResizedFlip(mean, std, train.void, zoom=(1, 1), cut=1, flip=0.0),
    )
    height, width = train.images.shape[2:]
    return Problem(
        title=f"{Path(place).name}, {height} x {width} pixels, its own validation split",
        classes=train.classes,
        channels=train.images.shape[1],
        size=(height, width),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        train=Batches(train, batch, shuffle=True, drop_last=True, seed=seed, collate=augment.collate),
        held_out=Batches(held_out, 8, collate=plain.collate),
        test=Batches(test, 8, collate=plain.collate),
        task=Segmentation(len(train.classes), train.void),
    )


def _detection(data: Data, batch: int, seed: int) -> Problem:
    assert data.place is not None
    size = _shape(data.place, data.size) if data.size is not None else None
    train, test = (detection.to_memory(load_voc(data.place, split), size) for split in ("train", "test"))
    name = f"{Path(data.place).name}, {test.images.shape[2]} x {test.images.shape[3]} pixels"
    held_out = None
    if data.held_out is None:
        try:
            title, held_out = (
                f"{name}, its own validation split",
                detection.to_memory(load_voc(data.place, "val"), size),
            )
        except MissingSplitError:
            pass
    if held_out is None:
        count = data.held_out if data.held_out is not None else max(1, len(train) // 10)
        if count >= len(train):
            raise ConfigError(f"data.held_out is {count}, and there are {len(train)} training images; hold out fewer")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(data.seed))
        train, held_out = train.part(order[count:]), train.part(order[:count])
        title = f"{name}, {count} training images held out, seed {data.seed}"
    mean, std = channel_stats(train.images)
    augment, plain = detection.RandomResizedFlipBoxes(mean, std), detection.Normalize(mean, std)
    return Problem(
        title=title,
        classes=train.classes,
        channels=train.images.shape[1],
        size=(train.images.shape[2], train.images.shape[3]),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        train=Batches(train, batch, shuffle=True, drop_last=True, seed=seed, collate=augment.collate),
        held_out=Batches(held_out, 8, collate=plain.collate),
        test=Batches(test, 8, collate=plain.collate),
        task=Detection(tuple(train.classes)),
    )


def _shape(place: str, height: int) -> tuple[int, int]:
    """(height, width) of the first training image's shape."""
    image, _ = load_voc(place, "train")[0]
    return height, max(1, round(image.shape[2] * height / image.shape[1]))
