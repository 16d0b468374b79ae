"""Learned exits on a frozen network: gates (JEI-DNN) and a schedule under a budget (EENet), fitted on a table.

They are fitted to the logits of `tabulate(..., keep_logits=True)`; no gradient reaches the network. The result is a
`Confidence`, so thresholds, sessions, traces and costs work as with any other.

    table = tabulate(model, held_out, cost, keep_logits=True)
    frontier = with_learned_confidence(Frontier(model, table), fit_gates(table, cost_weight(table, budget)))
    small = frontier.at(budget)
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dynanet.calibrate.budgeted import thresholds_for_share
from dynanet.calibrate.frontier import Frontier, apply, threshold_exits
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.calibrate.table import ExitTable, halt_of
from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError, ConfigError, DataError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.gates.confidence import Confidence, LearnedGate, LearnedScore, MaxProbability, PerExit

DECAY = 1e-2  # ridge penalty on standardised weights, per sample
ROUNDS = 3  # of alternating between scores and assignment
SOFTNESS = 0.1  # temperature of the assignment that weighs samples, in units of probability


def fit_gates(table: ExitTable, weight: float, *, decay: float = DECAY) -> PerExit:
    """Gates that predict whether a sample's best exit is this one or an earlier one (JEI-DNN: arXiv:2310.09163).

    The best exit minimises cross-entropy + weight * macs / macs of the last exit. Each gate is a logistic regression,
    so the fit is unique. Thresholds of 0 are the paper's rule (leave if that is more likely best); calibrated
    thresholds suit any budget.

    Args:
        table: of held-out data, with logits and labels.
        weight: cost of the last exit in nats of cross-entropy; `cost_weight` finds one for a budget.
        decay: ridge penalty on the weights.

    Returns:
        One `LearnedGate` per exit but the last. Where leaving is always best, or never, it keeps the order of the
        maximum probability.

    Raises:
        DataError: a table without logits or labels.
        ConfigError: a negative weight or decay.
    """
    _check(weight=weight, decay=decay)
    logits, best = _logits(table), _best(table, weight)
    gates = [LearnedGate() for _ in range(table.exits - 1)]
    for k, gate in enumerate(gates):
        _fit(gate.linear, gate.features(logits[:, k].double()), best <= k, torch.ones(table.samples), decay)
    return PerExit(gates)


def cost_weight(table: ExitTable, budget: Budget) -> float:
    """The weight for `fit_gates` at which the best exits have the budget as their mean cost.

    Gates only predict the best exits, so their own mean cost differs; calibrate thresholds for the budget.

    Args:
        table: of held-out data, with logits and labels.
        budget: with `macs`.

    Raises:
        BudgetError: without `macs`, or below the cheapest exit.
        DataError: a table without logits or labels.
    """
    return _assigned(-_losses(table), torch.from_numpy(_cost(table)), _bound(table, budget))[0]


def fit_scores(table: ExitTable, budget: Budget, *, decay: float = DECAY) -> PerExit:
    """Score functions that predict whether an exit is correct, weighted to samples likely to leave there.

    EENet (arXiv:2301.07099) trains scores and assignment together; here they alternate: scores by weighted logistic
    regression, then the assignment of samples to exits with the highest scores whose mean cost is the budget, which
    weighs the samples of the next round.

    Args:
        table: of held-out data, with logits.
        budget: with `macs`.
        decay: ridge penalty on the weights.

    Returns:
        One `LearnedScore` per exit but the last.

    Raises:
        BudgetError: without `macs`, or below what the cheapest exit costs.
        DataError: a table without logits.
        ConfigError: a negative decay.
    """
    return _schedule(table, budget, decay)[0]


def schedule(frontier: Frontier, budget: Budget, *, decay: float = DECAY) -> nn.Module:
    """A copy of the model, in eval mode, with learned scores and the thresholds of the learned assignment.

    The schedule of EENet (arXiv:2301.07099): at every exit the share of held-out samples that the assignment gave it
    leaves, those of the highest scores. `with_learned_confidence(frontier, fit_scores(...)).at(budget)` takes the same
    scores and searches thresholds of the best held-out accuracy instead.

    Raises:
        BudgetError: without `macs`, or below the cheapest exit.
        DataError: a table without logits.
        StructureError: the model has no confidence to replace.
    """
    scores, share = _schedule(frontier.table, budget, decay)
    learned = with_learned_confidence(frontier, scores)
    thresholds = thresholds_for_share(learned.table.scores, share)
    return apply(learned.model, OperatingPoint.of(learned.table, budget, thresholds))


def with_learned_confidence(frontier: Frontier, confidence: Confidence) -> Frontier:
    """The frontier of a copy of the model that decides by another confidence; no pass over the data.

    Thresholds calibrated on the rows that the confidence was fitted on are slightly optimistic. The ridge penalty makes
    up for it with few parameters; with many, fit on some rows and give the frontier of others (`ExitTable.take`).

    Args:
        frontier: its table has logits.
        confidence: of `fit_gates` or `fit_scores`, or any other.

    Raises:
        DataError: a table without logits.
        StructureError: the model's halting layer has no confidence, or the given one does not score every exit.
    """
    model = copy.deepcopy(frontier.model)
    halt = halt_of(model)[1]
    exits = threshold_exits(halt)
    own = dict(halt.named_children()).get("confidence")
    if not isinstance(own, Confidence):
        raise StructureError(f"{type(halt).__name__} has no `confidence` to replace; EarlyExit and Cascade have one")
    table = frontier.table
    scores, spent = _scored(table, confidence)
    before = _scored(table, PerExit([own.at(k) for k in exits]))[1]
    more = np.append(spent - before, 0.0).cumsum()  # MACs that the new scores add up to every exit
    table = replace(
        table, scores=scores, macs=table.macs + more, worst=None if table.worst is None else table.worst + more
    )
    per_exit: list[Confidence] = [MaxProbability() for _ in range(max(exits) + 1)]  # unused where exits are off
    for step, k in enumerate(exits):
        per_exit[k] = copy.deepcopy(confidence.at(step))
    placed = PerExit(per_exit).to(next(halt.parameters()).device).train(model.training)
    halt.set_submodule("confidence", placed)
    return Frontier(model, table)


def rescore(table: ExitTable, confidence: Confidence) -> ExitTable:
    """The table of the same model with the scores of another confidence, computed from its logits.

    Costs stay the same; `with_learned_confidence` adds those of the scores.

    Raises:
        DataError: a table without logits.
        StructureError: a confidence that does not score every exit.
    """
    return replace(table, scores=_scored(table, confidence)[0])


@torch.no_grad()
def _scored(table: ExitTable, confidence: Confidence) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, K - 1), and the MACs (K - 1,) per sample of computing them."""
    logits = _logits(table)
    memory = None
    scores = []
    macs = []
    for k in range(table.exits - 1):
        with CountMacs() as count:
            memory = confidence.at(k).remember(logits[:, k], memory)
            scores.append(confidence.at(k)(logits[:, k], memory).double().cpu())
        macs.append(count.total / table.samples)
    return torch.cat(scores, 1).numpy(), np.array(macs)


