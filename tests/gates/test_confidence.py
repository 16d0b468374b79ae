import decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet.core.errors import StructureError
from dynanet.gates.confidence import (
    Confidence,
    Entropy,
    LearnedGate,
    LearnedScore,
    Margin,
    MaxProbability,
    Patience,
    PerExit,
)

STATELESS = [MaxProbability(), Entropy(), Margin()]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def exactly(logits, of):
    """A score in decimal arithmetic, with as many digits as it takes: (rows, 1) float64."""
    scores = []
    with decimal.localcontext(prec=500):
        for row in logits.tolist():
            z = [decimal.Decimal(value) for value in row]
            weights = [(value - max(z)).exp() for value in z]
            scores.append([float(of(sorted(w / sum(weights) for w in weights)))])
    return torch.tensor(scores, dtype=torch.float64)


def log_odds(p):
    return (p[-1] / sum(p[:-1])).ln()


def minus_log_entropy(p):
    return -(-sum(q * q.ln() for q in p)).ln()


def same_order(score, reference, closer_than):
    """Pairs that the reference tells apart by more than `closer_than` (relatively) are told apart, and alike."""
    gap = reference - reference.T
    clear = gap.abs() > closer_than * (1 + torch.maximum(reference.abs(), reference.abs().T))
    return torch.equal((score - score.T)[clear].sign(), gap[clear].sign().to(score.dtype))


@pytest.mark.parametrize(("confidence", "of"), [(MaxProbability(), log_odds), (Entropy(), minus_log_entropy)])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scale", [0.01, 1, 15, 80])
def test_the_scores_are_what_their_names_say_at_every_scale(confidence, of, dtype, precision, scale):
    logits = (scale * torch.randn(12, 5)).to(dtype)
    score, reference = confidence(logits).double(), exactly(logits, of)
    assert ((score - reference).abs() <= precision * (1 + reference.abs())).all()


