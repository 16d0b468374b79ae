"""Shakespeare: the next character from the 16 before, with skipped neurons or experts, beside static networks (`beside.py`).

    python recipes/characters_mechanisms.py train --data DIR        # DIR holds tinyshakespeare.txt
    python recipes/characters_mechanisms.py measure --data DIR

The neural language model of Bengio et al. (JMLR 2003) with two residual feed-forward layers. Where sentences are told
apart by a few words (`text_mechanisms.py`) a quarter of the neurons does as well as all, and no choice of neurons can
help; here every neuron does. The text is cut in its order: the first eight tenths train, a tenth is held out, the last
tenth is tested.
"""

import re
from functools import partial
from pathlib import Path

import torch
from beside import Experiment, Recipe, arguments
from torch import nn

from dynanet import Budget, Gate, convert
from dynanet.gates.expert_rules import BatchCoupledTopK, BiasedTopK
from dynanet.gates.rules import Gumbel, TopK
from dynanet.mechanisms.experts import Experts, RouterScorer, sigmoid_over_kept
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip, moefy
from dynanet.train import Batches, BudgetPenalty, CrossEntropy, LoadBalance, RouterZ, adamw, tighten_budget

CONTEXT, EMBEDDED, WIDTH, HIDDEN, EXPERTS, ACTIVE = 16, 24, 256, 1024, 8, 2


class Residual(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, feed_forward) -> None:
        super().__init__()
        self.norm, self.feed_forward = nn.LayerNorm(WIDTH), feed_forward

    def forward(self, x):
        """(B, WIDTH) to the same."""
        return x + self.feed_forward(self.norm(x))


def static(characters, hidden=HIDDEN):
    """(B, CONTEXT) whole numbers to (B, characters)."""
    return nn.Sequential(
        *(nn.Embedding(characters, EMBEDDED), nn.Flatten(), nn.Linear(CONTEXT * EMBEDDED, WIDTH)),
        *(Residual(feed_forward(hidden)) for _ in range(2)),
        *(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)),
    )


def feed_forward(hidden):
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH))


def neurons(characters):
    """All neurons, in blocks of 16, a quarter of which a context may use."""

    def gated(layer):
        up, activation, down = layer
        blocks = up.out_features // 16
        return NeuronSkip(up, down, Gate(LowRankScorer(WIDTH, blocks), Gumbel(), units=blocks), activation=activation)

    return convert(static(characters), {r".*feed_forward": gated})


def experts(characters, rule=lambda: TopK(ACTIVE), **settings):
    """The neurons in eight experts, two of which a context gets."""

    def routed(layer):
        parts = [feed_forward(HIDDEN // EXPERTS) for _ in range(EXPERTS)]
        return Experts(parts, Gate(RouterScorer(WIDTH, EXPERTS), rule(), units=EXPERTS), **settings)

    return convert(static(characters), {r".*feed_forward": routed})


def shared(characters):
    """One of eight experts for a context, and a ninth for all."""

    def routed(layer):
        parts = [feed_forward(HIDDEN // EXPERTS) for _ in range(EXPERTS + 1)]
        gate = Gate(RouterScorer(WIDTH, EXPERTS), TopK(1), units=EXPERTS)
        return Experts(parts[1:], gate, shared=parts[0])

    return convert(static(characters), {r".*feed_forward": routed})


def converted(batches, trained):
    """MoEfication: the trained network, and a router that names a quarter of its neurons. No weight changes."""
    seen = {name: [] for name, _ in trained.named_modules() if name.endswith("feed_forward")}
    hooks = [
        trained.get_submodule(name).register_forward_pre_hook(lambda module, x, heard=heard: heard.append(x[0]))
        for name, heard in seen.items()
    ]
    with torch.no_grad():
        for _, (x, _) in zip(range(40), batches, strict=False):
            trained.eval()(x)
    for hook in hooks:
        hook.remove()

    def routed(name):
        up, _, down = trained.get_submodule(name)
        return lambda layer: moefy(up, down, torch.cat(seen[name]), keep=HIDDEN // 16 // 4)

    return convert(trained, {re.escape(name): routed(name) for name in seen})


def quarter(model, cost):
    """Cross-entropy, and a budget of a quarter of the gated MACs."""
    budget = BudgetPenalty(Budget(macs=cost.always + 0.25 * (cost.full - cost.always)), cost)
    return CrossEntropy() + 4.0 * budget, (tighten_budget(budget),)


def balanced(model, cost):
    """Cross-entropy, and loads that do not collapse."""
    return CrossEntropy() + 0.01 * LoadBalance() + 0.001 * RouterZ(), ()


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "characters_mechanisms", epochs=2)
    text = (Path(args.data) / "tinyshakespeare.txt").read_text()
    known = sorted(set(text))
    ids = torch.tensor([known.index(c) for c in text])

    def part(first, last, batch=256, **more):
        windows = ids[round(first * len(ids)) : round(last * len(ids))].unfold(0, CONTEXT + 1, 1)
        return Batches(torch.utils.data.TensorDataset(windows[:, :-1], windows[:, -1]), batch, **more)

    sized = partial(static, len(known))
    Experiment(
        "characters_mechanisms", "tiny Shakespeare, the next of 65 characters",
        static={f"hidden {n}": Recipe(partial(sized, n)) for n in (64, 256, HIDDEN)},
        dynamic={
            "neuron_skip": Recipe(partial(neurons, len(known)), quarter),
            "experts": Recipe(partial(experts, len(known)), balanced),
            "switch": Recipe(partial(experts, len(known), lambda: TopK(1)), balanced),
            "experts_shared": Recipe(partial(shared, len(known)), balanced),
            "experts_by_bias": Recipe(
                partial(experts, len(known), lambda: BiasedTopK(ACTIVE, EXPERTS), mix=sigmoid_over_kept)
            ),
            "experts_limited": Recipe(partial(experts, len(known), lambda: BatchCoupledTopK(ACTIVE, 1.25)), balanced),
            "moefied": Recipe(partial(converted, part(0, 0.8, shuffle=True, seed=args.seed)), None, start=f"hidden {HIDDEN}"),
        },
        train=part(0, 0.8, shuffle=True, drop_last=True, seed=args.seed), held_out=part(0.8, 0.9), test=part(0.9, 1),
        samples=ids[-4096 - CONTEXT:].unfold(0, CONTEXT, 1)[::16], optimizer=adamw(2e-3, weight_decay=0.01),
    ).run(args)  # fmt: skip
