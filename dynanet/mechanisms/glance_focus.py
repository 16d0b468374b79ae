"""Glance and focus: a look at the whole image, small; then crops, one after another, until the answer is sure."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.halt import ThresholdHalt
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.confidence import Confidence, MaxProbability
from dynanet.nets.spatial_transformer import Size, crop, resize, sides


class GlanceFocus(ThresholdHalt):
    """Early exit over glimpses (GFNet: Wang et al. 2020, arXiv:2010.05300): step 0 sees the whole image at a low
    resolution, each later step a crop at full resolution, and a policy says where the next one lies.

    Every glimpse is answered with all that was seen so far. In training all steps answer, for `train.MultiExit`; in
    eval mode a row goes on while its confidence is below the step's threshold. A new model takes all glimpses;
    `calibrate.calibrate` finds thresholds for a budget. Images may have any size, one smaller than a crop too.

    How the policy learns is `places`:

    - `LearnedCrops()`, the default: crops are interpolated, so the gradient of the loss reaches their places. One
      training, end to end.
    - `SampledCrops(std)`: places are drawn around the policy's, and `PlaceReward` makes those likelier after which the
      true class was more probable (the paper's second stage; see the card for all three).
    - `RandomCrops()`: places at random: encoders and head learn before there is a policy (the paper's first stage).

    In eval mode all three look where the policy says. No gradient goes from the policy into the encoders.

    Args:
        glance: the resized image (B, C, *glance_size) to features (B, F, h, w).
        focus: a crop (B, C, *crop_size) to features; the same module as `glance` where the two are to share weights.
        policy: maps (features, memory) to a place (B, 2) and the memory for the next step; memory is None at first. See
            `PlacePolicy`.
        head: maps (features, memory) to logits (B, classes) and the memory for the next step, likewise. See
            `RecurrentHead`.
        glance_size: of the first glimpse: a side, or (height, width).
        crop_size: of the others, in pixels of the image.
        glimpses: how many at most, the first included.
        places: how places are taken in training.
        confidence: how sure logits are; `PerExit` for another criterion after every glimpse.

    Attributes:
        thresholds: (glimpses - 1,), in the units of `confidence`. +inf: nobody leaves here; -inf: everybody.

    Raises:
        ConfigError: sizes that are none, or no glimpse.
        StructureError: a confidence that does not speak of every glimpse.
    """

    def __init__(
        self,
        glance: nn.Module,
        focus: nn.Module,
        policy: nn.Module,
        head: nn.Module,
        *,
        glance_size: Size,
        crop_size: Size,
        glimpses: int,
        places: "CropSampler | None" = None,
        confidence: Confidence | None = None,
    ) -> None:
        if not isinstance(glimpses, int) or glimpses < 1:
            raise ConfigError(f"{glimpses!r} glimpses; expected a whole number: 1 for the glance alone, or more")
        super().__init__(glimpses, confidence if confidence is not None else MaxProbability())
        self.glance, self.focus, self.policy, self.head = glance, focus, policy, head
        self.glance_size, self.crop_size = sides(glance_size), sides(crop_size)
        self.places: CropSampler = places if places is not None else LearnedCrops()

    def start(self, x_BCHW: Tensor) -> Any:
        """The image, no place yet and no likelihood of it, and empty memories of policy, head and confidence."""
        return x_BCHW, None, None, None, None, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """A glimpse, the answer after it, and where to look next."""
        image, place, likelihood, looked, seen, memory = state
        if k == 0:
            features = self.glance(resize(image, self.glance_size))
        else:
            features = self.focus(crop(image, place, self.crop_size))
        logits, seen = self.head(features, seen)
        if k + 1 < self.steps:
            memory = self.confidence.at(k).remember(logits, memory)
            wanted, looked = self.policy(features.detach(), looked)
            place, likelihood = self.places(wanted)
        return (image, place, likelihood, looked, seen, memory), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The confidence; where the place of the next crop was drawn (in training), its log-likelihood, for
        `PlaceReward`: every row goes on then, however sure it is.
        """
        likelihood, memory = state[2], state[5]
        return self.confidence.at(k)(answer, memory) if likelihood is None else likelihood


class PlacePolicy(nn.Module):
    """Where to look next, from a feature map and what was looked at before: 1x1 convolution, pool to a grid, linear,
    GRU, linear, sigmoid (Wang et al. 2020, appendix A.1; the grid is ours, so that features may have any size).

    A new one looks at the middle.

    Args:
        features: channels of the feature map.
        width: channels after the convolution.
        hidden: size of the memory.
        grid: side of the grid that the map is averaged down to.
    """

    def __init__(self, features: int, *, width: int = 8, hidden: int = 32, grid: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(features, width, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(grid), nn.Flatten(),
            nn.Linear(width * grid * grid, hidden), nn.ReLU(),
        )  # fmt: skip
        self.cell, self.place = nn.GRUCell(hidden, hidden), nn.Linear(hidden, 2)
        nn.init.zeros_(self.place.bias)

    def forward(self, features_BCHW: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """The place (B, 2), each coordinate from 0 to 1, and the memory (B, hidden)."""
        memory = self.cell(self.reduce(features_BCHW), memory)
        return self.place(memory).sigmoid(), memory


class RecurrentHead(nn.Module):
    """Answers from all feature maps so far: each is averaged and read by a GRU (Wang et al. 2020, section 3.2).

    Args:
        features: channels of the feature maps.
        hidden: size of the memory.
        num_classes: width of the logits.
    """

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.cell, self.answer = nn.GRUCell(features, hidden), nn.Linear(hidden, num_classes)
        nn.init.zeros_(self.answer.bias)

    def forward(self, features_BCHW: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and the memory (B, hidden)."""
        memory = self.cell(features_BCHW.mean((2, 3)), memory)
        return self.answer(memory), memory


class JoinedHead(nn.Module):
    """Answers from all feature maps so far: each is averaged, they are joined, and there is a linear map for every
    number of them (the cascaded classifiers of Wang et al. 2020, for MobileNets and EfficientNets).

    Args:
        features: channels of the feature maps.
        glimpses: how many there will be at most.
        num_classes: width of the logits.
    """

    def __init__(self, features: int, glimpses: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        linears = [nn.Linear(features * n, num_classes) for n in range(1, glimpses + 1)]
        for linear in linears:
            nn.init.zeros_(linear.bias)
        self.answers = nn.ModuleList(linears)

    def forward(self, features_BCHW: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and the averages so far, (B, features * glimpses)."""
        mean = features_BCHW.mean((2, 3))
        memory = mean if memory is None else torch.cat([memory, mean], 1)
        return self.answers[memory.shape[1] // self.features - 1](memory), memory


class CropSampler(nn.Module, ABC):
    """From the place that the policy wants (rows, 2) to the one that is looked at, and the log-likelihood of having
    drawn it (rows, 1), None where nothing is drawn. In eval mode the two places are the same.
    """

    @abstractmethod
    def forward(self, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """The place, and its log-likelihood."""


class LearnedCrops(CropSampler):
    """Where the policy says, in training too: the gradient of the answer moves the crop."""

    def forward(self, wanted: Tensor) -> tuple[Tensor, None]:
        """As it was wanted."""
        return wanted, None


class RandomCrops(CropSampler):
    """Uniformly at random in training: no policy is needed yet."""

    def forward(self, wanted: Tensor) -> tuple[Tensor, None]:
        """From 0 to 1."""
        return (torch.rand_like(wanted) if self.training else wanted), None


class SampledCrops(CropSampler):
    """Around the policy's place in training, by a normal distribution; for `PlaceReward`. Beyond an edge the crop lies
    at the edge.

    Args:
        std: of each coordinate, as a share of the way from edge to edge.

    Raises:
        ConfigError: a std that is not above 0.
    """

    def __init__(self, std: float = 0.1) -> None:
        super().__init__()
        if not 0 < std < math.inf:
            raise ConfigError(f"places drawn with a standard deviation of {std}; give a number above 0")
        self.std = std

    def forward(self, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """A draw that carries no gradient, and the logarithm of its density, up to a constant."""
        if not self.training:
            return wanted, None
        wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))  # halves would round the noise
        drawn = (wanted + self.std * torch.randn_like(wanted)).detach()
        likelihood = -((drawn - wanted) / self.std).square().sum(1, keepdim=True) / 2
        return drawn.clamp(0, 1), likelihood


class PlaceReward(Objective):
    """Trains the policy of a GlanceFocus whose places are `SampledCrops`: `MultiExit() + PlaceReward()`.

    REINFORCE with the paper's reward: by how much a glimpse raised the probability of the true class. A place is
    credited with its own glimpse and, discounted, with those after it; the baseline is the mean of the batch's other
    rows, and what is above or below it is divided by its size in the batch, as the authors do. Only the policy gets a
    gradient. Where nothing is drawn because the model is in eval mode (validation), it is 0.

    Args:
        discount: what the next glimpse's reward counts for a place. 0.7 in the authors' code.
        halt: the name of the GlanceFocus; None where the model has only one.

    Raises:
        ConfigError: a discount outside [0, 1].
    """

    def __init__(self, discount: float = 0.7, *, halt: str | None = None) -> None:
        if not 0 <= discount <= 1:
            raise ConfigError(f"a discount of {discount}; expected what later glimpses count, from 0 to 1")
        self.discount, self.halt = discount, halt

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the glimpses' logits (B, C) and the likelihoods in the trace.

        Raises:
            StructureError: no GlanceFocus or several and none named, places that are not drawn, or rows that were not
                computed.
        """
        layer, name = self._layer(trace)
        if not isinstance(layer.places, SampledCrops):
            kind = type(layer.places).__name__
            raise StructureError(
                f"{name!r} takes its places by {kind}, so there is nothing to reward; give it SampledCrops()"
            )
        calls = [call for call in trace.calls if call.name == name]
        if not layer.training or not calls:
            return answer.new_zeros(())
        answers = trace.answers[name]
        if len(answers) != len(calls) + 1 or any(each.shape[0] != y.shape[0] for each in answers):
            raise StructureError(f"only some rows took all glimpses of {name!r}; this loss needs them: use train mode")
        credit = self._credits(answers, y)
        rows = y.shape[0]
        advantage = (credit - credit.mean(0)) * (rows / (rows - 1)) if rows > 1 else credit
        advantage = advantage / advantage.square().mean().sqrt().clamp(min=1e-5)
        likelihood = torch.cat([call.decision.score for call in calls], 1)
        return -(likelihood * advantage.to(likelihood.dtype)).sum(1).mean()

    def _credits(self, answers: Sequence[Tensor], y: Tensor) -> Tensor:
        """(B, crops): each one's reward, and what it is discounted of those after it."""
        true = torch.stack([logits.detach().softmax(1).gather(1, y[:, None])[:, 0] for logits in answers], 1)
        rewards = list(true.diff(dim=1).unbind(1))
        for k in reversed(range(len(rewards) - 1)):
            rewards[k] = rewards[k] + self.discount * rewards[k + 1]
        return torch.stack(rewards, 1)

    def _layer(self, trace: Trace) -> tuple[GlanceFocus, str]:
        found = {name: layer for layer, name in trace.names.items() if isinstance(layer, GlanceFocus)}
        name = next(iter(found)) if self.halt is None and len(found) == 1 else self.halt
        if name is None or name not in found:
            raise StructureError(
                f"PlaceReward is of one GlanceFocus and {'none is' if name is None else repr(name) + ' was'} named; "
                f"this model has {sorted(found)}"
            )
        return found[name], name

    def __repr__(self) -> str:
        return f"PlaceReward({self.discount:g}, halt={self.halt!r})"
