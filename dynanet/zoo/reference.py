"""The authors' published models: their configurations, checkpoints and way of counting FLOPs.

`load_reference` builds our model from an authors' checkpoint; `paper_flops` counts as the authors do.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynanet.core.errors import CheckpointError, ConfigError
from dynanet.core.macs import CountMacs
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.zoo.msdnets import msdnet
from dynanet.zoo.ranets import Stage, ranet


def load_reference(
    system: Literal["MSDNet", "RANet"], config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> EarlyExit:
    """Build our model from the authors' configuration and fill it with the weights of their checkpoint.

    MSDNet is https://github.com/kalviny/MSDNet-PyTorch (MIT): `config` has the names of its command line (data,
    nBlocks, base, step, stepmode, nChannels, growthRate, grFactor and bnFactor as a list or as "1-2-4", nScales, prune,
    bottleneck, reduction), with its defaults for what is left out. RANet is https://github.com/yangle15/RANet-pytorch:
    data, nBlocks, block_step, step, stepmode, nChannels, growthRate, scale_list, grFactor and bnFactor as lists or as
    "1-2-3", nScales, compress_factor, reduction, and likewise. Names that do not shape the network (epochs, lr) are not
    read.

    Args:
        system: the paper, "MSDNet" or "RANet".
        config: the authors' arguments by name.
        state_dict: the authors' weights by their names, with or without the `module.` of DataParallel. The counters
            `num_batches_tracked`, which old checkpoints lack, may be missing.

    Returns:
        The model in eval mode; `model.answers(x)` lists the authors' logits at every exit.

    Raises:
        ConfigError: an unknown system, or a configuration that gives no valid network.
        CheckpointError: missing or unexpected names, or shapes that are not this configuration's.
    """
    builders = {"MSDNet": _msdnet_from, "RANet": _ranet_from}
    if system not in builders:
        raise ConfigError(f"load_reference: unknown system {system!r}; expected 'MSDNet' or 'RANet'")
    model = builders[system](config)
    own = reference_state_dict(model)  # shares its memory with the model
    theirs = _without_module(state_dict)
    _check_state(system, own, theirs)
    for name, tensor in theirs.items():
        own[name].copy_(tensor)
    return model.eval()


def reference_state_dict(model: EarlyExit) -> dict[str, Tensor]:
    """The weights of an MSDNet or RANet under the authors' names and in their order, for their code to load.

    Without what we add to the authors' network (thresholds). Tensors are the model's own, not copies.
    """
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(("stages.", "exits."))}
    return {theirs: own[key] for key, theirs in _names(model, own).items()}


def paper_flops(
    model: EarlyExit, input_shape: tuple[int, int, int], convention: Literal["msdnet"] = "msdnet"
) -> list[int]:
    """What the authors' own counter prints for one sample that leaves at active exit 0, 1, ...; not comparable to MACs.

    "msdnet" (also RANet's and CondenseNet's): multiply-accumulates of convolutions without their bias, weights + bias
    of a linear layer, one per input of a ReLU, kernel size per output of a pooling; norms, concatenation and additions
    are free. Everything up to the exit counts, earlier exits included.

    Args:
        model: a network with exits; it runs once on a sample of zeros (on the meta device, without computing).
        input_shape: (C, H, W) of one sample.
        convention: whose count.

    Raises:
        ConfigError: an unknown convention.
    """
    if convention != "msdnet":
        raise ConfigError(f"paper_flops: unknown convention {convention!r}; expected 'msdnet'")
    return [macs + extras for macs, extras in _count_per_exit(model, input_shape)]


def macs_per_exit(model: EarlyExit, input_shape: tuple[int, int, int]) -> list[int]:
    """Multiply-accumulates (convolutions, linears) of one sample (C, H, W) that leaves at active exit 0, 1, ...

    As a CostModel measures, without thresholds and traces; the network may be on the meta device.
    """
    return [macs for macs, _ in _count_per_exit(model, input_shape)]


def _msdnet_from(config: Mapping[str, Any]) -> EarlyExit:
    data, classes = _data("MSDNet", config)
    growth_factors = _factors(config, "grFactor")
    scales = config.get("nScales", len(growth_factors))
    bottleneck = config.get("bottleneck", True)
    if not isinstance(bottleneck, bool):
        raise ConfigError(f"load_reference: MSDNet's bottleneck is {bottleneck!r}; expected True or False")
    return msdnet(
        num_classes=classes,
        blocks=config.get("nBlocks", 1),
        base=config.get("base", 4),
        step=config.get("step", 1),
        step_mode=config.get("stepmode") or "lin_grow",  # the default of the authors' code
        channels=config.get("nChannels", 32),
        growth=config.get("growthRate", 6),
        growth_factors=growth_factors[:scales],
        bottleneck_factors=_factors(config, "bnFactor")[:scales],
        prune=config.get("prune", "max"),
        bottleneck=bottleneck,
        reduction=config.get("reduction", 0.5),
        head="imagenet" if data == "imagenet" else "cifar",
    )


def _ranet_from(config: Mapping[str, Any]) -> EarlyExit:
    data, classes = _data("RANet", config)
    modes: dict[str, Literal["even", "lin_grow"]] = {"even": "even", "lg": "lin_grow", "lin_grow": "lin_grow"}
    mode = config.get("stepmode") or "even"
    if mode not in modes:
        raise ConfigError(f"load_reference: RANet's stepmode is {mode!r}; expected 'even' or 'lg'")
    growth_factors = _factors(config, "grFactor", "4-2-1")
    scales = config.get("nScales", len(growth_factors))
    return ranet(
        num_classes=classes,
        blocks=config.get("nBlocks", 2),
        block_step=config.get("block_step", 2),
        step=config.get("step", 4),
        step_mode=modes[mode],
        channels=config.get("nChannels", 16),
        growth=config.get("growthRate", 6),
        scales=_factors(config, "scale_list", "1-2-3")[:scales],
        growth_factors=growth_factors[:scales],
        bottleneck_factors=_factors(config, "bnFactor", "4-2-1")[:scales],
        compress=config.get("compress_factor", 0.25),
        reduction=config.get("reduction", 0.5),
        head="imagenet" if data == "imagenet" else "cifar",
    )


def _data(system: str, config: Mapping[str, Any]) -> tuple[str, int]:
    """The data set and its number of classes."""
    data = str(config.get("data", "cifar10"))
    classes = {"cifar100": 100, "cifar10": 10, "imagenet": 1000}
    known = [name for name in classes if data.lower().startswith(name)]  # the authors test by prefix: cifar10+
    if not known:
        raise ConfigError(f"load_reference: {system}'s data is {data!r}; expected cifar10, cifar100 or ImageNet")
    return known[0], classes[known[0]]


def _factors(config: Mapping[str, Any], name: str, otherwise: str = "1-2-4") -> tuple[int, ...]:
    """One factor per scale, from a list or from the command line's "1-2-4"."""
    value = config.get(name, otherwise)
    try:
        factors = tuple(int(f) for f in (value.split("-") if isinstance(value, str) else value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"load_reference: {name} is {value!r}; expected a list of numbers or '1-2-4'") from error
    scales = config.get("nScales", len(factors))
    if scales > len(factors):
        raise ConfigError(f"load_reference: {name} has {len(factors)} factors for nScales {scales}; expected one each")
    return factors


def _names(model: EarlyExit, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Our keys and the authors' names of them, in the authors' order."""
    if not isinstance(model.stages[0], Stage):
        return {key: _msdnet_key(key, own) for key in own}
    names = {key: _ranet_key(key, model, own) for key in own}
    order = ("scale_flows", "classifier", "FirstLayer")
    return dict(sorted(names.items(), key=lambda pair: order.index(pair[1].split(".")[0])))


_MSDNET_KEYS = (
    (r"^stages\.0\.0\.scales\.(\d+)\.", r"blocks.0.0.layers.\1.net."),
    (r"^stages\.(\d+)\.(\d+)\.scales\.(\d+)\.(normal|down)\.", r"blocks.\1.\2.layers.\3.conv_\4.net."),
    (r"^stages\.(\d+)\.(\d+)\.narrow\.(\d+)\.", r"blocks.\1.\2.m.\3.net."),
    (r"^exits\.(\d+)\.convs\.(\d+)\.", r"classifier.\1.m.\2.net."),
    (r"^exits\.(\d+)\.linear\.", r"classifier.\1.linear."),
)


def _msdnet_key(key: str, own: Mapping[str, Tensor]) -> str:
    """The authors' name of our key."""
    if key.startswith("stages.0.0.scales.0.") and "stages.0.0.scales.0.0.bias" in own:  # ImageNet: a bare Sequential
        return key.replace("stages.0.0.scales.0.", "blocks.0.0.layers.0.")
    for pattern, theirs in _MSDNET_KEYS:
        name, found = re.subn(pattern, theirs, key)
        if found:
            return name
    raise CheckpointError(f"MSDNet has no parameter {key}; expected a model made by zoo.msdnet")


_RANET_KEYS = (
    (r"layers\.(\d+)\.(normal|up)\.", r"layers.\1.conv_\2.net."),
    (r"last\.", "conv_last.net."),
    (r"trans\.", "trans.net."),
)


def _ranet_key(key: str, model: EarlyExit, own: Mapping[str, Tensor]) -> str:
    """The authors' name of our key: their blocks are numbered by sub-network, ours by exit."""
    part, number, *rest = key.split(".")
    if part == "exits":
        return _msdnet_key(key, own)
    stage = model.stages[int(number)]
    assert isinstance(stage, Stage)
    if rest[0] == "stem":
        bare = rest[2] == "0" and "stages.0.stem.scales.0.0.bias" in own  # ImageNet: a bare Sequential
        return ".".join(["FirstLayer.layers", rest[2], *([] if bare else ["net"]), *rest[3:]])
    name = ".".join(rest[2:])
    for pattern, theirs in _RANET_KEYS:
        name, found = re.subn(f"^{pattern}", theirs, name)
        if found:
            break
    return f"scale_flows.{stage.subnet}.{stage.place + int(rest[1])}.{name}"


def _without_module(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith("module.") for key in state_dict):
        return {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    return dict(state_dict)


def _check_state(system: str, expected: Mapping[str, Tensor], came: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in came and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in came if name not in expected]
    shapes = [
        f"{name} is {tuple(came[name].shape) if torch.is_tensor(came[name]) else type(came[name]).__name__}, "
        f"expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in came and not (torch.is_tensor(came[name]) and came[name].shape == tensor.shape)
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    wrong = [f"{len(names)} {what} ({_first(names)})" for what, names in found.items() if names]
    if wrong:
        raise CheckpointError(
            f"this state_dict is not that of a {system} of this configuration: {'; '.join(wrong)}; "
            f"pass the authors' configuration of this very checkpoint, and the checkpoint's 'state_dict' entry"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _count_per_exit(model: EarlyExit, input_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(MACs, the msdnet convention's extras) up to and including each active exit."""
    model = copy.deepcopy(model).eval()  # a copy, because the caller's may be training
    weight = next(model.parameters())
    state = torch.zeros(1, *input_shape, device=weight.device, dtype=weight.dtype)
    counts = []
    with torch.no_grad(), CountMacs() as count, _CountExtras() as extras:
        for k, (stage, leave) in enumerate(zip(model.stages, model.exits, strict=True)):
            state = stage(state)
            if k in model.active:
                leave(state)
                counts.append((count.total, extras.total))
    return counts


class _CountExtras(TorchDispatchMode):
    """What the msdnet convention adds to MACs, counted at dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op, aten = func._overloadpacket, torch.ops.aten
        if op is aten.addmm:
            self.total += out.numel()  # the bias of a linear layer
        elif op in (aten.relu, aten.relu_, aten.mean, aten._adaptive_avg_pool2d):
            self.total += args[0].numel()
        elif op in (aten.avg_pool2d, aten.max_pool2d_with_indices):
            height, width = args[1]
            self.total += (out[0] if isinstance(out, tuple) else out).numel() * height * width
        return out
