"""Samples of different lengths as rows: their tokens are packed one after another, and nothing is padded."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from dynanet.core.rows import LEADING, Rows
from dynanet.ops.native.attention import mean_packed
from dynanet.ops.native.library import fit
from dynanet.ops.tokens import Tokens


class Packed(NamedTuple):
    """The tokens of all samples. Batches join by concatenating the tensors of both along their first axis.

    Attributes:
        x: (N, D), sample after sample.
        counts: (B,) int64, tokens of every sample.
        width: columns of the rectangle that they came from, the width of decisions in a trace.
    """

    x: Tensor
    counts: Tensor
    width: int

    def tokens(self) -> Tokens:
        """For `attend`."""
        return Tokens(self.x, lengths=tuple(self.counts.tolist()))

    def there(self) -> Tensor:
        """(B, width) of x's dtype, 1 where the rectangle has a token."""
        columns = torch.arange(self.width, device=self.x.device)
        return (columns < self.counts[:, None]).to(self.x.dtype)

    def mean(self) -> Tensor:
        """Average over the tokens of every sample, (B, D)."""
        if self.counts.shape[0] == 1:
            return self.x.mean(0, keepdim=True)
        if self.counts.shape[0] == 0:
            return self.x[:0]
        if fit(self.x):
            return mean_packed(self.x, self.counts.tolist())
        rows = torch.arange(self.x.shape[0], device=self.x.device)
        # Several times as fast as torch.segment_reduce, where there are several samples.
        sums = functional.embedding_bag(rows, self.x, self.counts.cumsum(0) - self.counts, mode="sum")
        return sums / self.counts[:, None]


def pack(x: Tensor, counts: Tensor) -> Packed:
    """Pack the first `counts` columns of every row of a rectangle (B, T, ...)."""
    columns = torch.arange(x.shape[1], device=x.device)
    return Packed(x[columns < counts[:, None]], counts, x.shape[1])


class PackedRows(Rows):
    """Rows are samples: of a `Packed` its samples with all their tokens, of any other tensor its first axis.

    In the dense form nothing is packed: `Tokens` in their rectangle are leading rows.
    """

    flat = True

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """All rows of a rectangle."""
        return LEADING.whole(x, lead)

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """The samples at `index`; x itself, without a copy, if these are all."""
        if index.numel() == lead[0]:
            return x

        def samples(part: Any) -> Any:
            if not isinstance(part, Packed):
                return LEADING.take(part, lead, index)
            parts = part.x.split(part.counts.tolist())
            kept = [parts[i] for i in index.tolist()]
            return Packed(torch.cat(kept) if kept else part.x[:0], part.counts[index], part.width)

        return tree_map(samples, x, is_leaf=lambda node: isinstance(node, Packed))

    def put(self, y: Any, lead: tuple[int, ...], index: Tensor, otherwise: Any) -> Any:
        """As of leading rows: answers have the samples along their first axis."""
        return LEADING.put(y, lead, index, otherwise)

    def mask(self, y: Any, lead: tuple[int, ...], keep: Tensor, otherwise: Any) -> Any:
        """As of leading rows."""
        return LEADING.mask(y, lead, keep, otherwise)


PACKED_ROWS = PackedRows()
