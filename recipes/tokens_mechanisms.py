"""CIFAR-10: a vision transformer whose tokens become fewer, beside static ones of the same recipe (`beside.py`).

    python recipes/tokens_mechanisms.py train --data DIR          # or a name of STATIC or DYNAMIC, or several
    python recipes/tokens_mechanisms.py measure --data DIR
    python recipes/tokens_mechanisms.py speed --data DIR          # on a quiet machine

Trained from scratch on patches of 4 x 4 pixels: 64 tokens and a class token, six blocks. What begins with the static
network of full width goes on with its weights: `..._as_is` without any training, `dynamic_vit_taught` as its student.
In float32: attention's backward pass in bfloat16 is slower on a CPU. DIR holds the parquet files of the Hugging Face hub's
`cifar10`.
"""

from functools import partial

import torch
from beside import Experiment, Recipe, arguments

from dynanet import Gate, zoo
from dynanet.experiment import Data
from dynanet.gates.rules import StraightThrough, Threshold
from dynanet.mechanisms.token_drop import RankScorer, TokenDistillation, TokenDrop, TokenRatio, WithTeacher
from dynanet.mechanisms.token_halting import HaltingDepth, TokenPonderCost
from dynanet.train import CrossEntropy, adamw

WIDTH, HEAD = 64, 16  # features of a token, and of a head
DROPS, SHARES = (1, 3), (0.7, 0.49)  # in front of, or in, which blocks; what is left of all tokens after each
MERGE = 5  # tokens less after each block
SIMILARITY = 0.8  # cosine above which tokens are merged


def network(build, width=WIDTH, **settings):
    """One of the zoo's, for these images."""
    return build(num_classes=10, width=width, heads=width // HEAD, **settings)


def from_static(build, static, **settings):
    """The same weights, with tokens that become fewer."""
    return network(build, **settings).inherit(static)


dynamic_vit = partial(zoo.dynamic_vit, drops=DROPS)
evit = partial(zoo.evit, drops=DROPS, share=SHARES[0])


def per_image():
    """Trained as it will run: hard in training too, or a sampled share would be met by tokens that are all kept later."""
    model = network(dynamic_vit)
    for layer in drops(model):
        layer.gate.rule = StraightThrough()
    return model


def fixed_share(model):
    """DynamicViT's own inference: the best 0.7 of the tokens, of every image as many."""
    for layer in drops(model):
        layer.gate = Gate(RankScorer(layer.gate.scorer), Threshold(1 - SHARES[0]))
    return model


def drops(model):
    return [layer for layer in model.modules() if isinstance(layer, TokenDrop)]


def taught(static):
    """DynamicViT's own training, with samples of its gates: it begins as its teacher."""
    return WithTeacher(from_static(dynamic_vit, static), static)


def ratio(model, cost):
    """Cross-entropy, and shares of tokens that the batch keeps on average: images may differ."""
    return CrossEntropy() + 2.0 * TokenRatio(SHARES, per_sample=False), ()


def distilled(model, cost):
    """The weights of the paper: shares for every image, and half as much for the teacher's logits and tokens."""
    return CrossEntropy() + 2.0 * TokenRatio(SHARES) + TokenDistillation(0.5, 0.5), ()


def ponder(model, cost):
    """Cross-entropy, a price for every block, and a depth around which tokens halt."""
    return CrossEntropy() + 0.005 * TokenPonderCost() + 0.1 * HaltingDepth(3.0), ()


STATIC = {f"static-{width}": Recipe(partial(network, zoo.token_vit, width)) for width in (32, 48, WIDTH)}
DYNAMIC = {
    "dynamic_vit": Recipe(per_image, ratio),
    "dynamic_vit_taught": Recipe(taught, distilled, start=f"static-{WIDTH}", epochs=2, optimizer=adamw(2e-4)),
    "dynamic_vit_share": Recipe(fixed_share, None, start="dynamic_vit_taught"),
    "evit": Recipe(partial(network, evit)),
    "evit_as_is": Recipe(partial(from_static, evit), None, start=f"static-{WIDTH}"),
    "a_vit": Recipe(partial(network, zoo.a_vit), ponder),
    "tome": Recipe(partial(network, zoo.tome, merge=MERGE)),
    "tome_as_is": Recipe(partial(from_static, zoo.tome, merge=MERGE), None, start=f"static-{WIDTH}"),
    "tome_similar_as_is": Recipe(
        partial(from_static, zoo.tome, merge=None, similarity=SIMILARITY), None, start=f"static-{WIDTH}"
    ),
}


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "tokens_mechanisms", epochs=4)
    problem = Data("parquet", place=args.data, held_out=5000).open(batch=128, seed=args.seed)
    samples = torch.cat([x for (x, _), _ in zip(problem.test, range(2), strict=False)])
    Experiment(
        "tokens_mechanisms", problem.title, STATIC, DYNAMIC, problem.train, problem.held_out, problem.test, samples,
        adamw(1e-3, weight_decay=0.05),
    ).run(args)  # fmt: skip
