import pytest
import torch
from torch import nn

from dynanet.calibrate import calibrate
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.gates.confidence import LearnedScore, MaxProbability, PerExit
from dynanet.mechanisms.cascade import Cascade
from dynanet.session import Session

D, CLASSES = 6, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def networks(widths=(4, 16, 64)):
    return [nn.Sequential(nn.Linear(D, w), nn.ReLU(), nn.Linear(w, CLASSES)) for w in widths]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_network_sees_only_the_rows_that_those_before_were_unsure_of(sparse):
    parts, x = networks(), torch.randn(50, D)
    model = execute(Cascade(parts).eval(), sparse=sparse)
    model.thresholds.copy_(torch.tensor([-0.6, -0.7]))
    seen = []
    for part in parts:
        part.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    with torch.no_grad():
        answers = model(x)
    seen, each = list(seen), [part(x) for part in parts]
    sure = [MaxProbability()(e)[:, 0] >= t for e, t in zip(each, (-0.6, -0.7), strict=False)]
    expected = torch.where(sure[0][:, None], each[0], torch.where(sure[1][:, None], each[1], each[2]))
    torch.testing.assert_close(answers, expected)
    left = [50, int((~sure[0]).sum()), int((~sure[0] & ~sure[1]).sum())]
    assert 50 > left[1] > left[2] > 0
    assert seen == (left if sparse else [50, 50, 50])


def test_an_ensemble_answers_the_mean_of_what_was_said():
    parts, x = networks(), torch.randn(7, D)
    said = torch.stack([p(x) for p in parts])
    logits = Cascade(parts, ensemble="logits").answers(x)
    probabilities = Cascade(parts, ensemble="probabilities").answers(x)
    for k in range(3):
        torch.testing.assert_close(logits[k], said[: k + 1].mean(0))
        torch.testing.assert_close(probabilities[k].exp(), said[: k + 1].softmax(-1).mean(0))
    for ours, theirs in zip(Cascade(parts).answers(x), said, strict=True):
        assert torch.equal(ours, theirs)


def test_a_price_is_that_of_the_networks_asked():
    model, x = Cascade(networks()), torch.randn(3, D)
    cost = CostModel(model, x)
    assert cost.always == (D + CLASSES) * 4
    assert cost.unit[""].tolist() == [(D + CLASSES) * 16, (D + CLASSES) * 64]


@pytest.mark.parametrize("ensemble", ["none", "probabilities"])
def test_it_is_calibrated_and_deployed_like_any_halt(ensemble):
    model, x = Cascade(networks(), ensemble=ensemble), torch.randn(120, D)
    y = model.answers(x)[-1].argmax(1)
    cost = CostModel(model, x)
    frontier = calibrate(model, [(x, y)], cost)
    budget = Budget(macs=0.5 * cost.full)
    small = frontier.at(budget)
    session = Session(small, x, engines="onnxruntime", threads=1, batches=(8,))
    with torch.no_grad(), record(session) as trace:
        answers = session(x)
    torch.testing.assert_close(answers, small(x), rtol=1e-4, atol=1e-5)
    assert cost.spent(trace).mean().item() == pytest.approx(frontier.choose(budget).macs)
    torch.testing.assert_close(torch.stack(list(session.stream(x, batch=16))), answers, rtol=1e-4, atol=1e-5)


def test_in_training_every_network_answers():
    model = Cascade(networks()).train()
    model.thresholds.fill_(-torch.inf)
    with record(model) as trace:
        model(torch.randn(5, D))
    assert [a.shape for a in trace.answers[""]] == [(5, CLASSES)] * 3


def test_networks_may_want_other_resolutions():
    small = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    model = Cascade([small, nn.Sequential(nn.Flatten(), nn.Linear(64, 3))]).eval()
    model.thresholds.fill_(0.1)
    x = torch.randn(9, 1, 8, 8)
    torch.testing.assert_close(execute(model, sparse=True)(x), execute(model, sparse=False)(x))


def test_what_is_no_cascade_is_refused():
    with pytest.raises(StructureError, match="at least one network"):
        Cascade([])
    with pytest.raises(ConfigError, match="ensemble is 'mean'"):
        Cascade(networks(), ensemble="mean")
    with pytest.raises(StructureError, match="no confidence for exit .*, only 1;"):
        Cascade(networks(), PerExit([LearnedScore(CLASSES)]))
    assert Cascade(networks((4,)))(torch.randn(2, D)).shape == (2, CLASSES)
