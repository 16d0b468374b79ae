"""Gradient equilibrium: rescale gradients where exits share weights.

Li, Zhang, Qi, Yang, Huang: Improved Techniques for Training Adaptive Deep Networks, ICCV 2019, arXiv:1908.06294:
where exit i of K leaves the backbone, gradients from the exit are scaled by 1/(K-i+1) and those from the
rest by (K-i)/(K-i+1). Multiplied out along the backbone, every weight's gradient becomes the *mean* over the exits that
depend on it, where plain training has their sum. So this module counts the exits that reach a weight, and divides its
gradient by the count. It needs no hooks in the model and works for any Halt.

On a chain of stages this is the paper's rescaling exactly. Where stages pass several tensors on (MSDNet) the authors'
code rescales only the one that the exit reads; here all of a stage's weights are averaged over the exits they reach.
All of a weight's gradient is divided, that of a budget term too. Optimizers that normalise by the gradient's size
(Adam) undo it.
"""

from collections.abc import Iterable

from torch import Tensor
from torch.utils._pytree import tree_leaves

from dynanet.core.errors import StructureError
from dynanet.core.trace import Trace


def exits_reached(trace: Trace, halt: str | None = None) -> dict[Tensor, int]:
    """How many exits depend on each weight, read off the autograd graph of a recorded training pass.

    Args:
        trace: of a pass in which every exit answered, with gradients. It must not have been compiled as one graph.
        halt: the Halt's name; None where there is only one.

    Raises:
        StructureError: no exits, or those of several Halts and none is named.
    """
    if halt is None and len(trace.answers) == 1:
        halt = next(iter(trace.answers))
    if halt is None or halt not in trace.answers:
        raise StructureError(
            f"expected the exits of {'one Halt' if halt is None else repr(halt)} in the trace, found those of "
            f"{sorted(trace.answers)}; pass `halt=` to choose one"
        )
    counts: dict[Tensor, int] = {}
    for answer in trace.answers[halt]:
        for weight in _leaves(t for t in tree_leaves(answer) if isinstance(t, Tensor)):
            counts[weight] = counts.get(weight, 0) + 1
    return counts


def rescale_gradients(counts: dict[Tensor, int]) -> None:
    """Divide every gradient by its count.

    Call it once per step, after `backward` and before clipping and `optimizer.step`.
    """
    for weight, count in counts.items():
        if count > 1 and weight.grad is not None:
            weight.grad.div_(count)


def _leaves(tensors: Iterable[Tensor]) -> set[Tensor]:
    """The leaf tensors of the autograd graph that the tensors depend on."""
    stack = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(stack)
    leaves: set[Tensor] = set()
    while stack:
        node = stack.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.add(node.variable)  # type: ignore[attr-defined]  # of this one kind of node
        for above, _ in node.next_functions:
            if above is not None and above not in seen:
                seen.add(above)
                stack.append(above)
    return leaves
