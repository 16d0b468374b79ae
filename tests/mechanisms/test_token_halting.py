import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.token_halting import HaltingDepth, TokenHalting, TokenPonderCost, blocks_taken
from dynanet.ops.tokens import Tokens, attend
from dynanet.session import Session

D = 6

# Scores before the last step; N + R, N, the weights of the states: the vectors that SACT's authors test theirs with.
VECTORS = [
    ([0.999] * 4, 2.0, 1, [1, 0, 0, 0, 0]),
    ([0.01, 0.50, 0.60, 0.70], 3.49, 3, [0.01, 0.50, 0.49, 0, 0]),
    ([0.01] * 4, 5.96, 5, [0.01, 0.01, 0.01, 0.01, 0.96]),
]


class Told(nn.Module):
    """Block k writes the k-th told logit into the first entry, and counts in the last."""

    def __init__(self, k) -> None:
        super().__init__()
        self.k = k

    def forward(self, tokens):
        x = tokens.x
        first = x[..., 1 + self.k : 2 + self.k].logit(eps=1e-12)
        return tokens._replace(x=torch.cat([first, x[..., 1:-1], x[..., -1:] + 1], -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, tokens):
        y = self.map(tokens.x)
        return tokens._replace(x=torch.tanh(tokens.x + attend(y, y, y, tokens, 2)))


class OfImages(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(Tokens(x)).x


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def halting(**settings):
    return TokenHalting([Block() for _ in range(4)], scale=2.0, shift=-0.5, **settings)


@pytest.mark.parametrize("sparse", [False, True])
def test_published_vectors(sparse):
    """Tokens side by side with the scores of the three cases behind a class token; the states are 1, 2, 3, 4, 5."""
    scores = torch.tensor([[0.3] * 4, *[v[0] for v in VECTORS]], dtype=torch.float64)
    x = torch.cat([torch.zeros(4, 1), scores, torch.zeros(4, 2)], 1).double()[None].requires_grad_()
    model = TokenHalting([Told(k) for k in range(5)], scale=1.0, shift=0.0).double().eval()
    with record(execute(model, sparse=sparse)) as trace:
        y = model(Tokens(x)).x
    weights = torch.tensor([v[3] for v in VECTORS], dtype=torch.float64)
    torch.testing.assert_close(y[0, 1:, -1], (weights * torch.arange(1, 6)).sum(1))
    assert blocks_taken(trace)[0].tolist() == [5, *[v[2] for v in VECTORS]], "the class token takes all blocks"
    torch.testing.assert_close(y[0, 0, -1].item(), 0.3 * 1 + 0.3 * 2 + 0.3 * 3 + 0.1 * 4)
    if not sparse:
        cost = TokenPonderCost()(None, None, trace)
        torch.testing.assert_close(cost.item(), sum(v[1] for v in VECTORS) / 3)
        (gradient,) = torch.autograd.grad(3 * cost, x)
        expected = torch.zeros(4, 4, dtype=torch.float64)
        expected[2, :2] = -1  # d cost / d h of the second case: -1, -1, 0, 0
        expected[3] = -1
        torch.testing.assert_close(gradient[0, :, 1:5], expected)


def test_who_halted_is_not_looked_at_any_longer():
    """The answer equals that of a plain loop over one sample's tokens, written out."""
    model, x = halting().double().eval(), torch.randn(3, 7, D).double()
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        answer = model(Tokens(x)).x
    taken = blocks_taken(trace)
    for b in range(3):
        tokens, there = x[b], list(range(7))
        total, mean = torch.zeros(7).double(), torch.zeros(7, D).double()
        for k, block in enumerate(model.blocks):
            with torch.no_grad():
                tokens = tokens.index_copy(0, torch.tensor(there), block(Tokens(tokens[None, there])).x[0])
            for t in list(there):
                h = torch.sigmoid(2.0 * tokens[t, 0] - 0.5)
                stops = k == 3 or (t > 0 and total[t] + h >= 0.99)
                weight = 1 - total[t] if stops else torch.minimum(h, 1 - total[t])
                total[t], mean[t] = total[t] + weight, mean[t] + weight * tokens[t]
                if stops:
                    assert taken[b, t] == k + 1
                    there.remove(t)
        torch.testing.assert_close(answer[b], mean)
    assert len(taken[:, 1:].unique()) > 1, "all tokens took as many blocks: nothing was tested"
    with torch.no_grad():
        torch.testing.assert_close(execute(model, sparse=False)(Tokens(x)).x, answer)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_class_token_alone_is_the_class_token_of_all(sparse):
    whole, only = halting().eval(), halting(first_only=True).eval()
    only.load_state_dict(whole.state_dict())
    for rows in (4, 1, 0):
        x = torch.randn(rows, 5, D)
        answers = [execute(model, sparse=sparse)(Tokens(x)).x for model in (whole, only)]
        torch.testing.assert_close(answers[1], answers[0][:, :1])


def test_all_halt_at_once_and_none_does():
    x = torch.randn(2, 5, D)
    for shift, taken in ((30.0, 1), (-30.0, 4)):
        model = TokenHalting([Block() for _ in range(4)], shift=shift).eval()
        for sparse in (False, True):
            with torch.no_grad(), record(execute(model, sparse=sparse)) as trace:
                model(Tokens(x))
            assert (blocks_taken(trace)[:, 1:] == taken).all() and (blocks_taken(trace)[:, 0] == 4).all()


def test_a_price_with_attention_in_a_session():
    model, x = OfImages(halting(first_only=True)).eval(), torch.randn(5, 8, D)
    session, cost = Session(model, x, engines="eager"), CostModel(model, x[:1])
    assert cost.unit["layer"].tolist() == [[D * D, 2 * D]] * 3
    with torch.no_grad(), record(model) as dense, record(session) as sparse:
        torch.testing.assert_close(session(x), model(x))
    n = torch.stack(sparse["layer"]).sum(2)[..., 0].double()  # (blocks, B)
    expected = (n * D * D + 2 * n.square() * D).sum(0) + 8 * D * D + 2 * 64 * D
    torch.testing.assert_close(cost.spent(sparse), expected)
    torch.testing.assert_close(cost.spent(dense), expected)
    assert len(set(expected.tolist())) > 1, "all samples cost the same: nothing was tested"


def test_the_ponder_cost_and_the_depth_teach_tokens_when_to_halt():
    for term, least in ((TokenPonderCost(), 0.2), (HaltingDepth(2.0), 0.01)):
        model, x = halting().train(), torch.randn(4, 6, D)
        optimizer, costs = torch.optim.SGD(model.parameters(), lr=0.2), []
        for _ in range(25):
            with record(model) as trace:
                model(Tokens(x))
            cost = term(None, None, trace)
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            costs.append(cost.item())
        assert costs[-1] < costs[0] - least
    assert model.halting.scale.grad is not None and model.halting.shift.grad.abs() > 0


def test_the_depth_by_hand():
    scores = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.2, 0.6, 0.3, 0.5]], dtype=torch.float64)
    x = torch.cat([torch.zeros(2, 1), scores, torch.zeros(2, 2)], 1).double()[None]
    model = TokenHalting([Told(k) for k in range(4)], scale=1.0, shift=0.0).double()
    with record(model) as trace:
        model(Tokens(x))
    h = torch.tensor([0.2, 0.6, 0.3]).double()  # of the second token, which halts at the third block
    p, wanted = h / h.sum(), torch.tensor([-0.5, 0.0, -0.5]).double().softmax(0)
    torch.testing.assert_close(HaltingDepth(2.0)(None, None, trace), (p * (p / wanted).log()).sum())


