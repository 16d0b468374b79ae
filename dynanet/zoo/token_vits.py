"""Vision transformers whose tokens become fewer on the way: one plain network, and four ways to make it dynamic.

The plain one is DeiT's (Touvron et al.: Training data-efficient image transformers, ICML 2021,
https://arxiv.org/abs/2012.12877) without its distillation token: patches, a class token, learned positions, pre-norm
blocks. The defaults are our own, for 32 x 32 pixels and small machines; DeiT-S is `size=224, patch=16, width=384,
depth=12, heads=6, expansion=4`.

- `dynamic_vit`: Rao et al.: DynamicViT, NeurIPS 2021, https://arxiv.org/abs/2106.02034. A predictor drops tokens.
- `evit`: Liang et al.: Not All Patches are What You Need, ICLR 2022, https://arxiv.org/abs/2202.07800. Tokens that the
  class token hardly attends to become one.
- `a_vit`: Yin et al.: A-ViT, CVPR 2022, https://arxiv.org/abs/2112.07658. Every token halts at a block of its own.
- `tome`: Bolya et al.: Token Merging, ICLR 2023, https://arxiv.org/abs/2210.09461. Alike tokens are merged.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, InputError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Gumbel, Threshold
from dynanet.mechanisms.token_drop import ClassAttention, RankScorer, TokenDrop, TokenPredictor
from dynanet.mechanisms.token_halting import TokenHalting
from dynanet.mechanisms.token_merge import TokenMerge
from dynanet.ops.tokens import Tokens, attend, class_attention, summed_key


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

    Args:
        num_classes: width of the logits.
        in_channels: channels (bands) of the input.
        size: side of the images in pixels; other sizes are refused, as positions are learned.
        patch: side of a patch, in pixels; it divides `size`.
        width: features of a token.
        depth: blocks.
        heads: of attention; they divide `width`.
        expansion: the hidden layer of a block is so many times the width.

    Raises:
        ConfigError: a value out of range, or a patch or heads that do not divide.

    Example:
        >>> token_vit(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    parts = _halves(width, depth, heads, expansion)
    return TokenViT(_Patches(in_channels, size, patch, width), nn.Sequential(*parts), num_classes)


@architecture
def dynamic_vit(
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

    Train it with `TokenRatio`, or any budget; DynamicViT's own training adds `TokenDistillation`.

    Args:
        num_classes: as in `token_vit`.
        in_channels: as in `token_vit`.
        size: as in `token_vit`.
        patch: as in `token_vit`.
        width: as in `token_vit`; a multiple of 4.
        depth: as in `token_vit`.
        heads: as in `token_vit`.
        expansion: as in `token_vit`.
        drops: in front of which blocks, counted from 0 in ascending order. The paper's are (3, 6, 9) of 12.

    Raises:
        ConfigError: as `token_vit`, or drops that are no blocks.
    """
    _check_blocks("dynamic_vit", drops, depth)

    def drop(rest: nn.Module) -> nn.Module:
        return TokenDrop(rest, Gate(TokenPredictor(width), Gumbel()))

    body = _nested(_halves(width, depth, heads, expansion), dict.fromkeys([2 * b for b in drops], drop))
    return TokenViT(_Patches(in_channels, size, patch, width), body, num_classes)


