"""BERT-like text encoders with exits after their layers. Sentences have any length; padding is never computed with.

Post-norm layers of Devlin et al.: BERT, 2019, https://arxiv.org/abs/1810.04805, so that pretrained encoders fit in
(`zoo.pretrained_text_exits`; MiniLM: Wang et al., 2020, https://arxiv.org/abs/2002.10957). Exits as in DeeBERT (Xin et
al., 2020, https://arxiv.org/abs/2004.12993), read from the mean of a sentence's tokens.

The sparse form packs the tokens of all sentences, and sentences leave with theirs: linear layers see one long list of
tokens, attention stays within a sentence. In the dense form (training) sentences stand in their rectangle and padding
is masked.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, InputError
from dynanet.core.serving import CalledInParts, PartByPart
from dynanet.core.trace import Frame
from dynanet.gates.confidence import Confidence
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.ops.packed import PACKED_ROWS, Packed, pack
from dynanet.ops.tokens import TOKEN_ROWS, Tokens, attend


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
) -> "TextExits":
    """A text encoder with exits; token ids (B, T) int64, padded at the end, to logits (B, num_classes).

    T may be anything up to `longest`. The default sizes are MiniLM's.

    Args:
        num_classes: width of every exit's logits.
        vocabulary: ids that there are.
        longest: tokens of the longest sentence.
        width: features of a token.
        depth: layers.
        heads: of attention; must divide `width`.
        hidden: neurons of a layer's feed-forward part.
        exits: after which layers a sentence may leave, counted from 0 in ascending order, the last one included; all
            of them if None. The last one only: the static encoder.
        padding: the id that is no token.
        dropout: share of features that training drops.
        epsilon: of the layer norms.

    Raises:
        ConfigError: a value out of range, heads that do not divide, or exits without the last layer.

    Example:
        >>> model = text_exits(num_classes=2, vocabulary=100, width=12, depth=2, heads=2, hidden=24)
        >>> model(torch.tensor([[5, 7, 9], [5, 8, 0]])).shape
        torch.Size([2, 2])
    """
    counts = {
        "num_classes": num_classes, "vocabulary": vocabulary, "longest": longest, "width": width, "depth": depth,
        "heads": heads, "hidden": hidden,
    }  # fmt: skip
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"text_exits: {name} is {value!r}; expected a whole number of at least 1")
    if width % heads:
        raise ConfigError(f"text_exits: width {width} with {heads} heads; expected a width that the heads divide")
    if not 0 <= dropout < 1 or not 0 <= padding < vocabulary or not epsilon > 0:
        raise ConfigError(
            f"text_exits: dropout {dropout}, padding {padding} of {vocabulary} ids, epsilon {epsilon}; expected a "
            f"share below 1, an id that exists, and a small positive number"
        )
    leave = list(range(depth)) if exits is None else list(exits)
    if leave != sorted(set(leave)) or not leave or leave[0] < 0 or leave[-1] != depth - 1:
        raise ConfigError(
            f"text_exits: exits is {exits!r}; expected ascending numbers of layers from 0 to {depth - 1}, the last "
            f"included"
        )
    embed = TextInput(vocabulary, longest, width, padding=padding, dropout=dropout, epsilon=epsilon)
    layers = [TextLayer(width, heads, hidden, dropout=dropout, epsilon=epsilon) for _ in range(depth)]
    firsts = [0, *(last + 1 for last in leave[:-1])]
    stages: list[list[nn.Module]] = [list(layers[first : last + 1]) for first, last in zip(firsts, leave, strict=True)]
    stages[0] = [embed, *stages[0]]
    return TextExits([nn.Sequential(*stage) for stage in stages], [TextHead(width, num_classes) for _ in leave])


def with_confidence(model: "TextExits", confidence: Confidence) -> "TextExits":
    """The same network (same weights, not copied) that leaves by another criterion: `Entropy`, `Patience`, ...

    DeeBERT and BranchyNet leave by entropy, PABEE (Zhou et al. 2020, arXiv:2006.04152) by patience. Thresholds are
    infinite again, as scores have another scale.
    """
    other = TextExits(list(model.stages), list(model.exits), confidence)
    other.active = model.active
    return other.train(model.training)


def exits_only(model: EarlyExit) -> EarlyExit:
    """Freeze everything but the exits before the last one: the second stage of DeeBERT's and FastBERT's training.

    The first stage trains the last exit (`train.MultiExit` with weights 0, ..., 0, 1). The second trains the others:
    with labels (DeeBERT), or with the last exit as their teacher (FastBERT, Liu et al. 2020, arXiv:2004.02178:
    `train.MultiExit(distill=1.0, temperature=1.0)`). Dropout in frozen layers goes on in train mode. Returns the model.
    """
    model.requires_grad_(False)
    for head in list(model.exits)[:-1]:
        head.requires_grad_(True)
    return model


class TextExits(EarlyExit, PartByPart):
    """Exits along a text encoder. Its rows are sentences, and a sentence's parts are its tokens."""

    rows = PACKED_ROWS

    def parts(self, x: Tensor) -> Tensor:
        """Token ids (1, T) to embedded tokens (n, D), before their norm."""
        return self.stages[0][0].sum(x)

    def one_row(self, k: int) -> nn.Module | None:
        """The layers up to active exit k, that exit, and its confidence."""
        number, first = self.active[k], self.active[k - 1] + 1 if k else 0
        layers = [m for stage in self.stages[first : number + 1] for m in stage.children()]
        if k == 0:
            layers[0] = layers[0].norm
        confidence = self.confidence.at(number) if k + 1 < self.steps else None
        remembers = confidence is not None and type(confidence).remember is not Confidence.remember
        step = TextStep(layers, self.exits[number], confidence)
        decisions = [m for m in step.modules() if isinstance(m, Dynamic) and not isinstance(m, TextLayer)]
        plain = all(isinstance(layer, TextLayer | nn.LayerNorm) for layer in layers) and not decisions
        return step if plain and not remembers else None


