"""Experts: a router sends each row to a few of many experts and adds up what they answer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.rows import take_rows
from dynanet.core.serving import CalledInParts
from dynanet.core.trace import Frame
from dynanet.gates.rules import Rule, TopK
from dynanet.ops.native.experts import PackedExperts

Mix = Callable[[Tensor, Tensor], Tensor]


class Experts(Dynamic):
    """Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538; Switch: Fedus et al. 2022, arXiv:2101.03961).

    The answer is the sum of weight * expert(x) over the experts a row keeps, plus the shared expert's answer. The
    weights come from the router's scores, which is how gradients reach it. Nothing is dropped: an expert runs for every
    row that chose it, however many (`BatchCoupledTopK` limits that, at a price).

    The sparse form sorts rows by expert: each expert is called once, on rows that lie together, or not at all; experts
    of two linear layers go through one native kernel where that was built. It also
    serves training, once `execute(model, sparse=True)` has asked for it, where the rule is hard (`TopK` and its kin):
    then what was not kept has no gradient. Batch norms inside an expert would see its rows only.

    Rows may be samples or tokens: with x (B, T, D), a keep (B, T, experts) routes tokens, (B, experts) samples.

    Args:
        experts: each maps rows to rows of one and the same shape. They may differ in size, and hold dynamic layers.
        gate: maps x to a Decision with keep (rows..., experts): Gate(RouterScorer(D, 8), TopK(2), units=8).
        mix: from (scores, keep) to the weight of each expert if it is kept; see the three below.
        shared: an expert that always runs, unweighted (DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066).
        outputs: the shape of a row's answer; None: that of the row.

    Raises:
        StructureError: no experts, or a gate for another number of them.
        ConfigError: a rule that keeps more experts than there are; or one that keeps a single expert with a mix that
            then always answers 1, so that no gradient would reach the router.
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
            raise StructureError("a mixture of experts needs at least one expert")
        mix = mix if mix is not None else softmax_over_all
        if isinstance(gate, Gate):
            _check(gate, len(experts), mix)
        self.experts, self.gate, self.mix, self.shared = nn.ModuleList(experts), gate, mix, shared
        self.outputs = None if outputs is None else tuple(outputs)
        self._packed = PackedExperts()

    @property
    def decides(self) -> str:
        """How answers are weighted."""
        return getattr(self.mix, "__name__", type(self.mix).__name__)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """(rows..., ...) to (rows..., ...).

        Args:
            x: rows are its leading axes, as many as the gate's keep says.
            present: (rows...), 1 where there is a row, 0 for padding, which no expert computes.

        Raises:
            StructureError: an expert that answers another shape than `outputs` says.
        """
        if present is not None and isinstance(self.gate, Gate) and getattr(self.gate.rule, "counts_rows", False):
            decision = self.gate(x, present)
        else:
            decision = self.gate(x)
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
        lead, rows = tuple(keep.shape[:-1]), math.prod(keep.shape[:-1])
        x, keep = x.reshape(rows, *x.shape[len(lead) :]), keep.reshape(rows, len(self.experts))
        weight, answer = (keep * weight.reshape(keep.shape)).to(x.dtype), x.new_zeros(rows, *shape)
        # One frame for all: a row costs the same in every expert, and in two linear layers nothing is decided.
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
                # At once and not after a concatenation of all: what an expert answered is still in the cache.
                answer.index_add_(0, r, (y * w.reshape(r.shape[0], *[1] * len(shape))).to(answer.dtype))
        return answer

    def _checked(self, e: int, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(y.shape[1:]) != shape:
            raise StructureError(
                f"expert {e} answered rows of shape {tuple(y.shape[1:])}, and {shape} was expected; pass `outputs` if "
                f"experts answer another shape than they get"
            )
        return y


def softmax_over_all(score: Tensor, keep: Tensor) -> Tensor:
    """The softmax over all experts, kept or not (Switch eq. 1-2). Right for any k; the weights of a row sum to less
    than 1.
    """
    return score.softmax(-1)


def softmax_over_kept(score: Tensor, keep: Tensor) -> Tensor:
    """The softmax over the experts that a row keeps, for k > 1 (Shazeer et al. eq. 3, 5; Mixtral, arXiv:2401.04088)."""
    exponent = (score - score.amax(-1, keepdim=True).detach()).exp()
    return exponent / (keep * exponent).sum(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)


def sigmoid_over_kept(score: Tensor, keep: Tensor) -> Tensor:
    """Sigmoids, scaled so that those of the kept experts sum to 1 (DeepSeek-V3, arXiv:2412.19437, eq. 13-15). For
    k > 1.
    """
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
        if min(inputs, experts) < 1:
            raise ConfigError(f"a router of {inputs} inputs to {experts} experts; give 1 or more of each")
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter of {jitter}; expected a number from 0 to below 1")
        self.weight, self.jitter = nn.Parameter(torch.empty(experts, inputs)), jitter
        nn.init.trunc_normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to scores (..., experts)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, self.weight.to(x.dtype))


