"""The configuration of a run: data, model and recipe."""

import inspect
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from dynanet import zoo
from dynanet.core.errors import ConfigError
from dynanet.core.files import write_atomically
from dynanet.datamodules import DATA_MODULES as DATA_MODULES
from dynanet.datamodules import DataModule


@dataclass(frozen=True)
class Data:
    """Where the data comes from.

    Attributes:
        name: of the data module. indian_pines and digits come in packages; parquet is the Hugging Face hub's schema for
            image classification; folder is root/split/class/image; camvid is segmentation in SegNet's layout,
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

    name: str = "indian_pines"
    place: str | None = None
    split: str = "field_cut"
    seed: int = 0
    held_out: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in DATA_MODULES:
            raise ConfigError(f"data.name is {self.name!r}; expected one of {', '.join(map(repr, DATA_MODULES))}")
        for name, value, least in (("seed", self.seed, 0), ("held_out", self.held_out, 1), ("size", self.size, 1)):
            if value is not None and value < least:
                raise ConfigError(f"data.{name} is {value}; expected {least} or more")
        takes = inspect.signature(DATA_MODULES[self.name]).parameters
        defaults = {each.name: each.default for each in fields(self)}
        for name, option in _OPTIONS.items():
            # A seed is accepted everywhere: some sets have nothing to draw.
            if option not in takes and name != "seed" and getattr(self, name) != defaults[name]:
                raise ConfigError(f"data.{name} is not supported for {self.name}; leave it out")

    def open(self, batch: int = 128, seed: int = 0) -> DataModule:
        """The data module of this name, with these options. It reads its files when it is first used.

        Args:
            batch: training samples per step.
            seed: of the order of training samples and of their augmentation.

        Raises:
            ConfigError: no place, for data that needs one.
        """
        kind = DATA_MODULES[self.name]
        takes = inspect.signature(kind).parameters
        if "place" in takes and self.place is None and takes["place"].default is inspect.Parameter.empty:
            raise ConfigError(f"data.place is missing: where is the {self.name} data? Give --data.place FOLDER")
        options = {option: getattr(self, name) for name, option in _OPTIONS.items() if option in takes}
        return kind(**options, batch=batch, shuffle_seed=seed)


# By name in the configuration: the argument of a data module.
_OPTIONS = {"place": "place", "held_out": "hold_out", "size": "size", "split": "split", "seed": "seed"}


@dataclass(frozen=True)
class Model:
    """Which network.

    Attributes:
        name: a function of `dynanet.zoo`.
        arguments: its arguments; classes and channels are filled in from the data.
    """

    name: str = "spectral_exit"
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, data: DataModule) -> nn.Module:
        """The network with fresh weights, for this data.

        Raises:
            ConfigError: no such model, or arguments it does not take.
        """
        if self.name not in zoo.MODELS:
            raise ConfigError(f"model.name is {self.name!r}; expected a model of the zoo: {', '.join(zoo.MODELS)}")
        given = data.arguments
        for name, value in self.arguments.items():
            if name in given and value != given[name]:
                raise ConfigError(f"model.arguments has {name} = {value}, but the data has {given[name]}; leave it out")
        builder = zoo.MODELS[self.name]
        try:
            return builder(**{**self.arguments, **given})
        except TypeError as error:
            parameters = inspect.signature(builder).parameters
            if foreign := [name for name in given if name not in parameters]:
                raise ConfigError(
                    f"model.name is {self.name}, which has no argument {foreign[0]!r}, which this data needs; expected "
                    f"a network for such inputs"
                ) from error
            takes = ", ".join(name for name in parameters if name not in given)
            unknown = [name for name in self.arguments if name not in parameters]
            reason = f"does not take {unknown[0]!r}" if unknown else str(error)
            raise ConfigError(f"model.arguments: {self.name} {reason}; it takes {takes}") from error


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: with one cycle of the learning rate.

    Attributes:
        epochs: passes over the training data.
        batch: samples per step.
        lr: the highest learning rate.
        weight_decay: of kernels and matrices.
        warmup: share of training in which the learning rate rises.
        exit_weights: of the exits' losses; equal, summing to 1, if not given.
        distill: weight of the distillation from the last exit into the others.
        label_smoothing: share of the target spread over all classes; above 0 it makes confidences less useful.
        seed: of weights, order and augmentation.
        ponder: weight of the ponder cost, where positions halt.
        rate: share of the samples for which every layer that can be skipped should run; None: unconstrained.
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
    """Data, model and recipe: everything that a run depends on."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    recipe: Recipe = field(default_factory=Recipe)

    def save(self, path: Path) -> None:
        """Write a YAML file, for `read`."""
        text = yaml.safe_dump(asdict(self), sort_keys=False)
        write_atomically(path, lambda file: file.write(text.encode()))

    def changes(self, other: "Experiment") -> list[str]:
        """The options in which another experiment differs, each as text."""
        ours, theirs = (yaml.safe_load(yaml.safe_dump(asdict(each))) for each in (self, other))
        return [
            f"{part}.{name} was {was} and is {theirs[part][name]}"
            for part, values in ours.items()
            for name, was in values.items()
            if theirs[part][name] != was
        ]

    @classmethod
    def read(cls, path: Path) -> "Experiment":
        """Read a YAML file.

        Raises:
            ConfigError: the file cannot be read, or is not the YAML of an experiment.
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
