"""Slimmable widths: one network at several widths that share their weights; a gate picks one width for every row."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, Kept, layers
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.rules import Rule


class Slim(nn.Module, ABC):
    """A module that runs at several widths: `module(x, u)` is width u, counted from the narrowest.

    Attributes:
        widths: how many there are.
    """

    widths: int

    @abstractmethod
    def forward(self, x: Tensor, u: int) -> Tensor:
        """The answer at width u."""

    @abstractmethod
    def at(self, u: int) -> nn.Module:
        """Width u as a plain module with weights of its own: what is deployed."""


class SlimConv2d(Slim):
    """A convolution without bias whose width u is the first rows and columns of its weights (arXiv:1812.08928).

    Args:
        inputs: channels that come in at every width.
        outputs: channels that go out at every width. A layer that stays as it is repeats a number.
        kernel: side of the kernel, odd; zeros pad it.
        stride: of the convolution.
        depthwise: every channel by itself.

    Raises:
        ConfigError: widths that are no whole numbers from 1 up, that fall, or that are not as many in as out.
    """

    def __init__(
        self, inputs: Sequence[int], outputs: Sequence[int], kernel: int, stride: int = 1, *, depthwise: bool = False
    ):
        super().__init__()
        self.inputs, self.outputs = _channels("inputs", inputs), _channels("outputs", outputs)
        if len(inputs) != len(outputs) or (depthwise and self.inputs != self.outputs):
            raise ConfigError(
                f"a slimmable convolution takes {self.inputs} and answers {self.outputs} channels; give one number in "
                f"and one out for every width{', the same ones where it is depthwise' if depthwise else ''}"
            )
        self.kernel, self.stride, self.depthwise, self.widths = kernel, stride, depthwise, len(self.outputs)
        self.weight = nn.Parameter(torch.empty(outputs[-1], 1 if depthwise else inputs[-1], kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out" if not depthwise else "fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u], H, W) to (B, outputs[u], H', W')."""
        return F.conv2d(x, self._slice(u), None, self.stride, self.kernel // 2, 1, self._groups(u))

    def at(self, u: int) -> nn.Conv2d:
        """A plain convolution."""
        conv = nn.Conv2d(
            *(self.inputs[u], self.outputs[u], self.kernel, self.stride, self.kernel // 2),
            groups=self._groups(u),
            bias=False,
        ).to(self.weight)
        conv.weight = nn.Parameter(self._slice(u).detach().clone(memory_format=torch.contiguous_format))
        return conv

    def _slice(self, u: int) -> Tensor:
        return self.weight[: self.outputs[u], : 1 if self.depthwise else self.inputs[u]]

    def _groups(self, u: int) -> int:
        return self.outputs[u] if self.depthwise else 1


class SlimBatchNorm2d(Slim):
    """A batch norm with statistics of its own for every width (switchable batch norm, arXiv:1812.08928, section 3.2).

    One norm for all widths would mix statistics that differ. With `shared` only they are apart and the widths share
    scale and shift, as US-Nets do (arXiv:1903.05134); `train.recalibrate_batchnorm` refreshes either.

    Args:
        channels: at every width.
        shared: one scale and shift for all widths.
    """

    def __init__(self, channels: Sequence[int], *, shared: bool = False):
        super().__init__()
        self.channels, self.widths, self.shared = _channels("channels", channels), len(channels), shared
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=not shared) for c in channels)
        self.weight = nn.Parameter(torch.ones(channels[-1])) if shared else None
        self.bias = nn.Parameter(torch.zeros(channels[-1])) if shared else None

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, channels[u], H, W) to the same shape."""
        x = self.norms[u](x)
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight[: self.channels[u], None, None] + self.bias[: self.channels[u], None, None]

    def at(self, u: int) -> nn.BatchNorm2d:
        """A plain batch norm."""
        norm = copy.deepcopy(cast(nn.BatchNorm2d, self.norms[u]))
        if self.weight is not None and self.bias is not None:
            norm.affine = True
            norm.weight = nn.Parameter(self.weight[: self.channels[u]].detach().clone())
            norm.bias = nn.Parameter(self.bias[: self.channels[u]].detach().clone())
        return norm


class SlimLinear(Slim):
    """A linear map from as many features as the width has; the answer is as long at every width.

    Args:
        inputs: features that come in at every width.
        outputs: features that go out.
    """

    def __init__(self, inputs: Sequence[int], outputs: int):
        super().__init__()
        self.inputs, self.widths = _channels("inputs", inputs), len(inputs)
        linear = nn.Linear(inputs[-1], outputs)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u]) to (B, outputs)."""
        return F.linear(x, self.weight[:, : self.inputs[u]], self.bias)

    def at(self, u: int) -> nn.Linear:
        """A plain linear map."""
        linear = nn.Linear(self.inputs[u], self.weight.shape[0]).to(self.weight)
        linear.weight = nn.Parameter(self.weight[:, : self.inputs[u]].detach().clone())
        linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


