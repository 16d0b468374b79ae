"""Resolution select: a small predictor looks at each image and says at which size the network is to see it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.rules import RelaxedTopK
from dynanet.nets.spatial_transformer import Resize, Size
from dynanet.nets.switchable_norm import norms_apart


class ResolutionSelect(Dynamic):
    """Resizes every row to the size its gate picks, and runs one network on it (DRNet: Zhu et al. 2021,
    arXiv:2106.02898).

    Unit u is the network at size u. Rows of one size run together, through really smaller feature maps. All sizes share
    the weights; batch norms are each size's own, as activations of different sizes have different statistics. Images of
    any size come in: one smaller than a candidate is enlarged.

    A gate keeps one size per row. Where a forced decision keeps none the first size runs, where it keeps several their
    mean answers. In training every size sees every row, and the answers are added with the keeps as weights.

    Args:
        net: from images of every one of the sizes to answers (B, ...) of one shape.
        sizes: the candidates, cheapest first: sides, or (height, width).
        gate: maps the images as they come to a Decision with one unit per size; give it a scorer that resizes first,
            nn.Sequential(Resize(...), ...), and the rule `RelaxedTopK(noise=True, hard=True)`.

    Raises:
        ConfigError: sizes that are none, fewer than two, or costs of another number in the rule.
        StructureError: a gate that scores another number of sizes, or a rule that keeps several of every row.
    """

    max_units = 1

    def __init__(self, net: nn.Module, sizes: Sequence[Size], gate: nn.Module) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ConfigError(f"sizes are {tuple(sizes)}; give two or more to pick from, or resize to the only one")
        if isinstance(gate, Gate) and gate.units != len(sizes):
            raise StructureError(f"the gate scores {gate.units} sizes and there are {len(sizes)}; make them equal")
        if isinstance(gate, Gate) and isinstance(gate.rule, RelaxedTopK):
            gate.rule.check(len(sizes))
            if gate.rule.k != 1:
                raise StructureError(f"the rule keeps {gate.rule.k} sizes of every row; give RelaxedTopK(k=1)")
        self.gate = gate
        views = zip(sizes, norms_apart(net, len(sizes)), strict=True)
        self.nets = nn.ModuleList(nn.Sequential(Resize(size), view) for size, view in views)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Every row's answer at its size."""
        keep, score = self.apply_override(self.gate(x_BCHW))
        nothing = (keep.detach().sum(-1, keepdim=True) <= 0).to(keep)
        keep = keep + functional.pad(nothing, (0, len(self.nets) - 1))
        self.log(Decision(keep, score))
        share, answer = keep / keep.sum(-1, keepdim=True), None
        for u, net in enumerate(self.nets):
            with self.only(u, keep[:, u]) as kept:
                if kept.empty and (answer is not None or u + 1 < len(self.nets)):
                    continue  # for a batch without rows the last size gives the answer its shape
                part = kept.call(net, x_BCHW)
            weight = kept.take(share[:, u]).to(part.dtype)
            part = part * weight.reshape(-1, *[1] * (part.dim() - 1))
            if kept.index is not None and kept.index.numel() < x_BCHW.shape[0]:
                answer = part.new_zeros(x_BCHW.shape[0], *part.shape[1:]) if answer is None else answer
                answer = answer.index_add(0, kept.index, part)
            else:
                answer = part if answer is None else answer + part
        assert answer is not None
        return answer


class ResolutionCost(Objective):
    """max(0, mean MACs - target) / (dearest size - cheapest): the FLOPs regulariser of DRNet (arXiv:2106.02898).

    `CrossEntropy() + 0.1 * ResolutionCost(target, cost)`. Linear in the excess, where `train.BudgetPenalty` is squared.
    What always runs (the predictor) counts towards the target.

    Args:
        macs: the target, mean per sample.
        cost: of this model.
        layer: the name of the ResolutionSelect; "" where it is the model itself.

    Raises:
        BudgetError: a target below what the cheapest size costs.
        StructureError: the cost model knows no such layer.
    """

    def __init__(self, macs: float, cost: CostModel, layer: str = "") -> None:
        if layer not in cost.unit:
            raise StructureError(f"{layer!r} is no layer of this cost model; there are {sorted(cost.unit)}")
        prices = cost.unit[layer]
        least = cost.always + prices.min().item()
        if not macs >= least:
            raise BudgetError(f"a target of {macs:,.0f} MACs is below the {least:,.0f} of the cheapest size; raise it")
        self.macs, self.cost, self.layer = float(macs), cost, layer
        self.range = (prices.max() - prices.min()).clamp(min=1).item()

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The relative excess, a scalar; 0 within the target."""
        excess = (self.cost.spent(trace).mean() - self.macs) / self.range
        excess = excess.clamp(min=0)
        return excess.to(answer.dtype) if isinstance(answer, Tensor) else excess

    def __repr__(self) -> str:
        return f"ResolutionCost({self.macs:.0f}, range={self.range:.0f}, layer={self.layer!r})"
