"""Splitting a trained ReLU FFN into blocks of neurons, and fitting a router that ranks the blocks for an input.

MoEfication (Zhang et al. 2022, arXiv:2110.01786): in a trained ReLU network most neurons are 0 for most inputs, and
neurons that are active together form blocks. `mechanisms.neuron_skip.moefy` combines the two steps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.errors import ConfigError


@torch.no_grad()
def balanced_clusters(weight: Tensor, block: int, *, steps: int = 20, seed: int = 0) -> Tensor:
    """An order of the neurons in which every `block` consecutive ones have similar incoming weights.

    Balanced k-means on the unit vectors of the incoming weights (the paper's "parameter clustering").
    Neurons are assigned in rounds: each requests the nearest centre with room, and a centre takes the nearest of its
    requests. A heuristic: it finds a good assignment, not the best one.

    Args:
        weight: (neurons, inputs).
        block: neurons per cluster.
        steps: maximum number of rounds of k-means; it ends when nothing changes.
        seed: of the first centres.

    Returns:
        (neurons,) indices, cluster after cluster; ascending inside one.

    Raises:
        ConfigError: a block that does not divide the neurons.
    """
    neurons = weight.shape[0]
    if block < 1 or neurons % block:
        raise ConfigError(f"block must divide the {neurons} neurons, got {block}")
    clusters = neurons // block
    points = functional.normalize(weight.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(neurons, generator=generator)[:clusters].to(weight.device)]
    chosen = torch.full((neurons,), -1, device=weight.device)
    for _ in range(steps):
        before, chosen = chosen, _assign(torch.cdist(points, centres), block)
        if torch.equal(before, chosen):
            break
        centres = torch.zeros_like(centres).index_add(0, chosen, points) / block
    return chosen.argsort(stable=True)


def fit_router(
    scorer: nn.Module,
    inputs_ND: Tensor,
    active: Tensor,
    *,
    epochs: int = 20,
    batch: int = 256,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Train a scorer to rank blocks by their activation.

    Cross-entropy between the softmax of the scores and the blocks' shares of a row's activation, so that blocks with
    large shares rank first (the paper's router also learns sums of activations). Rows without activation are left out.

    Args:
        scorer: (N, D) to scores (N, blocks); changed in place.
        inputs_ND: inputs of the FFN.
        active: (N, blocks), sums of every block's ReLU activations.
        epochs: passes over the inputs.
        batch: rows per step.
        learning_rate: of Adam, decaying to 0 by a cosine.
        seed: of the order of rows.

    Returns:
        The mean loss of every epoch.

    Raises:
        ConfigError: no row with an active neuron, or not one row of `active` per input.
    """
    if inputs_ND.shape[0] != active.shape[0]:
        raise ConfigError(f"{inputs_ND.shape[0]} inputs and activations of {active.shape[0]}; expected as many")
    some = active.sum(1) > 0
    inputs = inputs_ND[some].detach()
    share = functional.normalize(active[some].detach(), p=1, dim=1)
    if not inputs.shape[0]:
        raise ConfigError("no input activates a neuron; give more inputs")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(scorer.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-inputs.shape[0] // batch))
    losses = []
    with torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(inputs.shape[0], generator=generator).to(inputs.device).split(batch):
                loss = functional.cross_entropy(scorer(inputs[rows]), share[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * rows.shape[0]
            losses.append(total / inputs.shape[0])
    return losses


def _assign(distance: Tensor, room: int) -> Tensor:
    """(points, centres) distances to the centre of every point, `room` points for each."""
    points, centres = distance.shape
    chosen = torch.full((points,), -1, device=distance.device)
    free = torch.full((centres,), room, device=distance.device)
    waiting = torch.arange(points, device=distance.device)
    while waiting.numel():
        near, wanted = distance[waiting].masked_fill(free == 0, torch.inf).min(1)
        order = near.argsort(stable=True)
        order = order[wanted[order].argsort(stable=True)]  # by centre, the nearest first
        requests = torch.bincount(wanted, minlength=centres)
        rank = torch.arange(len(order), device=order.device) - (requests.cumsum(0) - requests)[wanted[order]]
        taken = order[rank < free[wanted[order]]]
        chosen[waiting[taken]] = wanted[taken]
        free = free - torch.bincount(wanted[taken], minlength=centres)
        waiting = waiting[chosen[waiting] < 0]
    return chosen
