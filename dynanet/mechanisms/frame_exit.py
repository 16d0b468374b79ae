"""Frame exit: a video is read from coarse to fine, and what was not read when a gate is sure is not computed."""

import math
from collections.abc import Sequence
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
    """FrameExit (Ghodrati et al. 2021, arXiv:2104.13400, section 3): step k reads one more frame, answers from the
    maximum of the features of all frames so far, and a gate says whether that is enough.

    Frames come in the order of `coarse_to_fine`: the middle, both ends, the middles of the halves, and so on. So a
    video that has more frames than there are steps is read over its whole length all the same. One that has fewer
    leaves after its last frame; what lies behind a video's end costs nothing, also where thresholds are being found.

    In training every frame that is read at most is read, and every step answers: `MultiExit() + ExitLabels(beta)`. In
    eval mode a row leaves where its gate finds leaving likelier than not (thresholds of 0); `calibrate.calibrate` finds
    other thresholds for a budget or a risk.

    Args:
        backbone: from frames (rows, C, H, W) to features (rows, features).
        classifiers: one per step, from features to logits (rows, classes); as many frames are read at most.
        gates: one per step but the last, from the features and those before this frame (not at the first) to the
            log-odds of leaving, (rows, 1). See `ExitGate`.
        longest: frames of the longest video that will come; None for as many as are read.

    Attributes:
        thresholds: (steps - 1,), log-odds of leaving. +inf: nobody leaves here; -inf: everybody.

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
                f"frame exit got {len(classifiers)} classifiers and {len(gates)} gates; give one or more classifiers, "
                f"and a gate for each but the last"
            )
        super().__init__(len(classifiers), threshold=0.0)
        self.longest = len(classifiers) if longest is None else longest
        check_sizes(longest=self.longest)
        self.reader, self.gates = FrameReader(backbone, classifiers), nn.ModuleList(gates)
        orders = [coarse_to_fine(n, self.steps) for n in range(1, self.longest + 1)]
        self.orders: Tensor
        rows = [order + [0] * (self.steps - len(order)) for order in orders]
        self.register_buffer("orders", torch.tensor(rows, dtype=torch.int64), persistent=False)

    def start(self, x: Tensor | Sequences) -> Any:
        """The frames that may be read, in order; how many they are; no features, none before, and no answer.

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
        """One more frame, and the answer after it. Rows whose video has ended keep their answer."""
        frames, lengths, features, _, logits = state
        before = features
        if frames.shape[1]:
            features = self.reader.read(frames[:, 0], before, k < lengths)
            logits = self.reader.answer(k, features, logits, k < lengths)
        return (frames[:, 1:], lengths, features, before, logits), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The log-odds of leaving, (rows, 1); as high as can be where a video has ended."""
        _, lengths, features, before, _ = state
        sure = self.gates[k](features) if before is None else self.gates[k](features, before)
        return torch.where((lengths <= k + 1)[:, None], highest_score(sure.dtype), sure)


class FrameReader(Dynamic):
    """The part of a FrameExit that costs: the backbone (unit 0) and step k's classifier (unit 1 + k), for videos that
    have not ended. Nothing is decided here: a video lasts as long as it does, whatever is forced.
    """

    def __init__(self, backbone: nn.Module, classifiers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone, self.classifiers = backbone, nn.ModuleList(classifiers)

    def read(self, frame: Tensor, before: Tensor | None, present: Tensor) -> Tensor:
        """The largest of each feature so far, (rows, features)."""
        features = self._where(0, self.backbone, frame, before, present)
        return features if before is None else torch.maximum(before, features)

    def answer(self, k: int, features: Tensor, before: Tensor | None, present: Tensor) -> Tensor:
        """Step k's logits; those given before where the video had ended."""
        return self._where(1 + k, self.classifiers[k], features, before, present)

    def _where(self, unit: int, f: nn.Module, x: Tensor, otherwise: Tensor | None, present: Tensor) -> Tensor:
        there = present.to(x.dtype)[:, None]
        keep = self.tap(Decision(there, there), first=unit, pinned=there, present=there).keep[:, 0]
        if otherwise is not None:
            return self.run(unit, f, keep, x, otherwise=otherwise)
        with self.only(unit, keep) as kept:  # the first frame, which every video has
            return kept.call(f, x)


