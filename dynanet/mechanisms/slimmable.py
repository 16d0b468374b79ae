"""Slimmable widths: one network at several widths that share weights; a gate chooses a width for every row."""

import copy
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, Kept, layers
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate, check_units
from dynanet.core.objective import Objective
from dynanet.core.serving import CalledInParts
from dynanet.core.trace import Trace
from dynanet.nets.slim import Slim


class Slimmable(Dynamic):
    """Runs a network, or the later part of one, for every row at the width of its gate (DS-Net, arXiv:2103.13023).

    Unit u is the whole network at width u. Rows of one width run together, through smaller convolutions. A gate keeps
    one width per row; where a forced decision keeps none the narrowest runs, where it keeps several the answer is that
    of the widest of them.

    In the dense form the answers of all widths that ran are logged, narrowest first, for the objectives of both stages
    of training.

    Args:
        net: from rows to rows.
        gate: maps the net's input to a Decision with one unit per width, by the rule `RelaxedTopK(noise=True,
            hard=True)`. With `DoubleHead` as its scorer, the net's input is multiplied with its attention.

    Attributes:
        between: None: the gate decides. A number: train the net itself by the sandwich rule (arXiv:1903.05134): every
            pass runs the narrowest width, the widest, and this number of random ones between; the widest answers.
        target: the net's moving average after `bootstrap`. It runs in the sandwich only.

    Raises:
        StructureError: a net that is not a `Slim`, or a gate that scores another number of widths.
    """

    max_units = 1
    between: int | None = None

    def __init__(self, net: Slim, gate: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, Slim):
            raise StructureError(f"net must be a Slim (see dynanet.nets.slim), got {type(net).__name__}")
        check_units(gate, net.widths, "widths")
        self.net: nn.Module = net
        self.target: nn.Module | None = None
        self.gate = gate
        self.widths = net.widths
        self.decay = 0.0

    def bootstrap(self, decay: float = 0.997) -> None:
        """Add a moving average of the net, the teacher of `EnsembleBootstrapping`; it is saved with the model.

        Args:
            decay: the share of the average that remains in every step. Use a smaller one for few steps: 0.99.

        Raises:
            ConfigError: a decay outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must be from 0 to below 1, got {decay}")
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:
        """Every row's answer at its width."""
        keep, score = self.apply_override(self.gate(x))
        x = self._attended(x)
        if self.training and self.between is not None:
            return self._sandwich(x)
        nothing = (keep.amax(-1, keepdim=True) <= 0).to(keep)
        keep = keep + F.pad(nothing, (0, self.widths - 1))
        self.log(Decision(keep, score))
        y: Tensor | None = None
        for u in range(self.widths):
            with self.only(u, keep[:, u]) as kept:
                if kept.empty and (y is not None or u + 1 < self.widths):
                    continue  # for a batch without rows the last width gives the answer its shape
                part = kept.call(partial(self._run, self.net, u), x)
            if not self.gathers and self.trace is not None:
                self.trace.log_answer(self, part)
            y = self._placed(y, part, kept)
        assert y is not None
        return y

    def at(self, u: int, x: Tensor) -> Tensor:
        """All rows at width u; the gate does not decide."""
        return self._run(self.net, u, self._attended(x))

    def _attended(self, x: Tensor) -> Tensor:
        scorer = self.gate.scorer if isinstance(self.gate, Gate) else None
        return scorer.attend(x) if isinstance(scorer, DoubleHead) else x

    @staticmethod
    def _run(net: nn.Module, u: int, x: Tensor) -> Tensor:
        return net[u](x) if isinstance(net, nn.ModuleList) else net(x, u)

    def _placed(self, y: Tensor | None, part: Tensor, kept: Kept) -> Tensor:
        if self.training:  # a sum, so that the gate gets a gradient from the answer of every width
            part = part * kept.keep.reshape(-1, *[1] * (part.dim() - 1))
            return part if y is None else y + part
        if kept.index is None:
            return kept.put(part, otherwise=part if y is None else y)
        if kept.index.numel() == kept.keep.numel():
            return part
        y = part.new_zeros(kept.keep.numel(), *part.shape[1:]) if y is None else y
        return y.index_copy_(0, kept.index, part)

    def _sandwich(self, x: Tensor) -> Tensor:
        """Run some widths for all rows and log their answers; no decision is made or logged."""
        drawn = 1 + torch.randperm(max(0, self.widths - 2))[: self.between]
        order = sorted({0, *drawn.tolist(), self.widths - 1})
        answer = x
        for u in order:
            answer = self._run(self.net, u, x)
            if self.trace is not None:
                self.trace.log_answer(self, answer)
        if self.target is not None:
            self._update_target(x, order[1:])
        return answer

    @torch.no_grad()
    def _update_target(self, x: Tensor, order: Sequence[int]) -> None:
        """Update the moving average, and log its answers at the widths that teach."""
        assert self.target is not None
        for average, weight in zip(self.target.parameters(), self.net.parameters(), strict=True):
            average.lerp_(weight, 1 - self.decay)
        for u in order:
            answer = self._run(self.target, u, x)
            if self.trace is not None:
                self.trace.log_answer(self, answer)


