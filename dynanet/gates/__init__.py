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
from dynanet.gates.scorers import ContextScorer, PooledScorer, TileScorer

__all__ = [
    "BatchCoupledTopK", "Bernoulli", "BiasedTopK", "BinaryRule", "Confidence", "ContextScorer", "Entropy", "Gumbel",
    "LearnedGate", "LearnedScore", "Margin", "MaxProbability", "OneOf", "Patience", "PerExit",
    "PooledScorer", "RecurrentGate", "RelaxedTopK", "Rule", "Sigmoid", 
    "StraightThrough", "Threshold", "TileScorer", "TopK", 
]  # fmt: skip
