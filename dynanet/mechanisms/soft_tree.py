"""A neural tree: gates send every row left or right; softly in training, down a single path afterwards."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.trace import Call, Trace
from dynanet.gates.rules import Sigmoid

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
_LEAST = 1e-20  # of a probability


def expected(keep: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The mean answer of two subtrees, weighted with keep (rows, 2): regression, features, `LeafCrossEntropy`."""
    share = keep.to(left.dtype).reshape(*keep.shape, *[1] * (left.dim() - 1))
    return share[:, 0] * left + share[:, 1] * right


def mixture(keep: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The logarithm of the mean distribution, for leaves that answer log-probabilities (rows, classes).

    A tree of these answers the log-probabilities of the mixture of its leaves, so that `train.CrossEntropy` is the
    negative log-likelihood that neural decision forests and adaptive neural trees train with.
    """
    share = keep.to(left.dtype)
    # The logarithm of 0 is cut off, but not the gradient: a hard rule learns from the side that it did not take.
    share = (share + (share.clamp(min=_LEAST) - share).detach()).log()
    return torch.logaddexp(share[:, :1] + left, share[:, 1:] + right)


class SoftTree(Dynamic):
    """An inner node: the gate looks at a row, and one of two subtrees answers. Subtrees are trees, or leaves.

    In training every leaf sees every row, weighted with the product of the gates' probabilities on its path (soft
    decision tree: Frosst and Hinton 2017, arXiv:1711.09784, eq. 1-2). In eval mode a row goes where the gate's score
    points, and sparsely only the gates, transformers and the leaf on its own path are computed. Units are 0, left, and
    1, right; a subtree is a dynamic layer of its own, so the trace has a keep (B, 2) for every inner node: the
    probability in training, and the choice in eval mode, of every row's way as far as that child. The price of depth
    is what the gates and transformers on the way cost.

    With modules as leaves and `before` as transformers on the edges it is an adaptive neural tree (Tanno et al. 2019,
    arXiv:1807.06699) of a fixed shape; trees need not be balanced.

    Args:
        gate: maps what `before` answered to a Decision with one score, keep (rows, 1): 1 is right. Its rule says how
            training chooses: `Sigmoid` as the papers do, `Gumbel` or `StraightThrough` for one path at a time.
        left: from rows to answers; a leaf, a `SoftTree`, or any other dynamic layer.
        right: as left; answers of the same shape.
        before: what every row that comes here goes through; the gate and both subtrees see its answer. None: nothing.
        mix: in training, from keep (rows, 2) and both answers to the answer: `mixture` or `expected`.

    Raises:
        StructureError: a gate for more than one unit, or one whose rule keeps the best of several (the one score of a
            node is always among the best, so every row would go right).
    """

    def __init__(
        self,
        gate: nn.Module,
        left: nn.Module,
        right: nn.Module,
        *,
        before: nn.Module | None = None,
        mix: Mix = mixture,
    ) -> None:
        super().__init__()
        if isinstance(gate, Gate) and gate.units != 1:
            raise StructureError(
                f"a node of a tree got a gate for {gate.units} units; give one score, which says right"
            )
        if isinstance(gate, Gate) and getattr(gate.rule, "competes", False):
            raise StructureError(
                f"a node of a tree got the rule {type(gate.rule).__name__}, by which all rows go right; give "
                f"Sigmoid or Gumbel"
            )
        self.before = before if before is not None else nn.Identity()
        self.gate, self.left, self.right, self.mix = gate, left, right, mix

    def forward(self, x: Any) -> Any:
        """The answer of the leaf that a row reached; in training the mix of all."""
        x = self.before(x)
        right, score = self.gate(x)
        keep = self.tap(Decision(torch.cat([1 - right, right], -1), score)).keep
        if self.training:
            return self._mixed(keep, x)
        answer = None
        for u, child in enumerate((self.left, self.right)):
            with self.only(u, keep[..., u]) as kept:
                if kept.empty:
                    continue
                y = kept.call(child, x)
            answer = kept.put(y, otherwise=_zeros(keep, y) if answer is None else answer)
        if answer is None:  # no rows: a subtree says what shape its answers have
            with self.only(0, keep[..., 0]) as kept:
                answer = _zeros(keep, kept.call(self.left, x))
        return answer

    def _mixed(self, keep: Tensor, x: Any) -> Any:
        answers = []
        for u, child in enumerate((self.left, self.right)):
            with self.only(u, keep[..., u]) as kept:
                answers.append(kept.call(child, x))
        lead, flat = keep.shape[:-1], keep.flatten(0, -2)
        return over_tensors(lambda a, b: self.mix(flat, a, b).reshape(*lead, *a.shape[1:]), *answers)


class LeafDistribution(nn.Module):
    """A leaf that answers the same learned distribution to every row (arXiv:1711.09784, eq. 2); it costs no MACs.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ConfigError(f"a leaf got {classes} classes; give two or more")
        self.logits = nn.Parameter(0.01 * torch.randn(classes))

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (rows, classes)."""
        return self.logits.log_softmax(0).expand(x.shape[0], -1)


class LeafClassifier(nn.Module):
    """A leaf that classifies: a module that answers logits, then a log-softmax. The solver of an adaptive neural tree.

    Args:
        solver: maps rows to logits (rows, classes).
    """

    def __init__(self, solver: nn.Module) -> None:
        super().__init__()
        self.solver = solver

    def forward(self, x: Any) -> Tensor:
        """Log-probabilities (rows, classes)."""
        return self.solver(x).log_softmax(-1)


class Forest(nn.Module):
    """Trees side by side: the mean of their distributions (deep neural decision forests: Kontschieder et al. 2015).

    Args:
        trees: answer log-probabilities (rows, classes).

    Raises:
        StructureError: no trees.
    """

    def __init__(self, trees: Sequence[nn.Module]) -> None:
        super().__init__()
        if not trees:
            raise StructureError("a forest got no trees; give one or more")
        self.trees = nn.ModuleList(trees)

    def forward(self, x: Any) -> Tensor:
        """Log-probabilities (rows, classes)."""
        answers = torch.stack([tree(x) for tree in self.trees])
        return answers.logsumexp(0) - math.log(len(self.trees))


def full_tree(
    depth: int,
    gate: Callable[[], nn.Module],
    leaf: Callable[[], nn.Module],
    before: Callable[[int], nn.Module] | None = None,
    *,
    mix: Mix = mixture,
) -> SoftTree:
    """A balanced tree of `depth` decisions and 2^depth leaves.

    Args:
        depth: decisions on every path.
        gate: makes the gate of an inner node.
        leaf: makes a leaf.
        before: makes the transformer of an inner node, from how many decisions lie above it; None for none.
        mix: as in `SoftTree`.

    Raises:
        ConfigError: a depth below 1.
    """
    if depth < 1:
        raise ConfigError(f"a tree got a depth of {depth}; give 1 or more (without a decision it is a leaf)")

    def grow(above: int) -> nn.Module:
        if above == depth:
            return leaf()
        inner = None if before is None else before(above)
        return SoftTree(gate(), grow(above + 1), grow(above + 1), before=inner, mix=mix)

    tree = grow(0)
    assert isinstance(tree, SoftTree)
    return tree


def soft_decision_tree(features: int, classes: int, depth: int, *, temperature: float = 1.0) -> SoftTree:
    """The tree of Frosst and Hinton (arXiv:1711.09784): linear gates on the raw input, a learned distribution per leaf.

    MACs of a row: features x depth sparsely, features x (2^depth - 1) densely. Trained with `LeafCrossEntropy` and
    `RouteBalance`.

    Args:
        features: of x (rows, features).
        classes: of the answer, log-probabilities (rows, classes).
        depth: decisions on every path.
        temperature: of the gates' sigmoids; 1 / beta in the paper.

    Raises:
        ConfigError: a depth or number of features below 1, fewer than two classes, a temperature that is not above 0.
    """
    if features < 1:
        raise ConfigError(f"a soft decision tree got {features} features; give 1 or more")
    if not temperature > 0:
        raise ConfigError(f"a soft decision tree got a temperature of {temperature}; give a number above 0")
    return full_tree(
        depth,
        gate=lambda: Gate(nn.Linear(features, 1), Sigmoid(temperature)),
        leaf=lambda: LeafDistribution(classes),
        mix=expected,
    )


class LeafCrossEntropy(Objective):
    """Every leaf's cross-entropy, weighted with the probability of reaching it (arXiv:1711.09784, eq. 3).

    For a tree that mixes leaves of log-probabilities by `expected`. What such a tree answers in training is the mean of
    its leaves' log-probabilities, so the loss is minus that answer at the label; `train.CrossEntropy` would normalise
    it first. Adds to the objectives of `dynanet.train`.
    """

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Log-probabilities (B, C) against classes (B,), or against probabilities (B, C): a teacher's, say."""
        if y.is_floating_point():
            return -(y * answer).sum(1).mean()
        return nn.functional.nll_loss(answer, y)

    def __repr__(self) -> str:
        return "LeafCrossEntropy()"


