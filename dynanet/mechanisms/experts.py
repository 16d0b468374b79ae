"""Experts: a router sends each row to a few of many experts and sums their answers."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError, check_sizes
from dynanet.core.gate import Gate, check_units
from dynanet.core.rows import take_rows
from dynanet.core.trace import Frame
from dynanet.gates.expert_rules import BatchCoupledTopK, BiasedTopK
from dynanet.gates.rules import TopK
from dynanet.ops.native.experts import PackedExperts

Mix = Callable[[Tensor, Tensor], Tensor]


class Experts(Dynamic):
    """Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538; Switch: Fedus et al. 2022, arXiv:2101.03961).

    The answer is the sum of weight * expert(x) over the experts a row keeps, plus the shared expert's answer. The
    weights depend on the router's scores, so that gradients reach it. No row is dropped: an expert runs for every row
    that chose it, however many (`BatchCoupledTopK` limits them, and gives up the laws of a dynamic layer).

    The sparse form sorts rows by expert: each expert is called once, on contiguous rows, or not at all; experts of two
    linear layers run in one native kernel where it was built. After `execute(model, sparse=True)` it also runs in
    training if the rule is hard (`TopK` and its kin): experts that are not kept then have no gradient. Batch norms
    inside an expert would see its rows only.

    Rows may be samples or tokens: with x (B, T, D), a keep (B, T, experts) routes tokens, (B, experts) samples.

    Args:
        experts: each maps rows to rows, all of one shape. They may differ in size, and contain dynamic layers.
        gate: maps x to a Decision with keep (rows..., experts): Gate(RouterScorer(D, 8), TopK(2), units=8).
        mix: from (scores, keep) to the weight of each expert if it is kept: `softmax_over_all` (None),
            `softmax_over_kept` or `sigmoid_over_kept`.
        shared: an expert that always runs, unweighted (DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066).
        outputs: the shape of a row's answer; None: that of the row.

    Raises:
        StructureError: no experts, or a gate for another number of them.
        ConfigError: a rule that keeps a single expert with a mix that is then always 1, so that no gradient would
            reach the router.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gate: nn.Module,
        *,
        mix: Mix | None = None,
        shared: nn.Module | None = None,
        outputs: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise StructureError("a mixture of experts needs at least one expert, got none")
        mix = mix if mix is not None else softmax_over_all
        check_units(gate, len(experts), "experts")
        if isinstance(gate, Gate) and isinstance(gate.rule, TopK | BiasedTopK | BatchCoupledTopK):
            if gate.rule.k == 1 and len(experts) > 1 and mix in (softmax_over_kept, sigmoid_over_kept):
                raise ConfigError(
                    f"{mix.__name__} of a single kept expert is always 1, so no gradient reaches the router; with "
                    f"k = 1 use mix=softmax_over_all"
                )
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.mix = mix
        self.shared = shared
        self.outputs = None if outputs is None else tuple(outputs)
        self._packed = PackedExperts()

    @property
    def decides(self) -> str:
        """The name of the mix."""
        return getattr(self.mix, "__name__", type(self.mix).__name__)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """(rows..., ...) to (rows..., ...).

        Args:
            x: rows are its leading axes, as many as the gate's keep says.
            present: (rows...), 1 where there is a row, 0 for padding, which no expert computes.

        Raises:
            StructureError: an expert whose answer has another shape than `outputs`.
        """
        counts = present is not None and isinstance(self.gate, Gate) and self.gate.rule.counts_rows
        decision = self.gate(x, present) if counts else self.gate(x)
        keep, score = self.tap(decision, present=None if present is None else present.to(x.dtype)[..., None])
        lead = tuple(keep.shape[:-1])
        shape = tuple(x.shape[len(lead) :]) if self.outputs is None else self.outputs
        weight = self.mix(score, keep)
        if self.gathers or (self.sparse and not keep.requires_grad):
            answer = self._gathered(x, keep, weight, shape)
        else:
            answer = self._masked(x, keep, weight, shape)
        answer = answer.reshape(*lead, *shape)
        return answer if self.shared is None else answer + self.shared(x)

    def _masked(self, x: Tensor, keep: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        factor = (keep * weight).reshape(math.prod(keep.shape[:-1]), len(self.experts)).to(x.dtype)
        answer = x.new_zeros(factor.shape[0], *shape)
        for e, expert in enumerate(self.experts):
            with self.only(e, keep[..., e]) as kept:
                y = self._checked(e, expert(kept.take(x)), shape)
            answer = answer + y * factor[:, e].reshape(factor.shape[0], *[1] * len(shape))
        return answer

    def _gathered(self, x: Tensor, keep: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        lead = tuple(keep.shape[:-1])
        rows = math.prod(lead)
        x = x.reshape(rows, *x.shape[len(lead) :])
        keep = keep.reshape(rows, len(self.experts))
        weight = (keep * weight.reshape(keep.shape)).to(x.dtype)
        answer = x.new_zeros(rows, *shape)
        # One frame for all: a row costs the same in every expert, and two linear layers decide nothing.
        with self.within(Frame(self, range(len(self.experts)), lead, None, None, True)):
            if self._packed.add_(answer, x, self.experts, keep, weight):
                return answer
        chosen = (keep > 0).t()
        counts = chosen.sum(1).tolist()
        order = chosen.nonzero()[:, 1]  # sorted by expert, then by row
        for e, (r, w) in enumerate(zip(order.split(counts), weight.t()[chosen].split(counts), strict=True)):
            if r.shape[0]:
                with self.within(Frame(self, range(e, e + 1), lead, r, None, True)):
                    y = self._checked(e, self.experts[e](x if r.shape[0] == rows else take_rows(x, r)), shape)
                # Expert by expert, not after a concatenation of all: the answer is still in the cache.
                answer.index_add_(0, r, (y * w.reshape(r.shape[0], *[1] * len(shape))).to(answer.dtype))
        return answer

    def _checked(self, e: int, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(y.shape[1:]) != shape:
            raise StructureError(
                f"expert {e} returned rows of shape {tuple(y.shape[1:])}, expected {shape}; pass `outputs` if experts "
                f"change the shape of a row"
            )
        return y


def softmax_over_all(score: Tensor, keep: Tensor) -> Tensor:
    """The softmax over all experts, kept or not (Switch eq. 1-2).

    For any k; the weights of a row's kept experts sum to less than 1.
    """
    return score.softmax(-1)


def softmax_over_kept(score: Tensor, keep: Tensor) -> Tensor:
    """The softmax over the experts that a row keeps, for k > 1 (Shazeer et al. eq. 3, 5; Mixtral, arXiv:2401.04088)."""
    exponent = (score - score.amax(-1, keepdim=True).detach()).exp()
    return exponent / (keep * exponent).sum(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)


def sigmoid_over_kept(score: Tensor, keep: Tensor) -> Tensor:
    """Sigmoids that sum to 1 over the kept experts, for k > 1 (DeepSeek-V3, arXiv:2412.19437, eq. 13-15)."""
    affinity = score.sigmoid()
    return affinity / (keep * affinity).sum(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)


class RouterScorer(nn.Module):
    """One linear map without bias, in at least float32 (Switch: low precision makes routers unstable).

    Args:
        inputs: features D.
        experts: scores per row.
        jitter: in training, inputs are multiplied with noise from 1 - jitter to 1 + jitter (Switch: 0.01).

    Raises:
        ConfigError: sizes below 1; jitter below 0, or 1 and more.
    """

    def __init__(self, inputs: int, experts: int, jitter: float = 0.0) -> None:
        super().__init__()
        check_sizes(inputs=inputs, experts=experts)
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter must be from 0 to below 1, got {jitter}")
        self.weight = nn.Parameter(torch.empty(experts, inputs))
        self.jitter = jitter
        nn.init.trunc_normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to scores (..., experts)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, self.weight.to(x.dtype))
