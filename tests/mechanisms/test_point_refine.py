import pytest
import torch
from torch import nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.mechanisms.point_refine import PointHead, PointLoss, PointRefine, sampled
from dynanet.session import Session

FINE, CLASSES = 6, 4


class Coarse(nn.Module):
    """Fine features at half the size, coarse logits at a quarter."""

    def __init__(self, channels=3) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(channels, FINE, 3, 2, 1), nn.Conv2d(FINE, CLASSES, 3, 2, 1)

    def forward(self, x):
        fine = self.fine(x).relu()
        return fine, self.coarse(fine)


def refine(points=None, channels=3, **settings):
    torch.manual_seed(0)
    return PointRefine(Coarse(channels), PointHead(FINE, CLASSES, 8, 2), points, **settings).eval()


def resized(logits, size):
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(16, 16), (13, 10), (5, 23), (1, 1), (2, 3)])
@pytest.mark.parametrize("channels", [1, 3, 200])
@pytest.mark.parametrize("sparse", [False, True])
def test_images_of_any_size(size, channels, sparse):
    model = execute(refine(7, channels), sparse=sparse)
    for batch in (2, 1, 0):
        x = torch.randn(batch, channels, *size)
        with torch.no_grad(), record(model) as trace:
            assert model(x).shape == (batch, CLASSES, *size)
        for keep in trace[""]:
            assert (keep.flatten(1).sum(1) == min(7, keep[:1].numel() if batch else 7)).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_the_least_sure_points_are_predicted_anew(sparse):
    """Against the same, step by step, with torch's own interpolation of everything."""
    model, x = execute(refine(9).double(), sparse=sparse), torch.randn(2, 3, 13, 10).double()
    with torch.no_grad():
        answer, (fine, coarse) = model(x), model.network(x)
        logits, here = coarse, (4, 3)
        for size in ((8, 6), (13, 10)):
            logits = resized(logits, size)
            seen = torch.cat([resized(fine, size), resized(coarse, size)], 1).permute(0, 2, 3, 1)
            best = logits.topk(2, dim=1).values
            margin = (best[:, 0] - best[:, 1]).flatten(1)
            anew = model.head(seen.flatten(0, 2)).view(2, *size, CLASSES).permute(0, 3, 1, 2)
            mask = torch.zeros_like(margin).scatter(1, margin.topk(9, dim=1, largest=False).indices, 1.0)
            logits, here = torch.where(mask.view(2, 1, *size) > 0, anew, logits), size
    assert here == (13, 10)
    torch.testing.assert_close(answer, logits)


def test_all_points_none_and_as_many_as_are_unsure():
    model, x = refine(), torch.randn(3, 3, 12, 12)
    counts = {}
    for threshold in (torch.inf, 0.05, -torch.inf):
        model.threshold.fill_(threshold)
        answers = []
        for sparse in (False, True):
            with torch.no_grad(), record(execute(model, sparse=sparse)) as trace:
                answers.append(model(x))
        torch.testing.assert_close(answers[1], answers[0])
        counts[threshold] = trace[""][-1].flatten(1).sum(1).tolist()
    assert counts[torch.inf] == [144] * 3 and counts[-torch.inf] == [0] * 3
    assert len(set(counts[0.05])) > 1, "a threshold is to give every image a number of its own"
    with torch.no_grad():
        torch.testing.assert_close(model(x), resized(resized(model.network(x)[1], (6, 6)), (12, 12)))


def test_price_and_session():
    model, x = refine(10), torch.randn(4, 3, 12, 12)
    model.threshold.fill_(0.2)
    session, cost = Session(model, x, engines="eager"), CostModel(model, x[:1])
    head = (FINE + CLASSES) * 8 + (8 + CLASSES) * 8 + (8 + CLASSES) * CLASSES
    assert cost.unit[""].tolist() == [head, head]
    with torch.no_grad(), record(model) as dense, record(session) as sparse:
        torch.testing.assert_close(session(x), model(x))
    points = torch.stack([keep.flatten(1).sum(1) for keep in sparse[""]]).sum(0)
    torch.testing.assert_close(cost.spent(sparse), cost.always + head * points.double())
    torch.testing.assert_close(cost.spent(dense), cost.spent(sparse))


def test_points_between_positions():
    map_ = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0.125, 0.5], [0.25, 0.5], [0.0, 0.0], [1.0, 1.0], [0.5, 1 / 3]]])
    torch.testing.assert_close(sampled(map_, points)[0, :, 0], torch.tensor([4, 4.5, 0, 11, 3.5]))


