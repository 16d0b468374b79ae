"""Point refinement: a coarse segmentation grows, and only where it is unsure are points predicted anew."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.rows import LeadingAnswers
from dynanet.core.trace import Trace
from dynanet.data.camvid import check_labels
from dynanet.gates.confidence import Confidence, Margin


class PointRefine(Dynamic):
    """PointRend (Kirillov et al. 2020, arXiv:1912.08193, section 3) for semantic segmentation.

    A network answers coarse logits and fine features. The logits are doubled in size, bilinear, until they are as large
    as the image; after each step the positions that are least sure are predicted anew by a point head, from the fine
    features and the coarse logits there. Unit k is the head after step k, rows are the positions of that size.

    In training nothing is refined: the answer are the coarse logits at the image's size, and the head answers at random
    points, mostly unsure ones, for `PointLoss`.

    Args:
        network: images (B, C, H, W) to (fine features (B, F, h, w), coarse logits (B, classes, h', w')), of any sizes.
        head: maps (rows, F + classes) to logits (rows, classes), the features first; say a `PointHead`.
        points: at most so many positions of an image are predicted anew after each step, the least sure ones; None for
            no such limit.
        confidence: how sure logits are; the paper's is the margin between the best two.
        train_points: how many random points of an image teach the head.
        oversample: k: so many times more are drawn, of which the least sure are taken ...
        importance: beta: ... for this share of the points; the others lie anywhere.

    Attributes:
        threshold: of the confidence: positions that are at least so sure are left as they are. At infinity, where it
            starts, only `points` decides, as in the paper. May be changed at any time.

    Raises:
        ConfigError: a number of points below 1, k below 1, or beta outside [0, 1].
    """

    def __init__(
        self,
        network: nn.Module,
        head: nn.Module,
        points: int | None = 1024,
        *,
        confidence: Confidence | None = None,
        train_points: int = 196,
        oversample: float = 3.0,
        importance: float = 0.75,
    ) -> None:
        super().__init__()
        if (points is not None and points < 1) or train_points < 1:
            raise ConfigError(f"point refinement of {points} points, {train_points} in training; give 1 or more")
        if oversample < 1 or not 0 <= importance <= 1:
            raise ConfigError(
                f"point refinement with oversample {oversample} and importance {importance}; expected at least 1, and "
                f"a share between 0 and 1"
            )
        self.network, self.head, self.points = network, head, points
        self.confidence = confidence if confidence is not None else Margin()
        self.train_points, self.oversample, self.importance = train_points, oversample, importance
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(torch.inf))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits for every pixel, (B, classes, H, W)."""
        fine, coarse = self.network(x_BCHW)
        size = (x_BCHW.shape[2], x_BCHW.shape[3])
        if self.training:
            self._teach(fine, coarse)
            return _resized(coarse, size)
        logits, here, k = coarse, (coarse.shape[2], coarse.shape[3]), 0
        while here != size:
            here = (min(2 * here[0], size[0]), min(2 * here[1], size[1]))
            logits = self._step(k, _resized(logits, here), fine, coarse)
            k += 1
        return logits

    def _step(self, k: int, logits: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """The logits with the least sure positions predicted anew."""
        rows = logits.permute(0, 2, 3, 1)  # (B, H, W, classes)
        score = self.confidence.at(k)(rows)
        keep = self.tap(Decision(self._unsure(score), score), first=k).keep[..., 0]
        at = _At((rows.shape[1], rows.shape[2]))
        return self.run(k, self.head, keep, (fine, coarse), otherwise=rows, rows=at).permute(0, 3, 1, 2)

    def _unsure(self, score_BHW1: Tensor) -> Tensor:
        """1 for at most `points` of every image, the lowest scores below the threshold."""
        unsure = (score_BHW1 < self.threshold.to(score_BHW1.dtype)).to(score_BHW1.dtype)
        flat = score_BHW1.flatten(1)
        if self.points is None or flat.shape[1] <= self.points:
            return unsure
        lowest = flat.topk(self.points, dim=1, largest=False, sorted=False).indices
        return unsure * torch.zeros_like(flat).scatter(1, lowest, 1.0).view_as(score_BHW1)

    def _teach(self, fine: Tensor, coarse: Tensor) -> None:
        """The head's answers at random points, for the trace."""
        if self.trace is None:
            return
        batch, count = coarse.shape[0], self.train_points
        hard = round(self.importance * count)
        with torch.no_grad():
            drawn = torch.rand(batch, max(count, round(self.oversample * count)), 2, device=coarse.device)
            drawn = drawn.to(coarse.dtype)
            score = self.confidence.at(0)(sampled(coarse, drawn))[..., 0]
            lowest = score.topk(hard, dim=1, largest=False).indices
            unsure = drawn.gather(1, lowest[..., None].expand(-1, -1, 2))
            points = torch.cat([unsure, torch.rand_like(drawn[:, : count - hard])], 1)
        seen = torch.cat([sampled(fine, points), sampled(coarse, points)], -1)
        self.trace.log_answer(self, (points, self.head(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])))


