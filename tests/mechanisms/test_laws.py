"""Every mechanism is held to the laws here: one line in LAYERS."""

import pytest
import torch
from torch import nn

from dynanet.core.gate import Gate
from dynanet.gates.rules import Gumbel, Soft, StraightThrough, Threshold, TopK
from dynanet.gates.scorers import PooledScorer, TileScorer
from dynanet.mechanisms.channel_skip import ChannelSkip
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.position_halting import PositionHalting
from dynanet.mechanisms.scene_exit import SceneExit
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.mechanisms.token_drop import TokenDrop
from dynanet.mechanisms.update_skip import UpdateSkip
from dynanet.ops.tiles import Tiles
from dynanet.ops.tokens import Tokens, attend
from dynanet.testing import check_dynamic, check_nested

D, C = 12, 8


def mlp():
    return nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))


def row_gate(rule=None):
    return Gate(nn.Linear(D, 1), rule or StraightThrough())


def conv(kernel, inside=C, outside=C, dilation=1):
    return nn.Conv2d(inside, outside, kernel, padding=dilation * (kernel // 2), dilation=dilation)


def warm(model):
    """Batch norms as after training: a constant input no longer stays constant, biases leak where masks are wrong."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.bias.data.normal_()
    return model


def bottleneck():
    return nn.Sequential(
        conv(1, C, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        conv(3, 4, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        conv(1, 4, C),
        nn.BatchNorm2d(C),
    )


def cell():
    return nn.Sequential(nn.ReLU(), conv(3), nn.ReLU(), conv(3))


def early_exit(wrap, confidence=None, threshold=-1.3):
    model = EarlyExit([wrap(mlp()) for _ in range(4)], [nn.Linear(D, 5) for _ in range(4)], confidence)
    model.thresholds.fill_(threshold)
    return model


def residual(wrap):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(), conv(3), nn.BatchNorm2d(C))

        def forward(self, x):
            return (x + self.branch(x)).relu()

    return Residual()


def layer_skip_image(wrap):
    return warm(LayerSkip(residual(wrap), Gate(PooledScorer(C, hidden=4, bias=0.0), Gumbel())))


def shared_cell(wrap):
    """One layer called three times: a trace hears it three times."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = LayerSkip(wrap(mlp()), row_gate())

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            return x

    return Shared()


class Block(nn.Module):
    """A pre-norm transformer block on Tokens; the feed-forward part may be any layer from rows to rows."""

    def __init__(self, feed_forward):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out, self.feed_forward = nn.Linear(D, 3 * D), nn.Linear(D, D), feed_forward

    def forward(self, tokens):
        attended = attend(*self.qkv(self.norm1(tokens.x)).chunk(3, -1), tokens, heads=2)
        x = tokens.x + self.out(attended)
        return tokens._replace(x=x + self.feed_forward(self.norm2(x)))


class SmallViT(nn.Module):
    def __init__(self, *body):
        super().__init__()
        self.cls, self.body, self.head = nn.Parameter(torch.randn(1, 1, D)), nn.Sequential(*body), nn.Linear(D, 4)

    def forward(self, x_BTD):
        x = torch.cat([self.cls.expand(x_BTD.shape[0], -1, -1), x_BTD], 1)
        return self.head(self.body(Tokens(x)).x[:, 0])


def drop_twice(wrap):
    inner = TokenDrop(nn.Sequential(Block(wrap(mlp())), Block(mlp())), row_gate())
    return SmallViT(Block(mlp()), TokenDrop(nn.Sequential(Block(wrap(mlp())), inner), row_gate()))


def channels(wrap):
    gates = [
        Gate(PooledScorer(C, 4, hidden=0, bias=0.0), rule, units=4) for rule in (Threshold(), TopK(2), Threshold())
    ]
    return ChannelSkip([conv(3), conv(3), nn.Conv2d(C, 2 * C, 3, stride=2)], gates, groups=4)


def images(height, width, batch=5):
    return torch.randn(batch, C, height, width)


def spatial(height, width, tile, halo=1, branch=None):
    return (
        lambda wrap: warm(
            SpatialSkip((branch or bottleneck)(), Gate(TileScorer(C, tile), StraightThrough()), Tiles(tile, halo))
        ),
        images(height, width),
    )


class OfPatches(nn.Module):
    """Flattens a patch, so that units from rows to rows fit behind it."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(C * 9, D)

    def forward(self, x):
        return self.map(x.flatten(1)).relu()


def scene_exit(wrap):
    rest = EarlyExit([nn.Sequential(OfPatches(), wrap(mlp())), wrap(mlp())], [nn.Linear(D, 3), nn.Linear(D, 3)])
    rest.thresholds.fill_(0.1)
    return SceneExit(nn.Sequential(conv(1), nn.ReLU()), nn.Linear(C, 3), rest, patch=3, threshold=0.0)


def rows_to_rows(wrap):
    return LayerSkip(wrap(mlp()), row_gate())


LAYERS = {
    "early exit": (early_exit, torch.randn(7, D)),
    "layer skip, samples": (rows_to_rows, torch.randn(7, D)),
    "layer skip, tokens": (lambda wrap: LayerSkip(wrap(mlp()), row_gate(Soft())), torch.randn(4, 5, D)),
    "layer skip, images": (layer_skip_image, images(6, 7)),
    "layer skip, shared cell": (shared_cell, torch.randn(7, D)),
    "skip in skip in skip": (
        lambda wrap: rows_to_rows(
            lambda u: nn.Sequential(u, rows_to_rows(lambda v: nn.Sequential(v, rows_to_rows(wrap))))
        ),
        torch.randn(9, D),
    ),
    "spatial skip, tile 4 of 13x9": spatial(13, 9, 4),
    "spatial skip, tile 8 of 3x5": spatial(3, 5, 8),
    "spatial skip, positions of 7x7": spatial(7, 7, 1),
    "spatial skip, two convolutions": spatial(9, 10, 4, 2, lambda: nn.Sequential(conv(3), nn.ReLU(), conv(3))),
    "spatial skip, dilated": spatial(9, 10, 3, 2, lambda: conv(3, dilation=2)),
    "position halting, positions": (
        lambda wrap: PositionHalting([cell() for _ in range(3)], TileScorer(C, 1), Tiles(1, 2), eps=0.3),
        images(5, 6, 3),
    ),
    "position halting, tiles": (
        lambda wrap: PositionHalting([cell() for _ in range(4)], TileScorer(C, 3), Tiles(3, 2), eps=0.3),
        images(7, 8, 3),
    ),
    "token drop, ragged": (drop_twice, torch.randn(4, 9, D)),
    "mixture of depths": (
        lambda wrap: SmallViT(
            Block(mlp()), TokenDrop(Block(wrap(mlp())), row_gate()), Block(mlp()), TokenDrop(Block(mlp()), row_gate())
        ),
        torch.randn(4, 7, D),
    ),
    "channel skip, in x out": (channels, images(6, 6)),
    "scene exit": (scene_exit, images(4, 5, 3)),
    "update skip": (lambda wrap: UpdateSkip(nn.GRUCell(D, 6), D, 6), torch.randn(5, 6, D)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_laws(name):
    torch.manual_seed(0)
    make, example = LAYERS[name]
    model = make(lambda unit: unit)
    gates = [m.delta for m in model.modules() if isinstance(m, UpdateSkip)] or None
    check_dynamic(model, example, gates=gates)


@pytest.mark.parametrize("name", LAYERS)
def test_nested(name):
    torch.manual_seed(0)
    check_nested(*LAYERS[name])
