"""Decoding token by token: a causal transformer in parts, and its cache of keys and values."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Decoder(nn.Module, ABC):
    """A causal transformer in parts, so that tokens can leave after some layers, be drafted and verified.

    Attributes:
        depth: layers.
        exits: after which layers, counted from 0 in ascending order, next tokens can be read; the last layer included.
    """

    depth: int
    exits: tuple[int, ...]

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and their positions, (R, S) each, to features (R, S, D)."""

    @abstractmethod
    def query(self, layer: int, x: Tensor) -> Tensor:
        """Queries of a layer, (..., D) to (..., heads, d)."""

    @abstractmethod
    def key_value(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (..., D) to (..., heads, d) each."""

    @abstractmethod
    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer after attention: x and attended, (..., D) each, to the layer's answer."""

    @abstractmethod
    def logits(self, number: int, x: Tensor) -> Tensor:
        """Features (..., D) to logits (..., vocabulary), by exit `number` of `exits`."""

    def check(self, prompt: Tensor, positions: int) -> None:
        """Check a prompt before anything is decoded; by default nothing is refused.

        Args:
            prompt: (length,) int64.
            positions: number of positions that the prompt and its continuation take.

        Raises:
            InputError: tokens outside the vocabulary, or more positions than the decoder has.
        """

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next(self.parameters()).device

    def stage(self, number: int) -> range:
        """The layers between exit number - 1 and exit `number`."""
        return range(self.exits[number - 1] + 1 if number else 0, self.exits[number] + 1)


class Cache:
    """Keys and values of every layer, by row and position. Places after a row's last token are never read.

    Args:
        decoder: whose layers these are.
        rows: number of sequences that are decoded together.
        longest: number of positions.
    """

    def __init__(self, decoder: Decoder, rows: int, longest: int) -> None:
        self.decoder = decoder
        self.rows = rows
        first = torch.zeros(1, 1, dtype=torch.int64, device=decoder.device)
        key, _ = decoder.key_value(0, decoder.embed(first, first))
        shape = (rows, longest, *key.shape[2:])
        self.keys = [key.new_zeros(shape) for _ in range(decoder.depth)]
        self.values = [key.new_zeros(shape) for _ in range(decoder.depth)]

    def remember(self, layer: int, x: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Store keys and values of a layer's input x (..., D); rows and positions broadcast to its leading axes."""
        self.keys[layer][rows, positions], self.values[layer][rows, positions] = self.decoder.key_value(layer, x)

    def run(
        self, layers: Iterable[int], x: Tensor, rows: Tensor, positions: Tensor, there: Tensor | None = None
    ) -> Tensor:
        """Run layers: each token attends to its row's tokens up to its own position.

        Args:
            layers: ascending.
            x: (R, S, D), input of the first of them.
            rows: (R,), the numbers of the sequences.
            positions: (R, S).
            there: (R, S) bool, which places of the rectangle hold tokens; None: all. For the others only attention is
                computed, and its answer is not used.
        """
        if x.shape[0] == 0:
            return x
        seen = int(positions.max()) + 1
        mask = (torch.arange(seen, device=x.device) <= positions[:, :, None])[:, None]  # (R, 1, S, seen)
        everyone = rows.shape[0] == self.rows
        if there is None or bool(there.all()):
            inside: tuple[Tensor, ...] | None = None
            places = rows[:, None], positions
        else:
            inside = there.nonzero(as_tuple=True)
            places = rows[inside[0]], positions[inside]
            x = x[inside]
        for layer in layers:
            self.remember(layer, x, *places)
            keys, values = (
                (t[:, :seen] if everyone else t[rows, :seen]).transpose(1, 2)
                for t in (self.keys[layer], self.values[layer])
            )
            query = self.decoder.query(layer, x)
            if inside is not None:
                query = query.new_zeros(*positions.shape, *query.shape[1:]).index_put(inside, query)
            attended = functional.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
            attended = attended.transpose(1, 2).flatten(2)
            x = self.decoder.finish(layer, x, attended if inside is None else attended[inside])
        return x if inside is None else x.new_zeros(*positions.shape, x.shape[-1]).index_put(inside, x)


def prefilled(decoder: Decoder, prompts: list[Tensor], new: int) -> tuple[Cache, Tensor, Tensor]:
    """Fill a cache with all tokens of the prompts except their last ones.

    Args:
        decoder: in eval mode.
        prompts: (length,) int64 each, one token or more.
        new: number of tokens to make room for.

    Returns:
        The cache, the last tokens (B,), and their positions (B,).
    """
    lengths = torch.tensor([p.shape[0] for p in prompts], device=decoder.device)
    cache = Cache(decoder, len(prompts), int(lengths.max()) + new)
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(decoder.device)
    rows = torch.arange(len(prompts), device=decoder.device)
    before = ids[:, :-1]
    if before.shape[1]:  # padding after a shorter prompt is overwritten before it is read
        positions = torch.arange(before.shape[1], device=decoder.device).expand_as(before)
        cache.run(range(decoder.depth), decoder.embed(before, positions), rows, positions)
    return cache, ids[rows, lengths - 1], lengths - 1