def test_entropy_is_minus_the_logarithm_of_the_entropy():
    logits = 3 * torch.randn(200, 10, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()[:, None]
    assert torch.allclose(Entropy()(logits), -entropy.log(), rtol=1e-10, atol=1e-10)


def test_entropy_never_falls_where_one_logit_rises():
    """Also across the place where one formula hands over to another (log-odds of 15)."""
    rise = 15 + torch.arange(-300, 300, dtype=torch.float64) * 1e-10
    logits = torch.stack([rise, torch.zeros_like(rise)], 1)
    assert (Entropy()(logits)[:, 0].diff() > 0).all()


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_max_probability_has_the_order_of_the_softmax_in_float64(scale):
    logits = scale * torch.randn(100, 10)
    p = logits.double().softmax(-1).amax(-1, keepdim=True)
    assert same_order(MaxProbability()(logits), p, closer_than=1e-6)


@pytest.mark.parametrize("confidence", STATELESS)
def test_answers_that_float32_softmax_rounds_to_certainty_stay_apart(confidence):
    logits = 1000 * torch.randn(100, 10)
    softmax = logits.softmax(-1).amax(-1)
    assert (softmax == 1).sum() > 90, "the field's criterion is tied here"
    score = confidence(logits)
    assert score.unique().numel() == 100
    assert same_order(score, confidence(logits.double()), closer_than=1e-6)


@pytest.mark.parametrize("confidence", STATELESS)
@given(st.floats(-1e4, 1e4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_neither_a_shift_of_all_logits_nor_their_order_matters(confidence, shift, seed):
    logits = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    score = confidence(logits)
    assert torch.allclose(confidence(logits + shift), score, rtol=1e-8, atol=1e-8)
    assert torch.allclose(confidence(logits.flip(-1)), score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("confidence", STATELESS)
def test_a_row_is_scored_by_itself_and_surer_is_higher(confidence):
    logits = torch.randn(20, 4)
    score = confidence(logits)
    assert score.shape == (20, 1) and score.dtype == torch.float32
    assert torch.allclose(torch.cat([confidence(row[None]) for row in logits]), score)
    assert confidence(logits[:0]).shape == (0, 1)
    assert (confidence(2 * logits) > score).all()


@pytest.mark.parametrize("confidence", STATELESS)
def test_pixels_may_be_rows(confidence):
    logits = torch.randn(2, 3, 4, 5)
    assert torch.allclose(confidence(logits).flatten(), confidence(logits.flatten(0, 2)).flatten())


@pytest.mark.parametrize("confidence", STATELESS)
def test_ties_and_classes_that_are_ruled_out_give_numbers(confidence):
    logits = torch.tensor([[3.0, 3.0, 3.0], [2.0, 1.0, -torch.inf], [1e4, -1e4, -1e4]], requires_grad=True)
    score = confidence(logits)
    assert score.isfinite().all()
    assert score[0] < score[1] < score[2]
    score[[0, 2]].sum().backward()
    assert logits.grad[[0, 2]].isfinite().all()


def test_a_probability_as_a_threshold():
    p = torch.tensor([0.05, 0.5, 0.9, 0.999], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], 1).log()[1:]
    scores = MaxProbability()(logits)[:, 0].tolist()
    assert scores == pytest.approx([MaxProbability.from_probability(q) for q in p[1:].tolist()])


def test_margin_is_the_gap_between_the_best_two():
    assert Margin()(torch.tensor([[1.0, 5.0, 3.5], [2.0, 2.0, 0.0]])).tolist() == [[1.5], [0.0]]


def counts(answers):
    """Patience after each of a row's answers."""
    patience, memory, found = Patience(), None, []
    for answer in answers:
        logits = torch.nn.functional.one_hot(torch.tensor([answer]), 4).float()
        memory = patience.remember(logits, memory)
        found.append(patience(logits, memory).item())
    return found


def test_patience_counts_exits_in_a_row_that_agree_with_the_one_before():
    assert counts([2, 2, 2, 1, 1, 2, 2, 2]) == [0, 1, 2, 0, 1, 0, 1, 2]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_patience_is_the_length_of_the_last_run_less_one(answers):
    run = next((i for i, a in enumerate(reversed(answers)) if a != answers[-1]), len(answers))
    assert counts(answers)[-1] == run - 1


def test_patience_counts_row_by_row():
    patience, logits = Patience(), torch.eye(3)
    memory = patience.remember(logits, patience.remember(logits[[0, 2, 2]], None))
    assert patience(logits, memory).tolist() == [[1], [0], [1]]
    taken = tuple(t[[2]] for t in memory)  # as when other rows have left
    assert patience(logits[[2]], patience.remember(logits[[2]], taken)).tolist() == [[2]]


def test_most_criteria_remember_nothing():
    assert all(c.remember(torch.randn(2, 3), None) is None for c in STATELESS)
    learned = {LearnedGate, LearnedScore, PerExit}
    found = {c for c in Confidence.__subclasses__() if not c.__name__.startswith("_")}
    assert {type(c) for c in STATELESS} | {Patience} | learned == found


def test_a_new_learned_confidence_is_max_probability():
    logits = 5 * torch.randn(20, 4)
    expected, score = MaxProbability()(logits), LearnedScore(4)
    assert torch.allclose(LearnedGate()(logits), expected)
    memory = score.remember(logits, score.remember(torch.randn(20, 4), None))
    assert torch.allclose(score(logits, memory), expected)


def test_a_learned_gate_leaves_the_logits_alone():
    logits = torch.randn(5, 3, requires_grad=True)
    gate, score = LearnedGate(), LearnedScore(3)
    (gate(logits) + score(logits, score.remember(logits, None))).sum().backward()
    assert logits.grad is None
    assert gate.linear.weight.grad.abs().sum() > 0 and score.linear.weight.grad.abs().sum() > 0


def test_a_learned_score_sees_the_class_and_the_exit_before():
    score, logits = LearnedScore(3), torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    first = score.features(logits, None)
    assert torch.allclose(first[0, :4], first[1, :4]) and not torch.allclose(first[0], first[1])
    memory = (torch.tensor([[0], [0]]), torch.tensor([[1.5], [-0.5]]))
    assert score.features(logits, memory)[:, 4].tolist() == [1, 0], "agreement"
    assert score.features(logits, memory)[:, 5].tolist() == [1.5, -0.5], "the score before"


def test_another_confidence_at_every_exit():
    both = PerExit([MaxProbability(), Margin()])
    logits = torch.randn(3, 4)
    assert torch.equal(both.at(1)(logits), Margin()(logits))
    assert MaxProbability().at(5)(logits).shape == (3, 1)
    for k in (-1, 2):
        with pytest.raises(StructureError, match="no confidence for exit .*, only 2;"):
            both.at(k)
    with pytest.raises(StructureError, match=r"confidence\.at\(k\)"):
        both(logits)


@pytest.mark.parametrize("confidence", [MaxProbability(), Margin(), Entropy()], ids=lambda c: type(c).__name__)
def test_one_logit_cannot_be_sure(confidence):
    with pytest.raises(StructureError, match="a logit per class, two for yes and no"):
        confidence(torch.randn(3, 1))
