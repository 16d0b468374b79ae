import csv
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynanet import train
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import CheckpointError, ConfigError, TrainingError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Bernoulli, Gumbel, Sigmoid
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.train.checkpoint import step_files
from tests.train.train_toys import data, run, toy


def rows(folder, version=0):
    with open(folder / f"logs/version_{version}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_it_learns_and_tells_what_happened(tmp_path):
    model = toy()
    x = torch.randn(400, 8)
    y = x[:, :3].argmax(1)
    done = train.fit(
        model,
        DataLoader(TensorDataset(x[:300], y[:300]), 20, shuffle=True),
        DataLoader(TensorDataset(x[300:], y[300:]), 50),
        objective=train.MultiExit(),
        epochs=8,
        lr=0.1,
        cost=CostModel(model, x[:1]),
        folder=tmp_path,
        progress=False,
    )
    assert done.model is model and done.metrics["val/accuracy"] > 0.85 and done.metrics["val/accuracy/exit0"] > 0.85
    told = [float(row["val/accuracy"]) for row in rows(tmp_path) if row["val/accuracy"]]
    assert len(told) == 8
    best = train.load_weights(toy(), done.best).eval()
    right = (best(x[300:]).argmax(1) == y[300:]).float().mean().item()
    assert right == pytest.approx(max(told), abs=1e-6)
    with record(model.eval()) as trace:
        model(x[300:])
    assert done.metrics["val/keep/stages.1"] == pytest.approx(trace["stages.1"][0].mean().item(), abs=1e-6)
    spent = CostModel(model, x[:1]).spent(trace).mean().item() / CostModel(model, x[:1]).full
    assert done.metrics["val/spent"] == pytest.approx(spent, abs=1e-6)
    assert {"lr", "train/loss", "train/accuracy/exit1", "train/keep/stages.1"} <= set(done.metrics)
    assert list(tmp_path.glob("tensorboard/version_0/events*"))
    assert sorted(step_files(tmp_path)) == [7 * 15, 8 * 15]


def test_any_mechanism_and_a_model_that_is_none(tmp_path):
    """A residual net with gates, no Halt; and a plain linear layer."""
    torch.manual_seed(0)
    gated = nn.Sequential(
        *(LayerSkip(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), Gate(nn.Linear(8, 1), Gumbel())) for _ in range(2)),
        nn.Linear(8, 3),
    )
    cost = CostModel(gated, torch.zeros(1, 8))
    objective = train.CrossEntropy() + train.TargetRate(0.5) + train.BudgetPenalty(Budget(macs=0.8 * cost.full), cost)
    for name, model, wanted in (("gated", gated, objective), ("plain", nn.Linear(8, 3), train.CrossEntropy())):
        batches = train.Batches(data(), 5)
        done = train.fit(model, batches, batches, objective=wanted, epochs=2, folder=tmp_path / name, progress=False)
        assert 0 <= done.metrics["val/accuracy"] <= 1 and ("val/spent" in done.metrics) == (name == "gated")


@pytest.mark.parametrize("rule", [Gumbel, Bernoulli])
def test_a_collapsed_gate_is_named_once_and_an_exit_is_no_gate(tmp_path, rule):
    model = toy()
    model.stages[1].gate = Gate(nn.Linear(16, 1), rule())
    nn.init.constant_(model.stages[1].gate.scorer.bias, -30.0)
    batches, plain = train.Batches(data(200), 5), train.MultiExit()
    with pytest.warns(UserWarning, match="'stages.1' has collapsed: it kept 0.0% of its rows;") as told:
        train.fit(model, batches, objective=plain, epochs=3, folder=tmp_path, progress=False)
    assert len([w for w in told if "collapsed" in str(w.message)]) == 1


class Spoil(Callback):
    """Puts a NaN into the data or a weight at some step."""

    def __init__(self, what) -> None:
        self.what = what

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 7 and self.what == "data":
            batch[0][0] = float("nan")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 8 and self.what == "weight":
            module.model.exits[1].weight.data[0, 0] = float("nan")


def test_a_loss_that_is_nan_stops_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"loss is nan at step 7; the last good .* is .*step-00000005.ckpt; lower"):
        run(tmp_path, callbacks=[Spoil("data")])
    assert "\n" not in pytest.raises(TrainingError, run, tmp_path / "new", callbacks=[Spoil("data")]).value.args[0]


def test_weights_that_are_nan_are_never_saved(tmp_path):
    with pytest.raises(TrainingError, match=r"exits.1.weight is not finite after step 8; .* is .*step-00000006.ckpt"):
        run(tmp_path, checkpoint_every=2, callbacks=[Spoil("weight")])
    assert sorted(step_files(tmp_path)) == [5, 6]