class DoubleHead(nn.Module, CalledInParts):  # a session must not replace it: `attend` is called too
    """Both heads of DS-Net's gate on one hidden layer over pooled features (arXiv:2103.13023, section 3.3).

    The slimming head scores widths. The attention head multiplies every channel with 1 + tanh, initially 1; it is
    trained with the net, also in the first stage. Pooled features differ little from input to input, so they are normed
    first: without a norm the gate ends at one width for all.

    Args:
        channels: of the feature map (B, C, H, W).
        widths: scores per row.
        hidden: width of the hidden layer; a quarter of the channels if None.
    """

    def __init__(self, channels: int, widths: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = max(1, channels // 4) if hidden is None else hidden
        self.reduce = nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, hidden), nn.ReLU())
        self.slimming = nn.Linear(hidden, widths)
        self.attention = nn.Linear(hidden, channels)
        nn.init.zeros_(self.attention.weight)
        nn.init.zeros_(self.attention.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B, widths)."""
        return self.slimming(self.reduce(x_BCHW.mean((2, 3))))

    def attend(self, x_BCHW: Tensor) -> Tensor:
        """x, with every channel multiplied by its attention."""
        return x_BCHW * (1 + self.attention(self.reduce(x_BCHW.mean((2, 3)))).tanh())[..., None, None]


@dataclass(frozen=True)
class InPlaceDistillation(Objective):
    """Stage one: the widest learns from the labels, the others from the widest (US-Nets, arXiv:1903.05134).

    Needs `Slimmable.between`, and logits as answers.
    """

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Cross-entropy of the widest, plus cross-entropy of every other with the widest's probabilities.

        Raises:
            StructureError: not one Slimmable that answered at two widths or more.
        """
        *others, widest = _answers(trace).online
        taught = widest.detach().softmax(1)
        losses = [F.cross_entropy(widest, y), *(F.cross_entropy(logits, taught) for logits in others)]
        return torch.stack(losses).sum()


@dataclass(frozen=True)
class EnsembleBootstrapping(Objective):
    """Stage one as DS-Net trains it: a moving average of the net teaches (arXiv:2103.13023, section 3.2).

    In-place ensemble bootstrapping: the widest learns from the labels, those between from the average's widest, and the
    narrowest from the mean of the average's answers at all wider widths that were drawn. Needs `Slimmable.bootstrap`
    and `between`. In eval mode, where the average does not answer, it is the cross-entropy of the widest.
    """

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """The sum over widths.

        Raises:
            StructureError: not one Slimmable that answered at two widths or more, or no teacher in train mode.
        """
        answers = _answers(trace)
        narrowest, *between, widest = answers.online
        loss = F.cross_entropy(widest, y)
        if not answers.layer.training:
            return loss
        if not answers.taught:
            raise StructureError("no moving average answered; call the layer's `bootstrap`, and set its `between`")
        taught = [logits.softmax(1) for logits in answers.taught]
        losses = [F.cross_entropy(logits, taught[-1]) for logits in between]
        return torch.stack([loss, *losses, F.cross_entropy(narrowest, torch.stack(taught).mean(0))]).sum()


