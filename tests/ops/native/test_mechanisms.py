"""Mechanisms on native kernels: the same answers and the same MACs as on torch, in a session too."""

import copy

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import StraightThrough, TopK
from dynanet.gates.scorers import ContextScorer
from dynanet.mechanisms.experts import Experts, RouterScorer
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.ops.native import library
from dynanet.ops.tiles import Tiles
from dynanet.session import Session
from dynanet.testing import check_equal, check_neighbours, random_decisions


def neurons(activation=None):
    gate = Gate(LowRankScorer(9, 6, bias=0.0), StraightThrough(), units=6)
    return NeuronSkip(nn.Linear(9, 24), nn.Linear(24, 11), gate, activation=activation, block=4)


def tokens_of_samples():
    class OfTheMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(9, 6)

        def forward(self, x_BTD):
            return self.map(x_BTD.mean(1))

    gate = Gate(OfTheMean(), StraightThrough(), units=6)
    return NeuronSkip(nn.Linear(9, 24, bias=False), nn.Linear(24, 9, bias=False), gate, block=4)


def experts(activation=nn.ReLU, bias=True, **settings):
    several = [nn.Sequential(nn.Linear(9, 20, bias=bias), activation(), nn.Linear(20, 9, bias=bias)) for _ in range(4)]
    return Experts(several, Gate(RouterScorer(9, 4), TopK(2), units=4), **settings)


def bottleneck(norm=True):
    def conv(*sizes, **settings):
        return nn.Sequential(nn.Conv2d(*sizes, **settings), *([nn.BatchNorm2d(sizes[1])] if norm else []))

    return nn.Sequential(conv(6, 4, 1), nn.ReLU(), conv(4, 4, 3, padding=1), nn.ReLU(), conv(4, 6, 1))


def two_threes():
    return nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.GELU(), nn.Conv2d(5, 6, 3, padding=2, dilation=2), nn.ReLU())


def pixels(branch, tile=1):
    return SpatialSkip(branch, Gate(ContextScorer(6, tile, bias=0.0), StraightThrough()), Tiles(tile), dilate=True)


IMAGES = torch.randn(3, 6, 7, 10, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
MODELS = {
    "neurons": (neurons, ROWS),
    "neurons, another activation": (lambda: neurons(nn.Sigmoid()), ROWS),
    "neurons, tokens of samples": (tokens_of_samples, torch.randn(3, 5, 9)),
    "experts": (experts, ROWS),
    "experts, tokens, no biases, a shared one": (
        lambda: experts(nn.GELU, bias=False, shared=nn.Linear(9, 9)),
        torch.randn(4, 5, 9),
    ),
    "pixels, bottleneck": (lambda: pixels(bottleneck(norm=False)), IMAGES),
    "pixels, bottleneck with norms": (lambda: pixels(bottleneck()), IMAGES),
    "pixels, two convolutions, tiles": (lambda: pixels(two_threes(), 3), IMAGES),
    "pixels, one convolution": (lambda: pixels(nn.Conv2d(6, 6, 3, padding=1)), IMAGES),
    "pixels, a norm first": (lambda: pixels(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), *two_threes())), IMAGES),
}


def made(name):
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
    return model.eval().requires_grad_(False), x


class Ran:
    """Which native operators were called."""

    def __init__(self, monkeypatch) -> None:
        self.names = []
        chosen = library.chosen()
        for name in ("neurons_up", "neurons_down", "product", "convolutions"):
            kernel = getattr(chosen, name)
            monkeypatch.setattr(chosen, name, self._told(name, kernel))

    def _told(self, name, kernel):
        def call(*arguments):
            self.names.append(name)
            return kernel(*arguments)

        return call