class TextStep(nn.Module):
    """Layers, an exit and its confidence for one sentence, which nobody can leave half-way."""

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module, confidence: Confidence | None) -> None:
        super().__init__()
        self.layers, self.head, self.confidence = nn.ModuleList(layers), head, confidence

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

    It decides nothing; which form it is tells it what to make. `positions` holds BERT's token type too, as sentences
    here are of one type.
    """

    def __init__(
        self, vocabulary: int, longest: int, width: int, *, padding: int, dropout: float, epsilon: float
    ) -> None:
        super().__init__()
        self.padding, self.longest = padding, longest
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.norm, self.dropout = nn.LayerNorm(width, eps=epsilon), nn.Dropout(dropout)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tokens | Packed:
        """(B, T) int64.

        Raises:
            InputError: another shape or dtype, more than `longest` columns, ids that do not exist, sentences without
                a token, or padding in front of a token.
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
        """The vectors of words and positions of one sentence (1, T), added: (n, D).

        In few calls of torch: beside one sentence, each of them counts.

        Raises:
            InputError: as `forward`.
        """
        self._check_shape(ids)
        row = ids[0].tolist()
        n = row.index(self.padding) if self.padding in row else len(row)
        if not n or row.count(self.padding) != len(row) - n or min(row) < 0 or max(row) >= self.words.num_embeddings:
            self._there(ids)  # says what is wrong
        return self._words(ids[0, :n]).add_(self.positions.weight[:n])

    def _words(self, ids: Tensor) -> Tensor:
        # Not through the modules: a session would make engines that hold a copy of the table.
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
        """Where a token is, bool (B, T), and how many there are in each sentence, (B,), if all is well with them."""
        self._check_shape(ids)
        there = ids != self.padding
        counts = there.sum(1)
        if torch.compiler.is_compiling() or not ids.numel():
            return there, counts
        least, most = (int(n) for n in ids.aminmax())
        if least < 0 or most >= self.words.num_embeddings:
            raise InputError(
                f"token ids from {least} to {most} for {self.words.num_embeddings} words; this is another encoder's "
                f"tokenizer"
            )
        # None is missing in between where as many are there as its last one's place says.
        ends = (there * torch.arange(1, 1 + ids.shape[1], device=ids.device)).amax(1)
        broken = (ends != counts) | (counts == 0)
        if bool(broken.any()):
            rows = broken.nonzero().flatten().tolist()[:5]
            raise InputError(
                f"sentence(s) {rows} have no token, or padding ({self.padding}) in front of one; pad at the end only"
            )
        return there, counts


class TextLayer(Dynamic):
    """One layer of BERT, for the tokens that are there: attention within each sentence, then a hidden layer per token.

    Rows are tokens. Nothing is decided here, but decisions can be forced: tokens that are left out pass by as they are.
    The price of a sentence of n tokens is a n + b n^2.
    """

    degree = 2

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.rest = TextRest(width, hidden, dropout=dropout, epsilon=epsilon)
        nn.init.normal_(self.query_key_value.weight, std=0.02)
        nn.init.zeros_(self.query_key_value.bias)

    def forward(self, tokens: Tokens | Packed) -> Tokens | Packed:
        """To the same layout."""
        if isinstance(tokens, Packed):
            return tokens._replace(x=self._packed(tokens))
        assert tokens.alive is not None
        keep = self._kept(tokens.alive)
        x = self.run(0, self.whole, keep, tokens._replace(alive=keep), otherwise=tokens.x, rows=TOKEN_ROWS)
        return tokens._replace(x=x)

    def whole(self, tokens: Tokens) -> Tensor:
        """For all tokens, whatever anybody decides; shaped as their x."""
        query, key, value = self.query_key_value(tokens.x).chunk(3, -1)
        return self.rest(attend(query, key, value, tokens, self.heads), tokens.x)

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """a n + b n^2 with n the tokens of a sentence; both measured."""
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
    """What follows a layer's attention, token by token: projection, feed-forward part, both added and normed."""

    def __init__(self, width: int, hidden: int, *, dropout: float, epsilon: float) -> None:
        super().__init__()
        self.project, self.up, self.down = nn.Linear(width, width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_a, self.norm_b = nn.LayerNorm(width, eps=epsilon), nn.LayerNorm(width, eps=epsilon)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(dropout)
        for linear in (self.project, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        """(..., D) twice to (..., D)."""
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