def test_training_points_are_mostly_unsure_ones():
    """Left half of the image: sure; right half: not. With beta 0.75 seven eighths of the points lie on the right."""

    class Halves(nn.Module):
        def forward(self, x):
            logits = torch.zeros(x.shape[0], CLASSES, 8, 8)
            logits[:, 0, :, :4] = 9.0
            return torch.zeros(x.shape[0], FINE, 8, 8), logits

    model = PointRefine(Halves(), PointHead(FINE, CLASSES), train_points=400).train()
    torch.manual_seed(0)
    with record(model) as trace:
        model(torch.zeros(2, 3, 16, 16))
    points, logits = trace.answers[""][0]
    assert points.shape == (2, 400, 2) and logits.shape == (2, 400, CLASSES)
    assert abs((points[..., 0] > 0.5).float().mean() - 0.875) < 0.05
    assert abs((points[..., 1] > 0.5).float().mean() - 0.5) < 0.08


def test_the_loss_by_hand():
    model, x = refine(train_points=20).train(), torch.randn(2, 3, 9, 7)
    y = torch.randint(CLASSES, (2, 9, 7))
    y[0, :3] = 255
    with record(model) as trace:
        answer = model(x)
    points, logits = trace.answers[""][0]
    torch.testing.assert_close(answer, resized(model.network(x)[1], (9, 7)))
    losses = []
    for b in range(2):
        for n in range(20):
            label = y[b, int(points[b, n, 1] * 9), int(points[b, n, 0] * 7)]
            if label != 255:
                losses.append(functional.cross_entropy(logits[b, n], label))
    expected = functional.cross_entropy(answer, y, ignore_index=255) + 0.5 * torch.stack(losses).mean()
    loss = PointLoss(weight=0.5)(answer, y, trace)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with record(model) as trace:
        answer = model(x)
    assert PointLoss()(answer, torch.full_like(y, 255), trace) == 0, "void labels teach nothing and break nothing"


def test_in_eval_mode_the_loss_is_that_of_the_refined_answer():
    model, x, y = refine(5), torch.randn(2, 3, 9, 7), torch.randint(CLASSES, (2, 9, 7))
    with torch.no_grad(), record(model) as trace:
        answer = model(x)
    torch.testing.assert_close(PointLoss()(answer, y, trace), functional.cross_entropy(answer, y))


def test_refining_learns_what_the_coarse_map_cannot():
    """Pixels by their brightness: the head reads it from fine features at full size."""

    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coarse = nn.Conv2d(1, 2, 8, 8)

        def forward(self, x):
            return x, self.coarse(x)

    torch.manual_seed(0)
    model = PointRefine(Bright(), PointHead(1, 2, 16, 2), points=None, train_points=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        x = torch.randn(4, 1, 16, 16)
        with record(model.train()) as trace:
            loss = PointLoss()(model(x), (x[:, 0] > 0).long(), trace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        refined = (model.eval()(x).argmax(1) == (x[:, 0] > 0)).float().mean()
        with forced(model, lambda d: torch.zeros_like(d.keep)):
            coarse = (model(x).argmax(1) == (x[:, 0] > 0)).float().mean()
    assert coarse < 0.7 and refined > 0.9


def test_what_is_refused():
    for wrong, says in (
        ({"points": 0}, "^points"),
        ({"train_points": 0}, "^train_points"),
        ({"oversample": 0.5}, "oversample must be at least 1"),
        ({"importance": 1.5}, "importance must be a share"),
    ):
        with pytest.raises(ConfigError, match=says):
            refine(**wrong)
    with pytest.raises(ConfigError, match="^layers"):
        PointHead(3, 2, layers=0)
    model, x = refine(), torch.randn(1, 3, 8, 8)
    y = torch.zeros(1, 8, 8).long()
    with record(model.train()) as trace:
        model(x)
        answer = model(x)
    with pytest.raises(StructureError, match="one pass"):
        PointLoss()(answer, y, trace)
    with record(nn.Sequential(model)) as trace, pytest.raises(StructureError, match="named 'other'"):
        PointLoss(name="other")(answer, y, trace)
    with record(model.train()) as trace:
        answer = model(x)
    with pytest.raises(ConfigError, match="per pixel"):
        PointLoss()(answer, torch.zeros(1, 9, 8).long(), trace)
