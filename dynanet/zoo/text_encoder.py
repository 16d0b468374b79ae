"""BERT-like text encoders with exits after their layers, for sentences of any length, without computing on padding.

Post-norm layers of Devlin et al.: BERT, 2019, https://arxiv.org/abs/1810.04805, so that pretrained encoders fit in
(`zoo.pretrained_text_exits`; MiniLM: Wang et al., 2020, https://arxiv.org/abs/2002.10957). Exits as in DeeBERT (Xin et
al., 2020, https://arxiv.org/abs/2004.12993), read from the mean of a sentence's tokens.

The sparse form packs the tokens of all sentences, and a sentence leaves with its tokens: linear layers see one long
list of tokens, attention stays within a sentence. In the dense form (training) sentences are padded to a rectangle, and
padding is masked.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, InputError, check_sizes
from dynanet.core.serving import CalledInParts, PartByPart
from dynanet.core.trace import Frame
from dynanet.gates.confidence import Confidence
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.nets.blocks import init_normal
from dynanet.ops.packed import PACKED_ROWS, Packed, pack
from dynanet.ops.tokens import TOKEN_ROWS, Tokens, attend
from dynanet.zoo.exits import check_exits, split_at
from dynanet.zoo.vit_config import check_heads


@architecture
def text_exits(
    *,
    num_classes: int,
    vocabulary: int,
    longest: int = 128,
    width: int = 384,
    depth: int = 6,
    heads: int = 12,
    hidden: int = 1536,
    exits: Sequence[int] | None = None,
    padding: int = 0,
    dropout: float = 0.1,
    epsilon: float = 1e-12,
) -> EarlyExit:
    """A text encoder with exits; token ids (B, T) int64, padded at the end, to logits (B, num_classes).

    T is at most `longest`. The default sizes are MiniLM's.

    Args:
        num_classes: width of every exit's logits.
        vocabulary: number of ids.
        longest: tokens of the longest sentence.
        width: features of a token.
        depth: layers.
        heads: attention heads; they divide `width`.
        hidden: neurons of a layer's feed-forward part.
        exits: layers followed by an exit, counted from 0 in ascending order, the last one included; all layers if
            None. The last one only gives the static encoder.
        padding: the id of padding.
        dropout: share of features that training drops.
        epsilon: of the layer norms.

    Raises:
        ConfigError: a value out of range, heads that do not divide, or exits without the last layer.

    Example:
        >>> model = text_exits(num_classes=2, vocabulary=100, width=12, depth=2, heads=2, hidden=24)
        >>> model(torch.tensor([[5, 7, 9], [5, 8, 0]])).shape
        torch.Size([2, 2])
    """
    check_sizes(num_classes=num_classes, vocabulary=vocabulary, longest=longest)
    check_sizes(width=width, depth=depth, heads=heads, hidden=hidden)
    check_heads(width, heads)
    if not 0 <= dropout < 1 or not 0 <= padding < vocabulary or not epsilon > 0:
        raise ConfigError(
            f"dropout {dropout}, padding {padding} of {vocabulary} ids, epsilon {epsilon}; expected a share below 1, "
            f"an id below the vocabulary's size, and a positive number"
        )
    ends = check_exits(range(depth) if exits is None else exits, depth)
    embed = TextInput(vocabulary, longest, width, padding=padding, dropout=dropout, epsilon=epsilon)
    layers = [TextLayer(width, heads, hidden, dropout=dropout, epsilon=epsilon) for _ in range(depth)]
    return _sentence_wise(EarlyExit(split_at(layers, ends, embed), [TextHead(width, num_classes) for _ in ends]))


def with_confidence(model: EarlyExit, confidence: Confidence) -> EarlyExit:
    """A `text_exits` network with another exit criterion (`Entropy`, `Patience`, ...); weights are shared, not copied.

    DeeBERT and BranchyNet exit by entropy, PABEE (Zhou et al. 2020, arXiv:2006.04152) by patience. Thresholds are
    infinite again, as scores have another scale.
    """
    other = _sentence_wise(EarlyExit(list(model.stages), list(model.exits), confidence))
    other.active = model.active
    return other.train(model.training)


def _sentence_wise(model: EarlyExit) -> EarlyExit:
    """Rows are sentences, and a sentence's parts are its tokens."""
    model.rows = PACKED_ROWS
    model.part_by_part = TokenByToken()
    return model


def exits_only(model: EarlyExit) -> EarlyExit:
    """Freeze everything but the exits before the last one: the second stage of DeeBERT's and FastBERT's training.

    The first stage trains the last exit (`train.MultiExit` with weights 0, ..., 0, 1). The second trains the others
    with labels (DeeBERT), or with the last exit as teacher (FastBERT, Liu et al. 2020, arXiv:2004.02178:
    `train.MultiExit(distill=1.0, temperature=1.0)`). Dropout in frozen layers stays on in train mode.

    Returns:
        The model.
    """
    model.requires_grad_(False)
    for head in list(model.exits)[:-1]:
        head.requires_grad_(True)
    return model


