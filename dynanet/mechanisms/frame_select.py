"""Frame select: a light policy picks the size at which each frame of a video is classified, or skips frames."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, layers
from dynanet.core.errors import ConfigError, StructureError, check_sizes
from dynanet.core.gate import Gate, Rule
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_videos
from dynanet.gates.rules import RelaxedTopK
from dynanet.nets.spatial_transformer import Resize, Size, sides
from dynanet.ops.recurrent import zero_state


class FrameSelect(Dynamic):
    """AR-Net (Meng et al. 2020, arXiv:2007.15796, section 3).

    Each frame gets a size, with a network per size, or is skipped; the answers of the frames are averaged.

    Rows are frames. Units are the sizes, then the skips, which compute nothing; one unit is kept. The policy is a small
    network on frames at the first size, followed by an LSTM. A skip of n leaves out its frame and the next n - 1, which
    the policy does not see either; in the trace they have the decision that left them out. Frames of one size run
    together, over all videos of the batch.

    A video whose frames are all skipped answers zeros, equal for all classes. Padding is neither seen nor classified.
    Where a forced decision keeps several sizes, all of them answer and nothing is skipped; where it keeps nothing, that
    frame alone is left out.

    In training every network sees every frame, and keep weights the answers. A soft rule leaves out no frame.

    Args:
        look: network of the policy, maps frames of the first size, (rows, C, h, w), to (rows, features). It must not
            hold dynamic layers.
        nets: a network per size, maps frames of that size to logits (rows, num_classes).
        sizes: sides in pixels, or (height, width), smallest first.
        features: width of the features of `look`.
        hidden: size of the policy's memory.
        num_classes: width of the logits.
        skips: number of frames that each skip leaves out; empty to classify every frame.
        light: maps the policy's memory (rows, hidden) to logits. `nets` then begins at the second size, as the policy
            has seen the frame at the first, as in the paper.
        rule: how scores decide; None for `RelaxedTopK(noise=True, hard=True)`, whose `temperature` a schedule may
            lower.

    Raises:
        ConfigError: sizes or skips that do not ascend, or numbers below 1.
        StructureError: not one network per size, a `look` that holds dynamic layers, or a rule that keeps several.
    """

    max_units = 1

    def __init__(
        self,
        look: nn.Module,
        nets: Sequence[nn.Module],
        sizes: Sequence[Size],
        *,
        features: int,
        hidden: int,
        num_classes: int,
        skips: Sequence[int] = (1, 2, 4),
        light: nn.Module | None = None,
        rule: Rule | None = None,
    ) -> None:
        super().__init__()
        both = [sides(size) for size in sizes]
        pixels = [h * w for h, w in both]
        whole = all(isinstance(n, int) and n >= 1 for n in skips)
        if not sizes or pixels != sorted(set(pixels)) or list(skips) != sorted(set(skips)) or not whole:
            raise ConfigError(
                f"sizes are {tuple(sizes)} and skips {tuple(skips)}; expected at least one size, smallest first, and "
                f"ascending whole numbers of frames, each at least 1"
            )
        check_sizes(features=features, hidden=hidden, num_classes=num_classes)
        if len(nets) + (light is not None) != len(sizes):
            raise StructureError(
                f"{len(sizes)} sizes and {len(nets)} networks{' beside a light head' * (light is not None)}; give one "
                f"network per size{', but none for the first' * (light is not None)}"
            )
        rule = rule if rule is not None else RelaxedTopK(noise=True, hard=True)
        if isinstance(rule, RelaxedTopK) and rule.k != 1:
            raise StructureError(f"the rule keeps {rule.k} of sizes and skips per frame; give RelaxedTopK(k=1)")
        self.policy = FramePolicy(nn.Sequential(Resize(both[0]), look), features, hidden, len(sizes) + len(skips), rule)
        resized = zip(both[len(sizes) - len(nets) :], nets, strict=True)
        self.nets = nn.ModuleList(nn.Sequential(Resize(size), net) for size, net in resized)
        self.light, self.num_classes = light, num_classes
        self.sizes = len(sizes)
        self._furthest = max(skips, default=1)
        self._choices = f"sizes {both} and skips {list(skips)}"
        self.skips: Tensor
        self.register_buffer("skips", torch.tensor(skips, dtype=torch.int64), persistent=False)

    @property
    def decides(self) -> str:
        """The sizes and the skips, in words."""
        return self._choices

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """Map videos (B, T, C, H, W), or `Sequences` of them, to (B, num_classes).

        Raises:
            InputError: another shape, no frame, or impossible lengths.
            StructureError: a network that returns another number of classes.
        """
        x_BTCHW, lengths = as_videos(x)
        seen = self._decide(x_BTCHW, torch.arange(x_BTCHW.shape[1], device=lengths.device) < lengths[:, None])
        self.log(Decision(seen.keep, seen.score))
        zeros = x_BTCHW.new_zeros(*x_BTCHW.shape[:2], self.num_classes)
        total = torch.zeros_like(zeros)
        if self.light is not None:
            total = total + self.run(0, self._logits(self.light), seen.keep[..., 0], seen.memory, otherwise=zeros)
        for u, net in enumerate(self.nets, start=self.sizes - len(self.nets)):
            total = total + self.run(u, self._logits(net), seen.keep[..., u], x_BTCHW, otherwise=zeros)
        count = seen.keep[..., : self.sizes].sum((1, 2)).clamp(min=1)
        return total.sum(1) / count[:, None]

    def _decide(self, x: Tensor, present_BT: Tensor) -> "_Seen":
        """Decide frame after frame; where the policy does not look, its last decision holds."""
        ahead = self._ahead(x, present_BT)
        state, score = self.policy.start(x)
        keep = torch.zeros_like(score)
        following = torch.zeros_like(present_BT[:, 0], dtype=torch.int64)  # the next frame at which the policy looks
        steps: list[tuple[Tensor, ...]] = []
        for t in range(x.shape[1]):
            looks = present_BT[:, t] & (following <= t)
            now = looks.to(x.dtype)
            features = None if ahead is None else ahead[t]
            state, (own, score) = self.policy.look(x[:, t], features, state, Decision(keep, score), now)
            keep = torch.where(looks[:, None], self.apply_override(Decision(own, score)).keep, keep)
            following = torch.where(looks, t + self._stride(keep.detach()), following)
            steps.append((keep * present_BT[:, t, None].to(keep.dtype), score, state[0], now[:, None]))
        kept, scores, memory, looked = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        self.policy.log(Decision(looked, looked))
        return _Seen(kept, scores, memory)

    def _ahead(self, x: Tensor, present_BT: Tensor) -> tuple[Tensor, ...] | None:
        """The policy's features of all frames, computed in one call.

        None in the sparse form with skips of several frames, where frames at which the policy does not look must not be
        computed.
        """
        if self.gathers and self._furthest > 1:
            return None
        return self.policy.features(x, present_BT.to(x.dtype)).unbind(1)

    def _stride(self, keep: Tensor) -> Tensor:
        """Number of frames to the next one at which the policy looks, (B,), from the keep of this one."""
        skipped = torch.cat([torch.ones_like(keep[:, :1]), (keep[:, self.sizes :] > 0) * self.skips], 1).amax(1).long()
        return torch.where(keep[:, : self.sizes].sum(1) > 0, torch.ones_like(skipped), skipped)

    def _logits(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        def checked(x: Tensor) -> Tensor:
            logits = net(x)
            if logits.dim() != 2 or logits.shape[1] != self.num_classes:
                raise StructureError(
                    f"a network returned a tensor of shape {tuple(logits.shape)}; expected (rows, {self.num_classes})"
                )
            return logits

        return checked


class _Seen(NamedTuple):
    """The decisions on all frames, keep and score (B, T, units), and the policy's memory (B, T, hidden)."""

    keep: Tensor
    score: Tensor
    memory: Tensor