class PointHead(nn.Module):
    """A small network for each point by itself; every layer reads the coarse logits again (PointRend, section 4.1).

    Args:
        features: F, of the fine features.
        classes: of the logits.
        hidden: width of the layers between.
        layers: how many hidden layers.

    Raises:
        ConfigError: a width or number below 1.
    """

    def __init__(self, features: int, classes: int, hidden: int = 64, layers: int = 3) -> None:
        super().__init__()
        if min(features, classes, hidden, layers) < 1:
            raise ConfigError(
                f"a point head of {features} features, {classes} classes, {layers} layers of {hidden}; give 1 or more"
            )
        widths = [features, *[hidden] * layers]
        self.hidden = nn.ModuleList(nn.Linear(width + classes, hidden) for width in widths[:-1])
        self.answer, self.classes = nn.Linear(hidden + classes, classes), classes

    def forward(self, x: Tensor) -> Tensor:
        """(rows, features + classes) to logits (rows, classes)."""
        coarse = x[:, -self.classes :]
        for layer in self.hidden:
            x = torch.cat([layer(x).relu(), coarse], 1)
        return self.answer(x)


class PointLoss(Objective):
    """Cross-entropy of the coarse logits over all pixels, plus that of the head at the points it was asked about.

    Args:
        ignore: the label of void pixels.
        weight: of the points.
        name: the name of the PointRefine; None where the model has only one.
    """

    def __init__(self, ignore: int = 255, *, weight: float = 1.0, name: str | None = None) -> None:
        self.ignore, self.weight, self.name = ignore, weight, name

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the answer, the points in the trace and labels (B, H, W), int64. 0 where all labels are void.

        In eval mode it is the cross-entropy of the refined answer: no points are drawn.

        Raises:
            StructureError: no PointRefine, or several and none named, or one that was called more than once.
            ConfigError: labels of another size than the answer.
            DataError: a label that is neither a class nor void.
        """
        found = {name: layer for layer, name in trace.names.items() if isinstance(layer, PointRefine)}
        name = next(iter(found)) if self.name is None and len(found) == 1 else self.name
        if name not in found or len(trace.answers.get(name, [])) != int(found[name].training):
            raise StructureError(
                f"PointLoss is of one pass through one PointRefine; this model has {sorted(found)}, "
                f"{'none' if name is None else repr(name)} is named, and points came from {sorted(trace.answers)}"
            )
        if y.shape != answer.shape[:1] + answer.shape[2:]:
            raise ConfigError(
                f"labels of shape {tuple(y.shape)} came for an answer of shape {tuple(answer.shape)}; give one label "
                f"per pixel, (B, H, W)"
            )
        check_labels(y, answer.shape[1], self.ignore, "a batch of labels")
        if not found[name].training:
            return self._mean(answer, y)
        points, logits = trace.answers[name][0]
        size = torch.tensor([y.shape[2], y.shape[1]], device=y.device)
        column, row = (points * size).long().minimum(size - 1).unbind(-1)  # the pixel in which a point lies
        labels = y.flatten(1).gather(1, row * y.shape[2] + column)
        return self._mean(answer, y) + self.weight * self._mean(logits.transpose(1, 2), labels)

    def _mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = functional.cross_entropy(logits, labels, ignore_index=self.ignore, reduction="sum")
        return total / (labels != self.ignore).sum().clamp(min=1)

    def __repr__(self) -> str:
        return f"PointLoss({self.ignore}, weight={self.weight:g}, name={self.name!r})"


def sampled(map_BCHW: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of a map at points, (B, N, C).

    Args:
        map_BCHW: its corners are 0 and 1; beyond the middle of the outermost positions it stays as there.
        points: (B, N, 2), x and y between 0 and 1.
    """
    sample = torch.arange(points.shape[0], device=points.device)[:, None].expand(points.shape[:2])
    return _bilinear(map_BCHW, sample.flatten(), points.flatten(0, 1)).unflatten(0, points.shape[:2])


class _At(LeadingAnswers):
    """Positions of a grid over the image, lead (B, H, W): a unit sees maps of any sizes there, one beside the other."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._height, self._width = size

    def whole(self, x: Any, lead: tuple[int, ...]) -> Tensor:
        """All positions: (rows, C)."""
        return self.take(x, lead, torch.arange(lead[0] * lead[1] * lead[2], device=x[0].device))

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Tensor:
        """The positions at `index`: (r, C)."""
        cell = index % (self._height * self._width)
        middles = torch.stack([cell % self._width, cell // self._width], 1).to(x[0].dtype) + 0.5
        points = middles / torch.tensor([self._width, self._height], dtype=x[0].dtype, device=x[0].device)
        sample = index // (self._height * self._width)
        return torch.cat([_bilinear(m, sample, points) for m in x], 1)


def _bilinear(map_BCHW: Tensor, sample: Tensor, points: Tensor) -> Tensor:
    """Values at points (r, 2) of the samples (r,): (r, C), from four gathered rows each."""
    height, width = map_BCHW.shape[2:]
    rows = map_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
    column, right, across = _between(points[:, 0], width)
    row, below, down = _between(points[:, 1], height)
    first = sample * (height * width)
    above = torch.lerp(rows[first + row * width + column], rows[first + row * width + right], across)
    under = torch.lerp(rows[first + below * width + column], rows[first + below * width + right], across)
    return torch.lerp(above, under, down)


def _between(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two positions between whose middles a coordinate lies, and how far, (r, 1)."""
    place = (at * size - 0.5).clamp(0, size - 1)
    lower = place.floor().long().clamp(max=size - 1)
    return lower, (lower + 1).clamp(max=size - 1), (place - lower)[:, None]


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
