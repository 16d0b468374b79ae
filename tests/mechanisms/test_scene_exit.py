"""A scene answers as its patch classifier does around every pixel, and computes patches for uncertain pixels only."""

import pytest
import torch
from torch import nn

from dynanet.core.dynamic import execute, record
from dynanet.core.errors import StructureError
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.scene_exit import SceneExit
from dynanet.ops.patches import Patches


class Centre(nn.Module):
    """The logits of a patch's centre pixel."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def forward(self, x_BCPP):
        return self.pixels(x_BCPP[:, :, x_BCPP.shape[2] // 2, x_BCPP.shape[3] // 2])


P = 3
IMAGE = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    pixels = nn.Linear(4, 3)
    stem = nn.Sequential(nn.Conv2d(5, 4, 1, bias=False), nn.ReLU())
    later = [nn.Sequential(nn.Flatten(), nn.Linear(4 * P * P, 8), nn.ReLU()), nn.Linear(8, 8)]
    model = EarlyExit([stem, *later], [Centre(pixels), nn.Linear(8, 3), nn.Linear(8, 3)])
    model.thresholds.copy_(torch.tensor([-0.3, 0.1, torch.inf])[: len(model.thresholds)])
    return model.eval().requires_grad_(False)


def scene_of(model):
    return SceneExit.of(model, model.exits[0].pixels, P)


@pytest.mark.parametrize("sparse", [False, True])
def test_every_pixel_answers_as_its_patch_does(sparse, classifier):
    scene = execute(scene_of(classifier), sparse=sparse)
    with record(scene) as trace:
        answer = scene(IMAGE)
    patches = Patches(P).whole(IMAGE, (2, 6, 7))
    torch.testing.assert_close(answer, classifier(patches).view(2, 6, 7, 3), rtol=1e-5, atol=1e-5)
    assert 0 < trace[""][0].mean() < 1, "some pixels need their patch and some do not"


@pytest.mark.parametrize(("threshold", "share"), [(-torch.inf, 0), (torch.inf, 1)])
def test_the_threshold_says_which_pixels_get_a_patch(threshold, share, classifier):
    scene = scene_of(classifier)
    scene.threshold.fill_(threshold)
    with record(scene) as trace:
        answer = scene(IMAGE)
    assert trace[""][0].mean() == share
    first = scene.first(scene.stem(IMAGE).permute(0, 2, 3, 1))
    assert torch.equal(answer, first) == (share == 0)


def test_in_training_every_pixel_gets_its_patch(classifier):
    scene = scene_of(classifier.train())
    scene.threshold.fill_(-torch.inf)
    with record(scene) as trace:
        scene(IMAGE)
    assert scene.training and trace[""][0].mean() == 1


def test_the_scene_form_shares_weights_and_copies_thresholds(classifier):
    scene = scene_of(classifier)
    assert scene.threshold == classifier.thresholds[0]
    assert torch.equal(scene.rest.thresholds, classifier.thresholds[1:])
    assert {id(p) for p in scene.parameters()} == {id(p) for p in classifier.parameters()}


def test_one_stage_has_no_scene_form():
    with pytest.raises(StructureError, match="this model has one stage"):
        SceneExit.of(EarlyExit([nn.Identity()], [nn.Identity()]), nn.Identity(), P)


def test_a_patch_has_a_centre(classifier):
    with pytest.raises(StructureError, match="odd; got 4"):
        SceneExit.of(classifier, classifier.exits[0].pixels, 4)
