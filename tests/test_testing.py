"""The battery catches what it is there for: layers broken on purpose, each by the law it breaks."""

import pytest
import torch
from torch import nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.gate import Gate
from dynanet.core.trace import Frame
from dynanet.gates.rules import StraightThrough, Threshold
from dynanet.ops.tokens import TOKEN_ROWS, Tokens, attend
from dynanet.testing import check_dynamic, check_nested

D = 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def block():
    return nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))


class Honest(Dynamic):
    """What the broken layers are broken copies of."""

    def __init__(self, rule=None, unit=None) -> None:
        super().__init__()
        self.gate, self.block = Gate(nn.Linear(D, 1), rule or StraightThrough()), unit or block()

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        return self.run(0, self.block, keep[..., 0], x, otherwise=x)


class MasksOnly(Honest):
    """The literature's favourite: multiplies by zero, and saves nothing."""

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        return keep * self.block(x) + (1 - keep) * x


class MasksInAFrame(Honest):
    """Says that the unit runs for the kept rows, and runs it for all."""

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        with self.only(0, keep[..., 0]):
            y = self.block(x)
        return keep * y + (1 - keep) * x


class GathersByItself(Honest):
    """Really skips, but tells nobody: its unit runs in no frame."""

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        if not self.gathers:
            return keep * self.block(x) + (1 - keep) * x
        index = keep[:, 0].nonzero().squeeze(1)
        return x.index_copy(0, index, self.block(x[index]))


class WrongPrice(Honest):
    """Asks for the price of one row too many."""

    def price(self, keep, unit_macs):
        return super().price(keep, unit_macs) + unit_macs.sum()


class Stubborn(Honest):
    """Tells `tap`, and obeys its own gate."""

    def forward(self, x):
        decision = self.gate(x)
        self.tap(decision)
        return self.run(0, self.block, decision.keep[..., 0], x, otherwise=x)


class LooksAround(Honest):
    """Scores a row against the mean of the batch: alone, it decides otherwise."""

    def forward(self, x):
        keep = self.tap(self.gate(x - x.mean(0, keepdim=True))).keep
        return self.run(0, self.block, keep[..., 0], x, otherwise=x)


class AnswersTheMean(Honest):
    """Decides row by row; but what a row answers hangs on its neighbours."""

    def forward(self, x):
        return super().forward(x) - x.mean(0)


class SkipsOtherwise(Honest):
    """Leaves something else where the unit did not run, depending on the form."""

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        return self.run(0, self.block, keep[..., 0], x, otherwise=0 * x if self.gathers else x)


class TellsTwice(Honest):
    """Decides once in the dense form and twice in the sparse form."""

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        if self.gathers:
            self.tap(self.gate(x))
        return self.run(0, self.block, keep[..., 0], x, otherwise=x)


class DeafToTheAnswer(Honest):
    """The blend hides the decision's gradient; what was spent still carries it."""

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        return self.run(0, self.block, keep[..., 0].detach(), x, otherwise=x)


class DeafToTheCost(Honest):
    """The trace hears a decision without a gradient."""

    def forward(self, x):
        decision = self.gate(x)
        self.tap(Decision(decision.keep.detach(), decision.score))
        keep = self.apply_override(decision).keep
        return self.run(0, self.block, keep[..., 0], x, otherwise=x)


class DropsAndRevives(Dynamic):
    """Token drop that forgets `present`: a token that left outside comes back inside, in the dense form."""

    degree = 2

    def __init__(self, rest) -> None:
        super().__init__()
        self.gate, self.rest = Gate(nn.Linear(D, 1), Threshold()), rest

    def present(self, tokens):
        return None

    def forward(self, tokens):
        first = tokens.first()[..., None]
        keep = self.tap(self.gate(tokens.x), pinned=first, present=self.present(tokens)).keep[..., 0]
        inside = tokens if self.gathers else tokens._replace(alive=keep)
        x = self.run(0, lambda t: self.rest(t).x, keep, inside, otherwise=tokens.x, rows=TOKEN_ROWS)
        return tokens._replace(x=x)

    def price(self, keep, unit_macs):
        n = keep.to(unit_macs).flatten(1).sum(1)
        return n * unit_macs[0, 0] + n * n * unit_macs[0, 1]


class Drops(DropsAndRevives):
    """And one that does not forget."""

    def present(self, tokens):
        return None if tokens.alive is None else tokens.alive[..., None]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, tokens):
        return tokens._replace(x=tokens.x + attend(*self.qkv(tokens.x).chunk(3, -1), tokens, heads=2))


def twice(drop):
    """Two drops, one inside the other, on plain tensors."""

    class OfTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = drop(nn.Sequential(Attention(), drop(Attention())))

        def forward(self, x):
            return self.body(Tokens(x)).x

    return OfTensors()


BROKEN = {
    MasksOnly: "law 3.*cost nothing",
    MasksInAFrame: "law 3",
    GathersByItself: "law 3.*cost nothing",
    WrongPrice: "law 3",
    Stubborn: "law 3",
    LooksAround: "law 2",
    AnswersTheMean: "law 2",
    SkipsOtherwise: "law 1",
    TellsTwice: "law 4",
    DeafToTheAnswer: "law 5.*from the answer",
    DeafToTheCost: "law 5.*what was spent",
}


@pytest.mark.parametrize("layer", BROKEN)
def test_a_broken_layer_is_caught_by_the_law_it_breaks(layer):
    with pytest.raises(AssertionError, match=f"(?s){BROKEN[layer]}"):
        check_dynamic(layer(), torch.randn(7, D), portable=False)


def test_a_token_that_comes_back_from_outside_is_caught():
    with pytest.raises(AssertionError, match="law 1"):
        check_dynamic(twice(DropsAndRevives), torch.randn(4, 7, D), portable=False)
    check_dynamic(twice(Drops), torch.randn(4, 7, D), portable=False)


@pytest.mark.parametrize("rule", [StraightThrough(), Threshold()])
def test_an_honest_layer_passes(rule):
    check_dynamic(Honest(rule), torch.randn(7, D))


def test_a_gate_named_by_the_caller_is_held_to_law_5():
    layer = Honest(Threshold())
    with pytest.raises(AssertionError, match="law 5"):
        check_dynamic(layer, torch.randn(7, D), gates=[layer.gate], portable=False)


class WrongFrame(Honest):
    """A kernel of its own that gathers, and opens its frame as if it masked: right until something lies inside."""

    def forward(self, x):
        keep = self.tap(self.gate(x)).keep
        if not self.gathers:
            return self.run(0, self.block, keep[..., 0], x, otherwise=x)
        index = keep[:, 0].nonzero().squeeze(1)
        with self.within(Frame(self, range(1), (x.shape[0],), None, keep[:, 0], flat=True)):
            y = self.block(x[index])
        return x.index_copy(0, index, y)


def test_nesting_finds_what_a_layer_alone_hides():
    check_dynamic(WrongFrame(), torch.randn(7, D), portable=False)
    with pytest.raises((AssertionError, RuntimeError)):
        check_nested(lambda wrap: WrongFrame(unit=wrap(block())), torch.randn(7, D))
    check_nested(lambda wrap: Honest(unit=wrap(block())), torch.randn(7, D))
