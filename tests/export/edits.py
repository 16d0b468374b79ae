"""A tiny model, and what one can do to its bundle."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.decision import Decision
from dynanet.core.halt import Halt
from dynanet.export.folder import seal, sums
from dynanet.export.strict import dump

WEIGHTS, CONFIG, MANIFEST, README = NAMES = "model.safetensors", "config.json", "manifest.json", "README.md"
CANARY = "executed"  # a folder that appears beside the bundle if anything in it is executed


class Tiny(Halt):
    """Two steps, a norm, thresholds: the smallest model that has all a bundle must keep."""

    def __init__(self, num_classes: int, in_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.steps = 2
        self.first = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width))
        nn.init.kaiming_normal_(self.first[0].weight)
        self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(2))
        self.register_buffer("thresholds", torch.full((1,), torch.inf))

    def start(self, x):
        return self.first(x).mean((2, 3))

    def step(self, k, state):
        for layer in self.more if k else ():
            state = layer(state)
        return state, self.heads[k](state)

    def should_continue(self, k, state, answer):
        score = answer.amax(-1, keepdim=True)
        return Decision((score < self.thresholds[k]).to(score.dtype), score)


@architecture
def tiny(*, num_classes: int, in_channels: int = 2, width: int = 4, depth: int = 1, tags: tuple = ("a", 1)) -> Tiny:
    return Tiny(num_classes, in_channels, width, depth)


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest fit the files (and `changes` of its own)."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: sums((folder / name).read_bytes()) for name in manifest["files"]}
    manifest |= changes
    (folder / MANIFEST).write_bytes(dump(seal(manifest)))


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder.with_name(CANARY)

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def then_reseal(edit: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda at: (edit(at), reseal(at))


def edit_text(path: Path, edit: Callable[[bytes], bytes]) -> None:
    before = path.read_bytes()
    path.write_bytes(edit(before))
    assert path.read_bytes() != before, "the case changes nothing"


def edit_json(path: Path, changes: dict[str, Any], sealed: bool = False) -> None:
    value = json.loads(path.read_text()) | changes
    value = {key: each for key, each in value.items() if each is not ...}
    path.write_bytes(dump(seal(value)) if sealed else json.dumps(value).encode())


def edit_header(at: Path, edit: Callable[[bytes], bytes]) -> None:
    data = (at / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = edit(data[8:end].rstrip())
    assert text != data[8:end].rstrip(), "the case changes nothing"
    (at / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def offsets(text: bytes, move: Callable[[int, int], Any]) -> bytes:
    header = json.loads(text)
    for entry in header.values():
        entry["data_offsets"] = move(*entry["data_offsets"])
    return json.dumps(header).encode()


def many_tensors(n: int) -> bytes:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return json.dumps({f"more.{i}.bias": entry for i in range(n)}).encode()


def many_keys(n: int) -> bytes:
    return json.dumps({f"{i}": 0 for i in range(n)}).encode()


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def outside(at: Path, name: str, link: Callable[[Path, Path], object]) -> None:
    (at / name).rename(at.with_name(name))
    link(at.with_name(name), at / name)


def zip_all(at: Path) -> None:
    shutil.make_archive(str(at.with_name("zipped")), "zip", at)
    shutil.rmtree(at)
    at.with_name("zipped.zip").rename(at)


def old_torch_file(at: Path) -> None:
    torch.save({"a": Evil(at)}, at / WEIGHTS, _use_new_zipfile_serialization=False)


def pickle_in_header(at: Path) -> None:
    text = pickle.dumps(Evil(at))
    (at / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def zip_bomb(at: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(10_000_000))
    (at / WEIGHTS).write_bytes(file.getvalue())


def set_length(at: Path, length: int) -> None:
    data = (at / WEIGHTS).read_bytes()
    (at / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])


def long_header(at: Path) -> None:
    """As long on the disk as it says, without taking the room."""
    with open(at / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b"{")
    os.truncate(at / WEIGHTS, 100_000_100)


def changed(at: Path, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = safetensors.torch.load((at / WEIGHTS).read_bytes()) | changes
    return {name: value for name, value in found.items() if value is not None}


def poisoned(at: Path, name: str, value: float) -> dict[str, torch.Tensor]:
    tensor = changed(at)[name]
    tensor.view(-1)[-1] = value
    return changed(at, **{name: tensor})


def exchanged(at: Path) -> dict[str, torch.Tensor]:
    names = {"more.0.weight": "more.0.bias", "more.0.bias": "more.0.weight"}
    return {names.get(name, name): value for name, value in changed(at).items()}


def many_layers(at: Path) -> None:
    """All that can be asked of us before the size of the file betrays it."""
    edit_json(at / CONFIG, {"arguments": {"num_classes": 3, "depth": 4_000}})
    layers = {f"more.{i}.{name}": shape for i in range(4_000) for name, shape in (("weight", (4, 4)), ("bias", (4,)))}
    save(at, changed(at) | {name: torch.zeros(shape) for name, shape in layers.items()}, sealed=True)
    cut(at / WEIGHTS, 0.95)
    reseal(at)


def save(at: Path, values: dict[str, torch.Tensor], sealed: bool = False) -> None:
    (at / WEIGHTS).write_bytes(safetensors.torch.save(values))
    if sealed:
        short = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
        reseal(at, tensors={name: f"{short[v.dtype]} {list(v.shape)}" for name, v in values.items()})
