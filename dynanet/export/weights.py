"""model.safetensors: the header is compared with the expected tensors before any data is read."""

import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dynanet.core.errors import BundleError
from dynanet.export.strict import check_keys, line, parse, short

WEIGHTS = "model.safetensors"
MOST_HEADER_BYTES = 1_000_000  # holds about 10,000 tensors

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers, on the CPU (or meta), contiguous; tied ones are duplicated.

    Raises:
        BundleError: one of them is not a dense tensor of a supported dtype.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES or value.layout != torch.strided:
            kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise BundleError(f"{name} is {kind}; a bundle holds dense tensors of {', '.join(_DTYPES.values())}")
        device = value.device if value.is_meta else "cpu"
        tensors[name] = value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    return tensors


def describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The dtype and shape of every tensor, as a manifest lists them: `F32 [16, 3, 3, 3]`."""
    return {name: f"{_DTYPES[tensor.dtype]} {list(tensor.shape)}" for name, tensor in tensors.items()}


def header(file: BinaryIO) -> tuple[dict[str, str], int]:
    """The tensors in a file's header, in the format of `describe`, and the header's size in bytes.

    For comparison only: safetensors parses the offsets itself, from the bytes that were hashed.

    Raises:
        BundleError: not a safetensors header.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER_BYTES:
        raise BundleError(f"{WEIGHTS} starts with a header of {length:,} bytes; expected at most {MOST_HEADER_BYTES:,}")
    found = {}
    for name, entry in parse(file.read(length), f"{WEIGHTS}: header").items():
        check_keys(entry, {"dtype", "shape", "data_offsets"}, f"{WEIGHTS}: {short(name)}")
        dtype = entry["dtype"]
        shape = entry["shape"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
            raise BundleError(f"{WEIGHTS}: {short(name)} is {short(dtype)} {short(shape)}; expected dtype and shape")
        found[name] = f"{dtype} {shape}"
    return found, 8 + length


def compare(found: Mapping[str, str], expected: Mapping[str, Any], says: str) -> None:
    """Check for the same names, dtypes and shapes.

    Raises:
        BundleError: they differ; the message names the first, and `says` where it is expected.
    """
    if found == expected:
        return
    name = next(name for name in [*expected, *found] if found.get(name) != expected.get(name))
    there, here = (short(each.get(name, "nothing")) for each in (found, expected))
    raise BundleError(f"{WEIGHTS} has {there} for {short(name)}, {says} {here}; it belongs to another model")


def content(file: BinaryIO, start: int, expected: Mapping[str, Tensor]) -> bytes:
    """The whole file, if its size is `start` plus that of the expected (meta) tensors.

    Raises:
        BundleError: another size.
    """
    whole = start + sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    size = os.fstat(file.fileno()).st_size
    if size != whole:
        raise BundleError(f"{WEIGHTS} has {size:,} bytes, expected {whole:,}; it is damaged: fetch the bundle again")
    file.seek(0)
    return file.read(whole)


def parse_weights(data: bytes, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parse the tensors with safetensors.

    Raises:
        BundleError: not the expected tensors, NaN, infinite weights, or negative variances.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{WEIGHTS} is damaged: {line(error)}") from error
    compare(describe(tensors), describe(expected), "expected")
    for name, values in tensors.items():
        if not values.is_floating_point():
            continue
        last = name.rpartition(".")[2]
        # Thresholds may be infinite. A negative variance would become NaN one layer later.
        good = ~values.isnan() if last == "thresholds" else values.isfinite()
        if last == "running_var":
            good &= values >= 0
        if not good.all():
            raise BundleError(
                f"{WEIGHTS}: {name} holds {values[~good][0].item()}, which is not valid in a trained model"
            )
    return tensors
