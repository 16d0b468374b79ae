"""config.json: the function of the zoo that builds the model, and its arguments."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from dynanet.core.architecture import Architecture
from dynanet.core.errors import BundleError, ConfigError
from dynanet.export.strict import MOST_INTEGER, check_keys, dump, line, parse, plain, short

Builders = Mapping[str, Callable[..., nn.Module]]

FORMAT = 1
CONFIG = "config.json"


@dataclass(frozen=True)
class Inputs:
    """The format of a model's input.

    Attributes:
        channels: channels (bands) of the input.
        size: height and width in pixels; None for any size.
        mean: per channel, subtracted from the input; None if nothing is.
        std: per channel, divisor of the difference; None if there is none.
        rate: samples per second of the sounds that the input is made of; None of other inputs.

    Raises:
        ConfigError: a count below 1, another number of means or standard deviations than channels.
    """

    channels: int
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rate: int | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.channels):
            raise ConfigError(f"input: channels is {short(self.channels)}; expected a whole number of at least 1")
        if self.size is not None and not (_are(_is_count, self.size) and len(self.size) == 2):
            raise ConfigError(f"input: size is {short(self.size)}; expected (height, width), each at least 1")
        if self.rate is not None and not _is_count(self.rate):
            raise ConfigError(f"input: rate is {short(self.rate)}; expected samples per second, at least 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and not (_are(_is_finite, values) and len(values) == self.channels):
                raise ConfigError(f"input: {name} is {short(values)}; expected {self.channels} finite numbers")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"input: std is {short(self.std)}; expected numbers above 0")


@runtime_checkable
class Switchable(Protocol):
    """A layer some of whose steps can be switched off, as early exits can.

    Attributes:
        active: the steps that run, counted from 0, ascending, the last one included. Setting it switches the others
            off.
    """

    active: Sequence[int]


@dataclass(frozen=True)
class Config:
    """A checked config.

    Attributes:
        architecture: the name of the builder.
        arguments: of the builder, by name.
        limits: the step limits of the Halts that have one, by name.
        active: the active steps, counted from 0, of the Halts of which some are switched off, by name.
        classes: the name of each class.
        inputs: what the model takes.
    """

    architecture: str
    arguments: dict[str, Any]
    limits: dict[str, int]
    active: dict[str, list[int]]
    classes: list[str] | None
    inputs: Inputs | None


def write_config(
    made: Architecture,
    arguments: Mapping[str, Any],
    limits: Mapping[str, int],
    active: Mapping[str, Sequence[int]],
    classes: Sequence[str] | None,
    inputs: Inputs | None,
) -> bytes:
    """The config as JSON, checked by `parse_config`.

    Raises:
        BundleError: an invalid class name, or arguments that contradict the classes or the input.
    """
    config = {
        "format": FORMAT,
        "architecture": made.name,
        "arguments": dict(arguments),
        "limits": dict(limits),
        "classes": plain(classes if classes is None else list(classes), "classes"),
        "input": None if inputs is None else _written(inputs),
    }
    if active:  # left out where all steps are on, so that such bundles keep their bytes
        config["active"] = {name: list(steps) for name, steps in active.items()}
    text = dump(config)
    parse_config(text, {made.name: made.builder})
    return text


def parse_config(text: bytes, builders: Builders) -> Config:
    """Parse and check the config of an untrusted file.

    Raises:
        BundleError: it is not a config, names a function that is not in `builders`, or has arguments that the function
            does not take.
    """
    raw = parse(text, CONFIG)
    keys = {"format", "architecture", "arguments", "limits", "classes", "input"}
    check_keys(raw, keys | {"active"} & raw.keys(), CONFIG)
    if raw["format"] != FORMAT:
        raise BundleError(f"{CONFIG} has format {short(raw['format'])}; this dynanet reads {FORMAT}: update it")
    name = raw["architecture"]
    arguments = raw["arguments"]
    limits = raw["limits"]
    classes = raw["classes"]
    active = raw.get("active", {})
    if not isinstance(name, str) or name not in builders:
        raise BundleError(f"{CONFIG}: architecture is {short(name)}; expected one of {', '.join(sorted(builders))}")
    for key, value in (("arguments", arguments), ("limits", limits), ("active", active)):
        if not isinstance(value, dict):
            raise BundleError(f"{CONFIG}: {key} is {short(value)}; expected an object")
    for key, value in arguments.items():
        plain(value, f"{CONFIG}: argument {short(key)}")
    try:
        inspect.signature(builders[name]).bind(**arguments)
    except TypeError as error:
        raise BundleError(f"{CONFIG}: {name} does not take these arguments: {line(error)}") from error
    for key, limit in limits.items():
        if not _is_count(limit):
            raise BundleError(
                f"{CONFIG}: limit of {short(key)} is {short(limit)}; expected a number of steps from 1 on"
            )
    for key, steps in active.items():
        if not (isinstance(steps, list) and steps and _are(lambda k: k == 0 and type(k) is int or _is_count(k), steps)):
            raise BundleError(
                f"{CONFIG}: active steps of {short(key)} are {short(steps)}; expected a list of whole numbers from 0 on"
            )
    if classes is not None:
        if not _are(lambda each: isinstance(each, str), classes):
            raise BundleError(f"{CONFIG}: classes is {short(classes)}; expected a list of names, or null")
        plain(classes, f"{CONFIG}: classes")
        if len(classes) != arguments.get("num_classes", len(classes)):
            raise BundleError(f"{CONFIG}: {len(classes)} classes are named, {name} has {arguments['num_classes']}")
    return Config(name, arguments, limits, active, classes, _parse_inputs(raw["input"], arguments))


def _written(inputs: Inputs) -> dict[str, Any]:
    """Without a rate if there is none, so that such bundles keep their bytes."""
    fields = dataclasses.asdict(inputs)
    return {key: value for key, value in fields.items() if key != "rate" or value is not None}


def _parse_inputs(raw: Any, arguments: Mapping[str, Any]) -> Inputs | None:
    if raw is None:
        return None
    keys = {field.name for field in dataclasses.fields(Inputs)} - {"rate"}
    check_keys(raw, keys | ({"rate"} & raw.keys() if isinstance(raw, dict) else set()), f"{CONFIG}: input")
    try:
        size, rate = _tuple(raw["size"]), raw.get("rate")
        inputs = Inputs(raw["channels"], size, _tuple(raw["mean"]), _tuple(raw["std"]), rate)
    except ConfigError as error:
        raise BundleError(f"{CONFIG}: {error}") from error
    if inputs.channels != arguments.get("in_channels", inputs.channels):
        raise BundleError(f"{CONFIG}: the input has {inputs.channels} channels, the model {arguments['in_channels']}")
    return inputs


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_INTEGER


def _is_finite(value: Any) -> bool:
    return type(value) is int and abs(value) <= MOST_INTEGER or type(value) is float and math.isfinite(value)


def _are(kind: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, list | tuple) and all(kind(value) for value in values)
