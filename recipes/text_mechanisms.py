"""TREC or SST-2: a small transformer with experts or skipped neurons beside static ones of the same recipe (`beside.py`).

    python recipes/text_mechanisms.py train --data DIR       # the files of one set: TREC.train.all, TREC.test.all
    python recipes/text_mechanisms.py measure --data DIR

Trained from scratch on the words of the training sentences; a tenth of these is held out.
"""

import re
from functools import partial
from pathlib import Path

import torch
from beside import Experiment, Recipe, arguments
from text_sets import trec
from torch import nn

from dynanet import Budget, Gate, convert, zoo
from dynanet.data.text import Sentences, Vocabulary
from dynanet.gates.rules import Gumbel
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip, moefy
from dynanet.train import Batches, BudgetPenalty, CrossEntropy, LoadBalance, RouterZ, adamw, tighten_budget

LONGEST, WIDTH, HIDDEN, ACTIVE, EXPERTS = 40, 128, 256, 2, 8


def encoder(vocabulary, classes, experts=0, hidden=HIDDEN):
    """Four blocks; with experts in two of them."""
    return zoo.moe_encoder(
        num_classes=classes, vocabulary=vocabulary, longest=LONGEST, width=WIDTH, hidden=hidden, experts=experts,
        active=ACTIVE,
    )  # fmt: skip


def neurons(vocabulary, classes):
    """The static network with four times the neurons, a quarter of which a token may use."""
    static = encoder(vocabulary, classes, hidden=4 * HIDDEN)

    def gated(feed_forward):
        up, activation, down = feed_forward
        blocks = up.out_features // 16
        gate = Gate(LowRankScorer(WIDTH, blocks), Gumbel(), units=blocks)
        return NeuronSkip(up, down, gate, activation=activation)

    return convert(static, {r"blocks\.\d\.feed_forward": gated})


def converted(batches, trained):
    """MoEfication: the trained static network with four times the neurons, a quarter of which a router names per token.

    No weight changes; routers learn from what the training sentences' tokens bring about.
    """
    seen = {f"blocks.{k}.feed_forward": [] for k in range(len(trained.blocks))}
    there = []  # the tokens of a batch that are no padding

    def listen(name):
        return lambda module, x: seen[name].append(x[0][there[-1]])

    hooks = [trained.get_submodule(name).register_forward_pre_hook(listen(name)) for name in seen]
    with torch.no_grad():
        for ids, _ in batches:
            there.append(nn.functional.pad(ids != 0, (1, 0), value=True))
            trained.eval()(ids)
    for hook in hooks:
        hook.remove()

    def routed(name):
        up, _, down = trained.get_submodule(name)
        return lambda feed_forward: moefy(up, down, torch.cat(seen[name]), keep=up.out_features // 4 // 16)

    return convert(trained, {re.escape(name): routed(name) for name in seen})


def quarter(model, cost):
    """Cross-entropy, and a budget of a quarter of the gated MACs."""
    budget = BudgetPenalty(Budget(macs=cost.always + 0.25 * (cost.full - cost.always)), cost)
    return CrossEntropy() + 4.0 * budget, (tighten_budget(budget),)


def balanced(model, cost):
    """Cross-entropy, and loads that do not collapse."""
    return CrossEntropy() + 0.01 * LoadBalance() + 0.001 * RouterZ(), ()


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "text_mechanisms", epochs=8)
    torch.manual_seed(0)
    parts = trec(Path(args.data))
    vocabulary = Vocabulary(parts["train"][0], least=2)
    classes = int(parts["train"][1].max()) + 1

    def sentences(part):
        return Sentences(*parts[part], vocabulary, longest=LONGEST)

    def batches(part, **more):
        return Batches(sentences(part), 32, collate=Sentences.collate, **more)

    sized = partial(encoder, len(vocabulary), classes)
    Experiment(
        "text_mechanisms", "TREC, 6 classes",
        static={f"hidden x {n}": Recipe(partial(sized, hidden=int(n * HIDDEN))) for n in (0.25, 1, 4)},
        dynamic={
            "experts": Recipe(partial(sized, experts=EXPERTS), balanced),
            "neuron_skip": Recipe(partial(neurons, len(vocabulary), classes), quarter),
            "moefied": Recipe(partial(converted, batches("train")), None, start="hidden x 4"),
        },
        train=batches("train", shuffle=True, drop_last=True, seed=args.seed), held_out=batches("held_out"),
        test=batches("test"),
        samples=torch.stack([ids[:6] for ids in sentences("test").ids if len(ids) >= 6]), optimizer=adamw(1e-3, weight_decay=0.1),
        sample=lambda ids: ids[(ids != 0).sum(1).argmax()][None],
    ).run(args)  # fmt: skip
