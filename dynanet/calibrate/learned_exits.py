"""Learned exits on a frozen network: gates (JEI-DNN) and a schedule under a budget (EENet), fitted on a Table.

All that is read is what `tabulate(..., keep_logits=True)` saw of held-out data: no gradient reaches the network. What
is fitted is a `Confidence`, so thresholds, sessions, traces and prices work as with any other.

    table = tabulate(model, held_out, cost, keep_logits=True)
    frontier = learned(Frontier(model, table), fit_gates(table, cost_weight(table, budget)))
    small = frontier.at(budget)
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dynanet.calibrate.budgeted import outcome, thresholds_for_share
from dynanet.calibrate.frontier import Frontier, apply, places_of
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.calibrate.table import ExitTable, halt_of
from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError, ConfigError, DataError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.gates.confidence import Confidence, LearnedGate, LearnedScore, MaxProbability, PerExit

DECAY = 1e-2  # ridge on standardised weights, per sample: few held-out samples leave little to learn
ROUNDS = 3  # of scores and assignment, each the other's premise
SOFTNESS = 0.1  # of the assignment that weighs samples, in units of probability


def fit_gates(table: ExitTable, weight: float, *, decay: float = DECAY) -> PerExit:
    """Gates that tell whether a sample's best exit lies here or earlier (JEI-DNN: arXiv:2310.09163).

    Best is the exit of the least cross-entropy + weight * macs / macs of the last exit. Each gate is a logistic
    regression, so the fit has one answer. A gate at 0 follows the paper's rule (leave if that is likelier best);
    calibrated thresholds suit any budget.

    Args:
        table: of held-out data, with logits and labels.
        weight: what the last exit may cost in nats of cross-entropy; `cost_weight` finds one for a budget.
        decay: ridge on the weights.

    Returns:
        One `LearnedGate` per exit but the last. Where leaving is always best, or never, it keeps the order of max
        probability.

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
    """The weight at which the best exits cost the budget in the mean; for `fit_gates`.

    Best exits are known in hindsight only, so gates spend another amount; thresholds settle it.

    Args:
        table: of held-out data, with logits and labels.
        budget: with `macs`.

    Raises:
        BudgetError: without `macs`, or below what the cheapest exit costs.
        DataError: a table without logits or labels.
    """
    return _assigned(-_losses(table), torch.from_numpy(_cost(table)), _bound(table, budget))[0]


def fit_scores(table: ExitTable, budget: Budget, *, decay: float = DECAY) -> PerExit:
    """Score functions that tell whether an answer is right, for samples that are likely to leave there under a budget.

    EENet (arXiv:2301.07099) trains scores and assignment together; here they take turns: scores by weighted
    logistic regression, then the assignment of samples to exits with the highest scores whose mean cost is the budget,
    which weighs the samples of the next round.

    Args:
        table: of held-out data, with logits.
        budget: with `macs`.
        decay: ridge on the weights.

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

    The schedule of EENet (arXiv:2301.07099): every exit lets out the share of held-out samples that the
    assignment gave it, those of the highest scores. `with_learned_confidence(frontier, fit_scores(...)).at(budget)`
    takes the same scores and looks for thresholds of the best held-out accuracy instead.

    Raises:
        BudgetError: without `macs`, or below what the cheapest exit costs.
        DataError: a table without logits.
        StructureError: the model has no confidence that could be learned.
    """
    scores, share = _schedule(frontier.table, budget, decay)
    done = with_learned_confidence(frontier, scores)
    thresholds = thresholds_for_share(done.table.scores, share)
    spent = outcome(done.table, thresholds)
    choice = OperatingPoint(budget, thresholds, None, spent.macs, spent.ms, spent.accuracy, spent.share, None, "")
    return apply(done.model, choice)