class ExitGate(nn.Module):
    """The log-odds that the features so far are enough, from them and from those before the last frame: both go through
    the same two layers, and what comes out through a third (arXiv:2104.13400, figure 2).

    Args:
        features: of the backbone.
        widths: of the two layers; those of the authors' code.
        first: for the first frame, before which there was nothing.
    """

    def __init__(self, features: int, *, widths: tuple[int, int] = (128, 64), first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(features, widths[0]), nn.ReLU(), nn.Linear(widths[0], widths[1]), nn.ReLU()
        )
        self.leave = nn.Linear(widths[1] * (1 if first else 2), 1)

    def forward(self, features: Tensor, before: Tensor | None = None) -> Tensor:
        """(rows, features) twice to (rows, 1)."""
        seen = [features] if before is None else [features, before]
        return self.leave(torch.cat([self.embed(each) for each in seen], 1))


class ExitLabels(Objective):
    """Trains the gates of a FrameExit beside its classifiers: `MultiExit() + ExitLabels(1e-3)`.

    The t-th gate is to let a row out where the cross-entropy of its classifier is at most beta * exp(t / 2): what is
    asked falls from frame to frame (arXiv:2104.13400, section 3). Binary cross-entropy, averaged over rows and gates;
    a video's end decides nothing. No gradient goes through the labels.

    Args:
        beta: the larger, the earlier rows leave.
        halt: the name of the FrameExit; None where the model has only one.

    Raises:
        ConfigError: a beta that is not above 0.
    """

    def __init__(self, beta: float, *, halt: str | None = None) -> None:
        if not 0 < beta < math.inf:
            raise ConfigError(f"beta is {beta}; expected the cross-entropy at which rows leave, a number above 0")
        self.beta, self.halt = beta, halt

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the steps' logits (B, classes) and the gates' scores in the trace.

        Raises:
            StructureError: no FrameExit, several and none named, or steps that only some rows reached.
        """
        name = trace.one(FrameExit, self.halt)[1]
        calls, answers = [call for call in trace.calls if call.name == name], trace.answers.get(name, [])
        if len(answers) != len(calls) + 1 or any(each.shape[0] != y.shape[0] for each in answers):
            raise StructureError(f"only some rows took all steps of {name!r}; this loss needs them: use train mode")
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

    def __repr__(self) -> str:
        return f"ExitLabels({self.beta:g}, halt={self.halt!r})"


def coarse_to_fine(frames: int, most: int | None = None) -> list[int]:
    """The order in which frames are read: the middle, the first, the last, then the middles of halves, quarters, ...

    Ghodrati et al. 2021 (arXiv:2104.13400), algorithm 1 of appendix A; counted from 0.

    Args:
        frames: of the video.
        most: so many of them; None for all.

    >>> coarse_to_fine(10)
    [4, 0, 9, 2, 6, 1, 3, 5, 7, 8]
    """
    found, parts = dict.fromkeys(((frames + 1) // 2, 1, frames)), 2  # counted from 1, as in the paper
    wanted = frames if most is None else min(most, frames)
    while len(found) < wanted:
        ends = [1 + (frames - 1) * i // parts for i in range(parts + 1)]
        found.update(dict.fromkeys((a + b) // 2 for a, b in pairwise(ends)))
        parts *= 2
    return [n - 1 for n in found][:wanted]


def frames_read(trace: Trace, halt: str | None = None) -> Tensor:
    """How many frames of every video were read, (B,).

    Args:
        trace: of a pass.
        halt: the name of the FrameExit; None where the model has only one.

    Raises:
        StructureError: no FrameExit, several and none named, or one that did not run.
    """
    return trace.runs(trace.names[trace.one(FrameExit, halt)[0].reader])
