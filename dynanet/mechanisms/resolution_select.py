"""Resolution select: a small predictor picks the size at which the network sees an image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.gate import Gate, check_units
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.rules import RelaxedTopK
from dynanet.nets.spatial_transformer import Resize, Size
from dynanet.nets.switchable_norm import norms_apart


class ResolutionSelect(Dynamic):
    """Resizes every row to the size that its gate picks (DRNet: Zhu et al. 2021, arXiv:2106.02898).

    Unit u is the network at size u. Rows of one size run together, on smaller feature maps. All sizes share weights
    except those of batch norms, as statistics of activations depend on the size. Images may have any size: one smaller
    than a candidate is enlarged.

    The gate keeps one size per row. Where a forced decision keeps none the first size runs, where it keeps several the
    answer is their mean. In training every size sees every row, and the answers are summed with keep as weights.

    Args:
        net: maps images of each size to answers (B, ...) of one shape.
        sizes: the candidates, cheapest first: sides, or (height, width).
        gate: maps the original images to a Decision with one unit per size. Give it a scorer that resizes first,
            nn.Sequential(Resize(...), ...), and the rule `RelaxedTopK(noise=True, hard=True)`.

    Raises:
        ConfigError: fewer than two sizes, sizes below 1, or another number of costs in the rule.
        StructureError: a gate that scores another number of sizes, or a rule that keeps several per row.
    """

    max_units = 1

    def __init__(self, net: nn.Module, sizes: Sequence[Size], gate: nn.Module) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ConfigError(f"sizes are {tuple(sizes)}; give two or more to pick from")
        check_units(gate, len(sizes), "sizes")
        if isinstance(gate, Gate) and isinstance(gate.rule, RelaxedTopK):
            gate.rule.check(len(sizes))
            if gate.rule.k != 1:
                raise StructureError(f"the rule keeps {gate.rule.k} sizes of every row; give RelaxedTopK(k=1)")
        self.gate = gate
        views = zip(sizes, norms_apart(net, len(sizes)), strict=True)
        self.nets = nn.ModuleList(nn.Sequential(Resize(size), view) for size, view in views)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The answer of every row at its size, (B, ...)."""
        keep, score = self.apply_override(self.gate(x_BCHW))
        none = (keep.detach().sum(-1, keepdim=True) <= 0).to(keep)
        keep = keep + functional.pad(none, (0, len(self.nets) - 1))  # then the first size runs
        self.log(Decision(keep, score))
        share = keep / keep.sum(-1, keepdim=True)
        answer = None
        for u, net in enumerate(self.nets):
            with self.only(u, keep[:, u]) as kept:
                if kept.empty and (answer is not None or u + 1 < len(self.nets)):
                    continue  # in a batch without rows the last size runs, for the shape of the answer
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


@dataclass
class ResolutionCost(Objective):
    """max(0, mean MACs - target) / (largest price of a size - smallest): the FLOPs regulariser of DRNet.

    `CrossEntropy() + 0.1 * ResolutionCost(target, cost)` (arXiv:2106.02898). Linear in the excess, where
    `train.BudgetPenalty` is squared. What always runs (the predictor) counts towards the target.

    Args:
        macs: the target, mean per sample.
        cost: of this model.
        layer: name of the ResolutionSelect; "" where it is the model itself.

    Attributes:
        range: MACs between the cheapest and the most expensive size, which stand for the cost model in the repr.
            Derived, so the class is not frozen.

    Raises:
        BudgetError: a target below the cost of the cheapest size.
        StructureError: the cost model has no such layer.
    """

    macs: float
    cost: CostModel = field(repr=False)
    layer: str = ""
    range: float = field(init=False)

    def __post_init__(self) -> None:
        if self.layer not in self.cost.unit:
            raise StructureError(f"the cost model has no layer {self.layer!r}; there are {sorted(self.cost.unit)}")
        prices = self.cost.unit[self.layer]
        least = self.cost.always + prices.min().item()
        if not self.macs >= least:
            raise BudgetError(
                f"a target of {self.macs:,.0f} MACs is below the {least:,.0f} of the cheapest size; raise it"
            )
        self.range = (prices.max() - prices.min()).clamp(min=1).item()

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The relative excess, a scalar; 0 within the target."""
        excess = ((self.cost.spent(trace).mean() - self.macs) / self.range).clamp(min=0)
        return excess.to(answer.dtype) if isinstance(answer, Tensor) else excess
