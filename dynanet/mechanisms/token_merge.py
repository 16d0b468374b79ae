"""Token merge: similar tokens become one, so that later blocks see fewer, and no token is dropped."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.errors import ConfigError
from dynanet.ops.tokens import TOKEN_ROWS, Rectangle, TokenLayer, Tokens, rank


class TokenMerge(TokenLayer):
    """Bipartite soft matching (ToMe: Bolya et al. 2023, arXiv:2210.09461, section 3), then the rest on what is left.

    Every second token of a sample may be merged into the most similar one of the others. A merged token is the mean of
    the tokens that it stands for, weighted with their sizes, and counts in attention as that many (`Tokens.size`).

    The decision says which tokens continue: keep is 0 for those that were merged away, and unit 0 is the rest. In the
    output a token that was merged away equals the token it was merged into. The first token (CLS) neither merges nor is
    merged into.

    Args:
        rest: maps Tokens to Tokens, and may merge again.
        merge: number of tokens of every sample that are merged away, the most similar ones, as in the paper; at most
            half.
        similarity: instead, every pair whose cosine is above this is merged, so that the number depends on the sample.

    Attributes:
        merge: may be changed at any time.
        similarity: may be changed at any time.

    Raises:
        ConfigError: neither or both of `merge` and `similarity`, or one out of range.
    """

    def __init__(self, rest: nn.Module, *, merge: int | None = None, similarity: float | None = None) -> None:
        super().__init__()
        if (merge is None) == (similarity is None):
            raise ConfigError(f"token merge got merge = {merge} and similarity = {similarity}; give one of them")
        if merge is not None and merge < 0:
            raise ConfigError(f"merge must be at least 0, got merge = {merge}")
        if similarity is not None and not -1 <= similarity <= 1:
            raise ConfigError(f"similarity is a cosine between -1 and 1, got similarity = {similarity}")
        self.rest = rest
        self.merge = merge
        self.similarity = similarity

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout. Compared by `tokens.key` where the block before wrote it, else by x."""
        match = _match(tokens)
        distance = torch.where(match.candidate, 1 - match.cosine, 2.0)
        if self.similarity is not None:
            merged = match.candidate & (match.cosine > self.similarity)
        else:
            assert self.merge is not None
            closer, _ = rank(torch.where(match.candidate, distance, torch.inf), tokens)
            merged = match.candidate & (closer < self.merge)
        own = Decision((~merged).to(tokens.x.dtype)[..., None], distance[..., None])
        pinned = (~match.candidate).to(tokens.x.dtype)[..., None]
        keep = self.tap(own, pinned=pinned, present=tokens.present).keep[..., 0]
        folding = _Folding(tokens, match.partner, keep)
        with self.only(0, keep, TOKEN_ROWS) as kept:
            if kept.empty:
                return tokens
            if kept.index is None:
                y = self.rest(folding.dense()).x
                x = y.flatten(0, -2).index_select(0, match.partner).view_as(y)
                x = TOKEN_ROWS.mask(y, kept.lead, kept.keep, otherwise=x)
            else:
                packed = kept.take(tokens._replace(attention=None, key=None))
                y = self.rest(folding.sparse(packed, kept.index)).x
                # One gather scatters all answers: a row takes its own, or its partner's.
                x = y.index_select(0, folding.place[folding.onto]).reshape(tokens.x.shape)
        if tokens.alive is not None:
            x = torch.where(tokens.there()[..., None], x, tokens.x)
        return tokens._replace(x=x)


class _Match(NamedTuple):
    """Which tokens could merge.

    Attributes:
        candidate: True for tokens that may be merged away; shaped as x without its last axis.
        cosine: of a candidate and its partner; shaped as candidate.
        partner: for every token a flat row of x, its own if it is not a candidate.
    """

    candidate: Tensor
    cosine: Tensor
    partner: Tensor


