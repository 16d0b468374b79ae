"""Token merge: alike tokens become one; the blocks after it see fewer, and nothing is thrown away."""

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError
from dynanet.ops.tokens import TOKEN_ROWS, Rectangle, Tokens, attention_price, rank


class TokenMerge(Dynamic):
    """Bipartite soft matching (ToMe: Bolya et al. 2023, arXiv:2210.09461, section 3), and the rest on what is left.

    Every second token of a sample may be merged into the most similar one of the others. A merged token is the mean of
    what it stands for, weighted with their sizes, and is attended to as so many (`Tokens.size`).

    The decision says which tokens go on: keep is 0 for those that were merged away, and unit 0 is the rest. After it a
    token that was merged away comes out as the token it was merged into. The first token (CLS) neither merges nor is
    merged into.

    Args:
        rest: maps Tokens to Tokens, and may merge again.
        merge: so many tokens of every sample are merged away, the most similar ones, as in the paper; at most half.
        similarity: instead, every pair is merged whose cosine is above this: as many as an image has alike.

    Attributes:
        merge: may be changed at any time.
        similarity: may be changed at any time.

    Raises:
        ConfigError: neither or both of `merge` and `similarity`, or one out of range.
    """

    degree = 2  # attention among n tokens costs a n + b n^2

    def __init__(self, rest: nn.Module, *, merge: int | None = None, similarity: float | None = None) -> None:
        super().__init__()
        if (merge is None) == (similarity is None):
            raise ConfigError(f"token merge got merge = {merge} and similarity = {similarity}; give one of them")
        if merge is not None and merge < 0:
            raise ConfigError(f"token merge got merge = {merge}; give how many tokens are merged away, 0 or more")
        if similarity is not None and not -1 <= similarity <= 1:
            raise ConfigError(f"token merge got similarity = {similarity}; a cosine is between -1 and 1")
        self.rest, self.merge, self.similarity = rest, merge, similarity

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout. Compared are `tokens.key` where the block before wrote it, else x."""
        match = _match(tokens)
        distance = torch.where(match.candidate, 1 - match.cosine, 2.0)
        if self.similarity is None:
            closer, _ = rank(torch.where(match.candidate, distance, torch.inf), tokens)
            merged = match.candidate & (closer < self.merge)
        else:
            merged = match.candidate & (match.cosine > self.similarity)
        own = Decision((~merged).to(tokens.x.dtype)[..., None], distance[..., None])
        pinned = (~match.candidate).to(tokens.x.dtype)[..., None]
        present = None if tokens.alive is None else tokens.alive[..., None]
        keep = self.tap(own, pinned=pinned, present=present).keep[..., 0]
        into = _Folding(tokens, match.partner, keep)
        with self.only(0, keep, TOKEN_ROWS) as kept:
            if kept.empty:
                return tokens
            if kept.index is None:
                y = self.rest(into.dense()).x
                home = y.flatten(0, -2).index_select(0, match.partner).view_as(y)
                home = TOKEN_ROWS.mask(y, kept.lead, kept.keep, otherwise=home)
            else:
                packed = kept.take(tokens._replace(attention=None, key=None))
                y = self.rest(into.sparse(packed, kept.index)).x
                # One gather puts every row's answer home: its own, or its partner's.
                home = y.index_select(0, into.place[into.onto]).reshape(tokens.x.shape)
        if tokens.alive is not None:
            home = torch.where(tokens.there()[..., None], home, tokens.x)
        return tokens._replace(x=home)

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """a n + b n^2 with n the tokens that are left of a sample; both measured."""
        return attention_price(keep, unit_macs)


class _Match:
    """What could merge with what: `candidate` (who may be merged away) and `cosine` are shaped as x without its last
    axis; `partner` is a flat row of x for every token, its own where it is no candidate.
    """

    def __init__(self, candidate: Tensor, cosine: Tensor, partner: Tensor) -> None:
        self.candidate, self.cosine, self.partner = candidate, cosine, partner


class _Folding:
    """Hosts become the mean of what they stand for. Over flat rows: x_host + sum of (x_i - x_host) size_i / size, which
    leaves alone, to the last digit, what nothing is merged into.

    Attributes:
        onto: for every row the row that stands for it: itself if it is kept.
        place: where a kept row lies among the kept ones; set by `sparse`.
    """

    def __init__(self, tokens: Tokens, partner: Tensor, keep: Tensor) -> None:
        self._tokens, self._keep = tokens, keep
        size = torch.ones_like(keep) if tokens.size is None else tokens.size
        alive = torch.ones_like(keep) if tokens.alive is None else tokens.alive
        self._moves = ((1 - keep) * alive * size).flatten()
        self._sizes = size.flatten().index_add(0, partner, self._moves)
        self.onto = torch.where(self._moves > 0, partner, torch.arange(partner.shape[0], device=partner.device))
        self.place = partner

    def dense(self) -> Tokens:
        """The rectangle; what was merged away is no longer there."""
        x = self._tokens.x.flatten(0, -2)
        x = x.index_add(0, self.onto, self._change(x, self._moves, self.onto, x)).view_as(self._tokens.x)
        sizes = self._sizes.view_as(self._keep)
        return self._tokens._replace(x=x, size=sizes, alive=self._keep, attention=None, key=None)

    def sparse(self, packed: Tokens, index: Tensor) -> Tokens:
        """The kept tokens, which are a copy unless all are kept: then nothing is merged."""
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
    """Tokens at odd places of their sample, each with its most similar one at an even place, the first excepted.

    All pairs are compared, and not only those between the two halves: so the price is a polynomial of the count. The
    keys are narrow, and cost less than a hundredth of a block.
    """
    key = tokens.x if tokens.key is None else tokens.key
    key = key / key.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(key.dtype).tiny)
    own = torch.arange(key[..., 0].numel(), device=key.device).view(key.shape[:-1])
    rectangle = Rectangle(tokens)
    rows = rectangle.of(own, fill=0)
    candidate = torch.zeros_like(rows, dtype=torch.bool)
    cosine, partner = torch.full_like(rows, -1.0, dtype=key.dtype), rows.clone()
    if rectangle.full:
        best, which = _nearest(rectangle.of(key, fill=0.0))
        columns = 2 * best.shape[1]  # none where a sample has no host
        candidate[:, 1:columns:2], cosine[:, 1:columns:2] = True, best
        partner[:, 1:columns:2] = rows.gather(1, which)
    elif tokens.lengths is not None:
        for sample, part in enumerate(key.split(tokens.lengths)):
            best, which = _nearest(part[None])
            columns = 2 * best.shape[1]
            candidate[sample, 1:columns:2], cosine[sample, 1:columns:2] = True, best[0]
            partner[sample, 1:columns:2] = rows[sample, which[0]]
    else:  # a rectangle with gaps: places are counted among the tokens that are there, so that both layouts agree
        place, there = tokens.there().long().cumsum(1) - 1, tokens.there()
        host = there & (place % 2 == 0) & (place > 0)
        best, which = (key @ key.transpose(1, 2)).masked_fill(~host[:, None], -torch.inf).max(2)
        candidate = there & (place % 2 == 1) & host.any(1, keepdim=True)
        cosine = torch.where(candidate, best, -1.0)
        partner = torch.where(candidate, rows.gather(1, which), own)
    if tokens.lengths is None:
        return _Match(candidate, cosine, partner.flatten())
    return _Match(rectangle.rows(candidate), rectangle.rows(cosine), rectangle.rows(partner))


def _nearest(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of samples of equal length (B, n, d): for the tokens at odd places the best cosine with one at an even place but
    the first, and that place; (B, n // 2), or (B, 0) where there is none to merge into.
    """
    cosines = keys @ keys.transpose(1, 2)
    if keys.shape[1] < 3:
        nothing = keys[:, :0, 0]
        return nothing, nothing.long()
    best, which = cosines[:, 1::2, 2::2].max(2)
    return best, 2 * which + 2