@architecture
def evit(
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

    Args:
        num_classes: as in `token_vit`.
        in_channels: as in `token_vit`.
        size: as in `token_vit`.
        patch: as in `token_vit`.
        width: as in `token_vit`.
        depth: as in `token_vit`.
        heads: as in `token_vit`.
        expansion: as in `token_vit`.
        drops: in which blocks, counted from 0 in ascending order. The paper's are (3, 6, 9) of 12.
        share: of the tokens that are there, so many stay at each.

    Raises:
        ConfigError: as `token_vit`, drops that are no blocks, or a share outside (0, 1].
    """
    _check_blocks("evit", drops, depth)
    if not 0 < share <= 1:
        raise ConfigError(f"evit: share is {share}; expected the share of tokens that stay, above 0 and up to 1")

    def drop(rest: nn.Module) -> nn.Module:
        return TokenDrop(rest, Gate(RankScorer(ClassAttention()), Threshold(1 - share)), fuse=True)

    parts = _halves(width, depth, heads, expansion, watched=drops)
    body = _nested(parts, dict.fromkeys([2 * b + 1 for b in drops], drop))
    return TokenViT(_Patches(in_channels, size, patch, width), body, num_classes)


@architecture
def a_vit(
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

    Args:
        num_classes: as in `token_vit`.
        in_channels: as in `token_vit`.
        size: as in `token_vit`.
        patch: as in `token_vit`.
        width: as in `token_vit`.
        depth: as in `token_vit`.
        heads: as in `token_vit`.
        expansion: as in `token_vit`.
        eps: how far below 1 the halting scores of a token may sum up to.
        shift: of the halting score at the start; the more negative, the longer tokens stay at first.

    Raises:
        ConfigError: as `token_vit`, or eps outside (0, 1).
    """
    parts = _halves(width, depth, heads, expansion)
    blocks = [nn.Sequential(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    body = TokenHalting(blocks, eps=eps, shift=shift, first_only=True)
    return TokenViT(_Patches(in_channels, size, patch, width), body, num_classes)


@architecture
def tome(
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

    Args:
        num_classes: as in `token_vit`.
        in_channels: as in `token_vit`.
        size: as in `token_vit`.
        patch: as in `token_vit`.
        width: as in `token_vit`.
        depth: as in `token_vit`.
        heads: as in `token_vit`.
        expansion: as in `token_vit`.
        merge: so many tokens less after each block; None where `similarity` says how many.
        similarity: merge what is more alike than this cosine, as many as an image has.

    Raises:
        ConfigError: as `token_vit`, or neither or both of `merge` and `similarity`.
    """

    def merging(rest: nn.Module) -> nn.Module:
        return TokenMerge(rest, merge=merge, similarity=similarity)

    parts = _halves(width, depth, heads, expansion, keyed=True)
    body = _nested(parts, dict.fromkeys(range(1, 2 * depth, 2), merging))
    return TokenViT(_Patches(in_channels, size, patch, width), body, num_classes)


class TokenViT(nn.Module):
    """Patches, a class token, blocks, logits of the class token."""

    def __init__(self, patches: "_Patches", body: nn.Module, num_classes: int) -> None:
        super().__init__()
        _check(num_classes=num_classes)
        width = patches.positions.shape[-1]
        self.patches, self.body, self.norm = patches, body, nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, size, size) to logits (B, classes).

        Raises:
            InputError: images of another size.
        """
        return self.classify(self.features(x_BCHW))

    def features(self, x_BCHW: Tensor) -> Tokens:
        """Images to tokens with all blocks done, the class token first."""
        return self.body(Tokens(self.patches(x_BCHW)))

    def classify(self, tokens: Tokens) -> Tensor:
        """The class token to logits."""
        return self.head(self.norm(tokens.x[:, 0]))

    def inherit(self, other: "TokenViT") -> "TokenViT":
        """Take the weights of another network of the same sizes, whatever drops or merges its tokens; gates stay.

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
    """The first half of a block: every token looks at the others that are there.

    Args:
        width: features of a token.
        heads: of attention.
        watched: tell how much the class token attends to each (EViT).
        keyed: tell the key of each, summed over heads (ToMe).
    """

    def __init__(self, width: int, heads: int, *, watched: bool = False, keyed: bool = False) -> None:
        super().__init__()
        self.heads, self.watched, self.keyed = heads, watched, keyed
        self.read = nn.Sequential(nn.LayerNorm(width), _linear(width, 3 * width))
        self.project = _linear(width, width)

    def forward(self, tokens: Tokens) -> Tokens:  # noqa: D102
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
            nn.LayerNorm(width), _linear(width, expansion * width), nn.GELU(), _linear(expansion * width, width)
        )

    def forward(self, tokens: Tokens) -> Tokens:  # noqa: D102
        return tokens._replace(x=tokens.x + self.hidden(tokens.x))


class _Patches(nn.Module):
    """Images to tokens with their positions, (B, C, size, size) to (B, 1 + patches, D), the class token first."""

    def __init__(self, in_channels: int, size: int, patch: int, width: int) -> None:
        super().__init__()
        _check(in_channels=in_channels, size=size, patch=patch, width=width)
        if size % patch:
            raise ConfigError(f"token_vit: patch {patch} for size {size}; expected a patch that divides the size")
        self.expected = (in_channels, size, size)
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.first = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, width))
        for parameter in (self.first, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[1:] != self.expected:
            raise InputError(f"images of {tuple(x_BCHW.shape[1:])}; this network takes {self.expected}: resize them")
        patches = self.embed(x_BCHW).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x_BCHW.shape[0], -1, -1), patches], 1) + self.positions


def _halves(
    width: int, depth: int, heads: int, expansion: int, *, watched: Sequence[int] = (), keyed: bool = False
) -> list[nn.Module]:
    """The halves of all blocks, in order."""
    _check(width=width, depth=depth, heads=heads, expansion=expansion)
    if width % heads:
        raise ConfigError(f"token_vit: width {width} with {heads} heads; expected a width that the heads divide")
    return [
        half
        for b in range(depth)
        for half in (Attention(width, heads, watched=b in watched, keyed=keyed), FeedForward(width, expansion))
    ]


def _nested(parts: list[nn.Module], around: dict[int, Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """A Sequential in which what comes from a part on is wrapped as `around` says; the last first."""
    rest: list[nn.Module] = []
    for i in reversed(range(len(parts))):
        rest.insert(0, parts[i])
        if i in around:
            rest = [around[i](nn.Sequential(*rest))]
    return nn.Sequential(*rest)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _check_blocks(what: str, blocks: Sequence[int], depth: int) -> None:
    if not blocks or list(blocks) != sorted(set(blocks)) or not all(0 <= b < depth for b in blocks):
        raise ConfigError(f"{what}: drops is {blocks!r}; expected ascending numbers of blocks from 0 to {depth - 1}")


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"token_vit: {name} is {value!r}; expected a whole number of at least 1")
