"""Point refinement: a coarse segmentation is upsampled, and predicted again only where it is unsure."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError, check_shares, check_sizes
from dynanet.core.objective import Objective
from dynanet.core.rows import LeadingAnswers
from dynanet.core.trace import Trace
from dynanet.data.pixel_labels import check_pixel_labels, pixel_cross_entropy
from dynanet.gates.confidence import Confidence, Margin


class PointRefine(Dynamic):
    """PointRend (Kirillov et al. 2020, arXiv:1912.08193, section 3) for semantic segmentation.

    A network computes fine features and coarse logits. The logits are doubled in size by bilinear interpolation until
    they are as large as the image. After each step a point head predicts the least sure positions again, from the fine
    features and the coarse logits there. Unit k is the head after step k, rows are the positions of that size.

    In training nothing is refined: the answer is the coarse logits at the image's size, and the head is applied at
    random points, mostly unsure ones, for `PointLoss`.

    Args:
        network: images (B, C, H, W) to (fine features (B, F, h, w), coarse logits (B, classes, h', w')), of any sizes.
        head: maps (rows, F + classes) to logits (rows, classes), the features first; such as a `PointHead`.
        points: maximum number of positions of an image to predict again after each step, the least sure ones; None for
            no limit.
        confidence: scores the logits; `Margin`, as in the paper, if None.
        train_points: random points per image on which the head is trained.
        oversample: k of the paper: for the unsure points, k * train_points candidates are drawn, and the least sure
            taken.
        importance: beta of the paper: the share of points that are chosen so; the others are uniformly distributed.

    Attributes:
        threshold: of the confidence: positions that reach it are not predicted again. Initially infinite: only `points`
            decides, as in the paper. May be changed at any time.

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
        check_sizes(points=1 if points is None else points, train_points=train_points)
        check_shares(importance=importance)
        if oversample < 1:
            raise ConfigError(f"oversample must be at least 1, got {oversample}")
        self.network = network
        self.head = head
        self.points = points
        self.confidence = confidence if confidence is not None else Margin()
        self.train_points = train_points
        self.oversample = oversample
        self.importance = importance
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(torch.inf))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits for every pixel, (B, classes, H, W)."""
        fine, coarse = self.network(x_BCHW)
        size = (x_BCHW.shape[2], x_BCHW.shape[3])
        if self.training:
            self._log_points(fine, coarse)
            return _resized(coarse, size)
        logits = coarse
        here = (coarse.shape[2], coarse.shape[3])
        k = 0
        while here != size:
            here = (min(2 * here[0], size[0]), min(2 * here[1], size[1]))
            logits = self._step(k, _resized(logits, here), fine, coarse)
            k += 1
        return logits

    def _step(self, k: int, logits: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """The logits with the least sure positions predicted again."""
        rows = logits.permute(0, 2, 3, 1)  # (B, H, W, classes)
        score = self.confidence.at(k)(rows)
        keep = self.tap(Decision(self._unsure(score), score), first=k).keep[..., 0]
        at = _Points((rows.shape[1], rows.shape[2]))
        return self.run(k, self.head, keep, (fine, coarse), otherwise=rows, rows=at).permute(0, 3, 1, 2)

    def _unsure(self, score_BHW1: Tensor) -> Tensor:
        """1 for at most `points` of every image, the lowest scores below the threshold."""
        unsure = (score_BHW1 < self.threshold.to(score_BHW1.dtype)).to(score_BHW1.dtype)
        flat = score_BHW1.flatten(1)
        if self.points is None or flat.shape[1] <= self.points:
            return unsure
        lowest = flat.topk(self.points, dim=1, largest=False, sorted=False).indices
        return unsure * torch.zeros_like(flat).scatter(1, lowest, 1.0).view_as(score_BHW1)

    def _log_points(self, fine: Tensor, coarse: Tensor) -> None:
        """Log the head's answers at random points, for the loss."""
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
    """A small network on each point alone; every layer reads the coarse logits again (PointRend, section 4.1).

    Args:
        features: F, of the fine features.
        classes: of the logits.
        hidden: width of the layers between.
        layers: number of hidden layers.

    Raises:
        ConfigError: a width or number below 1.
    """

    def __init__(self, features: int, classes: int, hidden: int = 64, layers: int = 3) -> None:
        super().__init__()
        check_sizes(features=features, classes=classes, hidden=hidden, layers=layers)
        widths = [features, *[hidden] * layers]
        self.hidden = nn.ModuleList(nn.Linear(width + classes, hidden) for width in widths[:-1])
        self.answer = nn.Linear(hidden + classes, classes)
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """(rows, features + classes) to logits (rows, classes)."""
        coarse = x[:, -self.classes :]
        for layer in self.hidden:
            x = torch.cat([layer(x).relu(), coarse], 1)
        return self.answer(x)


