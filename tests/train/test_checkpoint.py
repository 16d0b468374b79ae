import errno
import hashlib
import io
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet import train
from dynanet.core.errors import CheckpointError
from dynanet.core.gate import Gate
from dynanet.gates.confidence import Patience
from dynanet.gates.rules import Gumbel, StraightThrough, TopK
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.train.checkpoint import decisions, is_whole, step_file, step_files, sweep
from tests.train.train_toys import toy

STATE = {"state_dict": {"a": torch.arange(300.0), "b": torch.ones(2, dtype=torch.int64)}, "names": ["x", None]}


def saved(folder):
    path = folder / "one.ckpt"
    train.save_checkpoint(STATE, path)
    return path


def test_what_was_saved_is_loaded_and_other_tools_read_it(tmp_path):
    path = saved(tmp_path)
    for loaded in (train.load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["state_dict"]["a"], STATE["state_dict"]["a"]) and loaded["names"] == ["x", None]
    assert zipfile.ZipFile(path).testzip() is None
    assert os.listdir(tmp_path) == ["one.ckpt"]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_damage_is_noticed(tmp_path_factory, data):
    path = saved(tmp_path_factory.mktemp("damage"))
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "drop", "add"]))
    if how == "flip":
        content[where] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[where:]
    elif how == "drop":
        del content[where]
    else:
        content.insert(where, 0x55)
        if bytes(content) == path.read_bytes():
            return
    path.write_bytes(content)
    assert not is_whole(path)
    with pytest.raises(CheckpointError, match="damaged"):
        train.load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_code_is_neither_saved_nor_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="more than tensors, numbers and strings"):
        train.save_checkpoint({"callback": Evil()}, "evil.ckpt")
    torch.save({"callback": Evil()}, "evil.ckpt")
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    evil = (tmp_path / "evil.ckpt").read_bytes()
    for disguised in (evil, pickle.dumps(Evil()), b"", zipped(parts, pickle.dumps(Evil()))):
        path.write_bytes(signed(disguised))
        with pytest.raises(CheckpointError):
            train.load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def zipped(parts, pickled):
    """An archive like torch's whose pickle is another one."""
    forged = io.BytesIO()
    with zipfile.ZipFile(forged, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return forged.getvalue()


def signed(content):
    """With the checksum that a careful forger would give it."""
    content = content[:-2] + (71).to_bytes(2, "little")
    return content + b"sha256:" + hashlib.sha256(content).hexdigest().encode()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; what was there is untouched"):
        train.save_checkpoint({**STATE, "step": 4}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["one.ckpt"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        train.load_checkpoint(tmp_path / "none.ckpt")
    assert not is_whole(tmp_path / "none.ckpt") and train.newest(tmp_path) is None


def test_the_newest_is_by_step_not_by_name_or_time(tmp_path):
    for step in (200_000_000, 99_999_999, 5):
        train.save_checkpoint(STATE, step_file(tmp_path, step))
    train.save_checkpoint(STATE, tmp_path / "step-notes.ckpt")
    assert list(sorted(step_files(tmp_path))) == [5, 99_999_999, 200_000_000]
    assert train.newest(tmp_path) == tmp_path / "step-200000000.ckpt"


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    for name in (".step-00000005.ckpt.0a1b.tmp", ".best.ckpt.0a1b.tmp", ".mine.tmp", "step-00000005.ckpt"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "step-00000005.ckpt"]


def test_weights_go_back_into_the_model_that_made_them_only(tmp_path):
    path, model = tmp_path / "one.ckpt", toy(seed=3)
    train.save_checkpoint({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, path)
    same = train.load_weights(toy(seed=4), path)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match=r"of another model: .*weight is \(16, 8\) .* and \(4, 8\).*and 8 more"):
        train.load_weights(toy(width=4), path)
    with pytest.raises(CheckpointError, match="weight is not in the checkpoint; bias is not in .*and 15 more"):
        train.load_weights(torch.nn.Linear(8, 16), path)


def test_another_gate_is_refused(tmp_path):
    path = tmp_path / "one.ckpt"

    def saved(model):
        state = {f"model.{k}": v for k, v in model.state_dict().items()}
        train.save_checkpoint({"state_dict": state, "dynanet": {"decides": decisions(model)}}, path)

    def gated(rule):
        return LayerSkip(torch.nn.Linear(4, 4), Gate(torch.nn.Linear(4, 1), rule))

    saved(gated(Gumbel()))
    train.load_weights(gated(StraightThrough()), path)  # in eval mode the same
    with pytest.raises(CheckpointError, match="gate decided by scores above 0 and now decides by scores above 3"):
        train.load_weights(gated(StraightThrough(3.0)), path)
    with pytest.raises(CheckpointError, match="and now decides by the 1 best scores"):
        train.load_weights(gated(TopK(1)), path)
    saved(toy())
    other = toy()
    other.confidence = Patience()
    with pytest.raises(CheckpointError, match="the model decided by MaxProbability and now decides by Patience"):
        train.load_weights(other, path)
