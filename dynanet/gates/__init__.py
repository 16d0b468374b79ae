"""Gates: scorers and confidences make scores, rules turn them into keep."""

from dynanet.core.confidence import Confidence
from dynanet.gates.confidence import Entropy, LearnedGate, LearnedScore, Margin, MaxProbability, Patience, PerExit
from dynanet.gates.expert_rules import BatchCoupledTopK, BiasedTopK
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import (
    Bernoulli,
    BinaryRule,
    Gumbel,
    OneOf,
    RelaxedTopK,
    Rule,
    Sigmoid,
    StraightThrough,
    Threshold,
    TopK,
)
from dynanet.gates.scorers import ContextScorer, PooledScorer, TileScorer, tile_mean
from dynanet.gates.token_confidence import LearnedToken, Saturation, SoftmaxGap, TokenConfidence, consistency_loss

__all__ = [
    "BatchCoupledTopK", "Bernoulli", "BiasedTopK", "BinaryRule", "Confidence", "ContextScorer", "Entropy", "Gumbel",
    "LearnedGate", "LearnedScore", "LearnedToken", "Margin", "MaxProbability", "OneOf", "Patience", "PerExit",
    "PooledScorer", "RecurrentGate", "RelaxedTopK", "Rule", "Saturation", "Sigmoid", "SoftmaxGap",
    "StraightThrough", "Threshold", "TileScorer", "TokenConfidence", "TopK", "consistency_loss", "tile_mean",
]  # fmt: skip
