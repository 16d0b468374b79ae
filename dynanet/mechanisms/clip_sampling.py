"""Clip sampling: a cheap scorer sees every clip of a video, the heavy network only those with the highest scores."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, InputError, StructureError, check_sizes
from dynanet.core.halt import highest_score
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, with_lengths
from dynanet.gates.confidence import MaxProbability


class ClipSampling(Dynamic):
    """SCSampler (Korbar et al. 2019, arXiv:1904.04289).

    The `clips` highest scored clips of every video are classified, and the answers averaged (probabilities, if the
    network ends with a softmax). Of a video with fewer clips all are.

    Rows are clips, the unit is the network; the kept clips of all videos run together. Which clips are kept depends on
    the whole video. Padding is not scored, and never kept. Where a forced decision keeps no clip of a video, its answer
    is zeros, equal for all classes.

    The scorer is one of two, as in the paper:

    - a small classifier of clips, trained alone by cross-entropy: `ClassSalience`.
    - any network with one output, trained by `SalienceRank` to rank clips as the heavy network does, which was trained
      before and is frozen. In training that network sees every clip, and its logits (B, clips, classes) are in the
      trace as `trace.answers[name][0]`.

    Args:
        scorer: maps clips (rows, ...) to scores (rows, 1).
        net: maps clips to logits (rows, num_classes).
        clips: number of clips that are kept.
        num_classes: width of the logits.

    Raises:
        ConfigError: numbers below 1, or not whole.
    """

    def __init__(self, scorer: nn.Module, net: nn.Module, clips: int, num_classes: int) -> None:
        super().__init__()
        check_sizes(clips=clips, num_classes=num_classes)
        self.scores = ClipScores(scorer)
        self.net = net
        self.clips, self.num_classes = clips, num_classes

    @property
    def decides(self) -> str:
        """The number of clips, in words."""
        return f"the {self.clips} best clips"

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """Map clips (B, clips, ...), or `Sequences` of them, to (B, num_classes). `cut` makes clips of videos.

        Raises:
            InputError: another shape, no clip, or impossible lengths.
            StructureError: a scorer or a network that returns another shape.
        """
        clips, lengths = _clips(x)
        present = torch.arange(clips.shape[1], device=lengths.device) < lengths[:, None]
        score = self.scores(clips, present)
        best = score[..., 0].topk(min(self.clips, clips.shape[1]), dim=1).indices
        keep = torch.zeros_like(score[..., 0]).scatter(1, best, 1.0)[..., None]
        keep = self.tap(Decision(keep, score), present=present[..., None].to(score.dtype)).keep
        zeros = clips.new_zeros(*present.shape, self.num_classes)
        with self.only(0, keep[..., 0]) as kept:
            logits = None if kept.empty else kept.call(self.net, clips)
        if logits is None:
            return zeros[:, 0]
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise StructureError(
                f"the network returned a tensor of shape {tuple(logits.shape)}; expected (rows, {self.num_classes})"
            )
        if self.trace is not None and self.training:
            self.trace.log_answer(self, logits.unflatten(0, present.shape))
        return kept.put(logits, zeros).sum(1) / keep.sum(1).clamp(min=1)


class ClipScores(Dynamic):
    """The scorer (unit 0) of a ClipSampling, run for all clips but padding. `forced` does not change lengths."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, clips: Tensor, present_BN: Tensor) -> Tensor:
        """Scores (B, clips, 1), the lowest number for padding."""
        present = present_BN[..., None].to(clips.dtype)
        keep = self.tap(Decision(present, present), pinned=present, present=present).keep[..., 0]
        score = self.run(0, self._score, keep, clips, otherwise=torch.zeros_like(present))
        return score.masked_fill(present == 0, -highest_score(score.dtype))

    def _score(self, clips: Tensor) -> Tensor:
        score = self.scorer(clips)
        if score.shape != (clips.shape[0], 1):
            raise StructureError(
                f"the scorer returned a tensor of shape {tuple(score.shape)}; expected one score per clip, "
                f"({clips.shape[0]}, 1)"
            )
        return score


class ClassSalience(nn.Module):
    """Scores a clip by the log-odds of the class that a small classifier finds most probable.

    The paper's score is its probability: the order is the same, but log-odds have no ties.

    Args:
        classifier: maps clips to logits (rows, classes); trained by cross-entropy.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.confidence = MaxProbability()

    def forward(self, clips: Tensor) -> Tensor:
        """Scores (rows, 1)."""
        return self.confidence(self.classifier(clips))


@dataclass(frozen=True)
class SalienceRank(Objective):
    """Trains the scorer of a ClipSampling to rank clips as the network does (arXiv:1904.04289, section 3).

    Of two clips of a video, the one to which the network gives the higher probability of the true class should score
    higher by `margin`: max(0, margin - (s_i - s_j)), averaged over pairs. Only the scorer gets a gradient. In eval mode
    (validation) the loss is 0.

    Args:
        margin: between scores.
        layer: name of the ClipSampling; None where the model has only one.

    Raises:
        ConfigError: a negative margin.
    """

    margin: float = 0.1
    _: KW_ONLY
    layer: str | None = None

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ConfigError(f"margin is {self.margin}; expected a distance between scores of two clips, 0 or more")

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """The loss of the scores and the clips' logits in the trace, with labels y (B,).

        Raises:
            StructureError: no ClipSampling, several and none named, or one that did not run.
        """
        layer, name = trace.one(ClipSampling, self.layer)
        if not trace[name]:
            raise StructureError(
                f"{name!r} did not run in this trace; run the model inside `with record(model) as trace`"
            )
        if not layer.training:
            return answer.new_zeros(())
        score = trace.complete(name)[0].decision.score[..., 0]
        logits = trace.answers[name][0].detach()
        true = logits.log_softmax(-1).gather(2, y[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
        present = score > -highest_score(score.dtype)
        # (B, i, j): the network finds the true class more probable in clip i than in clip j.
        better = (true[:, :, None] > true[:, None]) & present[:, :, None] & present[:, None]
        score = score.where(present, 0.0)
        lacks = (self.margin - (score[:, :, None] - score[:, None])).clamp(min=0)
        return (lacks * better).sum() / better.sum().clamp(min=1)


def cut(x: Tensor | Sequences, frames: int) -> Sequences:
    """Cut videos into consecutive clips; frames after the last whole clip of a video are left out.

    Args:
        x: (B, T, ...), or `Sequences` of them.
        frames: number of frames of a clip.

    Returns:
        x of shape (B, T // frames, frames, ...), lengths in clips.

    Raises:
        ConfigError: fewer than 1 frame.
        InputError: a video that is shorter than a clip.
    """
    check_sizes(frames=frames)
    given, lengths = _clips(x)
    shortest = int(lengths.min()) if lengths.numel() else given.shape[1]
    if shortest < frames:
        raise InputError(f"a video of {shortest} frames has no clip of {frames}; take shorter clips, or repeat frames")
    count = given.shape[1] // frames
    return Sequences(given[:, : count * frames].unflatten(1, (count, frames)), lengths // frames)


def _clips(x: Tensor | Sequences) -> Sequences:
    """Clips (or frames) with lengths, which in a tensor without lengths are equal for all rows."""
    given = x.x if isinstance(x, Sequences) else x
    if given.dim() < 3 or 0 in given.shape[1:]:
        raise InputError(f"clips have shape {tuple(given.shape)}; expected (batch, clips, ...), none of them 0")
    return with_lengths(x)
