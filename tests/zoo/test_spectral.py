"""The pixel classifier, on patches and over whole scenes: the same answers, and far less to compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dynanet
from dynanet import zoo
from dynanet.core.architecture import architecture_of
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import StructureError
from dynanet.export.bundles import bundle
from dynanet.mechanisms.early_exit import EarlyExit

BANDS, P = 7, 5
SMALL = {"in_channels": BANDS, "width": 6, "blocks": (((8, 2), (8, 1)), ((8, 1),))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = zoo.spectral_exit(num_classes=4, hidden=5, **SMALL)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):  # as after training: shifts that would lift zeros
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias)
    return net.eval()


@pytest.fixture
def image():
    return torch.randn(2, BANDS, 9, 6, generator=torch.Generator().manual_seed(0))


def patches(image):
    """The patch around every pixel, (B * H * W, bands, P, P); 0 beyond the edge."""
    padded = F.pad(image, [P // 2] * 4)
    return padded.unfold(2, P, 1).unfold(3, P, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


@torch.no_grad()
def split(net, x):
    """Thresholds between two scores, so that about half leave."""
    for k, answer in enumerate(net.answers(x)[:-1]):
        scores = net.confidence(answer, None).flatten().sort().values
        net.thresholds[k] = scores[len(scores) // 2 :][:2].mean() if len(scores) > 1 else torch.inf


@pytest.mark.parametrize("patch", [1, 3, 9])
def test_an_exit_per_stage(patch, model):
    x = torch.randn(3, BANDS, patch, patch)
    assert model.steps == 3 and [a.shape for a in model.answers(x)] == [(3, 4)] * 3
    assert model(x[:0]).shape == (0, 4)


def test_the_first_exit_sees_the_pixel_alone(model):
    x = torch.randn(3, BANDS, P, P)
    other = torch.randn(3, BANDS, P, P)
    other[:, :, P // 2, P // 2] = x[:, :, P // 2, P // 2]
    first, second, _ = model.answers(x)
    torch.testing.assert_close(model.answers(other)[0], first)
    assert not torch.allclose(model.answers(other)[1], second, atol=1e-2)


def test_the_static_net_is_the_same_backbone_with_the_last_exit(model):
    static = zoo.spectral_static(num_classes=4, **SMALL).eval()
    ours = [*model.stages.state_dict().values(), *model.exits[-1].state_dict().values()]
    static.load_state_dict(dict(zip(static.state_dict(), ours, strict=True)))
    x = torch.randn(3, BANDS, P, P)
    torch.testing.assert_close(static(x), model.answers(x)[-1])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("size", [(9, 6), (3, 2), (1, 1)])
def test_over_a_scene_every_pixel_gets_the_answer_of_its_patch(size, sparse, model):
    image = torch.randn(2, BANDS, *size, generator=torch.Generator().manual_seed(0))
    x = patches(image)
    split(model, x)
    form = execute(zoo.scene_form(model, P), sparse=sparse)
    with torch.no_grad(), record(form) as scene:
        logits = form(image)
    with torch.no_grad(), record(model) as trace:
        expected = model(x)
    assert logits.shape == (2, *size, 4)
    torch.testing.assert_close(logits.flatten(0, 2), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(scene[""][0].flatten(), trace[""][0].flatten())
    if scene[""][0].any():
        assert torch.equal(scene["rest"][0].flatten(), trace[""][1].flatten())


def test_pixels_without_a_spectrum_are_nothing_to_their_neighbours(model):
    image = torch.randn(1, BANDS, 6, 6)
    image[:, :, :, 3:] = 0
    form = zoo.scene_form(model, P)
    with torch.no_grad(), forced(form, everything):
        torch.testing.assert_close(form(image)[:, :, :3], form(image[..., :3]), rtol=1e-4, atol=1e-4)


def test_a_pixel_costs_its_stem_once(model, image):
    macs = zoo.scene_macs(model, image[:1], P)
    stem = BANDS * 6 + 6 * 6
    assert macs[0] == stem + 6 * 5 + 5 * 4
    patch_model = CostModel(model, torch.zeros(1, BANDS, P, P))
    later = patch_model.unit[""].tolist()  # on patches, the same stages
    assert macs == pytest.approx([macs[0], macs[0] + later[0], macs[0] + later[0] + later[1]])
    assert patch_model.always == P * P * stem + 6 * 5 + 5 * 4  # what a patch classifier pays for the stem
    assert zoo.scene_macs(model, image[:1, :, :4, :4], P) == pytest.approx(macs)  # any piece of a scene will do


def test_what_a_scene_spends_is_what_its_pixels_spend(model, image):
    split(model, patches(image))
    form, macs = execute(zoo.scene_form(model, P), sparse=True), zoo.scene_macs(model, image[:1], P)
    with torch.no_grad(), record(form) as trace:
        form(image)
    spent = CostModel(form, image[:1]).spent(trace)
    left = 1 + trace[""][0] + trace["rest"][0] - 1  # (B, H, W, 1): the exit of every pixel, from 0
    expected = torch.tensor(macs, dtype=torch.float64)[left.long()].flatten(1).sum(1)
    torch.testing.assert_close(spent, expected)


def test_a_scene_form_shares_weights_and_copies_thresholds(model):
    model.thresholds.copy_(torch.tensor([0.5, 0.7]))
    form = zoo.scene_form(model, P)
    assert form.threshold == 0.5 and form.rest.thresholds == pytest.approx([0.7])
    assert form.stem is model.stages[0] and form.rest.stages[0] is model.stages[1]
    model.thresholds.zero_()
    assert form.threshold == 0.5


def test_other_models_have_no_scene_form(model):
    for other in (
        zoo.staged_resnet(num_classes=3, widths=(4,), depths=(1,)),
        zoo.spectral_static(num_classes=4, **SMALL),
        nn.Linear(3, 3),
    ):
        with pytest.raises(StructureError, match="a scene form needs a model of spectral_exit"):
            zoo.scene_form(other)
    with pytest.raises(StructureError, match="at least one later stage"):
        zoo.scene_form(EarlyExit(list(model.stages)[:1], list(model.exits)[:1]))


@pytest.mark.parametrize("build", [zoo.spectral_exit, zoo.spectral_static])
def test_it_is_saved_and_loaded(build, tmp_path):
    net = build(num_classes=4, **SMALL).eval()
    assert architecture_of(net).name == build.__name__
    bundle(net, tmp_path / "bundle")
    x = torch.randn(2, BANDS, P, P)
    torch.testing.assert_close(dynanet.load(tmp_path / "bundle")(x), net(x))


def test_the_default_is_the_net_of_the_recipe():
    with torch.device("meta"):
        net, static = zoo.spectral_exit(num_classes=16), zoo.spectral_static(num_classes=16)
    count = {name: sum(p.numel() for p in each.parameters()) for name, each in (("exits", net), ("static", static))}
    assert count["static"] < count["exits"] < 1.1 * count["static"]
    assert net.steps == 3
