"""A small causal transformer whose next token can be read after some of its layers: for generation with exits.

Pre-norm blocks as in Radford et al.: GPT-2, 2019. Exits share the map to the vocabulary, each behind a norm of its own
(CALM: Schuster et al., 2022, https://arxiv.org/abs/2207.07061, shares it too). Layer dropout that grows with depth
(LayerSkip: Elhoushi et al., 2024, https://arxiv.org/abs/2404.16710, section 4.1) makes early exits better drafters.
`generate.generate` lets tokens leave, `generate.speculate` drafts and checks. Sizes are our own, for small machines.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, InputError
from dynanet.ops.decoding import Decoder
from dynanet.ops.tokens import Tokens, attend_causal


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
        vocabulary: tokens that there are.
        longest: positions, prompt and continuation together.
        width: features of a token.
        depth: layers.
        heads: of attention; must divide `width`.
        hidden: neurons of a layer's feed-forward part.
        exits: after which layers next tokens can be read, counted from 0 in ascending order, the last one included.
        dropout: share of features that training drops.
        layer_dropout: how often training leaves out the last layer; earlier ones less, the first never.

    Raises:
        ConfigError: a value out of range, heads that do not divide, or exits without the last layer.

    Example:
        >>> model = causal_transformer(vocabulary=65, width=32, heads=2, hidden=64)
        >>> model(torch.zeros(2, 9, dtype=torch.int64)).shape
        torch.Size([2, 9, 65])
    """
    counts = {
        "vocabulary": vocabulary, "longest": longest, "width": width, "depth": depth, "heads": heads, "hidden": hidden,
    }  # fmt: skip
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"causal_transformer: {name} is {value!r}; expected a whole number of at least 1")
    if width % heads:
        raise ConfigError(
            f"causal_transformer: width {width} with {heads} heads; expected a width that the heads divide"
        )
    if not (0 <= dropout < 1 and 0 <= layer_dropout < 1):
        raise ConfigError(f"causal_transformer: dropout {dropout}, layer_dropout {layer_dropout}; expected below 1")
    leave = list(exits)
    if leave != sorted(set(leave)) or not leave or leave[0] < 0 or leave[-1] != depth - 1:
        raise ConfigError(
            f"causal_transformer: exits is {exits!r}; expected ascending numbers of layers from 0 to {depth - 1}, the "
            f"last included"
        )
    blocks = [Block(width, heads, hidden, dropout) for _ in range(depth)]
    return CausalTransformer(vocabulary, longest, width, blocks, tuple(leave), layer_dropout)


class CausalTransformer(Decoder):
    """The network; its parts, for decoding, are `Decoder`'s."""

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
        self.depth, self.exits, self.longest, self.layer_dropout = len(blocks), exits, longest, layer_dropout
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(blocks)
        self.norms, self.vocabulary = nn.ModuleList(nn.LayerNorm(width) for _ in exits), nn.Linear(width, vocabulary)
        for table in (self.words, self.positions, self.vocabulary):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.vocabulary.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) to the last exit's logits (B, T, vocabulary)."""
        return self.answers(ids)[-1]

    def answers(self, ids: Tensor) -> list[Tensor]:
        """(B, T) to every exit's logits, (B, T, vocabulary) each: what comes after each token."""
        return [self.logits(number, x) for number, (x, _) in enumerate(self.features(ids))]

    def features(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, T) to every exit's features and those one layer earlier, (B, T, D) each.

        Raises:
            InputError: not (B, T) of token ids that there are, or more than `longest` of them.
        """
        self._check(ids)
        x = self.embed(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        found = []
        for layer, block in enumerate(self.blocks):
            before, x = x, self._dropped(layer, x, block(Tokens(x)).x)
            if layer in self.exits:
                found.append((x, before))
        return found

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:  # noqa: D102
        if positions.numel() and int(positions.max()) >= self.longest:
            raise self._too_long(int(positions.max()) + 1)
        return self.words(ids) + self.positions(positions)

    def check(self, prompt: Tensor, positions: int) -> None:  # noqa: D102
        self._check(prompt[None])
        if positions > self.longest:
            raise self._too_long(positions)

    def query(self, layer: int, x: Tensor) -> Tensor:  # noqa: D102
        return self.blocks[layer].query(x)

    def key_value(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.blocks[layer].key_value(x)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:  # noqa: D102
        return self.blocks[layer].finish(x, attended)

    def logits(self, number: int, x: Tensor) -> Tensor:  # noqa: D102
        return self.vocabulary(self.norms[number](x))

    def _dropped(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """LayerSkip, eq. 1 and 2: in training a sequence passes by layer l with chance p (e^(l ln 2 / (L - 1)) - 1)."""
        if not self.training or not self.layer_dropout or self.depth == 1:
            return y
        chance = self.layer_dropout * math.expm1(layer * math.log(2) / (self.depth - 1))
        return torch.where(torch.rand(x.shape[0], 1, 1, device=x.device) < chance, x, y)

    def _too_long(self, positions: int) -> InputError:
        return InputError(
            f"{positions} tokens in a network for {self.longest}; prompt, new tokens and drafts have to fit: give "
            f"less, or build it with a larger `longest`"
        )

    def _check(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise InputError(f"token ids of shape {tuple(ids.shape)} and {ids.dtype}; expected (B, T) of torch.int64")
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < self.words.num_embeddings):
            raise InputError(
                f"token ids from {int(ids.min())} to {int(ids.max())} for a vocabulary of {self.words.num_embeddings}; "
                f"this is another network's tokenizer, or a token that it has no number for"
            )


class Block(nn.Module):
    """Causal attention, then a hidden layer for each token; `Tokens` to the same layout, or in parts for decoding."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.norm_a, self.norm_b = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask, self.offer = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.project, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for linear in (self.ask, self.offer, self.project, self.feed_forward[0], self.feed_forward[2]):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tokens) -> Tokens:
        """All tokens at once."""
        x = self.norm_a(tokens.x)
        key, value = self.offer(x).chunk(2, -1)
        attended = attend_causal(self.ask(x), key, value, tokens, self.heads)
        return tokens._replace(x=self.finish(tokens.x, attended))

    def query(self, x: Tensor) -> Tensor:
        """(..., D) to (..., heads, d)."""
        return self.ask(self.norm_a(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) to (..., heads, d) twice."""
        key, value = self.offer(self.norm_a(x)).chunk(2, -1)
        return key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention."""
        x = x + self.dropout(self.project(attended))
        return x + self.dropout(self.feed_forward(self.norm_b(x)))


def exits_loss(answers: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the next token at every exit, later exits counting more.

    Exit i of n (from 1) has the weight i / (1 + ... + n), as CALM trains (Schuster et al. 2022, section 3.4).

    Args:
        answers: logits (B, T, vocabulary) of every exit.
        targets: (B, T), the tokens that follow.
    """
    losses = [functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in answers]
    weights = torch.arange(1, len(losses) + 1, dtype=losses[0].dtype, device=losses[0].device)
    return (torch.stack(losses) * weights).sum() / weights.sum()
