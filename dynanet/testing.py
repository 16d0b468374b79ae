"""The laws of a dynamic layer, as one set of checks: for every mechanism here, and for your own.

    >>> from dynanet.testing import check_dynamic
    >>> check_dynamic(my_layer, torch.randn(6, 16))                                     # doctest: +SKIP

1. The sparse form gives the answers of the dense form.
2. A row's answer does not depend on the other rows of the batch.
3. Prices are exact: what the cost model says was spent is what ran, counted at dispatch, sample by sample. Units must
   have a price: those that cost nothing cannot be skipped (a layer that multiplies by a mask has only those).
4. The dense and the sparse trace agree.
5. Gradients reach the gates, from the answer and from what was spent.
6. It saves, loads, exports, compiles and runs in bfloat16.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.core.trace import Trace
from dynanet.gates.rules import Rule, Threshold
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip


def check_dynamic(
    model: nn.Module,
    example: Tensor,
    *,
    gates: Sequence[nn.Module] | None = None,
    portable: bool = True,
    draws: int = 6,
) -> None:
    """Check a dynamic layer, or a model with dynamic layers inside, against the laws.

    Args:
        model: maps one tensor to any pytree of tensors; its rows are the first axis.
        example: at least three rows.
        gates: modules whose parameters need gradients by law 5; by default every Gate with a differentiable rule.
        portable: check export and compilation of law 6 too (seconds).
        draws: number of random decisions to force, besides all-on and all-off.

    Raises:
        AssertionError: a law is broken; the message says which, with the figures.
    """
    check_neighbours(model, example)  # first: a gate that looks at the whole batch breaks laws 1 and 3 too
    check_equal(model, example, draws=draws)
    check_gradients(model, example, gates)
    check_saving(model, example)
    if portable:
        check_portable(model, example)


def check_nested(make: Callable[[Callable[[nn.Module], nn.Module]], nn.Module], example: Tensor) -> None:
    """Check laws 1 to 4 of a layer alone, inside LayerSkip, inside EarlyExit, and with LayerSkip inside its units.

    Args:
        make: builds the layer. It gets a function to wrap each unit that may hold another dynamic layer (a unit from
            rows to rows of the same shape); a layer without such units ignores it.
        example: the layer's input.
    """

    def plain(unit: nn.Module) -> nn.Module:
        return unit

    def skipped(unit: nn.Module) -> nn.Module:
        return LayerSkip(unit, Gate(_FeatureScorer(), Threshold(0.0)))

    for inner in (plain, skipped):
        layer = make(inner).eval()
        for around in (_alone, _inside_skip, _inside_exit):
            check_equal(around(layer, example), example, draws=3)
        check_neighbours(layer, example)


def check_equal(model: nn.Module, example: Tensor, *, draws: int = 6) -> None:
    """Check laws 1, 3 and 4, in float64 to 1e-12 and in float32.

    Decisions are the model's own, all on, all off and random ones; batches have all samples, one, and none.
    """
    exact, close = copy.deepcopy(model).double().eval(), copy.deepcopy(model).float().eval()
    decisions = [None, *_forcings(draws)]
    cost = CostModel(exact, example.double())
    _priced(cost, _both(exact, example.double(), everything)[1].trace)
    for decide in decisions:
        for x in (example, example[:1], example[:0]):
            dense, sparse = _both(exact, x.double(), decide)
            torch.testing.assert_close(sparse.answer, dense.answer, rtol=1e-12, atol=1e-12, msg=_law(1, decide))
            _agree(dense.trace, sparse.trace, decide)
            if len(x):
                spent = cost.spent(sparse.trace)
                torch.testing.assert_close(cost.spent(dense.trace), spent, rtol=0, atol=0.01, msg=_law(3, decide))
                ran = _alone_macs(exact, x.double(), decide)
                torch.testing.assert_close(spent, ran, rtol=0, atol=0.5, msg=_law(3, decide))
    for decide in decisions[:3]:
        dense, sparse = _both(close, example.float(), decide)
        torch.testing.assert_close(sparse.answer, dense.answer, msg=_law(1, decide))


def check_neighbours(model: nn.Module, example: Tensor) -> None:
    """Check law 2: permuted, cut, or surrounded by others, a row decides and answers the same."""
    model, x = copy.deepcopy(model).double().eval(), example.double()
    others = torch.cat([x.flip(0) * 1.7 + 0.3, x, -x])
    order = torch.arange(len(x)).roll(1)
    for sparse in (False, True):
        execute(model, sparse=sparse)
        with torch.no_grad():
            answer = model(x)
            for batch, rows in ((x[order], order), (x[1:3], slice(1, 3)), (x[:1], slice(0, 1))):
                same = tree_map(lambda t, rows=rows: t[rows], answer)
                torch.testing.assert_close(model(batch), same, rtol=1e-10, atol=1e-10, msg=_law(2, None))
            inside = tree_map(lambda t: t[len(x) : 2 * len(x)], model(others))
        torch.testing.assert_close(inside, answer, rtol=1e-10, atol=1e-10, msg=_law(2, None))


def check_gradients(model: nn.Module, example: Tensor, gates: Sequence[nn.Module] | None = None) -> None:
    """Check law 5: in training, every differentiable gate gets a gradient from the answer and from what was spent."""
    model_, x = copy.deepcopy(model).double(), example.double()
    if gates is None:
        found: list[nn.Module] = [m for m in model_.modules() if isinstance(m, Gate) and _differentiable(m.rule)]
    else:
        names = {module: name for name, module in model.named_modules()}
        found = [model_.get_submodule(names[gate]) for gate in gates]
    cost = CostModel(model_, x)
    model_.train()
    with record(model_) as trace:
        answer = model_(x)
    targets = {"the answer": sum((t * t).sum() for t in tree_leaves(answer)), "what was spent": cost.spent(trace).sum()}
    for gate in found:
        parameters = list(gate.parameters())
        for source, value in targets.items():
            if not value.requires_grad:
                raise AssertionError(f"law 5: {source} has no gradient at all")
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            if not any(g is not None and g.abs().sum() > 0 for g in gradients):
                raise AssertionError(f"law 5: no gradient reaches the gate {type(gate).__name__} from {source}")


def check_saving(model: nn.Module, example: Tensor) -> None:
    """Check law 6, first part: a state dict restores the model, and bfloat16 runs in both forms."""
    model = copy.deepcopy(model).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(example), model(example), rtol=0, atol=0, msg=_law(6, None))
        half, x = copy.deepcopy(model).bfloat16(), example.bfloat16()
        for decide in _forcings(0):
            with forced(half, decide):
                dense, sparse = execute(half, sparse=False)(x), execute(half, sparse=True)(x)
            torch.testing.assert_close(sparse, dense, rtol=3e-2, atol=3e-2, msg=_law(6, decide))


def check_portable(model: nn.Module, example: Tensor) -> None:
    """Check law 6, second part: torch.export of the dense form with a dynamic batch, torch.compile in one graph."""
    model = execute(copy.deepcopy(model).eval(), sparse=False)
    with torch.no_grad():
        expected = model(example)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        torch.testing.assert_close(program(example), expected, msg=_law(6, None))
        torch.testing.assert_close(program(example[:2]), model(example[:2]), msg=_law(6, None))
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(example), expected, msg=_law(6, None))


def _differentiable(rule: nn.Module) -> bool:
    return isinstance(rule, Rule) and rule.differentiable


class _Pass:
    def __init__(self, answer: Any, trace: Trace) -> None:
        self.answer, self.trace = answer, trace


def _both(model: nn.Module, x: Tensor, decide: Callable[[Decision], Tensor] | None) -> tuple[_Pass, _Pass]:
    passes = []
    for sparse in (False, True):
        execute(model, sparse=sparse)
        with torch.no_grad(), _deciding(model, decide), record(model) as trace:
            passes.append(_Pass(model(x), trace))
    return passes[0], passes[1]


def _alone_macs(model: nn.Module, x: Tensor, decide: Callable[[Decision], Tensor] | None) -> Tensor:
    execute(model, sparse=True)
    ran = []
    for i in range(len(x)):
        with torch.no_grad(), _deciding(model, decide), CountMacs() as count:
            model(x[i : i + 1])
        ran.append(count.total)
    return torch.tensor(ran, dtype=torch.float64)


def _priced(cost: CostModel, trace: Trace) -> None:
    """Law 3: units have a price, their own or that of layers inside them."""
    around = {name for call in trace.calls for name, _ in call.within}
    for name, prices in cost.unit.items():
        assert prices.any() or name in around, (
            f"law 3: the units of the layer {name!r} cost nothing, so skipping them saves nothing; call them through "
            f"`run`, or inside `within`"
        )


def _agree(dense: Trace, sparse: Trace, decide: Any) -> None:
    """Law 4: the same keeps in the same order, without calls that no row reached."""
    for name in dense.keys():
        reached = [[k for k in trace[name] if k.any()] for trace in (dense, sparse)]
        assert len(reached[0]) == len(reached[1]), (
            f"law 4: {name!r} was recorded {len(reached[0])} and {len(reached[1])} times"
        )
        for a, b in zip(*reached, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=_law(4, decide))


@contextmanager
def _deciding(model: nn.Module, decide: Callable[[Decision], Tensor] | None) -> Iterator[None]:
    if decide is None:
        yield
    else:
        with forced(model, decide):
            yield


def _forcings(draws: int) -> list[Callable[[Decision], Tensor]]:
    def on(d: Decision) -> Tensor:
        return torch.ones_like(d.keep)

    def off(d: Decision) -> Tensor:
        return torch.zeros_like(d.keep)

    return [on, off, *(random_decisions(i) for i in range(draws))]


def random_decisions(seed: int) -> Callable[[Decision], Tensor]:
    """Make a pseudo-random, row-wise function of the scores for `forced`, with rates from 0.3 to 0.7."""

    def random(d: Decision) -> Tensor:
        units = torch.arange(d.keep.shape[-1], dtype=d.score.dtype, device=d.score.device)
        wave = torch.sin((d.score.nan_to_num(posinf=3.0, neginf=-3.0) + seed + units) * 1e3)
        return (wave > (seed % 5 - 2) / 3).to(d.keep).expand_as(d.keep)

    return random


def _law(number: int, decide: Any) -> Callable[[str], str]:
    how = "its own decisions" if decide is None else f"forced decisions ({decide.__name__})"
    return lambda message: f"law {number} with {how}: {message}"


class _FeatureScorer(nn.Module):
    """A fixed function of a row's features. Rows are all axes except the last; of images, the first."""

    def forward(self, x: Tensor) -> Tensor:
        features = x.flatten(1) if x.dim() == 4 else x
        return torch.sin(features.sum(-1, keepdim=True) * 7 + 0.4)