class SlimSequential(Slim):
    """Layers one after another, slimmable ones and such as take any number of channels (ReLU, pooling).

    Raises:
        StructureError: no slimmable layer, or layers with different numbers of widths.
    """

    def __init__(self, *parts: nn.Module):
        super().__init__()
        found = {part.widths for part in parts if isinstance(part, Slim)}
        if len(found) != 1:
            raise StructureError(f"slimmable layers of one number of widths were expected; got {sorted(found)}")
        self.parts, self.widths = nn.ModuleList(parts), found.pop()

    def forward(self, x: Tensor, u: int) -> Tensor:
        """Every layer at width u."""
        for part in self.parts:
            x = part(x, u) if isinstance(part, Slim) else part(x)
        return x

    def at(self, u: int) -> nn.Sequential:
        """The layers as they are at width u."""
        return nn.Sequential(*(part.at(u) if isinstance(part, Slim) else copy.deepcopy(part) for part in self.parts))


class Slimmable(Dynamic):
    """A network, or the later part of one, that runs every row at the width its gate picks (DS-Net, arXiv:2103.13023).

    Unit u is the whole of it at width u. Rows of one width run together, through really smaller convolutions. A gate
    keeps one width per row; where a forced decision keeps none the narrowest runs, where it keeps several the widest
    of them answers.

    In training the answers of all widths that ran are heard by the trace, narrowest first, for `InPlaceDistillation`
    and `SandwichGate`.

    Args:
        net: from rows to rows.
        gate: maps what the net takes to a Decision with one unit per width; see `OneWidth`.

    Attributes:
        between: None: the gate decides. A number: train the net itself by the sandwich rule (arXiv:1903.05134): every
            pass runs the narrowest width, the widest, and so many at random between them; the widest answers.

    Raises:
        StructureError: a gate that scores another number of widths.
    """

    between: int | None = None

    def __init__(self, net: Slim, gate: nn.Module):
        super().__init__()
        if isinstance(gate, Gate) and gate.units != net.widths:
            raise StructureError(f"the gate scores {gate.units} widths and the net has {net.widths}; make them equal")
        self.net: nn.Module = net
        self.gate, self.widths = gate, net.widths

    def forward(self, x: Tensor) -> Tensor:
        """Every row's answer at its width."""
        keep, score = self.obey(self.gate(x))
        if self.training and self.between is not None:
            return self._sandwich(x, score)
        nothing = (keep.amax(-1, keepdim=True) <= 0).to(keep)
        keep = keep + F.pad(nothing, (0, self.widths - 1))
        self.tell(Decision(keep, score))
        y: Tensor | None = None
        for u in range(self.widths):
            with self.only(u, keep[:, u]) as kept:
                if kept.empty and (y is not None or u + 1 < self.widths):
                    continue  # for a batch without rows the last width gives the answer its shape
                part = kept.call(partial(self.at, u), x)
            if self.training and self.trace is not None:
                self.trace.hear_answer(self, part)
            y = self._placed(y, part, kept)
        assert y is not None
        return y

    def at(self, u: int, x: Tensor) -> Tensor:
        """All rows at width u, whatever the gate says."""
        return self.net[u](x) if isinstance(self.net, nn.ModuleList) else self.net(x, u)

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

    def _sandwich(self, x: Tensor, score: Tensor) -> Tensor:
        drawn = 1 + torch.randperm(max(0, self.widths - 2))[: self.between]
        order = sorted({0, *drawn.tolist(), self.widths - 1})
        keep = torch.zeros_like(score)
        keep[:, -1] = 1
        self.tell(Decision(keep, score))
        answer = x
        for u in order:
            with self.only(u, keep[:, u]) as kept:
                answer = kept.call(partial(self.at, u), x)
            if self.trace is not None:
                self.trace.hear_answer(self, answer)
        return answer


