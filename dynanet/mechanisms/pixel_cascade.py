"""Pixel cascade: pixels that are easy to label leave early, and later stages compute only on those that stay."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.camvid import check_labels
from dynanet.gates.confidence import Confidence, MaxProbability
from dynanet.ops.positions import PositionChain
from dynanet.ops.region import Region, flat_image


class PixelCascade(Dynamic):
    """Deep layer cascade (Li et al. 2017, arXiv:1704.01344): semantic segmentation with an exit for every pixel.

    The backbone runs everywhere, and its classifier labels every position. Positions whose confidence reaches a
    threshold keep that label; a later stage is computed on the others only. Its cells are residual: x + cell(x) where a
    position goes on, x elsewhere. A cell's first convolution reads the features of all positions, those that left with
    the features they left with; further ones, inside the cell, find zeros outside the region.

    Unit k is stage k with its classifier, what comes after exit k; rows are positions at the backbone's stride.
    Thresholds act in training too, as in the paper; at infinity, where they start, nobody leaves and all stages learn
    from all pixels. `PixelCascadeLoss` is the loss.

    Args:
        backbone: images to features (B, C, h, w), with any strides.
        stages: for every later stage its cells, Sequentials of stride-1 same convolutions and position-wise layers
            that keep the C channels.
        exits: classifiers after the backbone and after every stage, (B, C, h, w) to logits (B, classes, h, w), of
            stride-1 same convolutions and position-wise layers; the usual one is a 1x1 convolution.
        confidence: how sure logits are.

    Attributes:
        thresholds: (stages,) of the confidence; positions below the k-th go on to stage k. With `MaxProbability` a
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
                f"a pixel cascade needs later stages, a cell or more in each, and an exit more than stages; got "
                f"{len(stages)} stages of {[len(cells) for cells in stages]} cells and {len(exits)} exits"
            )
        self.backbone = backbone
        self.stages, self.exits = nn.ModuleList(nn.ModuleList(cells) for cells in stages), nn.ModuleList(exits)
        self._chains()
        self.confidence = confidence if confidence is not None else MaxProbability()
        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.full((len(stages),), torch.inf))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits for every pixel, (B, classes, H, W), bilinear between the backbone's positions.

        At every position they are those of the exit at which it left.
        """
        features = self.backbone(x_BCHW)
        logits = self.exits[0](features)
        keep = torch.ones_like(logits[:, :1])
        memory, chains = None, self._chains()
        image = flat_image(features) if self.gathers else features
        for k, (*cells, head) in enumerate(chains):
            self._hear(logits)
            answer = logits.detach().permute(0, 2, 3, 1).contiguous()  # nothing is learnt from where positions leave
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
                        alone = not (image.requires_grad or rows.requires_grad)  # flat_image made a copy
                        image = (image.index_add_ if alone else image.index_add)(0, region.index, rows)
                    rows = head.rows(region, image)
                    flat = logits.permute(0, 2, 3, 1).flatten(0, 2).index_copy(0, region.index, rows)
                    logits = flat.view(answer.shape).permute(0, 3, 1, 2)
                else:
                    for cell in cells:
                        image = image + keep * cell.dense(image, keep)
                    logits = keep * head.dense(image, keep) + (1 - keep) * logits
        self._hear(logits)
        return functional.interpolate(logits, size=x_BCHW.shape[2:], mode="bilinear", align_corners=False)

    def _chains(self) -> list[list[PositionChain]]:
        """Of every stage its cells and its exit. Made anew where layers were replaced: folded norms, say."""
        units = [[*cells, head] for cells, head in zip(self.stages, list(self.exits)[1:], strict=True)]
        modules = [module for stage in units for unit in stage for module in unit.modules()]
        made, chains = vars(self).get("_made", ([], []))
        if len(made) != len(modules) or any(a is not b for a, b in zip(made, modules, strict=True)):
            chains = [[PositionChain(unit) for unit in stage] for stage in units]
            vars(self)["_made"] = modules, chains
        return chains

    def _hear(self, logits: Tensor) -> None:
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


class PixelCascadeLoss(Objective):
    """Every stage's cross-entropy over the pixels that reached it (Li et al. 2017, arXiv:1704.01344, section 3.2).

    Pixels that left before a stage, and void ones, teach it nothing. Each stage's loss is a mean over its pixels, 0
    where there are none.

    Args:
        ignore: the label of void pixels.
        weights: one per exit; None for ones.
        name: the name of the PixelCascade; None where the model has only one.
    """

    def __init__(self, ignore: int = 255, *, weights: Sequence[float] | None = None, name: str | None = None) -> None:
        self.ignore, self.name = ignore, name
        self.weights = None if weights is None else tuple(weights)

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the exits' logits in the trace and labels (B, H, W), int64.

        Raises:
            StructureError: no PixelCascade, or several and none named, or stages that only some samples reached.
            ConfigError: not one weight per exit, or labels of another size than the answer.
            DataError: a label that is neither a class nor void.
        """
        name = self._find(trace)
        exits, keeps = trace.answers.get(name, []), trace[name]
        weights = self.weights if self.weights is not None else (1.0,) * len(exits)
        if len(weights) != len(exits):
            raise ConfigError(f"PixelCascadeLoss got {len(weights)} weights for {len(exits)} exits; give one per exit")
        if y.shape != answer.shape[:1] + answer.shape[2:]:
            raise ConfigError(
                f"labels of shape {tuple(y.shape)} came for an answer of shape {tuple(answer.shape)}; give one label "
                f"per pixel, (B, H, W)"
            )
        if len(keeps) != len(exits) - 1 or any(e.shape[0] != y.shape[0] for e in exits):
            raise StructureError(
                f"the loss of {name!r} needs one pass that every sample reached; this trace has {len(exits)} answers "
                f"of {[e.shape[0] for e in exits]} samples and {len(keeps)} decisions: use train mode or the dense form"
            )
        check_labels(y, answer.shape[1], self.ignore, "a batch of labels")
        total = torch.zeros((), device=y.device, dtype=answer.dtype)
        for k, (weight, logits) in enumerate(zip(weights, exits, strict=True)):
            wide = functional.interpolate(logits, size=y.shape[1:], mode="bilinear", align_corners=False)
            losses = functional.cross_entropy(wide, y, ignore_index=self.ignore, reduction="none")
            counts = y != self.ignore
            if k:
                arrived = keeps[k - 1].detach()[..., 0][:, None]
                counts = counts & (functional.interpolate(arrived, size=y.shape[1:], mode="nearest")[:, 0] > 0)
            total = total + weight * (losses * counts).sum() / counts.sum().clamp(min=1)
        return total

    def _find(self, trace: Trace) -> str:
        found = [name for layer, name in trace.names.items() if isinstance(layer, PixelCascade)]
        name = found[0] if self.name is None and len(found) == 1 else self.name
        if name is None or name not in found:
            raise StructureError(
                f"PixelCascadeLoss is of one PixelCascade and {'none is' if name is None else repr(name) + ' was'} "
                f"named; this model has {sorted(found)}"
            )
        return name

    def __repr__(self) -> str:
        return f"PixelCascadeLoss({self.ignore}, weights={self.weights}, name={self.name!r})"


