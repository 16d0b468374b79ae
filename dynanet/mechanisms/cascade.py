"""Cascade: whole networks of growing size; the next one runs only for rows that the earlier ones are not sure of."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.halt import ThresholdHalt
from dynanet.gates.confidence import Confidence, MaxProbability

Ensemble = Literal["none", "logits", "probabilities"]


class Cascade(ThresholdHalt):
    """Independent networks in a row, each run only where those before are not sure.

    Network selection of Bolukbasi et al. 2017, arXiv:1702.07811. Networks share nothing but the input and, with
    `ensemble`, the answers, so that any trained networks will do. In training all networks answer for all rows; in eval
    mode a row goes on past network k while its confidence is below `thresholds[k]`. A new cascade always runs all
    networks; `calibrate.calibrate` finds thresholds for a budget.

    Args:
        networks: each maps x to logits (B, classes), cheapest first. A network for another resolution resizes first:
            nn.Sequential(nn.Upsample(...), network).
        confidence: scores logits; `PerExit` for a criterion per network. None for `MaxProbability`.
        ensemble: what network k answers. "none": its own logits. "logits": the mean of the logits so far.
            "probabilities": the logarithm of the mean of the probabilities so far.

    Raises:
        StructureError: no networks, or a confidence that does not score every network but the last.
        ConfigError: an unknown `ensemble`.
    """

    def __init__(
        self, networks: Sequence[nn.Module], confidence: Confidence | None = None, *, ensemble: Ensemble = "none"
    ) -> None:
        if not networks:
            raise StructureError("a cascade needs at least one network; got none")
        if ensemble not in ("none", "logits", "probabilities"):
            raise ConfigError(f"ensemble is {ensemble!r}; expected 'none', 'logits' or 'probabilities'")
        super().__init__(len(networks), confidence if confidence is not None else MaxProbability())
        self.networks = nn.ModuleList(networks)
        self.ensemble = ensemble

    def start(self, x: Any) -> Any:
        """The input, the answers so far (None), and the memory of the confidence (None)."""
        return x, None, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """Run network k on the input, and combine its answer with those before."""
        x, total, memory = state
        logits = self.networks[k](x)
        if self.ensemble == "logits":
            total = logits if total is None else total + logits
            logits = total / (k + 1)
        elif self.ensemble == "probabilities":
            log_p = logits.log_softmax(-1)
            total = log_p if total is None else torch.logaddexp(total, log_p)
            logits = total - math.log(k + 1)
        if k + 1 < self.steps:
            memory = self.confidence.at(k).remember(logits, memory)
        return (x, total, memory), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The confidence (B, 1) after network k."""
        return self.confidence.at(k)(answer, state[2])
