"""Frame select: a light policy looks at a video and says at which size, if at all, each frame is to be seen."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, layers
from dynanet.core.errors import ConfigError, StructureError, check_sizes
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_videos
from dynanet.gates.rules import RelaxedTopK
from dynanet.nets.spatial_transformer import Resize, Size, sides


class FrameSelect(Dynamic):
    """AR-Net (Meng et al. 2020, arXiv:2007.15796, section 3): per frame a resolution with a network of its own, or a
    skip; the answers of the frames that are seen are averaged.

    Rows are frames. Units are the sizes, and behind them the skips, which compute nothing: one of all is kept. The
    policy is a small network on frames at the first size, and an LSTM. A skip of n leaves out its frame and the n - 1
    after it, at which the policy does not look either; in the trace they have the decision that left them out. Frames
    that are to be seen at one size run together, of all videos of the batch.

    A video of which no frame is seen answers zeros: no class is likelier than another. Frames behind a video's end are
    looked at by nobody. Where a forced decision keeps several sizes all of them answer, and nothing is skipped; where
    it keeps nothing the frame alone is left out.

    In training every network sees every frame, and the keeps weigh the answers. A soft rule leaves out no frame.

    Args:
        look: the policy's network, from frames resized to the first size, (rows, C, h, w), to (rows, features). It may
            hold no dynamic layer.
        nets: a network per size, from frames of that size to logits (rows, num_classes).
        sizes: sides in pixels, or (height, width), smallest first.
        features: of `look`.
        hidden: size of the policy's memory.
        num_classes: width of the logits.
        skips: how many frames each skip leaves out; none: every frame is seen at some size.
        light: from the policy's memory (rows, hidden) to logits. With it `nets` begins at the second size: to see a
            frame at the first costs no more than the policy's look, as in the paper.
        rule: how scores decide; None for `RelaxedTopK(noise=True, hard=True)`, whose `temperature` a schedule may
            lower.

    Raises:
        ConfigError: sizes that do not grow, skips that do not, or numbers below 1.
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
        rule: nn.Module | None = None,
    ) -> None:
        super().__init__()
        both = [sides(size) for size in sizes]
        pixels, apart = [h * w for h, w in both], sorted(set(skips))
        whole = all(isinstance(n, int) and n >= 1 for n in skips)
        if not sizes or pixels != sorted(set(pixels)) or list(skips) != apart or not whole:
            raise ConfigError(
                f"sizes are {tuple(sizes)} and skips {tuple(skips)}; expected one size or more, smallest first, and "
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
            raise StructureError(f"the rule keeps {rule.k} of sizes and skips for every frame; give RelaxedTopK(k=1)")
        self.policy = FramePolicy(nn.Sequential(Resize(both[0]), look), features, hidden, len(sizes) + len(skips), rule)
        resized = zip(both[len(sizes) - len(nets) :], nets, strict=True)
        self.nets = nn.ModuleList(nn.Sequential(Resize(size), net) for size, net in resized)
        self.light, self.num_classes, self.sizes = light, num_classes, len(sizes)
        self._furthest, self._choices = max(skips, default=1), f"sizes {both} and skips {apart}"
        self.skips: Tensor
        self.register_buffer("skips", torch.tensor(apart, dtype=torch.int64), persistent=False)

    @property
    def decides(self) -> str:
        """Which sizes and which skips there are."""
        return self._choices

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """Videos (B, T, C, H, W), or `Sequences` of them, to (B, num_classes).

        Raises:
            InputError: another shape, no frame, or impossible lengths.
            StructureError: a network that answers another number of classes.
        """
        x_BTCHW, lengths = as_videos(x)
        seen = self._decide(x_BTCHW, torch.arange(x_BTCHW.shape[1], device=lengths.device) < lengths[:, None])
        self.log(Decision(seen.keep, seen.score))
        nothing = x_BTCHW.new_zeros(*x_BTCHW.shape[:2], self.num_classes)
        total, first = torch.zeros_like(nothing), 0
        if self.light is not None:
            total = total + self.run(0, self._logits(self.light), seen.keep[..., 0], seen.memory, otherwise=nothing)
            first = 1
        for u, net in enumerate(self.nets, start=first):
            total = total + self.run(u, self._logits(net), seen.keep[..., u], x_BTCHW, otherwise=nothing)
        count = seen.keep[..., : self.sizes].sum((1, 2)).clamp(min=1)
        return total.sum(1) / count[:, None]

    def _decide(self, x: Tensor, there_BT: Tensor) -> "_Seen":
        """Frame after frame: what the policy says where it looks, what it said before where it does not."""
        ahead = self._ahead(x, there_BT)
        state, score = self.policy.start(x)
        keep, following = torch.zeros_like(score), torch.zeros_like(there_BT[:, 0], dtype=torch.int64)
        told: list[tuple[Tensor, ...]] = []
        for t in range(x.shape[1]):
            looks = there_BT[:, t] & (following <= t)
            now = looks.to(x.dtype)
            features = None if ahead is None else ahead[t]
            state, (own, score) = self.policy.look(x[:, t], features, state, Decision(keep, score), now)
            keep = torch.where(looks[:, None], self.apply_override(Decision(own, score)).keep, keep)
            following = torch.where(looks, t + self._stride(keep.detach()), following)
            told.append((keep * there_BT[:, t, None].to(keep.dtype), score, state[0], now[:, None]))
        kept, scores, memory, looked = (torch.stack(parts, 1) for parts in zip(*told, strict=True))
        self.policy.log(Decision(looked, looked))
        return _Seen(kept, scores, memory)

    def _ahead(self, x: Tensor, there_BT: Tensor) -> tuple[Tensor, ...] | None:
        """The policy's features of all frames in one call, per frame; None where frames may be left out and are not
        to be computed.
        """
        if self.gathers and self._furthest > 1:
            return None
        return self.policy.features(x, there_BT.to(x.dtype)).unbind(1)

    def _stride(self, keep: Tensor) -> Tensor:
        """(B,): to the next frame that the policy looks at, by what is kept of this one."""
        skipped = torch.cat([torch.ones_like(keep[:, :1]), (keep[:, self.sizes :] > 0) * self.skips], 1).amax(1).long()
        return torch.where(keep[:, : self.sizes].sum(1) > 0, torch.ones_like(skipped), skipped)

    def _logits(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        def checked(x: Tensor) -> Tensor:
            logits = net(x)
            if logits.dim() != 2 or logits.shape[1] != self.num_classes:
                raise StructureError(
                    f"a network answered a tensor of shape {tuple(logits.shape)}; expected (rows, {self.num_classes})"
                )
            return logits

        return checked


class _Seen(NamedTuple):
    """What was decided for all frames: keep and score (B, T, units), the policy's memory (B, T, hidden)."""

    keep: Tensor
    score: Tensor
    memory: Tensor


class FramePolicy(Dynamic):
    """The part of a FrameSelect that every frame costs at which the policy looks: network, LSTM and scores, all unit 0.

    Which frames these are follows from the decisions of the FrameSelect and from the lengths, whatever is forced.
    """

    def __init__(self, net: nn.Module, features: int, hidden: int, units: int, rule: nn.Module) -> None:
        super().__init__()
        if inside := list(layers(net)):
            raise StructureError(f"the policy's network holds dynamic layers ({inside}); give a static one")
        self.net, self.cell = net, nn.LSTMCell(features, hidden)
        self.gate = Gate(nn.Linear(hidden, units), rule, units)
        # Kept apart, as a session puts engines in the place of parts.
        self._features, self._hidden, self._units = features, hidden, units

    def start(self, x: Tensor) -> tuple[Any, Tensor]:
        """An empty memory (h, c), and the scores before the first frame."""
        zero = x.new_zeros(x.shape[0], self._hidden)
        return (zero, zero), x.new_zeros(x.shape[0], self._units)

    def features(self, x_BTCHW: Tensor, there_BT: Tensor) -> Tensor:
        """Of all frames that are there, (B, T, features)."""
        return self.run(0, self._look, there_BT, x_BTCHW, otherwise=x_BTCHW.new_zeros(*there_BT.shape, self._features))

    def look(
        self, frame: Tensor, features: Tensor | None, memory: Any, before: Decision, looks: Tensor
    ) -> tuple[Any, Decision]:
        """The memory and the decision after a frame; as they were where the policy does not look."""

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
                f"the policy's network answered a tensor of shape {tuple(features.shape)}; expected "
                f"(rows, {self._features})"
            )
        return features


class FrameCost(Objective):
    """What a video costs in the mean, as a share of all its frames at the dearest size (arXiv:2007.15796, section 3).

    Linear and without a target: `0.9 * CrossEntropy() + 0.1 * (FrameCost(cost) + 3.0 * EvenUse())` is the authors'
    objective, but for their unit of GFLOPs. `train.BudgetPenalty` keeps to a budget instead.

    Args:
        cost: of this model.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost

    def __call__(self, answer: Tensor, y: Any, trace: Trace) -> Tensor:
        """MACs spent over those of the dense form."""
        return (self.cost.spent(trace).mean() / self.cost.full).to(answer.dtype)

    def __repr__(self) -> str:
        return f"FrameCost(full={self.cost.full:.0f})"


class EvenUse(Objective):
    """How far the use of sizes and skips in a batch is from even: the Euclidean norm of (share - 1 / units).

    It keeps one of them from taking all frames before the others have learnt (arXiv:2007.15796, section 3; the norm
    is the authors' code's). Summed over the FrameSelect layers of a model.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the decisions in the trace; frames behind an end do not count.

        Raises:
            StructureError: no FrameSelect that ran.
        """
        names = [name for layer, name in trace.names.items() if isinstance(layer, FrameSelect)]
        uses = [keep.flatten(0, -2).sum(0) for name in names for keep in trace[name]]
        if not uses:
            raise StructureError(f"the use of sizes is that of FrameSelect layers that ran; there are {trace.keys()}")
        shares = [use / use.sum().detach().clamp(min=1) for use in uses]
        return torch.stack([torch.linalg.vector_norm(share - 1 / share.shape[0]) for share in shares]).sum()

    def __repr__(self) -> str:
        return "EvenUse()"
