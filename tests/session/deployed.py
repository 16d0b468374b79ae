"""Small models of every kind that a session has to run, each with inputs that its thresholds split."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynanet import zoo
from dynanet.core.dynamic import execute, record
from dynanet.core.gate import Gate
from dynanet.core.halt import Halt
from dynanet.core.rows import over_tensors
from dynanet.gates.rules import Threshold
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.scene_exit import SceneExit
from dynanet.mechanisms.update_skip import UpdateSkip

ROWS = 40


@dataclass(frozen=True)
class Deployed:
    """A model in eval mode, and ROWS inputs whose scores all lie off the thresholds."""

    model: nn.Module
    x: Any


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def skip(channels: int = 4) -> LayerSkip:
    return LayerSkip(Residual(channels), Gate(PooledScorer(channels, hidden=0, bias=0.0), Threshold()))


def head(channels: int = 4, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def msdnet() -> nn.Module:
    factors = {"growth_factors": (1, 2), "bottleneck_factors": (1, 2)}
    return zoo.msdnet(num_classes=3, blocks=3, channels=4, growth=2, **factors)


def staged_resnet() -> nn.Module:
    return zoo.staged_resnet(num_classes=3, widths=(4, 8), depths=(1, 1), context=4)


def layer_skip() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), skip(), head())


def skips_in_exits() -> nn.Module:
    stages = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), skip(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())]
    return EarlyExit(stages, [head() for _ in stages])


def exits_behind_a_stem() -> nn.Module:
    stages = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), EarlyExit(stages, [head(), head()]))


def scene() -> nn.Module:
    return zoo.scene_form(zoo.spectral_exit(num_classes=3, in_channels=3, width=4, hidden=4, blocks=BLOCKS), patch=3)


BLOCKS = (((6, 2),), ((6, 1),))


class Reader(nn.Module):
    """A recurrent net: the last state, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = UpdateSkip(nn.GRUCell(3, 5), 3, 5), nn.Linear(5, 3)
        nn.init.constant_(self.read.delta.bias, -1.0)  # so that it does skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(x))


class Static(nn.Module):
    """Nothing is decided; a part is called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x)) + self.head(self.stem(x[:, :, ::2, ::2]))


class Glimpses(Halt):
    """Reads a dict of two tensors, answers a dict of two more; its state holds a number beside the tensors."""

    steps = 3

    def __init__(self) -> None:
        super().__init__()
        self.look, self.say = nn.ModuleList(nn.Linear(4, 6) for _ in range(3)), nn.Linear(6, 2)
        self.register_buffer("thresholds", torch.zeros(2))

    def start(self, x: dict[str, Tensor]) -> Any:
        glimpses = x["near"], x["far"], x["at"]
        return {"seen": x["at"].new_zeros(x["at"].shape[0], 6), "glimpses": glimpses, "scale": 0.5}

    def step(self, k: int, state: Any) -> Any:
        seen = torch.tanh(state["seen"] + state["scale"] * self.look[k](state["glimpses"][k]))
        said = self.say(seen)
        return {**state, "seen": seen}, {"class": said, "box": (seen[:, :3], said.argmax(1))}

    def score(self, k: int, state: Any, answer: Any) -> Tensor:
        return answer["class"].amax(1, keepdim=True)

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        return (score < self.thresholds[k]).to(score.dtype)


class Remembering(Halt):
    """Hands tensors on as they came, from place to place, and answers with one of them, beside something else."""

    steps = 4

    def __init__(self) -> None:
        super().__init__()
        self.move = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.register_buffer("thresholds", torch.zeros(3))

    def start(self, x: Tensor) -> Any:
        return x, x + 1, None

    def step(self, k: int, state: Any) -> Any:
        new, old, nothing = state
        return (torch.tanh(self.move[k](new + old)), new, nothing), (None, old, new)

    def score(self, k: int, state: Any, answer: Any) -> Tensor:
        return state[0].amax(1, keepdim=True)

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        return (score < self.thresholds[k]).to(score.dtype)


class Twice(nn.Module):
    """One Halt, called twice in a pass: its second call must leave the first one's answer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.exits = EarlyExit([nn.Linear(3, 5), nn.Linear(5, 5)], [nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.exits(x)
        return first - 2 * self.exits(x.flip(1))


def images(side: int = 12) -> Tensor:
    """Some plain, some busy: what a gate or an exit can tell apart."""
    return torch.randn(ROWS, 3, side, side) * torch.linspace(0.2, 2, ROWS)[:, None, None, None]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "msdnet": (msdnet, images),
    "staged resnet": (staged_resnet, images),
    "layer skip": (layer_skip, images),
    "skips in exits": (skips_in_exits, images),
    "exits behind a stem": (exits_behind_a_stem, images),
    "scene": (scene, lambda: images(6)),
    "update skip": (Reader, lambda: torch.randn(ROWS, 6, 3)),
    "static": (Static, images),
    "pytrees": (Glimpses, lambda: {name: torch.randn(ROWS, 4) for name in ("near", "far", "at")}),
    "what came, handed on": (Remembering, lambda: torch.randn(ROWS, 4)),
    "one halt, called twice": (Twice, lambda: torch.randn(ROWS, 3)),
}


def make(name: str) -> Deployed:
    """A model as it might come out of training and calibration."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, x = build(), inputs()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    split(model.eval(), x)
    return Deployed(model, x)


@torch.no_grad()
def split(model: nn.Module, x: Any) -> None:
    """Set every threshold, in the order of decisions, where no score lies close and about half lie on either side."""
    execute(model, sparse=False)
    with record(model) as trace:
        model(x)
    for i, call in enumerate(trace.calls):
        layer = next(layer for layer, name in trace.names.items() if name == call.name)
        number, before = itertools.count(), sum(earlier.name == call.name for earlier in trace.calls[:i])
        layer.force = lambda d, n=number, last=before: torch.ones_like(d.keep) if next(n) == last else d.keep
        with record(model) as trace:
            model(x)
        layer.force = None
        arrived = trace.calls[i].keep.flatten() == 1
        middle = between(trace.calls[i].decision.score.flatten()[arrived])
        if isinstance(layer, LayerSkip):
            layer.gate.scorer.map.bias -= middle
        elif isinstance(layer, SceneExit):
            layer.threshold.fill_(middle)
        elif isinstance(layer, Halt):
            layer.thresholds[call.first] = middle


def between(scores: Tensor) -> float:
    """The middle of the widest gap between the inner scores."""
    inner = scores.sort().values
    inner = inner[len(inner) // 3 : -len(inner) // 3]
    widest = inner.diff().argmax()
    return float(inner[widest : widest + 2].mean())


def rows(x: Any, index: Any) -> Any:
    """Some rows of a pytree."""
    return over_tensors(lambda t: t[index], x)
