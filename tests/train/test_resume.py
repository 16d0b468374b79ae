"""A resumed run is the run that never stopped, bit for bit, wherever it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from dynanet import train
from dynanet.core.errors import CheckpointError
from dynanet.train import saving
from dynanet.train.checkpoint import plain_names, step_file, step_files
from tests.train.train_toys import data, noisy, run, toy


class PowerCut(Exception):
    pass


class CutAt(Callback):
    """Stops the run at the beginning of its n-th batch."""

    def __init__(self, batch) -> None:
        self.left = batch

    def on_train_batch_start(self, *args):
        if self.left == 0:
            raise PowerCut
        self.left -= 1


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_every": 1},
        {"checkpoint_every": 3, "held_out": False},
        {"checkpoint_every": 2, "trainer_options": {"accumulate_grad_batches": 2}},
        {},
    ],
    ids=["every step", "no validation", "accumulated", "epochs only"],
)
def test_stopped_anywhere_it_goes_on_bit_for_bit(tmp_path, options):
    whole = run(tmp_path / "whole", **options)
    expected, best = whole.model, train.load_checkpoint(whole.best or whole.last)
    for batch in (3, 5, 9, 11):
        folder = tmp_path / f"cut{batch}"
        with pytest.raises(PowerCut):
            run(folder, callbacks=[CutAt(batch)], **options)
        resumed = run(folder, resume=True, **options)
        assert resumed.trainer.global_step == whole.trainer.global_step
        assert same(resumed.model, expected), f"stopped before batch {batch}"
        assert sorted(step_files(folder)) == sorted(step_files(tmp_path / "whole"))
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                train.load_checkpoint(resumed.best or resumed.last)["state_dict"].values(),
                best["state_dict"].values(),
                strict=True,
            )
        )


def test_the_toy_would_notice(tmp_path):
    """The test above could not pass if seeds, order or schedules went unheeded: other ones give other weights."""
    base = run(tmp_path / "a", epochs=1).model
    assert same(base, run(tmp_path / "b", epochs=1).model)
    assert not same(base, run(tmp_path / "c", epochs=1, seed=1).model)


def test_a_finished_run_resumes_to_itself(tmp_path):
    done = run(tmp_path, epochs=1)
    again = run(tmp_path, model=toy(seed=9), epochs=1, resume=True)
    assert same(done.model, again.model) and again.trainer.global_step == done.trainer.global_step


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="holds a run already, up to step 5; resume it"):
        run(tmp_path, epochs=1)


def test_resume_refuses_another_run(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="steps was 5 and is 10"):
        run(tmp_path, epochs=2, resume=True)
    with pytest.raises(CheckpointError, match="optimizer was SGD.*and is SGD.*lr=0.5"):
        run(tmp_path, epochs=1, lr=0.5, resume=True)
    with pytest.raises(CheckpointError, match="batches was Batches.22 samples.*and is Batches.21 samples"):
        run(tmp_path, samples=21, epochs=1, resume=True)


def test_resume_refuses_another_model(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match=r"stages.0.0.weight is \(16, 8\) in the checkpoint and \(12, 8\) in the"):
        run(tmp_path, model=toy(width=12), epochs=1, resume=True)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path):
    expected = run(tmp_path / "whole").model
    with pytest.raises(PowerCut):
        run(tmp_path / "cut", callbacks=[CutAt(12)])
    last = step_file(tmp_path / "cut", 10)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.warns(UserWarning, match="step 10.*damaged; going back to the one before"):
        resumed = run(tmp_path / "cut", resume=True)
    assert same(resumed.model, expected)
    assert train.load_checkpoint(last)["global_step"] == 10  # written again


def test_nothing_whole_left_is_an_error_and_no_new_beginning(tmp_path):
    run(tmp_path, epochs=1)
    for path in step_files(tmp_path).values():
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        run(tmp_path, epochs=1, resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_go_on_in_mid_epoch(workers):
    whole = train.Batches(data(), 5, shuffle=True, collate=noisy)
    expected = [x for _ in range(2) for x, _ in whole]
    first, part = train.Batches(data(), 5, shuffle=True, collate=noisy, workers=workers), []
    for _ in range(2):
        for x, _ in first:
            part.append(x)
            if len(part) == 7:
                break
    second = train.Batches(data(), 5, shuffle=True, collate=noisy, workers=workers)
    second.load_state_dict(first.state_dict())
    part += [x for x, _ in second]
    assert len(part) == 10 and all(torch.equal(a, b) for a, b in zip(part, expected, strict=True))


def test_killed_at_random_moments(tmp_path):
    """SIGKILL, saves included: nothing corrupt, and the end is that of the run that was left alone."""
    script = Path(__file__).parent / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200, cwd=script.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == 12 and told["in_saves"] >= 3, told
    assert told["corrupt"] == 0 and told["left"] == 0 and told["equal"], told


def test_stopped_before_the_copy_of_the_best(tmp_path, monkeypatch):
    """Every copy is tried, that of the last epoch included, whose run has nothing left to train."""
    copy, copies = saving._write_copy, []
    monkeypatch.setattr(saving, "_write_copy", lambda source, path: (copies.append(path), copy(source, path)))
    expected = train.load_checkpoint(run(tmp_path / "whole", epochs=4).best)
    for nth in range(len(copies)):
        folder, left = tmp_path / f"cut{nth}", [nth]

        def cut(source, path, left=left):
            if left[0] == 0:
                raise PowerCut
            left[0] -= 1
            copy(source, path)

        monkeypatch.setattr(saving, "_write_copy", cut)
        with pytest.raises(PowerCut):
            run(folder, epochs=4)
        monkeypatch.setattr(saving, "_write_copy", copy)
        resumed = run(folder, epochs=4, resume=True)
        best = train.load_checkpoint(resumed.best)
        assert best["global_step"] == expected["global_step"], f"stopped before copy {nth}"
        assert all(torch.equal(best["state_dict"][name], expected["state_dict"][name]) for name in best["state_dict"])


@pytest.mark.parametrize("damage", ["missing", "cut", "of another epoch"])
def test_a_best_that_is_not_the_best_is_made_up_for_or_not_named(tmp_path, damage):
    class Rises(Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log("val/rises", float(min(trainer.current_epoch, 1)))  # the best is the second epoch

    options = {"epochs": 4, "monitor": "val/rises", "callbacks": [Rises()]}
    done = run(tmp_path, **options)
    assert train.load_checkpoint(done.best)["global_step"] == 10
    second = done.best.read_bytes()
    spoilt = {"missing": b"", "cut": second[:-200], "of another epoch": done.last.read_bytes()}[damage]
    done.best.write_bytes(spoilt) if spoilt else done.best.unlink()
    assert run(tmp_path, resume=True, **options).best is None  # its step is not kept any more
    step_file(tmp_path, 10).write_bytes(second)
    again = run(tmp_path, resume=True, **options)
    assert again.best.read_bytes() == second


def test_the_best_of_a_run_before_is_not_named(tmp_path):
    done = run(tmp_path, epochs=1)
    done.last.unlink()
    assert done.best.exists() and run(tmp_path, epochs=1, held_out=False).best is None


def compiled_part(model):
    model.stages[0] = torch.compile(model.stages[0], backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "a part": compiled_part,
}


def wrapped_run(folder, wrap, **options):
    return train.fit(
        wrap(toy()),
        train.Batches(data(), 5, shuffle=True),
        objective=train.MultiExit(),
        epochs=2,
        folder=folder,
        progress=False,
        accelerator="cpu",
        **options,
    )


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_wrapped_model_saves_the_plain_one(tmp_path, wrap):
    plain = wrapped_run(tmp_path / "plain", lambda model: model)
    with pytest.raises(PowerCut):
        wrapped_run(tmp_path / "wrapped", wrap, callbacks=[CutAt(7)])
    done = wrapped_run(tmp_path / "wrapped", wrap, resume=True)
    states = [train.load_checkpoint(each.last) for each in (plain, done)]
    assert list(states[0]["state_dict"]) == list(states[1]["state_dict"])
    assert states[0]["dynanet"]["decides"] == states[1]["dynanet"]["decides"]
    assert same(train.load_weights(toy(seed=9), done.last), plain.model), "a wrapped model trains as the plain one does"
    for other in WRAPPERS.values():  # and a checkpoint of the plain model goes into any wrapped one
        assert same(train.load_weights(other(toy(seed=9)), plain.last), plain.model)
    with pytest.raises(CheckpointError, match="another model"):
        train.load_weights(toy(width=12), done.last)


def test_parts_that_are_named_as_wrappers_keep_their_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert plain_names(nn.Sequential(Named()), ["0.module.weight"]) == {"0.module.weight": "0.module.weight"}
    assert plain_names(nn.DataParallel(Named()), ["module.module.weight"]) == {"module.weight": "module.module.weight"}
