"""Slimmable widths: one network at several widths that share their weights; a gate picks one width for every row."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, Kept, layers
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.serving import CalledInParts
from dynanet.core.trace import Trace
from dynanet.nets.slim import Slim


class Slimmable(Dynamic):
    """A network, or the later part of one, that runs every row at the width its gate picks (DS-Net, arXiv:2103.13023).

    Unit u is the whole of it at width u. Rows of one width run together, through really smaller convolutions. A gate
    keeps one width per row; where a forced decision keeps none the narrowest runs, where it keeps several the widest
    of them answers.

    In the dense form the answers of all widths that ran are heard by the trace, narrowest first, for the objectives of
    both stages of training.

    Args:
        net: from rows to rows.
        gate: maps what the net takes to a Decision with one unit per width, by the rule `RelaxedTopK(noise=True,
            hard=True)`. With `DoubleHead` as its scorer, the net sees what that attends to.

    Attributes:
        between: None: the gate decides. A number: train the net itself by the sandwich rule (arXiv:1903.05134): every
            pass runs the narrowest width, the widest, and so many at random between them; the widest answers.
        target: the net's moving average, once there is one (`bootstrap`). It answers in the sandwich only.

    Raises:
        StructureError: a gate that scores another number of widths.
    """

    max_units = 1
    between: int | None = None

    def __init__(self, net: Slim, gate: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, Slim):
            raise StructureError(
                f"a slimmable layer was expected, and this is {type(net).__name__}; see dynanet.nets.slim"
            )
        if isinstance(gate, Gate) and gate.units != net.widths:
            raise StructureError(f"the gate scores {gate.units} widths and the net has {net.widths}; make them equal")
        self.net: nn.Module = net
        self.target: nn.Module | None = None
        self.gate, self.widths, self.decay = gate, net.widths, 0.0

    def bootstrap(self, decay: float = 0.997) -> None:
        """Let a moving average of the net teach in the sandwich, for `EnsembleBootstrapping`; saved with the model.

        Args:
            decay: how much of the average stays in every step. Over few steps less: 0.99.

        Raises:
            ConfigError: a decay outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ConfigError(f"a moving average with a decay of {decay}; give a number from 0 to below 1")
        self.target, self.decay = copy.deepcopy(self.net).requires_grad_(False), decay

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
        """All rows at width u, whatever the gate says."""
        return self._run(self.net, u, self._attended(x))

    def _attended(self, x: Tensor) -> Tensor:
        scorer = self.gate.scorer if isinstance(self.gate, Gate) else None
        return scorer.attend(x) if isinstance(scorer, DoubleHead) else x

    @staticmethod
    def _run(net: nn.Module, u: int, x: Tensor) -> Tensor:
        return net[u](x) if isinstance(net, nn.ModuleList) else net(x, u)

    def _placed(self, y: Tensor | None, part: Tensor, kept: Kept) -> Tensor:
        if self.training:  # a sum, so that every width's answer tells its gate what it is worth
            part = part * kept.keep.reshape(-1, *[1] * (part.dim() - 1))
            return part if y is None else y + part
        if kept.index is None:
            return kept.put(part, otherwise=part if y is None else y)
        if kept.index.numel() == kept.keep.numel():
            return part
        y = part.new_zeros(kept.keep.numel(), *part.shape[1:]) if y is None else y
        return y.index_copy_(0, kept.index, part)

    def _sandwich(self, x: Tensor) -> Tensor:
        """Nothing is decided here, and the trace hears of no decision."""
        drawn = 1 + torch.randperm(max(0, self.widths - 2))[: self.between]
        order = sorted({0, *drawn.tolist(), self.widths - 1})
        answer = x
        for u in order:
            answer = self._run(self.net, u, x)
            if self.trace is not None:
                self.trace.log_answer(self, answer)
        if self.target is not None:
            self._teach(x, order[1:])
        return answer

    @torch.no_grad()
    def _teach(self, x: Tensor, order: Sequence[int]) -> None:
        """The average follows, and answers at the widths that teach."""
        assert self.target is not None
        for average, weight in zip(self.target.parameters(), self.net.parameters(), strict=True):
            average.lerp_(weight, 1 - self.decay)
        for u in order:
            answer = self._run(self.target, u, x)
            if self.trace is not None:
                self.trace.log_answer(self, answer)


class DoubleHead(nn.Module, CalledInParts):  # `attend` is called too
    """Both heads of DS-Net's gate on one hidden layer over pooled features (arXiv:2103.13023, section 3.3).

    The slimming head scores widths. The attention head multiplies every channel with 1 + tanh, which is 1 at the start;
    it learns with the net, in the first stage, too. Pooled features differ little from input to input, so they are
    normed first: without, the gate ends at one width for all.

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
        """x, with some channels louder and some softer."""
        return x_BCHW * (1 + self.attention(self.reduce(x_BCHW.mean((2, 3)))).tanh())[..., None, None]


class InPlaceDistillation(Objective):
    """Stage one: the widest learns from the labels, the others from the widest (US-Nets, arXiv:1903.05134).

    A term like those of `train`: `term(answer, y, trace)`. Wants `between` set, and logits as answers.
    """

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Cross-entropy of the widest, plus cross-entropy of every other with the widest's probabilities."""
        *others, widest = _answers(trace).online
        taught = widest.detach().softmax(1)
        losses = [F.cross_entropy(widest, y), *(F.cross_entropy(logits, taught) for logits in others)]
        return torch.stack(losses).sum()

    def __repr__(self) -> str:
        return "InPlaceDistillation()"