@dataclass(frozen=True)
class SandwichGate(Objective):
    """Stage two: the gate learns which rows need width (sandwich gate sparsification, DS-Net, arXiv:2103.13023).

    The target of a row that the narrowest width gets right is the narrowest; of one that only the widest gets right,
    the widest. The target of a row that even the widest gets wrong is the narrowest, which saves its compute, or the
    widest, as in the authors' code. They add the cross-entropy of the answer, and half the square of the mean cost in
    billions of MACs.

    Args:
        give_up: rows that even the widest gets wrong go to the narrowest.
        balanced: weight both targets equally in a batch, whatever their numbers. Where rows that need width are rare
            the gate would otherwise learn that hardly any does; a budget then limits how many get it.
    """

    _: KW_ONLY
    give_up: bool = True
    balanced: bool = False

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Cross-entropy of the gate's scores with the target width of every row.

        Raises:
            StructureError: not one Slimmable that answered at two widths or more, or no decision (`between` is set).
        """
        answers = _answers(trace)
        score = next(call.decision.score for call in trace.decisions(Slimmable) if call.name == answers.name)
        wanted = self.targets(answers.online[0], answers.online[-1], y, score.shape[1])
        weight = 1 / wanted.bincount(minlength=score.shape[1]).clamp(min=1).to(score) if self.balanced else None
        return F.cross_entropy(score, wanted, weight=weight)

    def targets(self, narrowest: Tensor, widest: Tensor, y: Tensor, widths: int) -> Tensor:
        """The target width (B,) of every row."""
        easy = narrowest.argmax(1) == y
        solved = widest.argmax(1) == y
        wide = ~easy & solved if self.give_up else ~easy
        return wide.long() * (widths - 1)


def separate(model: nn.Module) -> nn.Module:
    """A copy for deployment, in which every width of every `Slimmable` has weights of its own.

    It answers, decides and costs the same. Slices of shared weights are copied in every call; these are not, and a
    session makes an engine of each. Weights are held several times: with w_u weights in width u, sum(w_u) instead of
    max(w_u), at 4 bytes per float32 weight (about twice the bytes for widths of 1/4, 1/2, 3/4 and 1, whose weights grow
    with the square).
    """
    model = copy.deepcopy(model)
    for layer in layers(model).values():
        if isinstance(layer, Slimmable) and isinstance(layer.net, Slim):
            net = layer.net
            layer.target = None
            layer.net = nn.ModuleList(net.at(u) for u in range(layer.widths)).train(layer.training)
    return model


class _Answers(NamedTuple):
    """One slimmable layer's answers: its own, narrowest first, and its teacher's."""

    name: str
    layer: Slimmable
    online: list[Tensor]
    taught: list[Tensor]


def _answers(trace: Trace) -> _Answers:
    """The answers of the one slimmable layer that gave several."""
    found = [name for name in trace.all(Slimmable) if len(trace.answers.get(name, ())) > 1]
    if len(found) != 1:
        raise StructureError(
            f"expected one Slimmable with answers at two widths or more, got {found}; run the model in train mode, or "
            f"in the dense form (`execute(model, sparse=False)`)"
        )
    layer, name = trace.one(Slimmable, found[0])
    answers = trace.answers[name]
    taught = layer.training and layer.between is not None and layer.target is not None
    own = len(answers) // 2 + 1 if taught else len(answers)  # the teacher answers at all widths but the narrowest
    return _Answers(name, layer, answers[:own], answers[own:])