def test_a_full_disk_stops_the_run_and_harms_nothing(tmp_path, monkeypatch):
    sync = os.fsync

    class Fill(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 7:
                monkeypatch.setattr(os, "fsync", full)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match="No space left on device"):
        run(tmp_path, callbacks=[Fill()])
    monkeypatch.setattr(os, "fsync", sync)
    assert sorted(step_files(tmp_path)) == [5] and not list(tmp_path.glob(".*"))
    assert run(tmp_path, resume=True).trainer.global_step == 15


def test_what_contradicts_itself_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="both lr and optimizer"):
        run(tmp_path / "new", lr=0.1, optimizer=train.sgd())
    with pytest.raises(ConfigError, match=r"trainer_options set \['callbacks', 'max_epochs'\], which fit sets"):
        run(tmp_path / "new", trainer_options={"callbacks": [], "max_epochs": 9, "gradient_clip_val": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_metric_that_nobody_logs_is_said_after_the_first_epoch_is_saved(tmp_path):
    with pytest.raises(
        ConfigError, match=r"monitor is 'val/f1', which is not logged; .* \['val/accuracy', .*'val/loss'"
    ):
        run(tmp_path, monitor="val/f1")
    assert sorted(step_files(tmp_path)) == [5]
    run(tmp_path, monitor="val/loss", lower_is_better=True, resume=True)
    losses = [float(row["val/loss"]) for row in rows(tmp_path, version=1) if row["val/loss"]]
    best = train.load_checkpoint(tmp_path / "best.ckpt")
    assert [state["best"] for name, state in best["callbacks"].items() if "Checkpoints" in name] == [min(losses)]


def test_the_smallest_run_there_is(tmp_path):
    assert run(tmp_path, samples=5, epochs=1, progress=True).trainer.global_step == 1


@pytest.mark.parametrize(
    "scheduler, first, tenth",
    [
        (train.one_cycle(warmup=0.5), 0.4 / 25, 0.4),
        (train.cosine(), 0.4, 0.2),
        (train.cosine(warmup_steps=10), 0.004, 0.4),
    ],
)
def test_learning_rates_go_where_they_should(scheduler, first, tenth):
    model = toy()
    optimizer = train.sgd(0.4)(model)
    schedule, seen = scheduler(optimizer, 20), []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[0] == pytest.approx(first) and seen[10] == pytest.approx(tenth, rel=0.03)
    assert seen[-1] < 0.03 * 0.4
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() > 1}


def test_equilibrium_in_a_run_is_that_of_a_loop(tmp_path):
    torch.manual_seed(0)
    models = [toy().double() for _ in range(2)]
    for model in models:
        model.stages[0][3].p = 0.0
        model.stages[1].gate.rule = Sigmoid()
    x, y = (torch.stack(list(column)) for column in zip(*data(20), strict=True))
    samples = TensorDataset(x.double(), y)
    train.fit(
        models[0],
        train.Batches(samples, 20),
        objective=train.MultiExit(),
        equilibrium=True,
        epochs=1,
        optimizer=train.sgd(0.1),
        scheduler=train.cosine(),
        folder=tmp_path,
        progress=False,
    )
    optimizer = train.sgd(0.1)(models[1].train())
    with record(models[1]) as trace:
        answer = models[1](x.double())
    counts = train.exits_reached(trace)
    train.MultiExit()(answer, y, trace).backward()
    train.rescale_gradients(counts)
    optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_two_processes_train_what_one_does_with_twice_the_batch(tmp_path):
    script = Path(__file__).parent / "two_processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (train.load_checkpoint(train.newest(tmp_path / name)) for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 8
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight)
    again = train.load_checkpoint(train.newest(tmp_path / "resumed"))
    assert all(torch.equal(again["state_dict"][name], weight) for name, weight in two["state_dict"].items())


@pytest.mark.parametrize(
    "strategy, told",
    [
        (
            "ddp",
            "refused: 2 weights get no gradient (exits.1.weight, exits.1.bias), as of an exit that is switched off",
        ),
        ("ddp_find_unused_parameters_true", "trained for 8 steps"),
    ],
)
def test_two_processes_with_an_exit_switched_off(tmp_path, strategy, told):
    script = Path(__file__).parent / "exit_off.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path, strategy], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0 and told in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]


def test_lightning_waits_until_it_is_needed():
    program = "import sys; from dynanet import train; train.MultiExit(); print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False"], done.stderr
    with pytest.raises(ImportError, match="cannot import name 'fits'"):
        from dynanet.train import fits  # noqa: F401
