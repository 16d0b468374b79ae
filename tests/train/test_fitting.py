"""What `fit` makes of its arguments and returns; that runs resume and learn is tested beside it."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from dynanet.core.errors import ConfigError
from dynanet.train.batches import Batches
from dynanet.train.checkpoint import load_weights, step_file
from dynanet.train.fitting import fit
from dynanet.train.objectives import CrossEntropy
from dynanet.train.optimizers import sgd
from tests.train.train_toys import data


def line():
    torch.manual_seed(0)
    return nn.Linear(8, 3)


def trained(folder, model, **options):
    batches = Batches(data(10), 5, shuffle=True)
    options = {"objective": CrossEntropy(), "epochs": 1, "progress": False, **options}
    return fit(model, batches, folder=folder, **options)


def test_the_model_is_trained_in_place_and_saved_as_it_is(tmp_path):
    model = line().eval()
    result = trained(tmp_path / "new" / "folder", model)
    assert result.model is model and model.training
    assert result.last == step_file(tmp_path / "new" / "folder", 2) and result.best is None
    assert not torch.equal(model.weight, line().weight)
    assert torch.equal(load_weights(line(), result.last).weight, model.weight)
    assert "train/loss" in result.metrics and all(isinstance(value, float) for value in result.metrics.values())


def test_without_an_optimizer_it_is_sgd(tmp_path):
    models = [line() for _ in range(3)]
    trained(tmp_path / "a", models[0])
    trained(tmp_path / "b", models[1], lr=0.1)
    trained(tmp_path / "c", models[2], optimizer=sgd(0.1))
    assert torch.equal(models[0].weight, models[1].weight) and torch.equal(models[0].weight, models[2].weight)


def test_callbacks_and_options_of_the_trainer_arrive(tmp_path):
    class Counts(Callback):
        steps = 0

        def on_train_batch_end(self, *_):
            self.steps += 1

    counts = Counts()
    result = trained(tmp_path, line(), callbacks=[counts], epochs=5, trainer_options={"max_steps": 3})
    assert counts.steps == result.trainer.global_step == 3


@pytest.mark.parametrize("taken", ["callbacks", "plugins", "use_distributed_sampler", "default_root_dir"])
def test_options_that_fit_sets_itself_are_refused(taken, tmp_path):
    with pytest.raises(ConfigError, match=rf"trainer_options set \['{taken}'\], which fit sets itself"):
        trained(tmp_path / "new", line(), trainer_options={taken: None})
    assert not list(tmp_path.iterdir())


def test_to_resume_where_nothing_was_saved_is_to_begin(tmp_path):
    first, second = line(), line()
    trained(tmp_path / "a", first, resume=True)
    trained(tmp_path / "b", second)
    assert torch.equal(first.weight, second.weight)