class FramePolicy(Dynamic):
    """The policy of a FrameSelect: network, LSTM and scores, all unit 0, for frames at which it looks.

    Which frames these are follows from the decisions of the FrameSelect and from the lengths, also under `forced`.
    """

    def __init__(self, net: nn.Module, features: int, hidden: int, units: int, rule: Rule) -> None:
        super().__init__()
        if inside := list(layers(net)):
            raise StructureError(f"the policy's network holds dynamic layers ({inside}); give a static one")
        self.net = net
        self.cell = nn.LSTMCell(features, hidden)
        self.gate = Gate(nn.Linear(hidden, units), rule, units)
        # Kept, as a session replaces the modules that know these sizes by engines.
        self._features, self._hidden = features, hidden
        self._units = units

    def start(self, x: Tensor) -> tuple[Any, Tensor]:
        """The memory (h, c) and the scores before the first frame."""
        rows = x.shape[0]
        return zero_state(x, rows, self._hidden, pair=True), x.new_zeros(rows, self._units)

    def features(self, x_BTCHW: Tensor, present_BT: Tensor) -> Tensor:
        """The features of all frames, (B, T, features); 0 for padding."""
        zeros = x_BTCHW.new_zeros(*present_BT.shape, self._features)
        return self.run(0, self._look, present_BT, x_BTCHW, otherwise=zeros)

    def look(
        self, frame: Tensor, features: Tensor | None, memory: Any, before: Decision, looks: Tensor
    ) -> tuple[Any, Decision]:
        """The memory and the decision after a frame (B, C, H, W); unchanged where the policy does not look."""

        def unit(given: tuple[Tensor, Any]) -> tuple[Any, Decision]:
            seen, memory = given
            after = self.cell(self._look(seen) if features is None else seen, memory)
            return after, self.gate(after[0])

        given = (frame if features is None else features, memory)
        return self.run(0, unit, looks, given, otherwise=(memory, before))

    def _look(self, frames: Tensor) -> Tensor:
        features = self.net(frames)
        if features.dim() != 2 or features.shape[1] != self._features:
            raise StructureError(
                f"the policy's network returned a tensor of shape {tuple(features.shape)}; expected "
                f"(rows, {self._features})"
            )
        return features


