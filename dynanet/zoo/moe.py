"""Small transformers with mixtures of experts: one for images, one for token sequences.

Experts replace the feed-forward part of every second block, as in Riquelme et al.: Scaling Vision with Sparse
Mixture of Experts, 2021, https://arxiv.org/abs/2106.05974 and Fedus et al.: Switch Transformers, 2022,
https://arxiv.org/abs/2101.03961. Blocks normalise first. Images have fixed sine positions and no class token (Beyer et
al.: Better plain ViT baselines, 2022, https://arxiv.org/abs/2205.01580), so they may have any size. Every token is
routed by itself, nothing is dropped, and padding goes to no expert. Sizes are our own, for small machines.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, InputError, check_sizes
from dynanet.core.gate import Gate
from dynanet.gates.expert_rules import BiasedTopK
from dynanet.gates.rules import TopK
from dynanet.mechanisms.experts import Experts, RouterScorer
from dynanet.zoo.vit_config import check_heads


@architecture
def moe_vit(
    *,
    num_classes: int,
    in_channels: int = 3,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    hidden: int = 192,
    experts: int = 8,
    active: int = 2,
    every: int = 2,
    shared: int = 0,
    balance_rate: float = 0.0,
) -> "VisionTransformer":
    """A vision transformer with experts; images (B, C, H, W) of any size that patches divide.

    Args:
        num_classes: width of the logits.
        in_channels: channels (bands) of the input.
        patch: side of a patch in pixels, which becomes a token.
        width: features of a token; a multiple of 4.
        depth: blocks.
        heads: of attention; they divide `width`.
        hidden: neurons of one expert. Plain blocks have `active + shared` times as many, to cost the same.
        experts: experts of a layer; 0 gives the static network of the same MACs (without the routers).
        active: experts that a token keeps, those with the highest scores.
        every: every `every`-th block has experts.
        shared: 1 adds an expert that every token runs; 0 adds none.
        balance_rate: above 0, biases instead of a loss balance the loads; see `BiasedTopK`.

    Raises:
        ConfigError: a value out of range, or more active experts than there are.

    Example:
        >>> moe_vit(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, patch=patch)
    blocks = _blocks(width, depth, heads, hidden, experts, active, every, shared, balance_rate)
    return VisionTransformer(nn.Conv2d(in_channels, width, patch, patch), blocks, nn.Linear(width, num_classes))


@architecture
def moe_encoder(
    *,
    num_classes: int,
    vocabulary: int,
    longest: int = 128,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    hidden: int = 256,
    experts: int = 8,
    active: int = 2,
    every: int = 2,
    shared: int = 0,
    balance_rate: float = 0.0,
    dropout: float = 0.1,
) -> "TokenClassifier":
    """A transformer encoder with experts that classifies sequences of token numbers (B, T), padded with 0.

    Args:
        num_classes: width of the logits.
        vocabulary: token numbers are from 0 (padding) to vocabulary - 1.
        longest: tokens of the longest sequence.
        width: features of a token.
        depth: blocks.
        heads: of attention; they divide `width`.
        hidden: as in `moe_vit`.
        experts: as in `moe_vit`.
        active: as in `moe_vit`.
        every: as in `moe_vit`.
        shared: as in `moe_vit`.
        balance_rate: as in `moe_vit`.
        dropout: of the embeddings, in training.

    Raises:
        ConfigError: a value out of range, or more active experts than there are.

    Example:
        >>> moe_encoder(num_classes=2, vocabulary=50)(torch.randint(50, (3, 7))).shape
        torch.Size([3, 2])
    """
    check_sizes(num_classes=num_classes, vocabulary=vocabulary, longest=longest)
    blocks = _blocks(width, depth, heads, hidden, experts, active, every, shared, balance_rate)
    return TokenClassifier(vocabulary, longest, blocks, nn.Linear(width, num_classes), dropout)


