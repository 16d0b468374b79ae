"""Early exit over a whole scene: the stem runs once over the image, and only uncertain pixels get a patch."""

from typing import cast

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.gates.confidence import Confidence, MaxProbability
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.ops.patches import Patches


class SceneExit(Dynamic):
    """A classifier of pixel patches, run over an image without computing overlapping patches again and again.

    A per-pixel stem (1x1 convolutions) does not depend on the patch, so it runs once over the image. The first exit
    sees single pixels; those with enough confidence need no patch. For the others patches of stem features are cut, and
    the later stages run as an early exit. Answers equal those of the patch classifier, if the stem maps 0 to 0 outside
    the image. The trace holds what was computed for every pixel.

    Args:
        stem: (B, bands, H, W) to (B, C, H, W), pixel by pixel.
        first: the first exit, (pixels, C) to logits (pixels, classes).
        rest: the later stages, on patches (rows, C, P, P).
        patch: side P of a patch.
        threshold: pixels whose confidence is at least this need no patch.
        confidence: scores logits, as that of `rest` does; None for `MaxProbability`.
    """

    def __init__(
        self,
        stem: nn.Module,
        first: nn.Module,
        rest: EarlyExit,
        patch: int,
        threshold: float = torch.inf,
        confidence: Confidence | None = None,
    ) -> None:
        super().__init__()
        self.stem, self.first = stem, first
        self.rest, self.rows = rest, Patches(patch)
        self.confidence = confidence if confidence is not None else MaxProbability()
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(float(threshold)))

    @classmethod
    def of(cls, model: EarlyExit, first: nn.Module, patch: int) -> "SceneExit":
        """Make the scene form of a trained patch classifier, with its weights and thresholds.

        Args:
            model: its first stage is the stem, its first exit sees the centre pixel only.
            first: that exit as a function of single pixels.
            patch: the side of the patches it was trained on.

        Raises:
            StructureError: fewer than two stages.
        """
        if model.steps < 2:
            raise StructureError("a scene form needs a stem and at least one later stage; this model has one stage")
        rest = EarlyExit(list(model.stages)[1:], list(model.exits)[1:], model.confidence)
        rest.thresholds.copy_(model.thresholds[1:])
        scene = cls(model.stages[0], first, rest, patch, model.thresholds[0].item(), model.confidence)
        return scene.train(model.training)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits for every pixel, (B, H, W, classes)."""
        features = cast(Tensor, self.stem(image_BCHW))
        batch, channels, height, width = features.shape
        pixels = features.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
        logits = self.first(pixels).unflatten(0, (batch, height, width))
        score = self.confidence(logits, self.confidence.remember(logits, None))
        keep = torch.ones_like(score) if self.training else (score.float() < self.threshold.float()).to(score.dtype)
        keep = self.tap(Decision(keep, score)).keep[..., 0]
        return self.run(0, self.rest, keep, features, otherwise=logits, rows=self.rows)