@dataclass(frozen=True)
class PointLoss(Objective):
    """Cross-entropy of the coarse logits over all pixels, plus that of the head at its random points.

    Args:
        ignore: the label of void pixels.
        weight: of the points.
        name: of the PointRefine; None where the model has only one.
    """

    ignore: int = 255
    _: KW_ONLY
    weight: float = 1.0
    name: str | None = None

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the answer, the points in the trace and labels (B, H, W), int64. 0 where all labels are void.

        In eval mode, where no points are drawn, it is the cross-entropy of the refined answer.

        Raises:
            StructureError: no PointRefine, several and none named, or one that did not run once.
            ConfigError: labels of another size than the answer.
            DataError: a label that is neither a class nor void.
        """
        layer, name = trace.one(PointRefine, self.name)
        check_pixel_labels(y, answer, self.ignore)
        loss = pixel_cross_entropy(answer, y, self.ignore)
        if not layer.training:
            return loss
        answers = trace.answers.get(name, [])
        if len(answers) != 1:
            raise StructureError(f"PointLoss needs one pass through {name!r}; this trace has {len(answers)}")
        points, logits = answers[0]
        size = torch.tensor([y.shape[2], y.shape[1]], device=y.device)
        column, row = (points * size).long().minimum(size - 1).unbind(-1)  # the pixel in which a point lies
        labels = y.flatten(1).gather(1, row * y.shape[2] + column)
        return loss + self.weight * pixel_cross_entropy(logits.transpose(1, 2), labels, self.ignore)


def sampled(map_BCHW: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of a map at points, (B, N, C).

    Args:
        map_BCHW: the map, from corner 0 to corner 1; constant beyond the centres of its outermost positions.
        points: (B, N, 2), x and y between 0 and 1.
    """
    sample = torch.arange(points.shape[0], device=points.device)[:, None].expand(points.shape[:2])
    return _bilinear(map_BCHW, sample.flatten(), points.flatten(0, 1)).unflatten(0, points.shape[:2])


class _Points(LeadingAnswers):
    """Rows are the positions of a grid, lead (B, H, W); a unit sees maps of any sizes there, concatenated."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._height, self._width = size

    def whole(self, x: Any, lead: tuple[int, ...]) -> Tensor:
        """All positions: (rows, C)."""
        return self.take(x, lead, torch.arange(lead[0] * lead[1] * lead[2], device=x[0].device))

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Tensor:
        """The positions at `index`: (r, C)."""
        cell = index % (self._height * self._width)
        centres = torch.stack([cell % self._width, cell // self._width], 1).to(x[0].dtype) + 0.5
        points = centres / torch.tensor([self._width, self._height], dtype=x[0].dtype, device=x[0].device)
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
    """The two positions between whose centres a coordinate lies, and its distance from the first, (r, 1)."""
    place = (at * size - 0.5).clamp(0, size - 1)
    lower = place.floor().long().clamp(max=size - 1)
    return lower, (lower + 1).clamp(max=size - 1), (place - lower)[:, None]


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
