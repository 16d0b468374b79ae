"""One mechanism per file. `dynanet.mechanisms.EarlyExit` is `dynanet.mechanisms.early_exit.EarlyExit`, and so on.

Each has a card (`cards/`) with its use, its measured gain and its cost. A file is imported when one of its names is
first used.
"""
# ruff: noqa: F401, I001  (the first block is for type checkers and editors)

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynanet.mechanisms.cascade import Cascade
    from dynanet.mechanisms.channel_gating import ChannelGating, PartialSumScorer, ThresholdTarget
    from dynanet.mechanisms.channel_skip import ChannelSkip, SaliencyL1, SaliencyScorer, fbs_gate
    from dynanet.mechanisms.clip_sampling import ClassSalience, ClipSampling, ClipScores, SalienceRank, cut
    from dynanet.mechanisms.early_exit import EarlyExit, JointGates
    from dynanet.mechanisms.early_stop import Earliest, EarlyStop, Frames, steps_read
    from dynanet.mechanisms.experts import (
        Experts, RouterScorer, sigmoid_over_kept, softmax_over_all, softmax_over_kept,
    )  # fmt: skip
    from dynanet.mechanisms.frame_exit import ExitGate, ExitLabels, FrameExit, FrameReader, coarse_to_fine, frames_read
    from dynanet.mechanisms.frame_select import EvenUse, FrameCost, FramePolicy, FrameSelect
    from dynanet.mechanisms.glance_focus import (
        CropSampler, GlanceFocus, JoinedHead, LearnedCrops, PlacePolicy, PlaceReward, RandomCrops, RecurrentHead,
        SampledCrops,
    )  # fmt: skip
    from dynanet.mechanisms.jump import Jump, Jumps, ReinforceJumps
    from dynanet.mechanisms.layer_skip import BranchSkip, LayerSkip, RecurrentSkip
    from dynanet.mechanisms.mixture_of_depths import MixtureOfDepths, PredictTopTokens, causal_predictor
    from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip, moefy
    from dynanet.mechanisms.path_select import PathBalance, PathSelect, averaged, by_score, price_for, summed
    from dynanet.mechanisms.pixel_cascade import PixelCascade, PixelCascadeLoss, left_at, roaming_thresholds
    from dynanet.mechanisms.point_refine import PointHead, PointLoss, PointRefine, sampled
    from dynanet.mechanisms.policy_skip import Bounded, PolicySkip, curriculum
    from dynanet.mechanisms.pondering import ACT, PonderCost, PonderLoss, PonderNet, log_stopping
    from dynanet.mechanisms.position_halting import PositionHalting, PositionPonderCost, steps_taken
    from dynanet.mechanisms.resolution_select import ResolutionCost, ResolutionSelect
    from dynanet.mechanisms.scene_exit import SceneExit
    from dynanet.mechanisms.skim import Skim, SkimCost
    from dynanet.mechanisms.slimmable import (
        DoubleHead, EnsembleBootstrapping, InPlaceDistillation, SandwichGate, Slimmable, separate,
    )  # fmt: skip
    from dynanet.mechanisms.soft_tree import (
        Forest, LeafClassifier, LeafCrossEntropy, LeafDistribution, RouteBalance, SoftTree, expected, full_tree,
        mixture, soft_decision_tree,
    )  # fmt: skip
    from dynanet.mechanisms.spatial_skip import SpatialBudget, SpatialSkip, anneal_bounds
    from dynanet.mechanisms.token_drop import (
        ClassAttention, RankScorer, TokenDistillation, TokenDrop, TokenPredictor, TokenRatio, TokenScorer, WithTeacher,
    )  # fmt: skip
    from dynanet.mechanisms.token_halting import FirstEntry, HaltingDepth, TokenHalting, TokenPonderCost, blocks_taken
    from dynanet.mechanisms.token_merge import TokenMerge
    from dynanet.mechanisms.update_skip import Update, UpdateCost, UpdateSkip

