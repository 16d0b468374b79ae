"""Bundles: a model in a folder, as weights, JSON and a model card, without code.

    model.safetensors   weights and buffers (thresholds too)
    config.json         the architecture by name, its arguments, limits, active exits, classes and input
    manifest.json       size and sha256 of the others, every tensor's dtype and shape, measured MACs, a fingerprint
    README.md           the model card

Loading treats all files as untrusted, and runs cheap checks before expensive ones: the kinds and names of the files,
the manifest, the config, the header of the weights, the shapes of the architecture on the meta device; only then are
weights read, hashed and parsed. Hashes detect damage, not manipulation: an attacker who can write one of the files can
write all four. To pin a bundle, keep the fingerprint that `bundle` returns and pass it to `load`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dynanet.core.architecture import Architecture, architecture_of
from dynanet.core.errors import BundleError, StructureError
from dynanet.core.files import write_atomically, write_folder_atomically
from dynanet.core.halt import Halt
from dynanet.export.card import Card, render
from dynanet.export.config import CONFIG, FORMAT, Builders, Inputs, Switchable, parse_config, write_config
from dynanet.export.folder import (
    MANIFEST,
    README,
    check_macs,
    check_names,
    check_place,
    check_sums,
    open_plain,
    parse_manifest,
    read_text,
    seal,
    sums,
)
from dynanet.export.strict import dump, line, plain, short
from dynanet.export.weights import WEIGHTS, compare, content, describe, header, parse_weights, state


@dataclass(frozen=True)
class Bundle:
    """The verified contents of a bundle.

    Attributes:
        model: on the CPU, in eval mode.
        classes: the name of each class, in the order of the logits; None if they were not given.
        inputs: the format of the model's input; None if it was not given.
        mean_macs: MACs per sample on average, as measured by the author.
        worst_macs: MACs of the most expensive path.
        fingerprint: a hash of the whole bundle.
    """

    model: nn.Module
    classes: Sequence[str] | None
    inputs: Inputs | None
    mean_macs: float | None
    worst_macs: float | None
    fingerprint: str


def bundle(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    inputs: Inputs | None = None,
    mean_macs: float | None = None,
    worst_macs: float | None = None,
    card: Card | None = None,
) -> str:
    """Write a model to a folder atomically; an older bundle there is replaced once the new one is complete.

    The new bundle is loaded once before it replaces the old one.

    Args:
        model: built by a function of the zoo, then trained and calibrated.
        folder: a new or empty folder, or an older bundle. Its parent must exist.
        classes: the name of each class, in the order of the logits.
        inputs: the format of the model's input.
        mean_macs: measured MACs per sample, on average, as `CostModel.spent` gives them.
        worst_macs: MACs of the most expensive path, `CostModel.worst`.
        card: the author's part of the model card.

    Returns:
        The fingerprint; pass it to `load` to accept only this bundle.

    Raises:
        BundleError: the model was not built by the zoo or was rebuilt since, holds NaN or a value that JSON cannot
            hold; the folder holds other files; the disk is full. The folder is then unchanged.
    """
    made = architecture_of(model)
    if made is None:
        raise BundleError(
            f"{type(model).__name__} was not built by a function of the zoo, so no name can rebuild it; "
            "build it with dynanet.zoo, or decorate your own function with dynanet.core.architecture.architecture"
        )
    check_place(Path(folder))
    macs = {"mean": mean_macs, "worst": worst_macs}
    for kind, value in macs.items():
        check_macs(kind, value)
    arguments = {name: plain(value, f"argument {name} of {made.name}") for name, value in made.arguments.items()}
    limits = _limits(model)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "MACs per sample, mean": mean_macs,
        "MACs per sample, worst case": worst_macs,
        "input": inputs,
        "classes": None if classes is None else len(classes),
        "step limit": limits,
    }
    tensors = state(model)
    contents = {
        WEIGHTS: safetensors.torch.save(tensors),
        CONFIG: write_config(made, arguments, limits, _active(model), classes, inputs),
        README: render(card or Card(), made.name, arguments, facts).encode(errors="replace"),
    }
    manifest = seal(
        {
            "format": FORMAT,
            "dynanet": version("dynanet"),
            "files": {name: sums(data) for name, data in contents.items()},
            "macs": macs,
            "tensors": describe(tensors),
        }
    )
    contents[MANIFEST] = dump(manifest)

    def fill(fresh: Path) -> None:
        for name, data in contents.items():
            write_atomically(fresh / name, methodcaller("write", data))
        _check_back(model, made, fresh)

    try:
        write_folder_atomically(folder, fill)
    except OSError as error:
        raise BundleError(f"{folder} cannot be written ({error.strerror}) and is unchanged") from error
    return manifest["fingerprint"]


def _limits(model: nn.Module) -> dict[str, int]:
    """The step limits of the Halts that have one, by name."""
    return {name: m.limit for name, m in model.named_modules() if isinstance(m, Halt) and m.limit is not None}


def _active(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The active steps of the Halts of which some are switched off, by name."""
    active = {name: tuple(m.active) for name, m in model.named_modules() if _is_switchable(m)}
    return {name: on for name, on in active.items() if on != tuple(range(on[-1] + 1))}