class RouteBalance(Objective):
    """Term of a loss: every inner node is to send half of its rows each way (arXiv:1711.09784, eq. 4-5).

    -weight x decay^d x (log a + log(1 - a)) / 2 for a node with d decisions above it, where a is the share of the
    node's rows that go right, summed over the nodes. Without it, trees settle on one side. Adds to the objectives of
    `dynanet.train`.

    Args:
        weight: of the term.
        decay: per level, because deep nodes see few rows and need not split them evenly; the paper's is 0.5.

    Raises:
        ConfigError: a negative weight, a decay that is not in (0, 1].
    """

    def __init__(self, weight: float = 0.1, *, decay: float = 0.5) -> None:
        if not weight >= 0 or not 0 < decay <= 1:
            raise ConfigError(f"route balance got weight={weight}, decay={decay}; give 0 or more, and one in (0, 1]")
        self.weight, self.decay = weight, decay

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The penalty, a scalar.

        Raises:
            StructureError: no tree decided in this pass.
        """
        nodes = {name for layer, name in trace.names.items() if isinstance(layer, SoftTree)}
        calls = [call for call in trace.calls if call.name in nodes]
        if not calls:
            raise StructureError("no tree decided in this pass, so there is nothing to balance; drop the term")
        return self.weight * torch.stack([self._of(call, nodes) for call in calls]).sum()

    def _of(self, call: Call, nodes: set[str]) -> Tensor:
        above = sum(name in nodes for name, _ in call.within)
        # At least in float32: bfloat16 knows no share just below 1, and what is left of 1 has no logarithm.
        arrived = call.keep.flatten(0, -2).to(torch.promote_types(call.keep.dtype, torch.float32)).sum(0)
        right = (arrived[1] / arrived.sum().clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6)
        penalty = -(self.decay**above) * 0.5 * (right.log() + (1 - right).log())
        return torch.where(arrived.sum() > 0, penalty, 0)  # hard rules may leave a node without rows

    def __repr__(self) -> str:
        return f"RouteBalance({self.weight:g}, decay={self.decay:g})"


def _zeros(keep: Tensor, y: Any) -> Any:
    return over_tensors(lambda t: t.new_zeros(*keep.shape[:-1], *t.shape[1:]), y)