_NAMES = {
    "dynanet.mechanisms.cascade": ("Cascade",),
    "dynanet.mechanisms.channel_gating": ("ChannelGating", "PartialSumScorer", "ThresholdTarget"),
    "dynanet.mechanisms.channel_skip": ("ChannelSkip", "SaliencyL1", "SaliencyScorer", "fbs_gate"),
    "dynanet.mechanisms.clip_sampling": ("ClassSalience", "ClipSampling", "ClipScores", "SalienceRank", "cut"),
    "dynanet.mechanisms.early_exit": ("EarlyExit", "JointGates"),
    "dynanet.mechanisms.early_stop": ("Earliest", "EarlyStop", "Frames", "steps_read"),
    "dynanet.mechanisms.experts": (
        "Experts", "RouterScorer", "sigmoid_over_kept", "softmax_over_all", "softmax_over_kept",
    ),
    "dynanet.mechanisms.frame_exit": (
        "ExitGate", "ExitLabels", "FrameExit", "FrameReader", "coarse_to_fine", "frames_read",
    ),
    "dynanet.mechanisms.frame_select": ("EvenUse", "FrameCost", "FramePolicy", "FrameSelect"),
    "dynanet.mechanisms.glance_focus": (
        "CropSampler", "GlanceFocus", "JoinedHead", "LearnedCrops", "PlacePolicy", "PlaceReward", "RandomCrops",
        "RecurrentHead", "SampledCrops",
    ),
    "dynanet.mechanisms.jump": ("Jump", "Jumps", "ReinforceJumps"),
    "dynanet.mechanisms.layer_skip": ("BranchSkip", "LayerSkip", "RecurrentSkip"),
    "dynanet.mechanisms.mixture_of_depths": ("MixtureOfDepths", "PredictTopTokens", "causal_predictor"),
    "dynanet.mechanisms.neuron_skip": ("LowRankScorer", "NeuronSkip", "moefy"),
    "dynanet.mechanisms.path_select": ("PathBalance", "PathSelect", "averaged", "by_score", "price_for", "summed"),
    "dynanet.mechanisms.pixel_cascade": ("PixelCascade", "PixelCascadeLoss", "left_at", "roaming_thresholds"),
    "dynanet.mechanisms.point_refine": ("PointHead", "PointLoss", "PointRefine", "sampled"),
    "dynanet.mechanisms.policy_skip": ("Bounded", "PolicySkip", "curriculum"),
    "dynanet.mechanisms.pondering": ("ACT", "PonderCost", "PonderLoss", "PonderNet", "log_stopping"),
    "dynanet.mechanisms.position_halting": ("PositionHalting", "PositionPonderCost", "steps_taken"),
    "dynanet.mechanisms.resolution_select": ("ResolutionCost", "ResolutionSelect"),
    "dynanet.mechanisms.scene_exit": ("SceneExit",),
    "dynanet.mechanisms.skim": ("Skim", "SkimCost"),
    "dynanet.mechanisms.slimmable": (
        "DoubleHead", "EnsembleBootstrapping", "InPlaceDistillation", "SandwichGate", "Slimmable", "separate",
    ),
    "dynanet.mechanisms.soft_tree": (
        "Forest", "LeafClassifier", "LeafCrossEntropy", "LeafDistribution", "RouteBalance", "SoftTree", "expected",
        "full_tree", "mixture", "soft_decision_tree",
    ),
    "dynanet.mechanisms.spatial_skip": ("SpatialBudget", "SpatialSkip", "anneal_bounds"),
    "dynanet.mechanisms.token_drop": (
        "ClassAttention", "RankScorer", "TokenDistillation", "TokenDrop", "TokenPredictor", "TokenRatio",
        "TokenScorer", "WithTeacher",
    ),
    "dynanet.mechanisms.token_halting": (
        "FirstEntry", "HaltingDepth", "TokenHalting", "TokenPonderCost", "blocks_taken",
    ),
    "dynanet.mechanisms.token_merge": ("TokenMerge",),
    "dynanet.mechanisms.update_skip": ("Update", "UpdateCost", "UpdateSkip"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import the file of a public name."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