def with_learned_confidence(frontier: Frontier, confidence: Confidence) -> Frontier:
    """The frontier of a copy of the model that decides by another confidence; no pass over the data.

    Thresholds that are then chosen on the rows the confidence was fitted on are a little hopeful: with few parameters
    that is what the ridge is for; with many, fit on some rows and give the frontier of others (`ExitTable.take`).

    Args:
        frontier: whose table has logits.
        confidence: of `fit_gates` or `fit_scores`, or any other.

    Raises:
        DataError: a table without logits.
        StructureError: the model's halting layer has no confidence, or the given one does not speak of every exit.
    """
    model = copy.deepcopy(frontier.model)
    halt = halt_of(model)[1]
    places, own = places_of(halt).tolist(), dict(halt.named_children()).get("confidence")
    if not isinstance(own, Confidence):
        raise StructureError(f"{type(halt).__name__} has no `confidence` to be learned; EarlyExit and Cascade have one")
    table = frontier.table
    scores, spent = _scored(table, confidence)
    more = np.append(spent - _scored(table, PerExit([own.at(k) for k in places]))[1], 0.0).cumsum()
    table = replace(
        table, scores=scores, macs=table.macs + more, worst=None if table.worst is None else table.worst + more
    )
    every: list[Confidence] = [MaxProbability() for _ in range(max(places) + 1)]  # where exits are off, nobody asks
    for step, k in enumerate(places):
        every[k] = copy.deepcopy(confidence.at(step))
    placed = PerExit(every).to(next(halt.parameters()).device).train(model.training)
    halt.set_submodule("confidence", placed)
    return Frontier(model, table)


def rescore(table: ExitTable, confidence: Confidence) -> ExitTable:
    """The table of the same model with another confidence, from its logits. Prices stay; `with_learned_confidence` adds
    the scores'.

    Raises:
        DataError: a table without logits.
        StructureError: a confidence that does not speak of every exit.
    """
    return replace(table, scores=_scored(table, confidence)[0])


@torch.no_grad()
def _scored(table: ExitTable, confidence: Confidence) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, K - 1), and the MACs (K - 1,) per sample of making them."""
    logits, memory, scores, macs = _logits(table), None, [], []
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
    asked = np.minimum(np.arange(1, table.exits + 1), table.exits - 1)  # scores that a sample pays for by exit k
    paid = asked * (LearnedScore.measures + logits.shape[-1]) / float(table.mean_macs[-1])
    cost = torch.from_numpy(_cost(table) + paid)
    scores = [LearnedScore(logits.shape[-1]) for _ in range(table.exits)]
    chance, weight = torch.zeros_like(cost), torch.ones_like(cost)
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
    """Samples go to the exits of the greatest worth - price * cost (N, K): the price at which this costs the bound in
    the mean, and the share (K,) of every exit. Where the mean jumps, lots decide between both sides of it.
    """

    def at(power: float) -> tuple[float, np.ndarray]:
        best = (worth - 10**power * cost).argmax(1)
        share = np.bincount(best.numpy(), minlength=worth.shape[1]) / len(worth)
        return cost.gather(1, best[:, None]).mean().item(), share

    low, high = -8.0, 8.0  # powers of ten: from where cost is nothing to where it is all
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[0] > bound else (low, middle)
    (dear, more), (cheap, less) = at(low), at(high)
    lot = min(max((bound - cheap) / (dear - cheap), 0.0), 1.0) if dear > cheap else 0.0
    return float(10**high), lot * more + (1 - lot) * less


def _fit(linear: nn.Linear, features: Tensor, target: Tensor, weight: Tensor, decay: float) -> None:
    """Weighted logistic regression with a ridge, in float64 on standardised features; the map takes the raw ones."""
    if target.all() or not target.any():  # nothing to tell apart: the old order, and all on the side of 0 they are on
        seen = features @ linear.weight[0].detach().double()
        sure = float(np.log1p(len(target)))
        nn.init.constant_(linear.bias, sure - seen.min().item() if target.all() else -sure - seen.max().item())
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
        raise DataError("gates are fitted to losses, and this table has no labels; make one with calibrate.tabulate")
    labels = torch.from_numpy(table.labels)[:, None].expand(-1, table.exits)
    losses = nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.unflatten(0, labels.shape)


def _logits(table: ExitTable) -> Tensor:
    if table.logits is None:
        raise DataError("exits are learned from logits, and this table has none; use tabulate(..., keep_logits=True)")
    if table.exits < 2:
        raise DataError("a table of one exit has nothing to learn; give that of a model with at least two")
    return torch.from_numpy(table.logits)


def _cost(table: ExitTable) -> np.ndarray:
    """(N, K) relative to the mean cost of the last exit."""
    return np.broadcast_to(table.macs / table.mean_macs[-1], table.correct.shape).copy()


def _bound(table: ExitTable, budget: Budget) -> float:
    if budget.macs is None:
        raise BudgetError(f"exits are learned for a mean cost in MACs, and this is {budget}; give Budget(macs=...)")
    if budget.macs < table.mean_macs.min():
        raise BudgetError(
            f"macs={budget.macs:.6g} is below the cheapest exit, {table.mean_macs.min():.6g}; ask for more"
        )
    return budget.macs / float(table.mean_macs[-1])


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} is {value}; expected a number of at least 0")
