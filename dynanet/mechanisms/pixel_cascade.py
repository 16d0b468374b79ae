"""Pixel cascade: pixels that are easy to label leave early, and later stages compute only on the others."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError, check_shares
from dynanet.core.objective import Objective, check_exit_weights
from dynanet.core.trace import Trace
from dynanet.data.pixel_labels import check_pixel_labels, pixel_cross_entropy
from dynanet.gates.confidence import Confidence, MaxProbability
from dynanet.ops.positions import PositionChain
from dynanet.ops.region import Region, flat_image


class PixelCascade(Dynamic):
    """Deep layer cascade (Li et al. 2017, arXiv:1704.01344): semantic segmentation with an exit for every pixel.

    The backbone runs everywhere, and its classifier labels every position. Positions whose confidence reaches a
    threshold keep that label; a later stage is computed on the others only. Its cells are residual: x + cell(x) where a
    position continues, x elsewhere. A cell's first convolution reads the features of all positions, of those that left
    the last ones; further convolutions inside the cell read zeros outside the region.

    Unit k is stage k with its classifier, what comes after exit k; rows are positions at the backbone's stride.
    Thresholds act in training too, as in the paper. Initially they are infinite: no position leaves, and all stages
    learn from all pixels. `PixelCascadeLoss` is the loss.

    Args:
        backbone: images to features (B, C, h, w), with any strides.
        stages: for every later stage its cells, Sequentials of stride-1 same convolutions and position-wise layers
            that keep the C channels.
        exits: classifiers after the backbone and after every stage, (B, C, h, w) to logits (B, classes, h, w), of
            stride-1 same convolutions and position-wise layers; the usual one is a 1x1 convolution.
        confidence: scores the logits; `MaxProbability` if None.

    Attributes:
        thresholds: (stages,) of the confidence; positions below the k-th continue to stage k. With `MaxProbability` a
            probability p is log(p / (1 - p)).

    Raises:
        StructureError: no later stage, not one exit more than stages, or a cell or exit that cannot run on positions.
    """

    def __init__(
        self,
        backbone: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        exits: Sequence[nn.Module],
        confidence: Confidence | None = None,
    ) -> None:
        super().__init__()
        if not stages or not all(stages) or len(exits) != len(stages) + 1:
            raise StructureError(
                f"a pixel cascade needs at least one later stage, at least one cell in each, and an exit more than "
                f"stages; got {len(stages)} stages of {[len(cells) for cells in stages]} cells and {len(exits)} exits"
            )
        self.backbone = backbone
        self.stages = nn.ModuleList(nn.ModuleList(cells) for cells in stages)
        self.exits = nn.ModuleList(exits)
        self._chains()
        self.confidence = confidence if confidence is not None else MaxProbability()
        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.full((len(stages),), torch.inf))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits for every pixel, (B, classes, H, W), interpolated between the backbone's positions.

        Those of a position are of the exit at which it left.
        """
        features = self.backbone(x_BCHW)
        logits = self.exits[0](features)
        keep = torch.ones_like(logits[:, :1])
        memory = None
        chains = self._chains()
        image = flat_image(features) if self.gathers else features
        for k, (*cells, head) in enumerate(chains):
            self._log_answer(logits)
            answer = logits.detach().permute(0, 2, 3, 1).contiguous()  # no gradient through where positions leave
            memory = self.confidence.at(k).remember(answer, memory)
            score = self.confidence.at(k)(answer, memory)
            own = Decision((score.float() < self.thresholds[k].float()).to(score.dtype), score)
            keep = self.tap(own, first=k, present=keep[:, 0, :, :, None]).keep[..., 0][:, None]
            region = Region(self, k, keep)
            if region.kept.empty:
                continue
            with self.within(region.frame):
                if self.gathers:
                    for cell in cells:
                        rows = cell.rows(region, image)
                        if image.requires_grad or rows.requires_grad:
                            image = image.index_add(0, region.index, rows)
                        else:  # in place, on the copy that flat_image made
                            image.index_add_(0, region.index, rows)
                    rows = head.rows(region, image)
                    flat = logits.permute(0, 2, 3, 1).flatten(0, 2).index_copy(0, region.index, rows)
                    logits = flat.view(answer.shape).permute(0, 3, 1, 2)
                else:
                    for cell in cells:
                        image = image + keep * cell.dense(image, keep)
                    logits = keep * head.dense(image, keep) + (1 - keep) * logits
        self._log_answer(logits)
        return _resized(logits, x_BCHW.shape[2:])

    def _chains(self) -> list[list[PositionChain]]:
        """Every stage's cells and its exit; made again after layers were replaced, for example folded norms."""
        units = [[*cells.children(), head] for cells, head in zip(self.stages, list(self.exits)[1:], strict=True)]
        modules = [module for stage in units for unit in stage for module in unit.modules()]
        made, chains = vars(self).get("_made", ([], []))
        if len(made) != len(modules) or any(a is not b for a, b in zip(made, modules, strict=True)):
            chains = [[PositionChain(unit) for unit in stage] for stage in units]
            vars(self)["_made"] = modules, chains
        return chains

    def _log_answer(self, logits: Tensor) -> None:
        if self.trace is not None:
            self.trace.log_answer(self, logits)

    def pixel_loss(self, ignore: int, weights: Sequence[float] | None) -> Objective:
        """Every stage's own loss."""
        return PixelCascadeLoss(ignore, weights=weights)

    def schedules(self) -> list[Callable[[float], None]]:
        """Thresholds drawn at random in the second part of training."""
        return [roaming_thresholds(self)]

    @torch.no_grad()
    def finish_training(self) -> None:
        """No thresholds: every position runs every stage."""
        self.thresholds.fill_(torch.inf)


