"""Glance and focus: the whole image at low resolution, then crops, until the answer has enough confidence."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.errors import ConfigError, StructureError, check_sizes
from dynanet.core.halt import ThresholdHalt
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.confidence import Confidence, MaxProbability
from dynanet.nets.spatial_transformer import Size, crop, resize, sides


class GlanceFocus(ThresholdHalt):
    """Early exit over glimpses (GFNet: Wang et al. 2020, arXiv:2010.05300).

    Step 0 sees the whole image at a low resolution, each later step a crop at full resolution, placed by a policy.

    Every step answers from all glimpses so far. Images may have any size, also smaller than a crop. A new model takes
    all glimpses; `calibrate.calibrate` finds thresholds for a budget.

    `places` sets how the policy is trained:

    - `LearnedCrops()`, the default: crops are interpolated, so that the gradient of the loss reaches their places, and
      all parts are trained end to end.
    - `SampledCrops(std)`: places are drawn around the policy's, and `PlaceReward` makes those more probable after which
      the true class was more probable (the paper's second stage; see the card for all three).
    - `RandomCrops()`: random places, to train encoders and head before there is a policy (the paper's first stage).

    In eval mode all three crop where the policy says. No gradient flows from the policy into the encoders.

    Args:
        glance: maps the resized image (B, C, *glance_size) to features (B, F, h, w).
        focus: maps a crop (B, C, *crop_size) to features; the same module as `glance` to share weights.
        policy: maps (features, memory) to a place (B, 2) and the memory for the next step; memory is None at first. See
            `PlacePolicy`.
        head: maps (features, memory) to logits (B, classes) and the memory for the next step, likewise. See
            `RecurrentHead`.
        glance_size: of the first glimpse: a side, or (height, width).
        crop_size: of the others, in pixels of the image.
        glimpses: maximum number of glimpses, the first included.
        places: how places are chosen in training.
        confidence: scores logits; `PerExit` for a criterion per glimpse. None for `MaxProbability`.

    Raises:
        ConfigError: sizes or a number of glimpses below 1.
        StructureError: a confidence that does not score every glimpse but the last.
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
        check_sizes(glimpses=glimpses)
        super().__init__(glimpses, confidence if confidence is not None else MaxProbability())
        self.glance, self.focus = glance, focus
        self.policy, self.head = policy, head
        self.glance_size, self.crop_size = sides(glance_size), sides(crop_size)
        self.places: CropSampler = places if places is not None else LearnedCrops()

    def start(self, x_BCHW: Tensor) -> Any:
        """The image, no place and no likelihood of it, and no memories of policy, head and confidence."""
        return x_BCHW, None, None, None, None, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """Take a glimpse, answer, and place the next crop."""
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
        """The confidence (B, 1); in training with drawn places, the log-likelihood of the next one, for `PlaceReward`.

        In training every row goes on, whatever its score.
        """
        likelihood, memory = state[2], state[5]
        return self.confidence.at(k)(answer, memory) if likelihood is None else likelihood


class PlacePolicy(nn.Module):
    """The place of the next crop, from a feature map and a memory of those before (Wang et al. 2020, appendix A.1).

    1x1 convolution, pool to a grid (added here, so that features may have any size), linear, GRU, linear, sigmoid. A
    new one crops the middle.

    Args:
        features: channels of the feature map.
        width: channels after the convolution.
        hidden: size of the memory.
        grid: side of the grid that the map is averaged to.
    """

    def __init__(self, features: int, *, width: int = 8, hidden: int = 32, grid: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(features, width, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(grid), nn.Flatten(),
            nn.Linear(width * grid * grid, hidden), nn.ReLU(),
        )  # fmt: skip
        self.cell = nn.GRUCell(hidden, hidden)
        self.place = nn.Linear(hidden, 2)
        nn.init.zeros_(self.place.bias)

    def forward(self, features_BCHW: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """The place (B, 2), each coordinate from 0 to 1, and the memory (B, hidden)."""
        memory = self.cell(self.reduce(features_BCHW), memory)
        return self.place(memory).sigmoid(), memory


class RecurrentHead(nn.Module):
    """Answers from all feature maps so far, each averaged and read by a GRU (Wang et al. 2020, section 3.2).

    Args:
        features: channels of the feature maps.
        hidden: size of the memory.
        num_classes: width of the logits.
    """

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(features, hidden)
        self.answer = nn.Linear(hidden, num_classes)
        nn.init.zeros_(self.answer.bias)

    def forward(self, features_BCHW: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and the memory (B, hidden)."""
        memory = self.cell(features_BCHW.mean((2, 3)), memory)
        return self.answer(memory), memory


class JoinedHead(nn.Module):
    """Answers from all feature maps so far, each averaged and joined, by a linear map per number of glimpses.

    The cascaded classifiers of Wang et al. 2020, for MobileNets and EfficientNets.

    Args:
        features: channels of the feature maps.
        glimpses: maximum number of glimpses.
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
    """Maps the place of the policy (rows, 2) to the place of the crop. In eval mode the two are the same."""

    @abstractmethod
    def forward(self, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """The place of the crop, and the log-likelihood of its draw (rows, 1); None where nothing is drawn."""


class LearnedCrops(CropSampler):
    """Crops where the policy says, in training too: the gradient of the answer moves the crop."""

    def forward(self, wanted: Tensor) -> tuple[Tensor, None]:
        """The policy's place, unchanged."""
        return wanted, None


class RandomCrops(CropSampler):
    """Crops uniformly at random in training, before there is a policy."""

    def forward(self, wanted: Tensor) -> tuple[Tensor, None]:
        """A random place in training."""
        return (torch.rand_like(wanted) if self.training else wanted), None


class SampledCrops(CropSampler):
    """Crops around the policy's place in training, drawn from a normal distribution, for `PlaceReward`.

    Beyond an edge the crop lies at the edge.

    Args:
        std: standard deviation of each coordinate, as a share of the way from edge to edge.

    Raises:
        ConfigError: a std that is not above 0.
    """

    def __init__(self, std: float = 0.1) -> None:
        super().__init__()
        if not 0 < std < math.inf:
            raise ConfigError(f"std must be above 0 and finite, got a standard deviation of {std}")
        self.std = std

    def forward(self, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """A drawn place, without gradient, and the logarithm of its density, up to a constant."""
        if not self.training:
            return wanted, None
        wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))  # half precision would round the noise
        drawn = (wanted + self.std * torch.randn_like(wanted)).detach()
        likelihood = -((drawn - wanted) / self.std).square().sum(1, keepdim=True) / 2
        return drawn.clamp(0, 1), likelihood


@dataclass(frozen=True)
class PlaceReward(Objective):
    """Trains the policy of a GlanceFocus whose places are `SampledCrops`: `MultiExit() + PlaceReward()`.

    REINFORCE with the paper's reward: the increase of the probability of the true class by a glimpse. A place is
    credited with its own glimpse and, discounted, with those after it. The baseline is the mean over the other rows of
    the batch, and advantages are divided by their root mean square in the batch, as in the authors' code. Only the
    policy gets a gradient. In eval mode (validation), where nothing is drawn, the loss is 0.

    Args:
        discount: factor of the reward of the next glimpse. 0.7 in the authors' code.
        halt: name of the GlanceFocus; None where the model has only one.

    Raises:
        ConfigError: a discount outside [0, 1].
    """

    discount: float = 0.7
    _: KW_ONLY
    halt: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"discount must be from 0 to 1, got a discount of {self.discount}")

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """The loss of the glimpses' logits (B, C) and the likelihoods in the trace, with labels y (B,).

        Raises:
            StructureError: no GlanceFocus, several and none named, places that are not drawn, or rows that were not
                computed.
        """
        layer, name = trace.one(GlanceFocus, self.halt)
        if not isinstance(layer.places, SampledCrops):
            kind = type(layer.places).__name__
            raise StructureError(f"the places of {name!r} are not drawn but set by {kind}; give it SampledCrops()")
        if not layer.training:
            return answer.new_zeros(())
        calls, answers = trace.full_pass(name, y.shape[0])
        if not calls:
            return answer.new_zeros(())
        credit = self._credits(answers, y)
        rows = y.shape[0]
        advantage = (credit - credit.mean(0)) * (rows / (rows - 1)) if rows > 1 else credit
        advantage = advantage / advantage.square().mean().sqrt().clamp(min=1e-5)
        likelihood = torch.cat([call.decision.score for call in calls], 1)
        return -(likelihood * advantage.to(likelihood.dtype)).sum(1).mean()

    def _credits(self, answers: Sequence[Tensor], y: Tensor) -> Tensor:
        """The reward of each crop plus the discounted rewards of those after it, (B, crops)."""
        true = torch.stack([logits.detach().softmax(1).gather(1, y[:, None])[:, 0] for logits in answers], 1)
        rewards = list(true.diff(dim=1).unbind(1))
        for k in reversed(range(len(rewards) - 1)):
            rewards[k] = rewards[k] + self.discount * rewards[k + 1]
        return torch.stack(rewards, 1)