class TokenByToken(PartByPart):
    """Runs a single sentence as its tokens, each step as one graph."""

    def parts(self, halt: EarlyExit, x: Tensor) -> Tensor:
        """Token ids (1, T) to embedded tokens (n, D), before their norm."""
        return cast(TextInput, cast(nn.Sequential, halt.stages[0])[0]).sum(x)

    def one_row(self, halt: EarlyExit, k: int) -> nn.Module | None:
        """The layers up to active exit k, that exit, and its confidence."""
        number = halt.active[k]
        first = halt.active[k - 1] + 1 if k else 0
        layers = [layer for stage in halt.stages[first : number + 1] for layer in stage.children()]
        if k == 0:
            layers[0] = cast(TextInput, layers[0]).norm
        confidence = halt.confidence.at(number) if k + 1 < halt.steps else None
        remembers = confidence is not None and type(confidence).remember is not Confidence.remember
        step = TextStep(layers, cast(TextHead, halt.exits[number]), confidence)
        decisions = [m for m in step.modules() if isinstance(m, Dynamic) and not isinstance(m, TextLayer)]
        plain = all(isinstance(layer, TextLayer | nn.LayerNorm) for layer in layers) and not decisions
        return step if plain and not remembers else None


class TextStep(nn.Module):
    """Layers, an exit and its confidence for one sentence."""

    def __init__(self, layers: Sequence[nn.Module], head: "TextHead", confidence: Confidence | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.confidence = confidence

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens (n, D) to (logits (n, classes), score (n, 1), tokens), or to the logits alone; see `PartByPart`."""
        for layer in self.layers:
            x = layer.whole(Tokens(x[None]))[0] if isinstance(layer, TextLayer) else layer(x)
        logits = self.head.classify(x.mean(0, keepdim=True))
        if self.confidence is None:
            return (logits.expand(x.shape[0], -1),)
        return logits.expand(x.shape[0], -1), self.confidence(logits).expand(x.shape[0], -1), x


class TextInput(Dynamic):
    """Token ids to their embeddings: a rectangle of `Tokens` in the dense form, `Packed` in the sparse one.

    It makes no decisions, and is a Dynamic to know its form. `positions` include BERT's token type, as all sentences
    here have one type.
    """

    def __init__(
        self, vocabulary: int, longest: int, width: int, *, padding: int, dropout: float, epsilon: float
    ) -> None:
        super().__init__()
        self.padding = padding
        self.longest = longest
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.dropout = nn.Dropout(dropout)
        init_normal(self.words, self.positions)

    def forward(self, ids: Tensor) -> Tokens | Packed:
        """Token ids (B, T) int64 to features (B, T, D), as `Tokens` or `Packed`.

        Raises:
            InputError: another shape or dtype, more than `longest` columns, ids outside the vocabulary, sentences
                without tokens, or padding in front of a token.
        """
        if self.gathers and ids.shape[:1] == (1,):
            x = self.norm(self.sum(ids))
            return Packed(x, torch.tensor(x.shape[:1], device=ids.device), ids.shape[1])
        there, counts = self._there(ids)
        columns = torch.arange(ids.shape[1], device=ids.device)
        if self.gathers:
            packed = pack(ids, counts)
            x = self._words(packed.x).add_(self._positions(columns.expand_as(ids)[there]))
            return packed._replace(x=self.norm(x))
        x = self.dropout(self.norm(self._words(ids) + self._positions(columns)))
        return Tokens(x, there.to(x.dtype))

    def sum(self, ids: Tensor) -> Tensor:
        """The sums of word and position embeddings of one sentence: ids (1, T) to (n, D).

        In few calls of torch, as each of them counts at batch size 1.

        Raises:
            InputError: as `forward`.
        """
        self._check_shape(ids)
        row = ids[0].tolist()
        n = row.index(self.padding) if self.padding in row else len(row)
        if not n or row.count(self.padding) != len(row) - n or min(row) < 0 or max(row) >= self.words.num_embeddings:
            self._there(ids)  # raises the error
        return self._words(ids[0, :n]).add_(self.positions.weight[:n])

    def _words(self, ids: Tensor) -> Tensor:
        # Not through the modules: a session would make engines of them, with a copy of the table.
        return nn.functional.embedding(ids, self.words.weight)

    def _positions(self, columns: Tensor) -> Tensor:
        return nn.functional.embedding(columns, self.positions.weight)

    def _check_shape(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64 or not 1 <= ids.shape[1] <= self.longest:
            raise InputError(
                f"token ids of shape {tuple(ids.shape)} and {ids.dtype}; expected (sentences, at most {self.longest} "
                f"tokens) of torch.int64: cut longer ones, or tokenise with zoo.TextTokenizer, which does"
            )

    def _there(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mask of the tokens (B, T), bool, and their number in each sentence (B,), after checking them."""
        self._check_shape(ids)
        there = ids != self.padding
        counts = there.sum(1)
        if torch.compiler.is_compiling() or not ids.numel():
            return there, counts
        least, most = (int(n) for n in ids.aminmax())
        if least < 0 or most >= self.words.num_embeddings:
            raise InputError(
                f"token ids from {least} to {most} for {self.words.num_embeddings} words; use the tokenizer of this "
                f"encoder"
            )
        # Without padding in between, the position of the last token is the number of tokens.
        ends = (there * torch.arange(1, 1 + ids.shape[1], device=ids.device)).amax(1)
        broken = (ends != counts) | (counts == 0)
        if bool(broken.any()):
            rows = broken.nonzero().flatten().tolist()[:5]
            raise InputError(
                f"sentence(s) {rows} have no token, or padding ({self.padding}) in front of one; pad at the end only"
            )
        return there, counts


class TextLayer(Dynamic):
    """One layer of BERT for all tokens but padding: attention within each sentence, then a hidden layer per token.

    Rows are tokens. The layer makes no decisions, but decisions can be forced: skipped tokens stay unchanged. The price
    of a sentence of n tokens is a n + b n^2.
    """

    degree = 2

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.rest = TextRest(width, hidden, dropout=dropout, epsilon=epsilon)
        init_normal(self.query_key_value)

    def forward(self, tokens: Tokens | Packed) -> Tokens | Packed:
        """Features (B, T, D), or packed (N, D), to the same layout."""
        if isinstance(tokens, Packed):
            return tokens._replace(x=self._packed(tokens))
        assert tokens.alive is not None
        keep = self._kept(tokens.alive)
        x = self.run(0, self.whole, keep, tokens._replace(alive=keep), otherwise=tokens.x, rows=TOKEN_ROWS)
        return tokens._replace(x=x)

    def whole(self, tokens: Tokens) -> Tensor:
        """All tokens, without decisions; features to the same shape."""
        query, key, value = self.query_key_value(tokens.x).chunk(3, -1)
        return self.rest(attend(query, key, value, tokens, self.heads), tokens.x)

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """The price a n + b n^2 of sentences of n tokens, with measured a and b."""
        n = keep.to(unit_macs).flatten(1).sum(1)
        return n * unit_macs[0, 0] + n * n * unit_macs[0, 1]

    def _packed(self, packed: Packed) -> Tensor:
        if self.trace is None and self.force is None:  # all tokens run: no need to say which
            return self.whole(packed.tokens())
        there = packed.there()
        keep = self._kept(there)
        taken = keep.flatten().nonzero().squeeze(1)
        which = (there.flatten().cumsum(0).long() - 1)[taken]  # among the packed tokens
        with self.within(Frame(self, range(1), tuple(keep.shape), taken, None, True)):
            lengths = tuple(keep.sum(1).long().tolist())
            y = self.whole(Tokens(packed.x.index_select(0, which), lengths=lengths))
        return packed.x.index_copy(0, which, y)

    def _kept(self, there: Tensor) -> Tensor:
        first = torch.zeros_like(there)
        first[:, 0] = 1
        keep, present = there[..., None], there[..., None]
        return self.tap(Decision(keep, keep), pinned=first[..., None], present=present).keep[..., 0]


class TextRest(nn.Module):
    """What follows attention in a layer, token by token: projection and feed-forward part, with residuals and norms."""

    def __init__(self, width: int, hidden: int, *, dropout: float, epsilon: float) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm_a = nn.LayerNorm(width, eps=epsilon)
        self.norm_b = nn.LayerNorm(width, eps=epsilon)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        init_normal(self.project, self.up, self.down)

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        """Attention results and layer inputs (..., D) to layer outputs (..., D)."""
        x = self.norm_a(x + self.dropout(self.project(attended)))
        return self.norm_b(x + self.dropout(self.down(self.activation(self.up(x)))))


class TextHead(nn.Module, CalledInParts):  # sentences are not rows of a tensor
    """An exit: the mean of a sentence's tokens, one hidden layer, logits."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes))

    def forward(self, tokens: Any) -> Tensor:
        """Tokens or Packed to (B, classes)."""
        if isinstance(tokens, Packed):
            return self.classify(tokens.mean())
        alive = tokens.alive[..., None]
        return self.classify((tokens.x * alive).sum(1) / alive.sum(1).clamp(min=1))