@dataclass(frozen=True)
class PixelCascadeLoss(Objective):
    """Every stage's cross-entropy over the pixels that reached it (Li et al. 2017, arXiv:1704.01344, section 3.2).

    Pixels that left before a stage, and void ones, teach it nothing. Each stage's loss is a mean over its pixels, 0
    where there are none.

    Args:
        ignore: the label of void pixels.
        weights: one per exit; None for ones.
        name: of the PixelCascade; None where the model has only one.

    Raises:
        ConfigError: weights that are negative, not finite or all 0.
    """

    ignore: int = 255
    _: KW_ONLY
    weights: Sequence[float] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            check_exit_weights(self.weights)

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the exits' logits in the trace and labels (B, H, W), int64.

        Raises:
            StructureError: no PixelCascade, several and none named, or one that ran several times or for some samples
                only.
            ConfigError: not one weight per exit, or labels of another size than the answer.
            DataError: a label that is neither a class nor void.
        """
        _, name = trace.one(PixelCascade, self.name)
        calls, exits = trace.full_pass(name, answer.shape[0])
        weights = self.weights if self.weights is not None else (1.0,) * len(exits)
        if len(weights) != len(exits):
            raise ConfigError(f"PixelCascadeLoss got {len(weights)} weights for {len(exits)} exits; give one per exit")
        check_pixel_labels(y, answer, self.ignore)
        total = torch.zeros((), device=y.device, dtype=answer.dtype)
        for k, (weight, logits) in enumerate(zip(weights, exits, strict=True)):
            labels = y
            if k:
                arrived = calls[k - 1].keep.detach()[..., 0][:, None]
                left = functional.interpolate(arrived, size=y.shape[1:], mode="nearest")[:, 0] <= 0
                labels = y.masked_fill(left, self.ignore)
            total = total + weight * pixel_cross_entropy(_resized(logits, y.shape[1:]), labels, self.ignore)
        return total


def roaming_thresholds(
    cascade: PixelCascade, *, probabilities: tuple[float, float] = (0.8, 0.995), begin: float = 0.4
) -> Callable[[float], None]:
    """A schedule for `train.fit`: no exits at first, then random thresholds at every step.

    A cascade trained at one threshold has seen regions of one kind; one that has seen many can be calibrated
    afterwards. The probability p of a threshold is drawn so that the logarithm of 1 - p is uniform; one in four
    thresholds stays infinite.

    Args:
        cascade: the layer whose thresholds are set; its confidence is on the scale of `MaxProbability`.
        probabilities: the lowest and the highest.
        begin: the share of training without exits.

    Raises:
        ConfigError: probabilities or a share out of range.
    """
    low, high = probabilities
    check_shares(begin=begin)
    if not 0 < low <= high < 1:
        raise ConfigError(f"probabilities must be two numbers between 0 and 1 that do not fall, got {probabilities}")

    def set_thresholds(progress: float) -> None:
        if progress < begin:
            cascade.thresholds.fill_(torch.inf)
            return
        unsure = (1 - low) * ((1 - high) / (1 - low)) ** torch.rand(len(cascade.thresholds))
        drawn = torch.where(torch.rand(len(unsure)) < 0.25, torch.inf, (1 - unsure).logit())
        cascade.thresholds.copy_(drawn)

    return set_thresholds


def left_at(trace: Trace, name: str | None = None) -> Tensor:
    """The exit at which every position left, counted from 0: (B, h, w). For maps of easy and hard pixels.

    Args:
        trace: of one pass.
        name: of the PixelCascade; None where the model has only one.

    Raises:
        StructureError: no such layer, several and none named, or one that did not run.
    """
    return trace.runs(trace.one(PixelCascade, name)[1], unit=None).long()


def _resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)