class OneWidth(Rule):
    """Keep the width with the highest score; in training a Gumbel-softmax draw, hard forward and soft backward.

    Args:
        temperature: of the relaxation. A schedule may change it.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, score: Tensor) -> Tensor:
        """(rows, widths), 1 for one width of every row."""
        if not self.training:
            return torch.zeros_like(score).scatter(-1, score.argmax(-1, keepdim=True), 1.0)
        noise = -(-torch.rand_like(score).clamp(1e-6, 1 - 1e-6).log()).log()
        soft = ((score + noise) / self.temperature).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())


class InPlaceDistillation(Objective):
    """Stage one: the widest learns from the labels, the others from the widest (US-Nets, arXiv:1903.05134).

    A term like those of `train`: `term(answer, y, trace)`. Wants `between` set, and logits as answers.
    """

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Cross-entropy of the widest, plus cross-entropy of every other with the widest's probabilities."""
        *others, widest = _answers(trace)[1]
        taught = widest.detach().softmax(1)
        losses = [F.cross_entropy(widest, y), *(F.cross_entropy(logits, taught) for logits in others)]
        return torch.stack(losses).sum()

    def __repr__(self) -> str:
        return "InPlaceDistillation()"


class SandwichGate(Objective):
    """Stage two: the gate learns which rows need width (sandwich gate sparsification, DS-Net, arXiv:2103.13023).

    A row that the narrowest width gets right belongs there; one that only the widest gets right belongs to the widest.
    What even the widest gets wrong goes to the narrowest, which saves its compute, or to the widest.

    Args:
        give_up: hopeless rows go to the narrowest.
    """

    def __init__(self, *, give_up: bool = True):
        self.give_up = give_up

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Cross-entropy of the gate's scores with the width that every row belongs to."""
        name, answers = _answers(trace)
        score = next(call.decision.score for call in trace.calls if call.name == name)
        return F.cross_entropy(score, self.targets(answers[0], answers[-1], y, score.shape[1]))

    def targets(self, narrowest: Tensor, widest: Tensor, y: Tensor, widths: int) -> Tensor:
        """The width (B,) of every row."""
        easy, solved = narrowest.argmax(1) == y, widest.argmax(1) == y
        wide = ~easy & solved if self.give_up else ~easy
        return wide.long() * (widths - 1)

    def __repr__(self) -> str:
        return f"SandwichGate(give_up={self.give_up})"


def separate(model: nn.Module) -> nn.Module:
    """A copy to deploy: every width of every `Slimmable` with weights of its own.

    It answers, decides and costs the same, and is larger. Slices of shared weights are copied in every call; these are
    not, and a session makes an engine of each.
    """
    model = copy.deepcopy(model)
    for layer in layers(model).values():
        if isinstance(layer, Slimmable) and isinstance(layer.net, Slim):
            net, training = layer.net, layer.training
            layer.net = nn.ModuleList(net.at(u) for u in range(layer.widths)).train(training)
    return model


def scaled(channels: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Channels at every ratio of the full width, rounded down to whole ones as MobileNet does.

    >>> scaled(64, (0.25, 0.5, 1.0))
    (16, 32, 64)

    Raises:
        ConfigError: ratios that are not ascending or not in (0, 1].
    """
    rising = all(a < b for a, b in pairwise(ratios))
    if not ratios or not rising or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise ConfigError(f"widths are {tuple(ratios)}; expected ascending ratios above 0 and at most 1")
    return tuple(max(1, int(channels * ratio)) for ratio in ratios)


def _channels(name: str, channels: Sequence[int]) -> tuple[int, ...]:
    whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 1 for c in channels)
    if not channels or not whole or any(a > b for a, b in pairwise(channels)):
        raise ConfigError(f"{name} of the widths are {tuple(channels)}; expected ascending whole numbers of at least 1")
    return tuple(channels)


def _answers(trace: Trace) -> tuple[str, list[Tensor]]:
    """The one slimmable layer's name and answers."""
    names = [name for layer, name in trace.names.items() if isinstance(layer, Slimmable) and name in trace.answers]
    if len(names) != 1 or len(trace.answers[names[0]]) < 2:
        raise StructureError(
            f"the answers of one Slimmable at two widths or more were expected and {names or 'none'} answered; use it "
            f"in train mode, inside `record`"
        )
    return names[0], trace.answers[names[0]]