@pytest.fixture
def ran(kernels, monkeypatch):
    return Ran(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_macs_are_those_of_torch(name, ran):
    model, x = made(name)
    cost = CostModel(model, x)
    for decide in (None, lambda d: torch.ones_like(d.keep), lambda d: torch.zeros_like(d.keep), random_decisions(1)):
        for rows in (x, x[:1], x[:0]):
            with forced(model, decide) if decide else record(model):
                dense = execute(model, sparse=False)(rows)
            answers, counts = [], []
            for native in (True, False):
                execute(model, sparse=True)
                with library.using(library.instruction_set() if native else ""), CountMacs() as count:
                    with forced(model, decide) if decide else record(model):
                        answers.append(model(rows))
                counts.append(count.total)
            torch.testing.assert_close(answers[0], dense, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(answers[1], dense, rtol=1e-4, atol=1e-4)
            assert counts[0] == counts[1]
    with record(model) as trace, CountMacs() as count:
        model(x)
    assert count.total == pytest.approx(float(cost.spent(trace).sum())), "law 3"
    assert ran.names


@pytest.mark.parametrize("name", MODELS)
def test_the_laws_hold(name, ran):
    model, x = made(name)
    check_equal(model, x, draws=1)
    check_neighbours(model, x)
    close = copy.deepcopy(model)
    execute(close, sparse=True)
    alone = torch.cat([close(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(close(x), alone, rtol=1e-5, atol=1e-5)
    assert ran.names


@pytest.mark.parametrize("name", ["neurons", "experts", "pixels, bottleneck with norms"])
def test_a_session_runs_them(name, ran):
    model, x = made(name)
    session = Session(model, x, engines="eager", batches=(1,))
    del ran.names[:]
    answer = session(x)
    assert ran.names
    torch.testing.assert_close(answer, execute(model, sparse=False)(x), rtol=1e-4, atol=1e-4)
    with record(session) as trace, CountMacs() as count:
        session(x)
    assert count.total == pytest.approx(float(CostModel(model, x).spent(trace).sum()))


def test_weights_that_train_stay_with_torch(ran):
    for name in ("experts", "pixels, bottleneck"):
        model, x = made(name)
        model.requires_grad_(True)
        with torch.no_grad():
            execute(model, sparse=True)(x)
    assert not ran.names


def test_experts_that_are_not_alike_stay_with_torch(ran):
    torch.manual_seed(0)
    x, gate = ROWS, Gate(RouterScorer(9, 2), TopK(1), units=2)
    wide, narrow = (nn.Sequential(nn.Linear(9, h), nn.ReLU(), nn.Linear(h, 9)) for h in (20, 8))
    for other in (narrow, nn.Sequential(nn.Linear(9, 20), nn.GELU(), nn.Linear(20, 9)), nn.Linear(9, 9)):
        model = Experts([wide, other], gate).eval().requires_grad_(False)
        dense, sparse = (execute(model, sparse=sparse)(x) for sparse in (False, True))
        torch.testing.assert_close(sparse, dense)
    assert not ran.names


def test_an_expert_that_is_replaced_is_seen(kernels):
    model, x = made("experts")
    execute(model, sparse=True)(x)
    model.experts[1] = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 9)).requires_grad_(False)
    model.experts[2][0].weight.mul_(2)
    dense, sparse = (execute(model, sparse=sparse)(x) for sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


def test_many_rows_that_agree_take_slices_of_the_weights(ran):
    model, _ = made("neurons")
    execute(model, sparse=True)
    x = torch.randn(100, 9)
    with forced(model, lambda d: torch.ones_like(d.keep)):
        model(x)
    assert not ran.names
    model(x)
    assert ran.names == ["neurons_up", "neurons_down"]


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("pixels")])
def test_images_and_scores_are_not_overwritten(name, kernels):
    model, x = made(name)
    execute(model, sparse=True)
    for given in (x.clone(), x.contiguous(memory_format=torch.channels_last)):
        model(given)
        assert torch.equal(given, x)

    class First(nn.Module):
        """Scores that are a part of what was scored."""

        def forward(self, x_BCHW):
            return x_BCHW.permute(0, 2, 3, 1)[..., :1]

    if model.tiles.tile == 1:
        model.gate = Gate(First(), StraightThrough())
        with record(model) as trace:
            answer = model(x)
        assert torch.equal(trace.calls[0].decision.score[..., 0], x[:, 0])
        torch.testing.assert_close(model(x), answer)


def test_a_session_leaves_gates_of_pixels_to_the_kernels(kernels):
    model, x = made("pixels, bottleneck")
    assert model.runs_whole and not Session(model, x, engines="eager", batches=(1,)).engines()
    with library.using(""):
        assert not model.runs_whole and Session(model, x, engines="eager", batches=(1,)).engines()
    model.gate = Gate(ContextScorer(6, norm=True), StraightThrough())
    assert not model.runs_whole