def test_who_is_made_to_stay_spends_no_more_than_all():
    model, x = TokenHalting([Told(k) for k in range(4)], scale=1.0, shift=0.0).double().eval(), torch.rand(1, 3, 7)
    x = x.double()
    x[..., -1] = 0
    with forced(model, lambda d: torch.ones_like(d.keep)):
        out = execute(model, sparse=True)(Tokens(x)).x
    h = torch.cat([x[0, :, 1:4], torch.ones(3, 1)], 1)
    weights = torch.cat([h.cumsum(1).clamp(max=1)[:, :1], h.cumsum(1).clamp(max=1).diff(dim=1)], 1)
    torch.testing.assert_close(out[0, :, -1], (weights * torch.arange(1, 5)).sum(1))


def test_what_is_refused():
    with pytest.raises(StructureError, match="at least one block"):
        TokenHalting([])
    with pytest.raises(ConfigError, match="eps = 0"):
        TokenHalting([Block()], eps=0.0)
    with pytest.raises(ConfigError, match="at least 1"):
        HaltingDepth(0.5)
    other = nn.Sequential(LayerSkip(nn.Identity(), nn.Identity()))
    with record(other) as trace, pytest.raises(StructureError, match="with TokenHalting layers"):
        TokenPonderCost()(None, None, trace)
    model, x = halting().eval(), torch.randn(2, 5, D)
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        model(Tokens(x))
    with pytest.raises(StructureError, match="train mode"):
        TokenPonderCost()(None, None, trace)
    with pytest.raises(StructureError, match="no TokenHalting is named"):
        blocks_taken(trace, "other")
