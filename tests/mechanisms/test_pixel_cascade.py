import pytest
import torch
from torch import nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.mechanisms.pixel_cascade import PixelCascade, PixelCascadeLoss, left_at

C, CLASSES = 6, 3


def plain():
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1))


def bottleneck():
    return nn.Sequential(
        nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(4, C, 1),
    )  # fmt: skip


def cascade(threshold=0.3, *, channels=3, stages=2):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(channels, C, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, stride=2, padding=1)
    )
    exits = [nn.Conv2d(C, CLASSES, 1) for _ in range(stages + 1)]
    for head in exits:
        nn.init.normal_(head.weight)
    model = PixelCascade(backbone, [[plain(), bottleneck()] for _ in range(stages)], exits)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.normal_()
    model.thresholds.fill_(threshold)
    return model.eval()


def by_hand(model, x):
    """Region convolutions as masks on images, in plain torch."""
    f = model.backbone(x)
    logits, at = model.exits[0](f), torch.ones_like(f[:, :1])
    for k, cells in enumerate(model.stages):
        p = logits.softmax(1).amax(1, keepdim=True)
        at = at * (p.logit() < model.thresholds[k])
        a, b = cells
        f = f + at * a[2](at * a[1](a[0](f)))
        f = f + at * b[7](b[6](b[5](at * b[4](b[3](b[2](b[1](b[0](f))))))))
        logits = at * model.exits[k + 1](f) + (1 - at) * logits
    return functional.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("height", "width"), [(21, 30), (5, 3), (1, 1)])
def test_equals_region_convolutions_by_hand(sparse, height, width):
    model, x = cascade().double(), torch.randn(2, 3, height, width).double()
    with torch.no_grad(), record(execute(model, sparse=sparse)) as trace:
        torch.testing.assert_close(model(x), by_hand(model, x))
    if height > 5:
        assert left_at(trace).unique().tolist() == [0, 1, 2], "some exit is not used: nothing was tested"


def test_pixels_that_left_cost_nothing():
    def one(decision):
        keep = torch.zeros_like(decision.keep)
        keep[:, 2, 3] = 1
        return keep

    model, x = execute(cascade(), sparse=True), torch.randn(1, 3, 21, 30)
    macs = []
    for keep in (lambda d: torch.zeros_like(d.keep), one):
        with torch.no_grad(), forced(model, keep), CountMacs() as count:
            model(x)
        macs.append(count.total)
    assert macs[1] - macs[0] == 2 * (2 * 9 * C * C + C * 4 + 9 * 4 * 4 + 4 * C + C * CLASSES)
    cost = CostModel(model, x)
    assert macs[0] == cost.always and cost.worst == cost.full


@pytest.mark.parametrize("channels", [1, 200])
def test_all_easy_and_all_hard(channels):
    x = torch.randn(2, channels, 13, 10)
    for threshold, left in ((-torch.inf, 0), (torch.inf, 2)):
        model = cascade(threshold, channels=channels)
        with torch.no_grad(), record(execute(model, sparse=True)) as trace:
            y = model(x)
            expected = trace.answers[""][left]
        assert (left_at(trace) == left).all()
        torch.testing.assert_close(y, functional.interpolate(expected, size=(13, 10), mode="bilinear"))


def passed(model, x):
    with record(model) as trace:
        answer = model(x)
    return answer, trace


def test_the_loss_counts_pixels_not_yet_confident():
    model, x = cascade().train(), torch.randn(2, 3, 21, 30)
    y = torch.randint(CLASSES, (2, 21, 30))
    y[:, :4] = 255
    answer, trace = passed(model, x)
    left = left_at(trace)
    expected = 0.0
    for k, logits in enumerate(trace.answers[""]):
        wide = functional.interpolate(logits, size=(21, 30), mode="bilinear")
        reached = (left >= k).float()[:, None]
        mask = (functional.interpolate(reached, size=(21, 30))[:, 0] > 0) & (y != 255)
        expected += functional.cross_entropy(wide.permute(0, 2, 3, 1)[mask], y[mask])
    assert (left == 0).any() and (left > 1).any()
    torch.testing.assert_close(PixelCascadeLoss()(answer, y, trace), expected)


def test_easy_pixels_do_not_teach_later_stages():
    model, x = cascade(-torch.inf).train(), torch.randn(2, 3, 21, 30)
    answer, trace = passed(model, x)
    PixelCascadeLoss()(answer, torch.randint(CLASSES, (2, 21, 30)), trace).backward()
    assert model.exits[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in [*model.stages.parameters(), *model.exits[1].parameters()])


def test_labels_with_only_void():
    model, x = cascade().train(), torch.randn(2, 3, 9, 7)
    answer, trace = passed(model, x)
    loss = PixelCascadeLoss()(answer, torch.full((2, 9, 7), 255), trace)
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_it_learns_a_picture():
    """Left half one class, a bright spot another: after training the spot's surroundings are right too."""
    torch.manual_seed(0)
    model = cascade(torch.inf).train()
    x = torch.randn(4, 3, 16, 16) * 0.1
    y = torch.zeros(4, 16, 16, dtype=torch.long)
    y[:, :, 8:] = 1
    x[:, 0, :, 8:] += 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(40):
        if step == 20:
            model.thresholds.fill_(2.0)  # the paper's second phase: confident pixels leave
        answer, trace = passed(model, x)
        optimizer.zero_grad()
        PixelCascadeLoss()(answer, y, trace).backward()
        optimizer.step()
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    assert right > 0.9 and (left_at(trace) == 0).any()


def test_what_is_refused():
    backbone, head = nn.Conv2d(3, C, 3), nn.Conv2d(C, CLASSES, 1)
    for stages, exits in (([], [head]), ([[]], [head] * 2), ([[plain()]], [head])):
        with pytest.raises(StructureError, match="an exit more than stages"):
            PixelCascade(backbone, stages, exits)
    with pytest.raises(StructureError, match="stride-1"):
        PixelCascade(backbone, [[nn.Conv2d(C, C, 3, stride=2)]], [head] * 2)
    answer, trace = passed(cascade(), torch.randn(2, 3, 9, 7))
    with pytest.raises(ConfigError, match="one label per pixel"):
        PixelCascadeLoss()(answer, torch.zeros(2, 8, 7).long(), trace)
    with pytest.raises(ConfigError, match="one per exit"):
        PixelCascadeLoss(weights=[1.0])(answer, torch.zeros(2, 9, 7).long(), trace)
    with pytest.raises(StructureError, match="no PixelCascade is named"):
        PixelCascadeLoss(name="elsewhere")(answer, torch.zeros(2, 9, 7).long(), trace)
    with pytest.raises(StructureError, match="no PixelCascade is named"):
        left_at(trace, "elsewhere")
