import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import Gumbel, Threshold
from dynanet.mechanisms.token_drop import (
    ClassAttention,
    RankScorer,
    TokenDistillation,
    TokenDrop,
    TokenPredictor,
    TokenRatio,
    WithTeacher,
)
from dynanet.ops.tokens import Tokens, attend
from dynanet.session import Session

D = 8


class Rest(nn.Module):
    """Attention and a linear map, and what was there is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.seen = nn.Linear(D, D), []

    def forward(self, tokens):
        self.seen.append(tokens)
        return tokens._replace(x=tokens.x + self.map(attend(tokens.x, tokens.x, tokens.x, tokens, 2)))


class OfImages(nn.Module):
    """A tensor (B, T, D) as tokens, and the first token's answer."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(Tokens(x)).x[:, 0]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def keeping(counts):
    """Force the first so many tokens of every sample, in the whole batch."""

    def keep(decision):
        places = torch.arange(decision.keep.shape[1])
        return (places < torch.tensor(counts)[:, None]).to(decision.keep)[..., None]

    return keep


@pytest.mark.parametrize("counts", [(7, 7, 7), (0, 0, 0), (1, 7, 3), (2, 2, 2)])
def test_what_is_dropped_is_not_computed_and_comes_out_as_it_went_in(counts):
    layer, x = OfImages(TokenDrop(Rest(), Gate(nn.Linear(D, 1), Threshold()))).eval(), torch.randn(3, 7, D)
    kept = [max(1, n) for n in counts]  # the class token
    with torch.no_grad(), forced(layer, keeping(counts)), record(execute(layer, sparse=True)) as trace:
        layer(x)
        (tokens,) = layer.layer.rest.seen
        whole = layer.layer(Tokens(x)).x
        with CountMacs() as count:
            layer(x)
    assert tokens.lengths == tuple(kept) and tokens.x.shape == (sum(kept), D)
    assert trace["layer"][0][..., 0].sum(1).tolist() == kept
    assert count.total == sum(n * D * D + 2 * n * n * D for n in kept) + 3 * 7 * D
    for b, n in enumerate(kept):
        assert torch.equal(whole[b, n:], x[b, n:])
        alone = layer.layer.rest(Tokens(x[b : b + 1, :n])).x
        torch.testing.assert_close(whole[b, :n], alone[0])


def test_batches_of_one_and_of_none():
    layer = OfImages(TokenDrop(Rest(), Gate(TokenPredictor(D), Gumbel()))).eval()
    execute(layer, sparse=True)
    assert layer(torch.randn(1, 7, D)).shape == (1, D)
    assert layer(torch.randn(0, 7, D)).shape == (0, D)
    assert layer(torch.randn(2, 1, D)).shape == (2, D), "a class token and nothing else"


def test_the_predictor_sees_the_mean_of_the_tokens_that_are_there():
    predictor, x = TokenPredictor(D).double(), torch.randn(2, 5, D).double()
    there = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).double()
    expected = []
    for b in range(2):
        own, shown = predictor.read(x[b, there[b] > 0]).chunk(2, -1)
        expected.append(predictor.decide(torch.cat([own, shown.mean(0).expand_as(own)], -1)))
    rectangle = predictor(Tokens(x, alive=there))
    packed = predictor(Tokens(x[there > 0], lengths=(3, 2)))
    torch.testing.assert_close(packed, torch.cat(expected))
    torch.testing.assert_close(rectangle[there > 0], torch.cat(expected))


class Told(nn.Module):
    """A score that is told: the first feature."""

    def forward(self, x):
        return x[..., :1]


@pytest.mark.parametrize(("share", "kept"), [(0.7, 7), (0.5, 5), (0.25, 2), (1.0, 10), (0.01, 0)])
def test_a_share_is_kept_whatever_the_scores(share, kept):
    """To the nearest whole number: 2.5 of 10 are 2. The class token comes on top."""
    x = torch.randn(4, 11, D) * torch.tensor([1e-3, 1, 5, 100])[:, None, None]
    x[:, 0, 0] = -1e9
    layer = OfImages(TokenDrop(Rest(), Gate(RankScorer(Told()), Threshold(1 - share)))).eval()
    for sparse in (False, True):
        with torch.no_grad(), record(execute(layer, sparse=sparse)) as trace:
            layer(x)
        keep = trace["layer"][0][..., 0]
        assert (keep[:, 0] == 1).all() and (keep[:, 1:].sum(1) == kept).all()
        for b in range(4):
            best = x[b, 1:, 0].topk(kept).indices
            assert keep[b, 1:][best].all()


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_dropped_is_fused_into_one_token_at_the_place_of_the_best(sparse):
    x, attention = torch.randn(2, 5, D).double(), torch.tensor([[0.1, 0.3, 0.1, 0.2, 0.3], [0.6, 0.2, 0.1, 0.1, 0.0]])
    layer = TokenDrop(Rest(), Gate(RankScorer(ClassAttention()), Threshold(0.5)), fuse=True).double().eval()
    execute(layer, sparse=sparse)
    with torch.no_grad(), record(layer) as trace:
        out = layer(Tokens(x, attention=attention.double())).x
    assert trace[""][0][..., 0].tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]
    for b, (stay, gone) in enumerate([([0, 1, 4], [3, 2]), ([0, 1, 2], [3, 4])]):
        weight = attention[b, gone].double()
        fused = (weight[:, None] * x[b, gone]).sum(0) / weight.sum()
        places = sorted([*stay, gone[0]])
        inside = torch.stack([fused if t == gone[0] else x[b, t] for t in places])
        torch.testing.assert_close(out[b, places], layer.rest(Tokens(inside[None])).x[0])
        assert torch.equal(out[b, gone[1]], x[b, gone[1]])


