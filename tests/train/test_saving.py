"""Checkpoints of Lightning are those of `save_checkpoint`, and the best metric decides which is kept."""

import pytest
import torch

from dynanet.core.errors import CheckpointError
from dynanet.train.checkpoint import load_checkpoint, save_checkpoint, step_file
from dynanet.train.saving import AtomicCheckpointIO, Checkpoints, advice


def test_lightning_writes_and_reads_what_we_do(tmp_path):
    plugin, state = AtomicCheckpointIO(), {"state_dict": {"weight": torch.ones(2)}, "epoch": 3}
    plugin.save_checkpoint(state, tmp_path / "one.ckpt")
    save_checkpoint(state, tmp_path / "two.ckpt")
    assert (tmp_path / "one.ckpt").read_bytes() == (tmp_path / "two.ckpt").read_bytes()
    found = plugin.load_checkpoint(tmp_path / "one.ckpt")
    assert found["epoch"] == 3 and torch.equal(found["state_dict"]["weight"], torch.ones(2))


def test_code_is_neither_written_nor_read(tmp_path):
    plugin = AtomicCheckpointIO()
    with pytest.raises(CheckpointError, match="more than tensors, numbers and strings"):
        plugin.save_checkpoint({"hook": test_code_is_neither_written_nor_read}, tmp_path / "bad.ckpt")
    assert not list(tmp_path.iterdir())
    torch.save({"hook": 1}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of dynanet"):
        plugin.load_checkpoint(tmp_path / "foreign.ckpt", weights_only=False)


def test_a_checkpoint_may_be_removed_twice(tmp_path):
    path = tmp_path / "one.ckpt"
    save_checkpoint({}, path)
    for _ in range(2):
        AtomicCheckpointIO().remove_checkpoint(path)
        assert not path.exists()


def test_a_resumed_run_knows_the_best_so_far(tmp_path):
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    first.best = 0.75
    second.load_state_dict(first.state_dict())
    assert second.best == 0.75


@pytest.mark.parametrize(("lower", "best"), [(False, [0.2, 0.4]), (True, [0.2, 0.1])])
def test_the_best_is_the_highest_or_the_lowest_but_never_nan(lower, best, tmp_path):
    class Run:
        """What `Checkpoints` asks of a Trainer."""

        global_step, val_dataloaders, is_global_zero = 0, True, True

        def save_checkpoint(self, path):
            save_checkpoint({"score": self.score}, path)

    saving, run, kept = Checkpoints(tmp_path, lower_is_better=lower), Run(), []
    for score in (float("nan"), 0.2, 0.1, 0.4, float("nan")):
        run.global_step, run.score = run.global_step + 1, score
        run.callback_metrics = {"val/accuracy": torch.tensor(score, dtype=torch.float64)}
        saving.on_train_epoch_end(run, torch.nn.Linear(1, 1))
        if (tmp_path / "best.ckpt").exists():
            kept.append(load_checkpoint(tmp_path / "best.ckpt")["score"])
    assert list(dict.fromkeys(kept)) == best and saving.best == best[-1]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [step_file("", k).name for k in (4, 5)]


def test_advice_names_the_last_good_checkpoint(tmp_path):
    for folder in (None, tmp_path):
        assert advice(folder).startswith("no checkpoint was saved yet; lower the learning rate")
    save_checkpoint({}, step_file(tmp_path, 3))
    assert str(step_file(tmp_path, 3)) in advice(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_damaged_checkpoints_are_no_advice(tmp_path):
    step_file(tmp_path, 3).write_bytes(b"torn")
    assert advice(tmp_path).startswith("no checkpoint was saved yet")