def _schedule(table: ExitTable, budget: Budget, decay: float) -> tuple[PerExit, np.ndarray]:
    """Scores, and the share (K,) of the samples that the assignment gives every exit."""
    _check(decay=decay)
    bound = _bound(table, budget)
    logits, correct = _logits(table), torch.from_numpy(table.correct)
    scored = np.minimum(np.arange(1, table.exits + 1), table.exits - 1)  # scores computed up to exit k
    paid = scored * (LearnedScore.measures + logits.shape[-1]) / float(table.mean_macs[-1])
    cost = torch.from_numpy(_cost(table) + paid)
    scores = [LearnedScore(logits.shape[-1]) for _ in range(table.exits)]
    chance = torch.zeros_like(cost)
    weight = torch.ones_like(cost)
    for _ in range(ROUNDS):
        memory = None
        for k, score in enumerate(scores):
            features = score.features(logits[:, k], memory).double()
            _fit(score.linear, features, correct[:, k], weight[:, k], decay)
            with torch.no_grad():
                memory = score.remember(logits[:, k], memory)
                chance[:, k] = memory[1][:, 0].sigmoid()
        price, share = _assigned(chance, cost, bound)
        weight = ((chance - price * cost) / SOFTNESS).softmax(1)
        weight = weight / weight.mean(0).clamp(min=1e-6)
    return PerExit(scores[:-1]), share