def test_nothing_is_fused_where_nothing_is_dropped():
    layer, x = (
        TokenDrop(Rest(), Gate(RankScorer(ClassAttention()), Threshold(0.0)), fuse=True).eval(),
        torch.randn(2, 4, D),
    )
    tokens = Tokens(x, attention=torch.rand(2, 4))
    with torch.no_grad():
        torch.testing.assert_close(layer(tokens).x, layer.rest(Tokens(x)).x)


def test_a_price_with_attention_in_a_session():
    model, x = OfImages(TokenDrop(Rest(), Gate(nn.Linear(D, 1), Threshold()))).eval(), torch.randn(6, 9, D)
    session = Session(model, x, engines="eager")
    cost = CostModel(model, x[:2])
    assert cost.unit["layer"].tolist() == [[D * D, 2 * D]]
    with torch.no_grad(), record(model) as dense, record(session) as sparse:
        torch.testing.assert_close(session(x), model(x))
    torch.testing.assert_close(cost.spent(sparse), cost.spent(dense))
    assert len(set(cost.spent(sparse).tolist())) > 1, "all samples cost the same: counts did not differ"


def test_ratios_by_hand_and_what_they_teach():
    model, x = OfImages(TokenDrop(Rest(), Gate(TokenPredictor(D, bias=0.0), Gumbel()))).train(), torch.randn(4, 9, D)
    ratio, batch = TokenRatio([0.5]), TokenRatio([0.5], per_sample=False)
    with record(model) as trace, forced(model, keeping((9, 1, 5, 3))):
        model(x)
    shares = torch.tensor([8, 0, 4, 2]) / 8
    assert float(ratio(None, None, trace)) == pytest.approx(float((shares - 0.5).square().mean()))
    assert float(batch(None, None, trace)) == pytest.approx(float((shares.mean() - 0.5) ** 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        with record(model) as trace:
            model(x)
        loss = TokenRatio([0.2])(None, None, trace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad(), record(model.eval()) as trace:
        model(x)
    assert trace["layer"][0][:, 1:].mean() < 0.4, "it kept half at the start"


class Net(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(D, 3)

    def features(self, x):
        return self.body(Tokens(x))

    def classify(self, tokens):
        return self.head(tokens.x[:, 0])

    def forward(self, x):
        return self.classify(self.features(x))


def test_a_student_learns_from_its_teacher():
    teacher, x = Net(Rest()), torch.randn(4, 6, D)
    student = Net(TokenDrop(Rest(), Gate(TokenPredictor(D), Gumbel())))
    student.body.rest.load_state_dict(teacher.body.state_dict())
    student.head.load_state_dict(teacher.head.state_dict())
    taught = WithTeacher(student, teacher)
    assert not any(name.startswith("teacher") for name in taught.state_dict())
    with record(taught.eval()) as trace:
        torch.testing.assert_close(taught(x), student(x))
    assert TokenDistillation()(student(x), None, trace) == 0, "the teacher is asked in training only"
    taught.train()
    distillation = TokenDistillation(1.0, 1.0)
    losses = []
    for counts in ((6, 6, 6, 6), (6, 1, 2, 3)):
        with record(taught) as trace, forced(taught, keeping(counts)):
            answer = taught(x)
        losses.append(distillation(answer, None, trace))
    assert losses[0].item() == pytest.approx(0.0, abs=1e-5), "with all its tokens it is its teacher"
    assert losses[1] > 1e-4
    losses[1].backward()
    assert student.head.weight.grad.abs().sum() > 0 and teacher.head.weight.grad is None
    # By hand: only what stayed is compared.
    with torch.no_grad():
        theirs = teacher.features(x)
        with forced(student, keeping((6, 1, 2, 3))):
            ours = student.eval().features(x)
        p, q = teacher.classify(theirs).log_softmax(1), student.classify(ours).log_softmax(1)
    stayed = torch.arange(6) < torch.tensor([6, 1, 2, 3])[:, None]
    apart = (ours.x - theirs.x).square().mean(-1)[stayed].mean()
    torch.testing.assert_close(losses[1].detach(), (p.exp() * (p - q)).sum(1).mean() + apart)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="multiple of 4"):
        TokenPredictor(6)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        TokenRatio([0.5, 1.2])
    layer = OfImages(TokenDrop(Rest(), Gate(RankScorer(ClassAttention()), Threshold(0.5)), fuse=True))
    with pytest.raises(StructureError, match="class_attention"):
        layer(torch.randn(2, 4, D))
    with record(layer) as trace, pytest.raises(StructureError, match="for 2 layers"):
        TokenRatio([0.5, 0.5])(None, None, trace)
    with record(layer) as trace, pytest.raises(StructureError, match="with WithTeacher layers"):
        TokenDistillation()(torch.zeros(1, 3), None, trace)
