"""Clip sampling: a cheap scorer sees every clip of a video, and the heavy network only those that say the most."""

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
    """SCSampler (Korbar et al. 2019, arXiv:1904.04289): the `clips` highest scored clips of every video are classified,
    and the answers averaged. A video that has fewer clips is seen whole.

    Rows are clips, the unit is the network; the clips of all videos that are kept run together. Which clips they are
    depends on the whole video. Clips behind a video's end are not scored, and never kept. Where a forced decision keeps
    no clip of a video, its answer is zeros: no class is likelier than another.

    The scorer is one of two, as in the paper:

    - a small classifier of clips, trained on its own by cross-entropy: `ClassSalience`.
    - any network with one output, trained by `SalienceRank` to rank clips as the heavy network does, which is trained
      before and stays as it is. In training that network sees every clip; what it answers is heard by the trace,
      `trace.answers[name][0]`, (B, clips, classes).

    Averaged is what the network answers: probabilities, if it ends with a softmax.

    Args:
        scorer: from clips (rows, ...) to how much they say, (rows, 1).
        net: from clips to logits (rows, num_classes).
        clips: how many are kept.
        num_classes: width of the logits.

    Raises:
        ConfigError: numbers that are no whole ones, or below 1.
    """

    def __init__(self, scorer: nn.Module, net: nn.Module, clips: int, num_classes: int) -> None:
        super().__init__()
        check_sizes(clips=clips, num_classes=num_classes)
        self.scores, self.net, self.clips, self.num_classes = ClipScores(scorer), net, clips, num_classes

    @property
    def decides(self) -> str:
        """How many clips."""
        return f"the {self.clips} best clips"

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """Clips (B, clips, ...), or `Sequences` of them, to (B, num_classes). `cut` makes clips of videos.

        Raises:
            InputError: another shape, no clip, or impossible lengths.
            StructureError: a scorer or a network that answers another shape.
        """
        clips, lengths = _clips(x)
        there = torch.arange(clips.shape[1], device=lengths.device) < lengths[:, None]
        score = self.scores(clips, there)
        best = score[..., 0].topk(min(self.clips, clips.shape[1]), dim=1).indices
        keep = torch.zeros_like(score[..., 0]).scatter(1, best, 1.0)[..., None]
        keep = self.tap(Decision(keep, score), present=there[..., None].to(score.dtype)).keep
        nothing = clips.new_zeros(*there.shape, self.num_classes)
        with self.only(0, keep[..., 0]) as kept:
            logits = None if kept.empty else kept.call(self.net, clips)
        if logits is None:
            return nothing[:, 0]
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise StructureError(
                f"the network answered a tensor of shape {tuple(logits.shape)}; expected (rows, {self.num_classes})"
            )
        if self.trace is not None and self.training:
            self.trace.log_answer(self, logits.unflatten(0, there.shape))
        return kept.put(logits, nothing).sum(1) / keep.sum(1).clamp(min=1)


class ClipScores(Dynamic):
    """The part of a ClipSampling that every clip costs: the scorer, unit 0.

    Nothing is decided here: a video has as many clips as it has, whatever is forced.
    """

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, clips: Tensor, there_BN: Tensor) -> Tensor:
        """Scores (B, clips, 1), as low as can be behind a video's end."""
        there = there_BN[..., None].to(clips.dtype)
        keep = self.tap(Decision(there, there), pinned=there, present=there).keep[..., 0]
        score = self.run(0, self._score, keep, clips, otherwise=torch.zeros_like(there))
        return score.masked_fill(there == 0, -highest_score(score.dtype))

    def _score(self, clips: Tensor) -> Tensor:
        score = self.scorer(clips)
        if score.shape != (clips.shape[0], 1):
            raise StructureError(
                f"the scorer answered a tensor of shape {tuple(score.shape)}; expected one score per clip, "
                f"({clips.shape[0]}, 1)"
            )
        return score


class ClassSalience(nn.Module):
    """How much a clip says: the log-odds of the class that a small classifier finds most probable (the order of its
    probabilities, which is the paper's score; without ties).

    Args:
        classifier: from clips to logits (rows, classes); trained by cross-entropy.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier, self.confidence = classifier, MaxProbability()

    def forward(self, clips: Tensor) -> Tensor:
        """(rows, 1)."""
        return self.confidence(self.classifier(clips))


class SalienceRank(Objective):
    """Trains the scorer of a ClipSampling to rank a video's clips as the network does (arXiv:1904.04289, section 3).

    Of any two clips of a video the one is to be scored higher, by `margin`, in which the network gives the true class
    the higher probability: max(0, margin - (s_i - s_j)), averaged over pairs. Only the scorer gets a gradient. Where
    the model is in eval mode (validation), it is 0.

    Args:
        margin: between scores.
        layer: the name of the ClipSampling; None where the model has only one.

    Raises:
        ConfigError: a margin below 0.
    """

    def __init__(self, margin: float = 0.1, *, layer: str | None = None) -> None:
        if not margin >= 0:
            raise ConfigError(f"margin is {margin}; expected how far scores of two clips are to be apart, 0 or more")
        self.margin, self.layer = margin, layer

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the scores and the clips' logits in the trace; y are classes (B,).

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
        score = next(call.decision.score for call in trace.calls if call.name == name)[..., 0]
        logits = trace.answers[name][0].detach()
        true = logits.log_softmax(-1).gather(2, y[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
        there = score > -highest_score(score.dtype)
        # (B, i, j): clip i says more than clip j.
        better = (true[:, :, None] > true[:, None]) & there[:, :, None] & there[:, None]
        score = score.where(there, 0.0)
        lacks = (self.margin - (score[:, :, None] - score[:, None])).clamp(min=0)
        return (lacks * better).sum() / better.sum().clamp(min=1)

    def __repr__(self) -> str:
        return f"SalienceRank({self.margin:g}, layer={self.layer!r})"


def cut(x: Tensor | Sequences, frames: int) -> Sequences:
    """Videos to clips of so many frames, one after another; frames behind a video's last whole clip are left out.

    Args:
        x: (B, T, ...), or `Sequences` of them.
        frames: of a clip.

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
    """Clips (or frames) with lengths: a tensor is as long as it looks in every row."""
    given = x.x if isinstance(x, Sequences) else x
    if given.dim() < 3 or 0 in given.shape[1:]:
        raise InputError(f"clips of shape {tuple(given.shape)}; expected (batch, clips, ...), none of them 0")
    return with_lengths(x)