@dataclass
class FrameCost(Objective):
    """Mean cost of a video, as a share of that of all its frames at the largest size (arXiv:2007.15796, section 3).

    Linear and without a target: `0.9 * CrossEntropy() + 0.1 * (FrameCost(cost) + 3.0 * EvenUse())` is the authors'
    objective, except for their unit of GFLOPs. `train.BudgetPenalty` keeps to a budget instead.

    Args:
        cost: of this model.

    Attributes:
        full: MACs of the dense form, which stand for the cost model in the repr. Derived, so the class is not frozen.
    """

    cost: CostModel = field(repr=False)
    full: float = field(init=False)

    def __post_init__(self) -> None:
        self.full = self.cost.full

    def __call__(self, answer: Tensor, y: Any, trace: Trace) -> Tensor:
        """MACs spent over those of the dense form."""
        return (self.cost.spent(trace).mean() / self.full).to(answer.dtype)


@dataclass(frozen=True)
class EvenUse(Objective):
    """Distance of the use of sizes and skips in a batch from even use: the Euclidean norm of (share - 1 / units).

    It keeps one of them from taking all frames before the others have learned (arXiv:2007.15796, section 3; the norm is
    that of the authors' code). Summed over the FrameSelect layers of a model.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The distance of the decisions in the trace. Padding does not count.

        Raises:
            StructureError: no FrameSelect that ran.
        """
        uses = [call.keep.flatten(0, -2).sum(0) for call in trace.decisions(FrameSelect)]
        shares = [use / use.sum().detach().clamp(min=1) for use in uses]
        return torch.stack([torch.linalg.vector_norm(share - 1 / share.shape[0]) for share in shares]).sum()
