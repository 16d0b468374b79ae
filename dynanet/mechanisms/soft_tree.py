"""A neural tree: gates send every row left or right, weighted in training, along a single path in eval mode."""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError, check_shares, check_sizes
from dynanet.core.gate import Gate, check_units
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.trace import Call, Trace
from dynanet.gates.rules import Sigmoid

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
_LEAST = 1e-20  # the lowest probability whose logarithm is taken


def expected(keep: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The mean answer of two subtrees, weighted with keep (rows, 2): for regression, features, `LeafCrossEntropy`."""
    share = keep.to(left.dtype).reshape(*keep.shape, *[1] * (left.dim() - 1))
    return share[:, 0] * left + share[:, 1] * right


def mixture(keep: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The logarithm of the mean distribution, for leaves that return log-probabilities (rows, classes).

    A tree of these returns the log-probabilities of the mixture of its leaves, so that `train.CrossEntropy` is the
    negative log-likelihood with which neural decision forests and adaptive neural trees are trained.
    """
    share = keep.to(left.dtype)
    # The value is clamped, not the gradient: a hard rule learns from the side that it did not take.
    share = (share + (share.clamp(min=_LEAST) - share).detach()).log()
    return torch.logaddexp(share[:, :1] + left, share[:, 1:] + right)


class SoftTree(Dynamic):
    """An inner node: a gate decides for each row which of two subtrees answers. Subtrees are trees, or leaves.

    In training every leaf sees every row, weighted with the product of the gates' probabilities on its path (soft
    decision tree: Frosst and Hinton 2017, arXiv:1711.09784, eq. 1-2). In eval mode a row follows the gates' scores, and
    the sparse form computes only the gates, transformers and the leaf on its path. Unit 0 is left and unit 1 right. A
    subtree is a dynamic layer of its own, so the trace has a keep (B, 2) for every inner node: in training the
    probability that a row reaches each child, in eval mode whether it does.

    With modules as leaves and `before` as transformers on the edges it is an adaptive neural tree (Tanno et al. 2019,
    arXiv:1807.06699) of a fixed shape; trees need not be balanced.

    Args:
        gate: maps the output of `before` to a Decision with one score, keep (rows, 1): 1 is right. Its rule decides in
            training: `Sigmoid` as in the papers, `Gumbel` or `StraightThrough` for one path at a time.
        left: from rows to answers; a leaf, a `SoftTree`, or any other dynamic layer.
        right: as left; answers of the same shape.
        before: applied to every row first; the gate and both subtrees read its output. None: nothing.
        mix: in training, from keep (rows, 2) and both answers to the answer: `mixture` or `expected`.

    Raises:
        StructureError: a gate for more than one unit, or one whose rule keeps the best of several units (the single
            score of a node is always the best, so every row would go right).
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
        check_units(gate, 1, "scores in a node of a tree")
        if isinstance(gate, Gate) and gate.rule.competes:
            raise StructureError(
                f"a node of a tree got the rule {type(gate.rule).__name__}, by which all rows go right; use Sigmoid or "
                f"Gumbel"
            )
        self.before = before if before is not None else nn.Identity()
        self.gate = gate
        self.left = left
        self.right = right
        self.mix = mix

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
        if answer is None:  # no rows: a subtree gives the shape of the answer
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
    """A leaf with one learned distribution for all rows (arXiv:1711.09784, eq. 2); it costs no MACs.

    Args:
        classes: number of classes.

    Raises:
        ConfigError: fewer than two classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ConfigError(f"classes must be at least 2, got {classes}")
        self.logits = nn.Parameter(0.01 * torch.randn(classes))

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (rows, classes)."""
        return self.logits.log_softmax(0).expand(x.shape[0], -1)


class LeafClassifier(nn.Module):
    """A leaf that classifies, the solver of an adaptive neural tree: logits, then a log-softmax.

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
    """The mean of the distributions of several trees (deep neural decision forests: Kontschieder et al. 2015).

    Args:
        trees: return log-probabilities (rows, classes).

    Raises:
        StructureError: no trees.
    """

    def __init__(self, trees: Sequence[nn.Module]) -> None:
        super().__init__()
        if not trees:
            raise StructureError("a forest needs at least one tree, got no trees")
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
    check_sizes(depth=depth)

    def grow(above: int) -> nn.Module:
        if above == depth:
            return leaf()
        inner = None if before is None else before(above)
        return SoftTree(gate(), grow(above + 1), grow(above + 1), before=inner, mix=mix)

    tree = grow(0)
    assert isinstance(tree, SoftTree)
    return tree


def soft_decision_tree(features: int, classes: int, depth: int, *, temperature: float = 1.0) -> SoftTree:
    """The tree of Frosst and Hinton (arXiv:1711.09784): linear gates on the input, a learned distribution per leaf.

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
    check_sizes(features=features)
    return full_tree(
        depth,
        gate=lambda: Gate(nn.Linear(features, 1), Sigmoid(temperature)),
        leaf=lambda: LeafDistribution(classes),
        mix=expected,
    )


@dataclass(frozen=True)
class LeafCrossEntropy(Objective):
    """Every leaf's cross-entropy, weighted with the probability of reaching it (arXiv:1711.09784, eq. 3).

    For a tree that mixes leaves of log-probabilities by `expected`. In training its answer is the mean of the leaves'
    log-probabilities, so the loss is minus that answer at the label; `train.CrossEntropy` would normalise it first.
    """

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Log-probabilities (B, C) against classes (B,), or against probabilities (B, C), such as a teacher's."""
        if y.is_floating_point():
            return -(y * answer).sum(1).mean()
        return nn.functional.nll_loss(answer, y)


@dataclass(frozen=True)
class RouteBalance(Objective):
    """Pulls every inner node to send half of its rows each way (arXiv:1711.09784, eq. 4-5).

    -weight x decay^d x (log a + log(1 - a)) / 2 for a node with d decisions above it, where a is the share of the
    node's rows that go right, summed over the nodes. Without it, trees settle on one side.

    Args:
        weight: of the term.
        decay: per level, because deep nodes see few rows and need not split them evenly; 0.5 in the paper.

    Raises:
        ConfigError: a negative weight, a decay that is not in (0, 1].
    """

    weight: float = 0.1
    _: KW_ONLY
    decay: float = 0.5

    def __post_init__(self) -> None:
        check_shares(positive=True, decay=self.decay)
        if not self.weight >= 0:
            raise ConfigError(f"weight must be at least 0, got {self.weight}")

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The penalty, a scalar.

        Raises:
            StructureError: no tree decided in this pass.
        """
        nodes = set(trace.all(SoftTree))
        return self.weight * torch.stack([self._of(call, nodes) for call in trace.decisions(SoftTree)]).sum()

    def _of(self, call: Call, nodes: set[str]) -> Tensor:
        above = sum(name in nodes for name, _ in call.within)
        # In at least float32: bfloat16 has no numbers just below 1, and 1 - a would have no logarithm.
        arrived = call.keep.flatten(0, -2).to(torch.promote_types(call.keep.dtype, torch.float32)).sum(0)
        right = (arrived[1] / arrived.sum().clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6)
        penalty = -(self.decay**above) * 0.5 * (right.log() + (1 - right).log())
        return torch.where(arrived.sum() > 0, penalty, 0)  # hard rules may leave a node without rows


def _zeros(keep: Tensor, y: Any) -> Any:
    return over_tensors(lambda t: t.new_zeros(*keep.shape[:-1], *t.shape[1:]), y)
