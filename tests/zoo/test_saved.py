"""Models of the zoo come back from their folder as they were."""

import pytest
import torch
from torch import nn

from dynanet import zoo
from dynanet.core.architecture import architecture, architecture_of
from dynanet.core.errors import BundleError
from dynanet.export.bundles import bundle
from dynanet.zoo.saved import load, read


def test_a_model_comes_back_with_its_weights_thresholds_and_classes(tmp_path):
    torch.manual_seed(0)
    model = zoo.staged_resnet(num_classes=3, widths=(4, 8), depths=(1, 1), context=4)
    model.thresholds.fill_(0.5)
    bundle(model, tmp_path / "model", classes=["a", "b", "c"])
    loaded, x = load(tmp_path / "model"), torch.randn(4, 3, 16, 16)
    assert architecture_of(loaded).builder is zoo.staged_resnet and not loaded.training
    assert torch.equal(loaded(x), model.eval()(x))
    found = read(tmp_path / "model")
    assert list(found.classes) == ["a", "b", "c"]
    assert torch.equal(found.model(x), model(x))


def test_a_builder_that_the_zoo_does_not_have_is_not_called(tmp_path):
    @architecture
    def home_made() -> nn.Module:
        return nn.Linear(1, 1)

    bundle(home_made(), tmp_path / "model")
    for reader in (load, read):
        with pytest.raises(BundleError, match="home_made"):
            reader(tmp_path / "model")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BundleError, match="it is not a bundle"):
        load(tmp_path)