class BiasedTopK(Rule):
    """Top-k of sigmoid(score) + bias, with a bias per expert that training moves against its load.

    Balance without a loss (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3): after each batch the bias of
    an expert with less than the mean load rises by `rate`, that of one with more falls. It chooses only, and is no part
    of a weight. In training it changes in the forward pass, as a batch norm's statistics do; in eval it is a constant.

    Args:
        k: how many experts a row keeps.
        experts: how many there are.
        rate: of the bias; the paper's 0.001.

    Attributes:
        bias: (experts,), saved with the model.

    Raises:
        ConfigError: k below 1 or above the number of experts.
    """

    competes = True
    counts_rows = True

    def __init__(self, k: int, experts: int, rate: float = 1e-3) -> None:
        super().__init__()
        _check_k(k, experts)
        self.k, self.rate = k, rate
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts))

    @property
    def decides(self) -> str:
        """The k best, biased."""
        return f"the {self.k} best of sigmoid(score) + bias"

    def check(self, units: int) -> None:
        """There is a bias for each unit."""
        if units != self.bias.shape[0]:
            raise ConfigError(f"BiasedTopK was made for {self.bias.shape[0]} experts, and the gate has {units} units")

    def forward(self, score: Tensor) -> Tensor:
        """1 at the k experts of every row."""
        best = (score.sigmoid() + self.bias.to(score.dtype)).topk(self.k, dim=-1).indices
        keep = torch.zeros_like(score).scatter(-1, best, 1.0)
        if self.training and score.numel():
            with torch.no_grad():
                load = keep.flatten(0, -2).sum(0)
                self.bias += self.rate * (load.mean() - load).sign().to(self.bias.dtype)
        return keep


class BatchCoupledTopK(Rule, CalledInParts):  # an engine would see a batch in pieces, or padded
    """Top-k with a limit: an expert takes at most ceil(capacity * rows * k / experts) rows (Switch eq. 3).

    Batch-coupled: whether a row is served depends on the rows before it in the batch, so its answer changes with its
    neighbours, also in eval mode, and the laws of a dynamic layer do not hold. For comparison with networks trained
    so, and for devices that need fixed shapes. First choices go before second ones (GShard, arXiv:2006.16668), earlier
    rows before later ones. Rows over the limit keep nothing from that expert.

    Args:
        k: how many experts a row asks for.
        capacity: 1 is an equal share for every expert; Switch trains with 1 to 1.25.

    Raises:
        ConfigError: k below 1, or a capacity that is not positive.
    """

    competes = True
    counts_rows = True

    def __init__(self, k: int, capacity: float) -> None:
        super().__init__()
        if k < 1 or not capacity > 0:
            raise ConfigError(f"k is {k} and capacity {capacity}; expected k >= 1 and a capacity above 0")
        self.k, self.capacity = k, capacity

    @property
    def decides(self) -> str:
        """The k best as far as there is room."""
        return f"the {self.k} best scores, with a capacity of {self.capacity:g}"

    def check(self, units: int) -> None:
        """k is at most the number of units."""
        _check_k(self.k, units)

    def forward(self, score: Tensor) -> Tensor:
        """1 at those of a row's k best experts that had room for it."""
        experts = score.shape[-1]
        flat = score.flatten(0, -2)
        room = math.ceil(self.capacity * flat.shape[0] * self.k / experts)
        asked = functional.one_hot(flat.topk(self.k, dim=-1).indices, experts)  # (rows, k, experts)
        queue = asked.transpose(0, 1).flatten(0, 1)  # all first choices, then all second ones
        served = queue * (queue.cumsum(0) <= room)
        keep = served.unflatten(0, (self.k, flat.shape[0])).sum(0)
        return keep.to(score.dtype).reshape(score.shape)


def _check(gate: Gate, experts: int, mix: Mix) -> None:
    if gate.units != experts:
        raise StructureError(
            f"the gate decides on {gate.units} units and there are {experts} experts; give units={experts}"
        )
    if isinstance(gate.rule, TopK | BiasedTopK | BatchCoupledTopK):
        if gate.rule.k == 1 and experts > 1 and mix in (softmax_over_kept, sigmoid_over_kept):
            raise ConfigError(
                f"{mix.__name__} of a single kept expert is always 1, so no gradient reaches the router; with k = 1 "
                f"use mix=softmax_over_all"
            )


def _check_k(k: int, experts: int) -> None:
    if not 1 <= k <= experts:
        raise ConfigError(f"a router that keeps k = {k} of {experts} experts; give k from 1 to {experts}")
