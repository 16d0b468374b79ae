"""Vision transformers whose tokens become fewer on the way: one plain network, and four ways to make it dynamic.

The plain one is DeiT's (Touvron et al.: Training data-efficient image transformers, ICML 2021,
https://arxiv.org/abs/2012.12877) without its distillation token: patches, a class token, learned positions, pre-norm
blocks. The default sizes are our own, for 32 x 32 pixels and small machines; DeiT-S is `size=224, patch=16, width=384,
depth=12, heads=6, expansion=4`.

- `dynamic_vit`: Rao et al.: DynamicViT, NeurIPS 2021, https://arxiv.org/abs/2106.02034. A predictor drops tokens.
- `evit`: Liang et al.: Not All Patches are What You Need, ICLR 2022, https://arxiv.org/abs/2202.07800. Tokens that the
  class token hardly attends to become one.
- `a_vit`: Yin et al.: A-ViT, CVPR 2022, https://arxiv.org/abs/2112.07658. Every token halts at a block of its own.
- `tome`: Bolya et al.: Token Merging, ICLR 2023, https://arxiv.org/abs/2210.09461. Similar tokens are merged.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Gumbel, Threshold
from dynanet.mechanisms.token_drop import ClassAttention, RankScorer, TokenDrop, TokenPredictor
from dynanet.mechanisms.token_halting import TokenHalting
from dynanet.mechanisms.token_merge import TokenMerge
from dynanet.nets.blocks import classifier, linear
from dynanet.ops.tokens import Tokens, attend, class_attention, summed_key
from dynanet.zoo.vit_config import ViTConfig


@architecture
def token_vit(
    *,
    num_classes: int,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    expansion: int = 2,
) -> "TokenViT":
    """The static network: every token goes through every block.

    Sizes are those of `ViTConfig`.

    Raises:
        ConfigError: as `ViTConfig`.

    Example:
        >>> token_vit(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    config = ViTConfig(num_classes, in_channels, size, patch, width, depth, heads, expansion)
    return TokenViT(config, nn.Sequential(*_halves(config)))


@architecture
def dynamic_vit(  # noqa: D417 (the sizes are documented in ViTConfig)
    *,
    num_classes: int,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    expansion: int = 2,
    drops: Sequence[int] = (2, 4),
) -> "TokenViT":
    """DynamicViT: in front of some blocks a predictor drops tokens, as many as an image can do without.

    Train it with `TokenRatio`, or any budget; DynamicViT's own training adds `TokenDistillation`. `width` must be a
    multiple of 4.

    Sizes are those of `ViTConfig`.

    Args:
        drops: in front of which blocks, counted from 0 in ascending order. The paper's are (3, 6, 9) of 12.

    Raises:
        ConfigError: as `ViTConfig`, or drops that are not ascending numbers of blocks.
    """
    config = ViTConfig(num_classes, in_channels, size, patch, width, depth, heads, expansion)
    _check_drops(drops, depth)

    def drop(rest: nn.Module) -> nn.Module:
        return TokenDrop(rest, Gate(TokenPredictor(width), Gumbel()))

    return TokenViT(config, _nested(_halves(config), dict.fromkeys([2 * b for b in drops], drop)))


@architecture
def evit(  # noqa: D417 (the sizes are documented in ViTConfig)
    *,
    num_classes: int,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    expansion: int = 2,
    drops: Sequence[int] = (1, 3),
    share: float = 0.7,
) -> "TokenViT":
    """EViT: between the halves of some blocks, what the class token hardly attends to becomes one token.

    Nothing is learned for it, so the weights of a trained `token_vit` do (`TokenViT.inherit`).

    Sizes are those of `ViTConfig`.

    Args:
        drops: in which blocks, counted from 0 in ascending order. The paper's are (3, 6, 9) of 12.
        share: of the remaining tokens, how many each of them keeps.

    Raises:
        ConfigError: as `ViTConfig`, drops that are not ascending numbers of blocks, or a share outside (0, 1].
    """
    config = ViTConfig(num_classes, in_channels, size, patch, width, depth, heads, expansion)
    _check_drops(drops, depth)
    if not 0 < share <= 1:
        raise ConfigError(f"share must be the share of tokens that stay, above 0 and up to 1, got {share}")

    def drop(rest: nn.Module) -> nn.Module:
        return TokenDrop(rest, Gate(RankScorer(ClassAttention()), Threshold(1 - share)), fuse=True)

    return TokenViT(config, _nested(_halves(config, watched=drops), dict.fromkeys([2 * b + 1 for b in drops], drop)))


@architecture
def a_vit(  # noqa: D417 (the sizes are documented in ViTConfig)
    *,
    num_classes: int,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    expansion: int = 2,
    eps: float = 0.01,
    shift: float = -3.0,
) -> "TokenViT":
    """A-ViT: every token halts at a block of its own. Train it with `TokenPonderCost` and `HaltingDepth`.

    Sizes are those of `ViTConfig`.

    Args:
        eps: how far below 1 the halting scores of a token may sum up to.
        shift: of the halting score at the start; the more negative, the longer tokens stay at first.

    Raises:
        ConfigError: as `ViTConfig`, or eps outside (0, 1).
    """
    config = ViTConfig(num_classes, in_channels, size, patch, width, depth, heads, expansion)
    parts = _halves(config)
    blocks = [nn.Sequential(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return TokenViT(config, TokenHalting(blocks, eps=eps, shift=shift, first_only=True))


@architecture
def tome(  # noqa: D417 (the sizes are documented in ViTConfig)
    *,
    num_classes: int,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    expansion: int = 2,
    merge: int | None = 6,
    similarity: float | None = None,
) -> "TokenViT":
    """ToMe: between the halves of every block, the most similar tokens are merged.

    Nothing is learned for it, so the weights of a trained `token_vit` do (`TokenViT.inherit`).

    Sizes are those of `ViTConfig`.

    Args:
        merge: tokens that each block removes; None where `similarity` says how many.
        similarity: merge all pairs of tokens whose cosine is above this value.

    Raises:
        ConfigError: as `ViTConfig`, or neither or both of `merge` and `similarity`.
    """
    config = ViTConfig(num_classes, in_channels, size, patch, width, depth, heads, expansion)

    def merging(rest: nn.Module) -> nn.Module:
        return TokenMerge(rest, merge=merge, similarity=similarity)

    return TokenViT(config, _nested(_halves(config, keyed=True), dict.fromkeys(range(1, 2 * depth, 2), merging)))


class TokenViT(nn.Module):
    """Patches, a class token, blocks, logits of the class token."""

    def __init__(self, config: ViTConfig, body: nn.Module) -> None:
        super().__init__()
        self.patches = _Patches(config)
        self.body = body
        self.norm = nn.LayerNorm(config.width)
        self.head = classifier(config.width, config.num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, size, size) to logits (B, classes).

        Raises:
            InputError: images of another size.
        """
        return self.classify(self.features(x_BCHW))

    def features(self, x_BCHW: Tensor) -> Tokens:
        """(B, C, size, size) to the tokens (B, T, D) after all blocks, the class token first."""
        return self.body(Tokens(self.patches(x_BCHW)))

    def classify(self, tokens: Tokens) -> Tensor:
        """Tokens (B, T, D) to logits (B, num_classes), read from the class token."""
        return self.head(self.norm(tokens.x[:, 0]))

    def inherit(self, other: "TokenViT") -> "TokenViT":
        """Copy the weights of another network of the same sizes, whichever mechanism it has; gates stay.

        Raises:
            ConfigError: other sizes.
        """
        pairs = [(self.patches, other.patches), (self.norm, other.norm), (self.head, other.head)]
        for kind in (Attention, FeedForward):
            ours, theirs = ([m for m in net.body.modules() if isinstance(m, kind)] for net in (self, other))
            if len(ours) != len(theirs):
                raise ConfigError(f"a network of {len(ours)} blocks cannot inherit from {len(theirs)}; make them equal")
            pairs += zip(ours, theirs, strict=True)
        for ours_, theirs_ in pairs:
            try:
                ours_.load_state_dict(theirs_.state_dict())
            except RuntimeError as error:
                raise ConfigError(f"networks of other sizes: {' '.join(str(error).split())[:200]}") from error
        return self


class Attention(nn.Module):
    """The first half of a block: every token attends to those that are present.

    Args:
        width: features of a token.
        heads: of attention.
        watched: add to the tokens how much the class token attends to each (EViT).
        keyed: add to the tokens the key of each, summed over heads (ToMe).
    """

    def __init__(self, width: int, heads: int, *, watched: bool = False, keyed: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.watched = watched
        self.keyed = keyed
        self.read = nn.Sequential(nn.LayerNorm(width), linear(width, 3 * width))
        self.project = linear(width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """(B, T, D) to the same shape, with attention or keys where they are wanted."""
        query, key, value = self.read(tokens.x).chunk(3, -1)
        x = tokens.x + self.project(attend(query, key, value, tokens, self.heads))
        if self.watched:
            tokens = tokens._replace(attention=class_attention(query, key, tokens, self.heads))
        if self.keyed:
            tokens = tokens._replace(key=summed_key(key, self.heads))
        return tokens._replace(x=x)


class FeedForward(nn.Module):
    """The second half of a block: a hidden layer for every token."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.LayerNorm(width), linear(width, expansion * width), nn.GELU(), linear(expansion * width, width)
        )

    def forward(self, tokens: Tokens) -> Tokens:
        """(B, T, D) to the same shape."""
        return tokens._replace(x=tokens.x + self.hidden(tokens.x))


class _Patches(nn.Module):
    """Images to tokens with their positions, the class token first."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Conv2d(config.in_channels, config.width, config.patch, config.patch)
        self.first = nn.Parameter(torch.empty(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + config.tokens, config.width))
        for parameter in (self.first, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, size, size) to (B, 1 + patches, D)."""
        self.config.check_images(x_BCHW)
        patches = self.embed(x_BCHW).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x_BCHW.shape[0], -1, -1), patches], 1) + self.positions


def _halves(config: ViTConfig, *, watched: Sequence[int] = (), keyed: bool = False) -> list[nn.Module]:
    """The halves of all blocks, in order."""
    halves: list[nn.Module] = []
    for b in range(config.depth):
        halves.append(Attention(config.width, config.heads, watched=b in watched, keyed=keyed))
        halves.append(FeedForward(config.width, config.expansion))
    return halves


def _nested(parts: list[nn.Module], around: dict[int, Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """A Sequential in which `around[i]` wraps part i and all that follow it."""
    rest: list[nn.Module] = []
    for i in reversed(range(len(parts))):
        rest.insert(0, parts[i])
        if i in around:
            rest = [around[i](nn.Sequential(*rest))]
    return nn.Sequential(*rest)


def _check_drops(drops: Sequence[int], depth: int) -> None:
    if not drops or list(drops) != sorted(set(drops)) or not all(0 <= b < depth for b in drops):
        raise ConfigError(f"drops must be ascending numbers of blocks from 0 to {depth - 1}, got {drops!r}")