class EnsembleBootstrapping(Objective):
    """Stage one as DS-Net trains it: a moving average of the net teaches (in-place ensemble bootstrapping,
    arXiv:2103.13023, section 3.2).

    The widest learns from the labels, those between from the average's widest, and the narrowest from the mean of what
    the average says at all wider widths that were drawn. Wants `Slimmable.bootstrap` and `between` set. In eval mode,
    where the average does not answer, it is the cross-entropy of the widest.
    """

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """The sum over widths.

        Raises:
            StructureError: no teacher in a pass in train mode.
        """
        heard = _answers(trace)
        narrowest, *between, widest = heard.online
        loss = F.cross_entropy(widest, y)
        if not heard.layer.training:
            return loss
        if not heard.taught:
            raise StructureError("no moving average answered; call the layer's `bootstrap`, and set its `between`")
        taught = [logits.softmax(1) for logits in heard.taught]
        losses = [F.cross_entropy(logits, taught[-1]) for logits in between]
        return torch.stack([loss, *losses, F.cross_entropy(narrowest, torch.stack(taught).mean(0))]).sum()

    def __repr__(self) -> str:
        return "EnsembleBootstrapping()"


class SandwichGate(Objective):
    """Stage two: the gate learns which rows need width (sandwich gate sparsification, DS-Net, arXiv:2103.13023).

    A row that the narrowest width gets right belongs there; one that only the widest gets right belongs to the widest.
    What even the widest gets wrong goes to the narrowest, which saves its compute, or to the widest, as in the authors'
    code. They add the cross-entropy of the answer, and half the square of the mean cost in billions of MACs.

    Args:
        give_up: hopeless rows go to the narrowest.
        balanced: both kinds of rows weigh the same in a batch, however many there are of each. Where rows that need
            width are rare the gate would otherwise learn that hardly any does; let a budget say how many may have it.
    """

    def __init__(self, *, give_up: bool = True, balanced: bool = False) -> None:
        self.give_up, self.balanced = give_up, balanced

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Cross-entropy of the gate's scores with the width that every row belongs to."""
        heard = _answers(trace)
        score = next(call.decision.score for call in trace.calls if call.name == heard.name)
        wanted = self.targets(heard.online[0], heard.online[-1], y, score.shape[1])
        weight = 1 / wanted.bincount(minlength=score.shape[1]).clamp(min=1).to(score) if self.balanced else None
        return F.cross_entropy(score, wanted, weight=weight)

    def targets(self, narrowest: Tensor, widest: Tensor, y: Tensor, widths: int) -> Tensor:
        """The width (B,) of every row."""
        easy, solved = narrowest.argmax(1) == y, widest.argmax(1) == y
        wide = ~easy & solved if self.give_up else ~easy
        return wide.long() * (widths - 1)

    def __repr__(self) -> str:
        return f"SandwichGate(give_up={self.give_up}, balanced={self.balanced})"


def separate(model: nn.Module) -> nn.Module:
    """A copy to deploy: every width of every `Slimmable` with weights of its own.

    It answers, decides and costs the same, and is larger. Slices of shared weights are copied in every call; these are
    not, and a session makes an engine of each.
    """
    model = copy.deepcopy(model)
    for layer in layers(model).values():
        if isinstance(layer, Slimmable) and isinstance(layer.net, Slim):
            net, training, layer.target = layer.net, layer.training, None
            layer.net = nn.ModuleList(net.at(u) for u in range(layer.widths)).train(training)
    return model


class _Heard(NamedTuple):
    """One slimmable layer's answers: its own, narrowest first, and its teacher's."""

    name: str
    layer: Slimmable
    online: list[Tensor]
    taught: list[Tensor]


def _answers(trace: Trace) -> _Heard:
    """Of the one slimmable layer."""
    found = [(name, layer) for layer, name in trace.names.items() if isinstance(layer, Slimmable)]
    found = [(name, layer) for name, layer in found if len(trace.answers.get(name, ())) > 1]
    if len(found) != 1:
        raise StructureError(
            f"the answers of one Slimmable at two widths or more were expected and {[name for name, _ in found]} "
            f"answered; use it in train mode, or the dense form, inside `record`"
        )
    (name, layer), answers = found[0], trace.answers[found[0][0]]
    taught = layer.training and layer.between is not None and layer.target is not None
    own = len(answers) // 2 + 1 if taught else len(answers)  # all but the narrowest teach
    return _Heard(name, layer, answers[:own], answers[own:])