class _Folding:
    """Makes hosts the mean of what they stand for, over flat rows: x_host + sum of (x_i - x_host) size_i / size.

    In this form a host that nothing is merged into keeps its x to the last digit.

    Attributes:
        onto: for every row the row that stands for it: itself if it is kept.
        place: where a kept row lies among the kept ones; set by `sparse`.
    """

    def __init__(self, tokens: Tokens, partner: Tensor, keep: Tensor) -> None:
        self._tokens = tokens
        self._keep = keep
        size = torch.ones_like(keep) if tokens.size is None else tokens.size
        self._moves = ((1 - keep) * tokens.membership() * size).flatten()
        self._sizes = size.flatten().index_add(0, partner, self._moves)
        self.onto = torch.where(self._moves > 0, partner, torch.arange(partner.shape[0], device=partner.device))
        self.place = partner

    def dense(self) -> Tokens:
        """The rectangle, in which tokens that were merged away are no longer there."""
        x = self._tokens.x.flatten(0, -2)
        x = x.index_add(0, self.onto, self._change(x, self._moves, self.onto, x)).view_as(self._tokens.x)
        sizes = self._sizes.view_as(self._keep)
        return self._tokens._replace(x=x, size=sizes, alive=self._keep, attention=None, key=None)

    def sparse(self, packed: Tokens, index: Tensor) -> Tokens:
        """The kept tokens, with hosts written in place: they are a copy unless all are kept and nothing is merged."""
        self.place = torch.zeros_like(self.onto)
        self.place[index] = torch.arange(index.shape[0], device=index.device)
        rows = self._moves.nonzero().squeeze(1)
        if rows.shape[0] == 0:
            return packed._replace(size=self._sizes)
        x, onto = self._tokens.x.flatten(0, -2), self.onto[rows]
        packed.x.index_add_(0, self.place[onto], self._change(x[rows], self._moves[rows], onto, x))
        return packed._replace(size=self._sizes[index])

    def _change(self, moved: Tensor, moves: Tensor, onto: Tensor, x: Tensor) -> Tensor:
        return (moves / self._sizes[onto])[:, None] * (moved - x[onto])


@torch.no_grad()
def _match(tokens: Tokens) -> _Match:
    """Match every token at an odd place of its sample with the most similar one at an even place but the first.

    All pairs are compared, not only those between the two halves, so that the price is a polynomial of the count. Keys
    are narrow: this costs less than a hundredth of a block.
    """
    key = tokens.x if tokens.key is None else tokens.key
    key = key / key.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(key.dtype).tiny)
    own = torch.arange(key[..., 0].numel(), device=key.device).view(key.shape[:-1])
    rectangle = Rectangle(tokens)
    rows = rectangle.of(own, fill=0)
    candidate = torch.zeros_like(rows, dtype=torch.bool)
    cosine = torch.full_like(rows, -1.0, dtype=key.dtype)
    partner = rows.clone()
    if rectangle.full:
        best, which = _nearest(rectangle.of(key, fill=0.0))
        columns = 2 * best.shape[1]  # none where a sample has no host
        candidate[:, 1:columns:2] = True
        cosine[:, 1:columns:2] = best
        partner[:, 1:columns:2] = rows.gather(1, which)
    elif tokens.lengths is not None:
        for sample, part in enumerate(key.split(tokens.lengths)):
            best, which = _nearest(part[None])
            columns = 2 * best.shape[1]
            candidate[sample, 1:columns:2] = True
            cosine[sample, 1:columns:2] = best[0]
            partner[sample, 1:columns:2] = rows[sample, which[0]]
    else:  # a rectangle with gaps: places are counted among the tokens that are there, so that both layouts agree
        there = tokens.there()
        place = there.long().cumsum(1) - 1
        host = there & (place % 2 == 0) & (place > 0)
        best, which = (key @ key.transpose(1, 2)).masked_fill(~host[:, None], -torch.inf).max(2)
        candidate = there & (place % 2 == 1) & host.any(1, keepdim=True)
        cosine = torch.where(candidate, best, -1.0)
        partner = torch.where(candidate, rows.gather(1, which), own)
    return _Match(rectangle.rows(candidate), rectangle.rows(cosine), rectangle.rows(partner).flatten())


def _nearest(keys: Tensor) -> tuple[Tensor, Tensor]:
    """For tokens at odd places, the best cosine with one at an even place but the first, and that place.

    Args:
        keys: of samples of equal length, (B, n, d).

    Returns:
        Both (B, n // 2), or (B, 0) where there is none to merge into.
    """
    cosines = keys @ keys.transpose(1, 2)
    if keys.shape[1] < 3:
        nothing = keys[:, :0, 0]
        return nothing, nothing.long()
    best, which = cosines[:, 1::2, 2::2].max(2)
    return best, 2 * which + 2
