"""Checkpoints that are written atomically, carry a checksum, and cannot run code when loaded.

A checkpoint is what `torch.save` writes (a zip archive), and any tool reads it with `torch.load`. Its SHA-256 is the
archive's comment, so that content and checksum stay together. Loading is always `weights_only=True`.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import CheckpointError
from dynanet.core.files import write_atomically
from dynanet.core.gate import Gate

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_STEP = re.compile(r"step-(\d{8,})\.ckpt")


def save_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically.

    Args:
        state: tensors, numbers, strings, lists and dicts of them.
        path: in a folder that exists.

    Raises:
        CheckpointError: the disk is full or not writable (the old file is untouched), or the state holds objects that
            cannot be loaded with `weights_only=True`.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    content[-2:] = _COMMENT.to_bytes(2, "little")  # the archive's last field: how long a comment follows
    digest = hashlib.sha256(content).hexdigest().encode()
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="meta")
    except Exception as error:
        raise CheckpointError(
            f"{Path(path).name} would hold more than tensors, numbers and strings, and not load again: "
            f"{_first_line(error)}; keep other objects out of the state of callbacks and schedulers"
        ) from error

    def write(file: Any) -> None:
        file.write(content)
        file.write(_MARK + digest)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; what was there is untouched: make room and resume"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: it is missing, damaged, or not a checkpoint.
    """
    content = _content(Path(path))
    if content is None:
        raise CheckpointError(f"{path} is damaged, or not a checkpoint of dynanet; use another one")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{path} holds more than tensors and was not loaded: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected the state of a training run")
    return state


def is_whole(path: str | Path) -> bool:
    """Whether the checkpoint exists and matches its checksum."""
    try:
        return _content(Path(path)) is not None
    except CheckpointError:
        return False


def newest(folder: str | Path) -> Path | None:
    """The last intact checkpoint of a run; None where nothing was saved. Skips damaged ones with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = sorted(step_files(folder).items(), reverse=True)
    for step, path in found:
        if is_whole(path):
            return path
        warnings.warn(f"{path} (step {step}) is damaged; going back to the one before", stacklevel=2)
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is intact; train in a new folder")
    return None


def step_files(folder: str | Path) -> dict[int, Path]:
    """A run's checkpoints by step, damaged ones included."""
    matches = ((_STEP.fullmatch(path.name), path) for path in Path(folder).glob("step-*.ckpt"))
    return {int(match[1]): path for match, path in matches if match}


def step_file(folder: str | Path, step: int) -> Path:
    """The path of the checkpoint after a step."""
    return Path(folder) / f"step-{step:08d}.ckpt"


def sweep(folder: str | Path) -> None:
    """Remove temporary files of writes that were interrupted."""
    for pattern in (".step-*.ckpt.*.tmp", ".best.ckpt.*.tmp"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint's weights into a model of the same architecture, and return the model.

    Either may be wrapped by `torch.compile` or `DataParallel`.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    loaded = load_checkpoint(path)
    mine = plain_names(model, model.state_dict())
    saved = {name.removeprefix("model."): value for name, value in loaded.get("state_dict", {}).items()}
    weights = {mine.get(name.replace("_orig_mod.", ""), name): value for name, value in saved.items()}
    check_same_model(model.state_dict(), weights, path)
    check_same_decisions(model, loaded.get("dynanet", {}).get("decides", {}), path)
    model.load_state_dict(weights)
    return model


def check_same_model(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: object) -> None:
    """Check that two state dicts have the same names and shapes.

    Raises:
        CheckpointError: they differ; the message names the first differences.
    """
    differences = [f"{name} is not in the checkpoint" for name in mine if name not in theirs]
    differences += [f"{name} is not in the model" for name in theirs if name not in mine]
    for name in mine:
        if name in theirs and mine[name].shape != theirs[name].shape:
            was = tuple(theirs[name].shape)
            now = tuple(mine[name].shape)
            differences.append(f"{name} is {was} in the checkpoint and {now} in the model")
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(differences[:3])}{more}; build the model that was trained"
        )


def decisions(model: nn.Module) -> dict[str, str]:
    """Settings of a model's decisions that are not in its weights, by layer: rules with their k, confidences."""
    deciding = ((name, m.decides) for name, m in model.named_modules() if isinstance(m, Gate | Dynamic))
    found = {name: how for name, how in deciding if how}
    return {plain: found[name] for plain, name in plain_names(model, found).items()}


def plain_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names of modules or weights by those they have where nothing is wrapped.

    Wrappers are what `torch.compile`, `DataParallel` and `DistributedDataParallel` put around a model or a part of it.
    """
    wrappers = []
    for name, module in model.named_modules(remove_duplicate=False):
        inner = "module" if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) else "_orig_mod"
        if inner == "module" or inner in dict(module.named_children()):
            head = f"{name}." if name else ""
            wrappers.append((f"{head}{inner}.", head))
    found = {}
    for name in names:
        plain = f"{name}."
        for prefix, head in reversed(wrappers):  # the innermost first, while the names around it are still whole
            if plain.startswith(prefix):
                plain = head + plain.removeprefix(prefix)
        found[plain.removesuffix(".")] = name
    return found


def check_same_decisions(model: nn.Module, theirs: Mapping[str, str], path: object) -> None:
    """Check that the layers decide by the rules of the trained model.

    Raises:
        CheckpointError: a layer decides by another rule; the message names the first.
    """
    for name, now in decisions(model).items():
        was = theirs.get(name, now)
        if was != now:
            raise CheckpointError(
                f"{path} is of another gate: {name or 'the model'} decided by {was} and now decides by {now}; build "
                f"the model that was trained, and change it after its weights are loaded"
            )


def _content(path: Path) -> bytes | None:
    """The bytes of the file; None if its comment is not the checksum of the rest."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give a checkpoint that exists") from error
    digest = hashlib.sha256(content[:-_COMMENT]).hexdigest().encode()
    return content if content[-_COMMENT:] == _MARK + digest else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else type(error).__name__