class _SampleScorer(nn.Module):
    """A fixed function of a sample, whatever its shape."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(_size(x)[:, None] * 7 + 0.4)


def _size(x: Tensor) -> Tensor:
    """A number of order 1 for every sample."""
    return x.flatten(1).sum(1) / max(1, x[:1].numel()) ** 0.5


class _Constant(nn.Module):
    """A fixed answer of the right shape, in place of a unit that does not run."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((x.shape[0], *self.shape), 0.25)


def _answer_shape(layer: nn.Module, example: Tensor) -> torch.Size:
    with torch.no_grad():
        answer = layer(example[:1].to(next(iter(layer.parameters())).dtype))
    return answer.shape[1:]


def _alone(layer: nn.Module, example: Tensor) -> nn.Module:
    return layer


def _inside_skip(layer: nn.Module, example: Tensor) -> nn.Module:
    return LayerSkip(layer, Gate(_SampleScorer(), Threshold(0.0)), otherwise=_Constant(_answer_shape(layer, example)))


def _inside_exit(layer: nn.Module, example: Tensor) -> nn.Module:
    """The layer in the second of two stages; half the rows leave before it."""

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.9 * x

    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.2 * torch.stack([torch.sin(_size(x) * c) for c in (3.0, 5.0, 7.0)], 1)

    model = EarlyExit([First(), layer], [Head(), Head()]).eval()
    model.thresholds.fill_(-0.5)
    return model