class VisionTransformer(nn.Module):
    """Patches, blocks, the mean over tokens, logits."""

    def __init__(self, patches: nn.Conv2d, blocks: list[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.patches = patches
        self.side = patches.kernel_size[0]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(head.in_features)
        self.head = head

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes).

        Raises:
            InputError: a size that patches do not divide.
        """
        side = self.side
        if x_BCHW.shape[2] % side or x_BCHW.shape[3] % side:
            raise InputError(
                f"an image of {x_BCHW.shape[2]} x {x_BCHW.shape[3]} pixels cannot be cut into patches of {side} x "
                f"{side}; pad or crop it to multiples"
            )
        grid_BDHW = self.patches(x_BCHW)
        x_BTD = grid_BDHW.flatten(2).transpose(1, 2) + _positions(grid_BDHW)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD).mean(1))


class TokenClassifier(nn.Module):
    """Embeddings, blocks, the mean over a learned first token and all tokens that are not padding, logits."""

    def __init__(self, vocabulary: int, longest: int, blocks: list[nn.Module], head: nn.Linear, dropout: float) -> None:
        super().__init__()
        width = head.in_features
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(longest, width))
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = head
        for table in (self.tokens.weight, self.positions):
            nn.init.normal_(table, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Token numbers (B, T), padded with 0, to logits (B, classes).

        Raises:
            InputError: sequences that are too long, or not whole numbers (B, T).
        """
        if ids_BT.dim() != 2 or ids_BT.is_floating_point():
            raise InputError(f"expected token numbers (B, T); got {ids_BT.dtype} of shape {tuple(ids_BT.shape)}")
        batch, length = ids_BT.shape
        if length > self.positions.shape[0]:
            raise InputError(f"sequences of {length} tokens; at most {self.positions.shape[0]}: cut them")
        x_BTD = self.tokens(ids_BT) + self.positions[:length]
        x_BTD = self.dropout(torch.cat([self.first.expand(batch, -1, -1), x_BTD], 1))
        there_BT = functional.pad(ids_BT != 0, (1, 0), value=True)
        for block in self.blocks:
            x_BTD = block(x_BTD, there_BT)
        weight_BT1 = there_BT.to(x_BTD.dtype)[..., None]
        return self.head((self.norm(x_BTD) * weight_BT1).sum(1) / weight_BT1.sum(1))


class Block(nn.Module):
    """A pre-norm transformer block; `feed_forward` maps single tokens to tokens, and experts get the padding mask."""

    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.feed_forward = feed_forward
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, there_BT: Tensor | None = None) -> Tensor:
        """(B, T, D), and bool (B, T), False for padding, to (B, T, D)."""
        query, key, value = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(self.norm1(x_BTD)).chunk(3, -1)
        )
        mask = None if there_BT is None else there_BT[:, None, None, :]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.norm2(x_BTD)
        if isinstance(self.feed_forward, Experts):
            return x_BTD + self.feed_forward(normed, there_BT)
        return x_BTD + self.feed_forward(normed)


def _blocks(
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    experts: int,
    active: int,
    every: int,
    shared: int,
    balance_rate: float,
) -> list[nn.Module]:
    check_sizes(width=width, depth=depth, heads=heads, hidden=hidden, active=active, every=every)
    check_sizes(0, experts=experts)
    check_heads(width, heads)
    if width % 4:
        raise ConfigError(f"width must be a multiple of 4, got {width}")
    if experts and active > experts:
        raise ConfigError(f"{active} active experts of {experts}; give at most as many, or experts=0 for none")
    if shared not in (0, 1) or not balance_rate >= 0:
        raise ConfigError(f"shared is {shared} and balance_rate {balance_rate}; expected 0 or 1, and at least 0")

    def mixture() -> Experts:
        rule = BiasedTopK(active, experts, balance_rate) if balance_rate else TopK(active)
        return Experts(
            [_feed_forward(width, hidden) for _ in range(experts)],
            Gate(RouterScorer(width, experts), rule, units=experts),
            shared=_feed_forward(width, hidden) if shared else None,
        )

    plain = (active + shared) * hidden
    return [
        Block(width, heads, mixture() if experts and i % every == every - 1 else _feed_forward(width, plain))
        for i in range(depth)
    ]


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def _positions(grid_BDHW: Tensor) -> Tensor:
    """Fixed positions (H W, D), a quarter of the features each for sine and cosine of the row and of the column.

    Wavelengths are from 2 pi to 20,000 pi.
    """
    _, width, rows, columns = grid_BDHW.shape
    y, x = (torch.arange(n, dtype=grid_BDHW.dtype, device=grid_BDHW.device) for n in (rows, columns))
    frequency = 1e4 ** -(torch.arange(width // 4, dtype=grid_BDHW.dtype, device=grid_BDHW.device) / (width // 4))
    down = (y[:, None] * frequency)[:, None]
    across = (x[:, None] * frequency)[None]
    parts = [down.sin(), down.cos(), across.sin(), across.cos()]
    return torch.cat([part.expand(rows, columns, -1) for part in parts], -1).flatten(0, 1)