def roaming_thresholds(
    cascade: PixelCascade, *, probabilities: tuple[float, float] = (0.8, 0.995), begin: float = 0.4
) -> Callable[[float], None]:
    """A schedule for `train.fit`: nobody leaves at first; then every threshold is drawn anew for every step.

    A cascade trained at one threshold has seen regions of one kind; one that has seen many can be calibrated
    afterwards. The probability of a threshold is drawn so that the logarithm of 1 - p is
    uniform; one in four stays infinite.

    Args:
        cascade: whose thresholds; its confidence is on the scale of `MaxProbability`.
        probabilities: the least and the greatest.
        begin: the share of training without exits.

    Raises:
        ConfigError: probabilities or a share out of range.
    """
    low, high = probabilities
    if not 0 < low <= high < 1 or not 0 <= begin <= 1:
        raise ConfigError(
            f"roaming_thresholds got probabilities {probabilities} and begin {begin}; expected two between 0 and 1, "
            f"rising, and a share"
        )

    def set_thresholds(progress: float) -> None:
        if progress < begin:
            cascade.thresholds.fill_(torch.inf)
            return
        unsure = (1 - low) * ((1 - high) / (1 - low)) ** torch.rand(len(cascade.thresholds))
        drawn = torch.where(torch.rand(len(unsure)) < 0.25, torch.inf, (1 - unsure).logit())
        cascade.thresholds.copy_(drawn)

    return set_thresholds


def left_at(trace: Trace, name: str = "") -> Tensor:
    """The exit at which every position left, counted from 0: (B, h, w). For pictures of easy and hard pixels.

    Args:
        trace: of one pass.
        name: the PixelCascade's name.

    Raises:
        StructureError: the layer of that name decided nothing in this trace.
    """
    if name not in trace.keys():
        raise StructureError(f"{name!r} decided nothing in this trace; the layers heard are {trace.keys()}")
    return torch.stack(trace[name]).sum(0)[..., 0].long()
