import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError
from dynanet.mechanisms.token_merge import TokenMerge
from dynanet.ops.tokens import Tokens, attend
from dynanet.session import Session

D = 8


class Rest(nn.Module):
    """Attention with weights of its own; what was there is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.seen = nn.Linear(D, D), []

    def forward(self, tokens):
        self.seen.append(tokens)
        y = self.map(tokens.x)
        return tokens._replace(x=tokens.x + attend(y, y, tokens.x, tokens, 2))


class OfImages(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(Tokens(x)).x


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def by_hand(x, size, count, similarity):
    """One sample, token by token: (tokens that are left, their sizes, the row that stands for every row)."""
    unit = x / x.norm(dim=1, keepdim=True)
    hosts, onto = list(range(2, len(x), 2)), list(range(len(x)))
    pairs = [(float(unit[i] @ unit[j]), i, j) for i in range(1, len(x), 2) for j in hosts]
    best = {i: max((c, j) for c, k, j in pairs if k == i) for i in range(1, len(x), 2) if hosts}
    merged = sorted(best, key=lambda i: -best[i][0])[:count] if similarity is None else best
    for i in merged:
        if similarity is None or best[i][0] > similarity:
            onto[i] = best[i][1]
    left = [t for t in range(len(x)) if onto[t] == t]
    groups = [[t for t in range(len(x)) if onto[t] == host] for host in left]
    sizes = torch.stack([size[g].sum() for g in groups])
    return torch.stack([(size[g, None] * x[g]).sum(0) for g in groups]) / sizes[:, None], sizes, onto


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 9])
@pytest.mark.parametrize(("count", "similarity"), [(0, None), (2, None), (99, None), (None, 0.3), (None, -1.0)])
def test_the_most_similar_pairs_become_one(count, similarity, tokens, sparse):
    x, size = torch.randn(3, tokens, D).double(), torch.randint(1, 4, (3, tokens)).double()
    layer = execute(TokenMerge(Rest(), merge=count, similarity=similarity).double().eval(), sparse=sparse)
    with torch.no_grad(), record(layer) as trace:
        out = layer(Tokens(x, size=size)).x
    for b in range(3):
        left, sizes, onto = by_hand(x[b], size[b], count, similarity)
        expected = layer.rest(Tokens(left[None], size=sizes[None])).x[0]
        kept = sorted(set(onto))
        torch.testing.assert_close(out[b], expected[torch.tensor([kept.index(row) for row in onto])])
        assert trace[""][0][b, :, 0].tolist() == [float(onto[t] == t) for t in range(tokens)]
        assert 0 in kept and 0 not in [onto[t] for t in range(1, tokens)], "the class token stays alone"


@pytest.mark.parametrize("sparse", [False, True])
def test_merging_equal_tokens_loses_nothing(sparse):
    """Every token after the first is there twice: half are merged away, and no answer changes."""
    x = torch.randn(2, 5, D).double()
    x = torch.cat([x[:, :1], x[:, 1:].repeat_interleave(2, 1)], 1)
    layer = execute(TokenMerge(Rest(), similarity=0.999999).double().eval(), sparse=sparse)
    with torch.no_grad(), record(layer) as trace:
        out = layer(Tokens(x)).x
        torch.testing.assert_close(out, layer.rest(Tokens(x)).x)
    assert trace[""][0].sum(1).flatten().tolist() == [5, 5]
    assert layer.rest.seen[0].size.sum() == (2 * 9 if sparse else 2 * 9 + 2 * 4), "sizes tell how many each stands for"


def test_gaps_in_a_rectangle_are_as_if_they_were_not():
    x = torch.randn(2, 7, D).double()
    there = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1, 1]]).double()
    layer = TokenMerge(Rest(), merge=2).double().eval()
    for sparse in (False, True):
        out = execute(layer, sparse=sparse)(Tokens(x, alive=there)).x
        for b in range(2):
            torch.testing.assert_close(out[b, there[b] > 0], layer(Tokens(x[b : b + 1, there[b] > 0])).x[0])
            assert torch.equal(out[b, there[b] == 0], x[b, there[b] == 0])


def test_counts_that_differ_in_a_session_and_their_price():
    model, x = OfImages(TokenMerge(Rest(), similarity=0.2)).eval(), torch.randn(5, 8, D)
    session, cost = Session(model, x, engines="eager"), CostModel(model, x)
    with torch.no_grad(), record(model) as dense, record(session) as sparse:
        torch.testing.assert_close(session(x), model(x))
    left = sparse["layer"][0].sum(1).flatten().double()
    assert len(set(left.tolist())) > 1, "all merge as many: nothing was tested"
    expected = 8 * 8 * D + left * D * D + 2 * left.square() * D
    torch.testing.assert_close(cost.spent(sparse), expected)
    torch.testing.assert_close(cost.spent(dense), expected)


def test_forced_off_every_other_token_is_merged_and_forced_on_none():
    model, x = TokenMerge(Rest(), merge=1).eval(), torch.randn(2, 9, D)
    for keep, left in ((torch.zeros_like, 5), (torch.ones_like, 9)):
        with torch.no_grad(), forced(model, lambda d, keep=keep: keep(d.keep)), record(model) as trace:
            model(Tokens(x))
        assert (trace[""][0].sum(1) == left).all()


def test_batches_of_one_and_of_none():
    for sparse in (False, True):
        model = execute(OfImages(TokenMerge(Rest(), merge=2)).eval(), sparse=sparse)
        assert model(torch.randn(1, 5, D)).shape == (1, 5, D) and model(torch.randn(0, 5, D)).shape == (0, 5, D)


def test_gradients_pass_a_merge():
    model, x = TokenMerge(Rest(), merge=2), torch.randn(2, 7, D, requires_grad=True)
    model(Tokens(x)).x[:, 0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all(), "merged or not, every token counts"


def test_what_is_refused():
    for wrong, says in (
        ({}, "give one"),
        ({"merge": 2, "similarity": 0.5}, "give one"),
        ({"merge": -1}, "at least 0"),
        ({"similarity": 1.5}, "cosine"),
    ):
        with pytest.raises(ConfigError, match=says):
            TokenMerge(Rest(), **wrong)