def _assigned(worth: Tensor, cost: Tensor, bound: float) -> tuple[float, np.ndarray]:
    """Assign every sample to the exit of the greatest worth - price * cost, both (N, K).

    Returns:
        The price at which the mean cost is the bound, and the share (K,) of every exit. Where the mean cost jumps over
        the bound, the shares on both sides of the jump are mixed.
    """

    def at(power: float) -> tuple[float, np.ndarray]:
        best = (worth - 10**power * cost).argmax(1)
        share = np.bincount(best.numpy(), minlength=worth.shape[1]) / len(worth)
        return cost.gather(1, best[:, None]).mean().item(), share

    low, high = -8.0, 8.0  # powers of ten: from where cost does not matter to where nothing else does
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[0] > bound else (low, middle)
    costly, costly_share = at(low)
    cheap, cheap_share = at(high)
    mix = min(max((bound - cheap) / (costly - cheap), 0.0), 1.0) if costly > cheap else 0.0
    return float(10**high), mix * costly_share + (1 - mix) * cheap_share


def _fit(linear: nn.Linear, features: Tensor, target: Tensor, weight: Tensor, decay: float) -> None:
    """Weighted ridge logistic regression in float64 on standardised features; `linear` then takes the raw ones."""
    if target.all() or not target.any():  # a single class: keep the weights, and put all scores on its side of 0
        seen = features @ linear.weight[0].detach().double()
        margin = float(np.log1p(len(target)))
        nn.init.constant_(linear.bias, margin - seen.min().item() if target.all() else -margin - seen.max().item())
        return
    target, weight = target.double(), weight.double()
    mean, std = features.mean(0), features.std(0)
    x = (features - mean) / torch.where(std > 1e-9, std, torch.inf)
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        misses = nn.functional.binary_cross_entropy_with_logits(x @ w[1:] + w[0], target, weight=weight)
        total = misses + decay / 2 * w[1:].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    with torch.no_grad():
        raw = w[1:] / torch.where(std > 1e-9, std, torch.inf)
        linear.weight.copy_(raw[None])
        linear.bias.copy_(w[0] - raw @ mean)


def _best(table: ExitTable, weight: float) -> Tensor:
    """(N,) the exit of the least cross-entropy + weight * relative cost."""
    return (_losses(table) + weight * torch.from_numpy(_cost(table))).argmin(1)


def _losses(table: ExitTable) -> Tensor:
    """(N, K) cross-entropies, float64."""
    logits = _logits(table)
    if table.labels is None:
        raise DataError("gates are fitted to labels, and this table has none; make one with calibrate.tabulate")
    labels = torch.from_numpy(table.labels)[:, None].expand(-1, table.exits)
    losses = nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.unflatten(0, labels.shape)


def _logits(table: ExitTable) -> Tensor:
    if table.logits is None:
        raise DataError("exits are learned from logits, and this table has none; use tabulate(..., keep_logits=True)")
    if table.exits < 2:
        raise DataError("learned exits need a table of at least two exits, got one")
    return torch.from_numpy(table.logits)


def _cost(table: ExitTable) -> np.ndarray:
    """(N, K) relative to the mean cost of the last exit."""
    return np.broadcast_to(table.macs / table.mean_macs[-1], table.correct.shape).copy()


def _bound(table: ExitTable, budget: Budget) -> float:
    if budget.macs is None:
        raise BudgetError(f"exits are learned for a mean cost in MACs, got {budget}; give Budget(macs=...)")
    if budget.macs < table.mean_macs.min():
        raise BudgetError(
            f"macs must be at least {table.mean_macs.min():.6g}, the cheapest exit; got {budget.macs:.6g}"
        )
    return budget.macs / float(table.mean_macs[-1])


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be at least 0 and finite, got {value}")
