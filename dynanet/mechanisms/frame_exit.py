"""Frame exit: a video is read from coarse to fine, until a gate decides that the frames so far are enough."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, InputError, StructureError, check_sizes
from dynanet.core.halt import ThresholdHalt, highest_score
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_videos


class FrameExit(ThresholdHalt):
    """FrameExit (Ghodrati et al. 2021, arXiv:2104.13400, section 3).

    Step k reads one more frame and answers from the maximum over the features of all frames so far. Frames come in the
    order of `coarse_to_fine`: the middle, both ends, the middles of the halves, and so on, so that a video with more
    frames than steps is still sampled over its whole length. A shorter one leaves after its last frame; padding costs
    nothing, also while thresholds are calibrated.

    In training every step reads its frame and answers: `MultiExit() + ExitLabels(beta)`. In eval mode a row leaves
    where the log-odds of its gate reach the threshold, 0 in a new model.

    Args:
        backbone: maps frames (rows, C, H, W) to features (rows, features).
        classifiers: one per step, maps features to logits (rows, classes).
        gates: one per step but the last, maps the features, and except at the first step those before this frame, to
            the log-odds of leaving, (rows, 1). See `ExitGate`.
        longest: maximum number of frames of a video; None for the number of steps.

    Raises:
        StructureError: no classifier, or not one gate per classifier but the last.
        ConfigError: a `longest` below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifiers: Sequence[nn.Module],
        gates: Sequence[nn.Module],
        *,
        longest: int | None = None,
    ) -> None:
        if not classifiers or len(gates) != len(classifiers) - 1:
            raise StructureError(
                f"frame exit got {len(classifiers)} classifiers and {len(gates)} gates; give at least one classifier, "
                f"and a gate for each but the last"
            )
        super().__init__(len(classifiers), threshold=0.0)
        self.longest = len(classifiers) if longest is None else longest
        check_sizes(longest=self.longest)
        self.reader = FrameReader(backbone, classifiers)
        self.gates = nn.ModuleList(gates)
        orders = [coarse_to_fine(n, self.steps) for n in range(1, self.longest + 1)]
        self.orders: Tensor
        rows = [order + [0] * (self.steps - len(order)) for order in orders]
        self.register_buffer("orders", torch.tensor(rows, dtype=torch.int64), persistent=False)

    def start(self, x: Tensor | Sequences) -> Any:
        """The frames in reading order, their number, no features, none before, and no answer.

        Raises:
            InputError: another shape, no frame, impossible lengths, or more than `longest` frames.
        """
        x_BTCHW, lengths = as_videos(x)
        frames = x_BTCHW.shape[1]
        if frames > self.longest:
            raise InputError(
                f"videos of {frames} frames for a layer made for {self.longest} at most; leave frames out, or make it "
                f"with a larger `longest`"
            )
        order = self.orders[lengths - 1][:, :frames]
        rows = torch.arange(x_BTCHW.shape[0], device=order.device)[:, None]
        return x_BTCHW[rows, order], lengths, None, None, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """Read one more frame, and answer. Rows whose video has ended keep their answer."""
        frames, lengths, features, _, logits = state
        before = features
        if frames.shape[1]:
            features = self.reader.read(frames[:, 0], before, k < lengths)
            logits = self.reader.answer(k, features, logits, k < lengths)
        return (frames[:, 1:], lengths, features, before, logits), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The log-odds of leaving, (rows, 1); the highest number where a video has ended."""
        _, lengths, features, before, _ = state
        sure = self.gates[k](features) if before is None else self.gates[k](features, before)
        return torch.where((lengths <= k + 1)[:, None], highest_score(sure.dtype), sure)


class FrameReader(Dynamic):
    """The backbone (unit 0) and classifier k (unit 1 + k) of a FrameExit, run only for videos that have not ended.

    It makes no decision: `forced` does not change lengths.
    """

    def __init__(self, backbone: nn.Module, classifiers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifiers = nn.ModuleList(classifiers)

    def read(self, frame: Tensor, before: Tensor | None, present: Tensor) -> Tensor:
        """The maximum over frames so far, (rows, features)."""
        features = self._where(0, self.backbone, frame, before, present)
        return features if before is None else torch.maximum(before, features)

    def answer(self, k: int, features: Tensor, before: Tensor | None, present: Tensor) -> Tensor:
        """The logits of step k; `before`, those of the step before, where the video had ended."""
        return self._where(1 + k, self.classifiers[k], features, before, present)

    def _where(self, unit: int, f: nn.Module, x: Tensor, otherwise: Tensor | None, present: Tensor) -> Tensor:
        mask = present.to(x.dtype)[:, None]
        keep = self.tap(Decision(mask, mask), first=unit, pinned=mask, present=mask).keep[:, 0]
        if otherwise is not None:
            return self.run(unit, f, keep, x, otherwise=otherwise)
        with self.only(unit, keep) as kept:  # every video has a first frame, so there is nothing to keep instead
            return kept.call(f, x)


class ExitGate(nn.Module):
    """The log-odds that the features so far are enough (arXiv:2104.13400, figure 2).

    The features so far and those before the last frame go through the same two layers, and jointly through a third.

    Args:
        features: width of the backbone's features.
        widths: of the two layers; defaults as in the authors' code.
        first: whether this is the gate of the first frame, which has no features before it.
    """

    def __init__(self, features: int, *, widths: tuple[int, int] = (128, 64), first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(features, widths[0]), nn.ReLU(), nn.Linear(widths[0], widths[1]), nn.ReLU()
        )
        self.leave = nn.Linear(widths[1] * (1 if first else 2), 1)

    def forward(self, features: Tensor, before: Tensor | None = None) -> Tensor:
        """Map features (rows, features), and those before if any, to log-odds (rows, 1)."""
        seen = [features] if before is None else [features, before]
        return self.leave(torch.cat([self.embed(each) for each in seen], 1))


@dataclass(frozen=True)
class ExitLabels(Objective):
    """Trains the gates of a FrameExit beside its classifiers: `MultiExit() + ExitLabels(1e-3)`.

    Gate t learns to let a row leave where the cross-entropy of its classifier is at most beta * exp(t / 2), a bound
    that rises from frame to frame (arXiv:2104.13400, section 3). Binary cross-entropy, averaged over rows and gates;
    the end of a video is not a decision. No gradient flows through the labels.

    Args:
        beta: the larger, the earlier rows leave.
        halt: name of the FrameExit; None where the model has only one.

    Raises:
        ConfigError: a beta that is not above 0.
    """

    beta: float
    _: KW_ONLY
    halt: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta is {self.beta}; expected the cross-entropy at which rows leave, a number above 0")

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """The loss of the gates' scores and the steps' logits (B, classes) in the trace, with labels y (B,).

        Raises:
            StructureError: no FrameExit, several and none named, or steps that only some rows reached.
        """
        calls, answers = trace.full_pass(trace.one(FrameExit, self.halt)[1], y.shape[0])
        losses = []
        for t, (call, logits) in enumerate(zip(calls, answers[:-1], strict=True), start=1):
            score = call.decision.score[:, 0]
            decides = (score < highest_score(score.dtype)).to(score.dtype)
            loss = functional.cross_entropy(logits.detach(), y, reduction="none")
            leave = (loss <= self.beta * math.exp(t / 2)).to(score.dtype)
            score = score.where(decides > 0, 0.0)
            total = functional.binary_cross_entropy_with_logits(score, leave, weight=decides, reduction="sum")
            losses.append(total / decides.sum().clamp(min=1))
        return torch.stack(losses).mean() if losses else answer.new_zeros(())


def coarse_to_fine(frames: int, most: int | None = None) -> list[int]:
    """The order in which frames are read: the middle, the first, the last, then the middles of halves, quarters, ...

    Ghodrati et al. 2021 (arXiv:2104.13400), algorithm 1 of appendix A.

    Args:
        frames: number of frames of the video.
        most: maximum number of frames to read; None for all.

    Returns:
        Numbers of frames, counted from 0.

    >>> coarse_to_fine(10)
    [4, 0, 9, 2, 6, 1, 3, 5, 7, 8]
    """
    found = dict.fromkeys(((frames + 1) // 2, 1, frames))  # counted from 1, as in the paper
    parts = 2
    wanted = frames if most is None else min(most, frames)
    while len(found) < wanted:
        ends = [1 + (frames - 1) * i // parts for i in range(parts + 1)]
        found.update(dict.fromkeys((a + b) // 2 for a, b in pairwise(ends)))
        parts *= 2
    return [n - 1 for n in found][:wanted]


def frames_read(trace: Trace, halt: str | None = None) -> Tensor:
    """Number of frames of every video that were read, (B,).

    Raises:
        StructureError: no FrameExit ran, or several are in the model and `halt` does not name one.
    """
    return trace.runs(trace.names[trace.one(FrameExit, halt)[0].reader])