def load(folder: str | os.PathLike, builders: Builders, *, fingerprint: str | None = None) -> nn.Module:
    """The model of a bundle, on the CPU, in eval mode. `read` also returns the classes and the other contents.

    Args:
        folder: of a bundle.
        builders: the functions that a bundle may name; nothing else is called.
        fingerprint: accept only the bundle with this fingerprint.

    Raises:
        BundleError: the folder is damaged, altered or not a bundle; the message names the file and the fault.
    """
    return read(folder, builders, fingerprint=fingerprint).model


def read(folder: str | os.PathLike, builders: Builders, *, fingerprint: str | None = None) -> Bundle:
    """All contents of a bundle; arguments and errors as of `load`."""
    try:
        return _read(Path(folder), builders, fingerprint)
    except OSError as error:
        raise BundleError(f"{folder} cannot be read ({error.strerror})") from error


def _read(folder: Path, builders: Builders, fingerprint: str | None) -> Bundle:
    check_names(folder)
    manifest = parse_manifest(read_text(folder, MANIFEST))
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise BundleError(f"{folder} is another bundle: fingerprint {manifest['fingerprint']}, expected {fingerprint}")
    check_sums(README, read_text(folder, README), manifest)
    text = read_text(folder, CONFIG)
    check_sums(CONFIG, text, manifest)
    config = parse_config(text, builders)

    with open_plain(folder, WEIGHTS) as file:
        found, start = header(file)
        compare(found, manifest["tensors"], f"{MANIFEST} lists")
        with torch.device("meta"), _AtMost(1000 + 20 * len(found)):
            skeleton = _built(builders[config.architecture], config.arguments)
        expected = state(skeleton)
        compare(found, describe(expected), f"{config.architecture} has")
        data = content(file, start, expected)
    check_sums(WEIGHTS, data, manifest)
    tensors = parse_weights(data, expected)

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # keep the user's random state
        model = _built(builders[config.architecture], config.arguments).eval()
    model.load_state_dict(tensors)
    _set_active(model, config.active)
    _set_limits(model, config.limits)
    macs = manifest["macs"]
    return Bundle(model, config.classes, config.inputs, macs["mean"], macs["worst"], manifest["fingerprint"])


_FILLS = {torch.Tensor.normal_, torch.Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}


class _AtMost(TorchFunctionMode):
    """Aborts building after `most` calls of torch, as a config of ten bytes can describe a million layers.

    Random initialisation is skipped: meta tensors hold no values, and normal numbers on the meta device import torch's
    compiler, which takes four seconds (as does any dispatch mode).
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise BundleError(f"{CONFIG} describes a far larger model than {WEIGHTS}; the files do not belong together")
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _built(builder: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return builder(**arguments)
    except BundleError:
        raise
    except Exception as error:  # a builder may raise anything for values of the right type
        raise BundleError(f"{CONFIG}: cannot build a model with these arguments: {line(error)}") from error


def _set_limits(model: nn.Module, limits: Mapping[str, int]) -> None:
    modules = dict(model.named_modules())
    for name, limit in limits.items():
        module = modules.get(name)
        if not isinstance(module, Halt):
            raise BundleError(f"{CONFIG}: limit of {short(name)}; the model has no steps there")
        module.limit = limit


def _is_switchable(module: nn.Module) -> TypeGuard[Switchable]:
    return isinstance(module, Halt) and isinstance(module, Switchable)


def _set_active(model: nn.Module, active: Mapping[str, Sequence[int]]) -> None:
    modules = dict(model.named_modules())
    for name, steps in active.items():
        module = modules.get(name)
        if module is None or not _is_switchable(module):
            raise BundleError(f"{CONFIG}: active steps of {short(name)}; the model has none to switch off there")
        try:
            module.active = steps
        except StructureError as error:
            raise BundleError(f"{CONFIG}: {short(name)}: {line(error)}") from error


def _check_back(model: nn.Module, made: Architecture, folder: Path) -> None:
    """Check that the new bundle loads and gives the same modules.

    Raises:
        BundleError: it does not.
    """
    try:
        again = _read(folder, {made.name: made.builder}, None).model
    except BundleError as error:
        raise BundleError(f"this model cannot be bundled: {error}") from error
    theirs, ours = ({name: type(m).__name__ for name, m in each.named_modules()} for each in (again, model))
    for name in theirs | ours:
        if theirs.get(name) != ours.get(name):
            raise BundleError(
                f"this model cannot be bundled: {short(name)} is now {ours.get(name)}, {made.name} builds "
                f"{theirs.get(name)}; only weights, buffers, limits and active exits may change after building"
            )
    steps = [{name: m.steps for name, m in each.named_modules() if isinstance(m, Halt)} for each in (again, model)]
    if steps[0] != steps[1]:
        raise BundleError(
            f"this model cannot be bundled: its layers have {steps[1]} steps, {made.name} builds {steps[0]}; build it "
            f"with the same steps"
        )
