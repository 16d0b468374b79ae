"""A small causal transformer with exits after some of its layers, for generation.

Pre-norm blocks as in Radford et al.: GPT-2, 2019. Exits share the map to the vocabulary, each after its own norm
(CALM: Schuster et al., 2022, https://arxiv.org/abs/2207.07061, shares it too). Layer dropout that grows with depth
(LayerSkip: Elhoushi et al., 2024, https://arxiv.org/abs/2404.16710, section 4.1) makes early exits better drafters.
`generate.generate` exits token by token, `generate.speculate` drafts and verifies. Sizes are our own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, InputError, check_sizes
from dynanet.nets.blocks import init_normal
from dynanet.ops.decoding import Decoder
from dynanet.ops.tokens import Tokens, attend_causal
from dynanet.zoo.exits import check_exits
from dynanet.zoo.vit_config import check_heads


@architecture
def causal_transformer(
    *,
    vocabulary: int,
    longest: int = 256,
    width: int = 128,
    depth: int = 8,
    heads: int = 4,
    hidden: int = 512,
    exits: Sequence[int] = (1, 3, 5, 7),
    dropout: float = 0.0,
    layer_dropout: float = 0.0,
) -> "CausalTransformer":
    """A causal transformer with exits; token ids (B, T) int64 to the last exit's logits (B, T, vocabulary).

    Args:
        vocabulary: number of different tokens.
        longest: number of positions, for prompt and continuation together.
        width: features of a token.
        depth: layers.
        heads: attention heads; they divide `width`.
        hidden: neurons of a layer's feed-forward part.
        exits: layers followed by an exit, counted from 0 in ascending order, the last one included.
        dropout: share of features that training drops.
        layer_dropout: probability with which training skips the last layer; less for earlier ones, 0 for the first.

    Raises:
        ConfigError: a value out of range, heads that do not divide, or exits without the last layer.

    Example:
        >>> model = causal_transformer(vocabulary=65, width=32, heads=2, hidden=64)
        >>> model(torch.zeros(2, 9, dtype=torch.int64)).shape
        torch.Size([2, 9, 65])
    """
    check_sizes(vocabulary=vocabulary, longest=longest, width=width, depth=depth, heads=heads, hidden=hidden)
    check_heads(width, heads)
    if not (0 <= dropout < 1 and 0 <= layer_dropout < 1):
        raise ConfigError(
            f"dropout and layer_dropout must be at least 0 and below 1, got {dropout} and {layer_dropout}"
        )
    ends = check_exits(exits, depth)
    blocks = [Block(width, heads, hidden, dropout) for _ in range(depth)]
    return CausalTransformer(vocabulary, longest, width, blocks, tuple(ends), layer_dropout)


class CausalTransformer(Decoder):
    """The network; see `Decoder` for the methods that decode token by token."""

    def __init__(
        self,
        vocabulary: int,
        longest: int,
        width: int,
        blocks: Sequence["Block"],
        exits: tuple[int, ...],
        layer_dropout: float,
    ) -> None:
        super().__init__()
        self.depth = len(blocks)
        self.exits = exits
        self.longest = longest
        self.layer_dropout = layer_dropout
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in exits)
        self.vocabulary = nn.Linear(width, vocabulary)
        init_normal(self.words, self.positions, self.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to the last exit's logits (B, T, vocabulary)."""
        return self.answers(ids)[-1]

    def answers(self, ids: Tensor) -> list[Tensor]:
        """Token ids (B, T) to the logits of the next tokens (B, T, vocabulary), one tensor per exit."""
        return [self.logits(number, x) for number, (x, _) in enumerate(self.features(ids))]

    def features(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Token ids (B, T) to the features at every exit and those one layer earlier, (B, T, D) each.

        Raises:
            InputError: another shape or dtype, ids outside the vocabulary, or more than `longest` columns.
        """
        self._check(ids)
        x = self.embed(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        found = []
        for layer, block in enumerate(self.blocks):
            before = x
            x = self._dropped(layer, x, block(Tokens(x)).x)
            if layer in self.exits:
                found.append((x, before))
        return found

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and their positions, of any shape (...), to features (..., D).

        Raises:
            InputError: a position of `longest` or more.
        """
        if positions.numel() and int(positions.max()) >= self.longest:
            raise self._too_long(int(positions.max()) + 1)
        return self.words(ids) + self.positions(positions)

    def check(self, prompt: Tensor, positions: int) -> None:
        """Check a prompt (T,) and how many positions are needed in all.

        Raises:
            InputError: ids outside the vocabulary, or more than `longest` positions.
        """
        self._check(prompt[None])
        if positions > self.longest:
            raise self._too_long(positions)

    def query(self, layer: int, x: Tensor) -> Tensor:
        """Features (..., D) to the queries (..., heads, d) of a layer."""
        return self._block(layer).query(x)

    def key_value(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (..., D) to the keys and values (..., heads, d) of a layer."""
        return self._block(layer).key_value(x)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """Features and attention results (..., D) to the layer's output (..., D)."""
        return self._block(layer).finish(x, attended)

    def logits(self, number: int, x: Tensor) -> Tensor:
        """Features (..., D) to the logits (..., vocabulary) of exit `number`."""
        return self.vocabulary(self.norms[number](x))

    def _dropped(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """LayerSkip, eq. 1 and 2: training skips layer l for a sequence with chance p (e^(l ln 2 / (L - 1)) - 1)."""
        if not self.training or not self.layer_dropout or self.depth == 1:
            return y
        chance = self.layer_dropout * math.expm1(layer * math.log(2) / (self.depth - 1))
        return torch.where(torch.rand(x.shape[0], 1, 1, device=x.device) < chance, x, y)

    def _block(self, layer: int) -> "Block":
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block

    def _too_long(self, positions: int) -> InputError:
        return InputError(
            f"{positions} tokens in a network for {self.longest}; prompt, new tokens and drafts must fit: give "
            f"fewer, or build it with a larger `longest`"
        )

    def _check(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise InputError(f"token ids of shape {tuple(ids.shape)} and {ids.dtype}; expected (B, T) of torch.int64")
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < self.words.num_embeddings):
            raise InputError(
                f"token ids from {int(ids.min())} to {int(ids.max())} for a vocabulary of {self.words.num_embeddings}; "
                f"use the tokenizer of this network"
            )


class Block(nn.Module):
    """Causal attention, then a hidden layer for each token; whole, or in parts for decoding."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a = nn.LayerNorm(width)
        self.norm_b = nn.LayerNorm(width)
        self.ask = nn.Linear(width, width)  # queries
        self.offer = nn.Linear(width, 2 * width)  # keys and values
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        init_normal(self.ask, self.offer, self.project, self.feed_forward[0], self.feed_forward[2])

    def forward(self, tokens: Tokens) -> Tokens:
        """All tokens at once, (B, T, D) to the same layout."""
        x = self.norm_a(tokens.x)
        key, value = self.offer(x).chunk(2, -1)
        attended = attend_causal(self.ask(x), key, value, tokens, self.heads)
        return tokens._replace(x=self.finish(tokens.x, attended))

    def query(self, x: Tensor) -> Tensor:
        """Features (..., D) to queries (..., heads, d)."""
        return self.ask(self.norm_a(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (..., D) to keys and values (..., heads, d)."""
        key, value = self.offer(self.norm_a(x)).chunk(2, -1)
        return key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: features and attention results (..., D) to (..., D)."""
        x = x + self.dropout(self.project(attended))
        return x + self.dropout(self.feed_forward(self.norm_b(x)))


def exits_loss(answers: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the next token at every exit, later exits counting more.

    Exit i of n (from 1) has the weight i / (1 + ... + n), as CALM trains (Schuster et al. 2022, section 3.4).

    Args:
        answers: logits (B, T, vocabulary) of every exit.
        targets: the next tokens (B, T).
    """
    losses = [functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in answers]
    weights = torch.arange(1, len(losses) + 1, dtype=losses[0].dtype, device=losses[0].device)
    return (torch.stack(losses) * weights).sum() / weights.sum()
