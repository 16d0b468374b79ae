"""Clip sampling: every clip is scored, the best are seen, and the others are not computed."""

import pytest
import torch
from torch import nn

from dynanet import train
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences
from dynanet.gates.confidence import MaxProbability
from dynanet.mechanisms.clip_sampling import ClassSalience, ClipSampling, SalienceRank, cut
from dynanet.session import Session

SCORER, NET = 12, 12 * 3


def model_of(clips=2, scorer=None):
    torch.manual_seed(1)
    scorer = scorer or nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    return ClipSampling(scorer, nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), clips, 3).double()


def videos(*lengths, clips=6):
    """Clips of 3 frames of 1 x 2 x 2."""
    torch.manual_seed(len(lengths))
    return Sequences(torch.randn(len(lengths), clips, 3, 1, 2, 2).double(), torch.tensor(lengths))


def by_hand(model, clips):
    """One video (clips, ...): its answer, and the clips that were seen."""
    best = model.scores.scorer(clips)[:, 0].sort(descending=True).indices[: model.clips]
    return torch.stack([model.net(clips[i : i + 1])[0] for i in best]).mean(0), sorted(best.tolist())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("clips", [1, 2, 9])
def test_the_best_clips_are_seen_and_their_answers_averaged(sparse, clips):
    model, x = execute(model_of(clips).eval(), sparse=sparse), videos(6, 1, 3, 6, 2)
    cost = CostModel(model, x)
    with torch.no_grad(), record(model) as trace, CountMacs() as count:
        answers = model(x)
    for i, length in enumerate(x.lengths):
        expected, seen = by_hand(model, x.x[i, :length])
        torch.testing.assert_close(answers[i], expected, rtol=1e-12, atol=1e-12)
        assert trace[""][0][i, :, 0].nonzero().flatten().tolist() == seen
        assert cost.spent(trace)[i].item() == length * SCORER + len(seen) * NET
    if sparse:
        assert count.total == cost.spent(trace).sum().item()


def test_the_clips_of_all_videos_run_in_one_call():
    model, x, rows = execute(model_of().eval(), sparse=True), videos(6, 1, 3, 6, 2), []
    for part in (model.scores.scorer, model.net):
        part.register_forward_hook(lambda m, args, y: rows.append(len(args[0])))
    with torch.no_grad():
        model(x)
    assert rows == [18, 2 + 1 + 2 + 2 + 2]


@pytest.mark.parametrize("sparse", [False, True])
def test_no_clip_answers_zeros_and_all_are_averaged(sparse):
    model, x = execute(model_of().eval(), sparse=sparse), videos(6, 1, 3)
    with torch.no_grad(), forced(model, lambda d: torch.zeros_like(d.keep)):
        assert torch.equal(model(x), torch.zeros(3, 3).double())
    with torch.no_grad(), forced(model, everything):
        answers = model(x)
    for i, length in enumerate(x.lengths):
        torch.testing.assert_close(answers[i], model.net(x.x[i, :length]).mean(0))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("batch, clips", [(0, 6), (1, 1), (1, 6), (64, 3)])
def test_any_batch_and_any_number_of_clips(sparse, batch, clips):
    model, x = execute(model_of().eval(), sparse=sparse), torch.randn(batch, clips, 3, 1, 2, 2).double()
    with torch.no_grad():
        answers = model(x)
    assert answers.shape == (batch, 3)
    for i in range(min(batch, 5)):
        torch.testing.assert_close(answers[i], by_hand(model, x[i])[0], rtol=1e-12, atol=1e-12)


def test_a_session_is_the_eager_sparse_form():
    model, x = execute(model_of().float().eval(), sparse=True), videos(6, 1, 3, 6, 2)
    x = Sequences(x.x.float(), x.lengths)
    session = Session(model, x, engines="eager", batches=(4,))
    with torch.no_grad(), record(model) as trace:
        expected = model(x)
    with record(session) as ran:
        torch.testing.assert_close(session(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ran[""][0], trace[""][0]) and len(session.engines()) == 2


def test_a_classifier_of_clips_scores_by_its_surest_class():
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model, x = model_of(scorer=ClassSalience(classifier)).eval(), videos(6, 3)
    probability = classifier(x.x.flatten(0, 1)).softmax(1).amax(1).unflatten(0, (2, 6))
    with record(model) as trace:
        model(x)
    best = probability[0].topk(2).indices
    assert trace[""][0][0, :, 0].nonzero().flatten().tolist() == sorted(best.tolist())
    score = trace.calls[-1].decision.score
    assert score[0, 0, 0].item() == pytest.approx(MaxProbability.from_probability(probability[0, 0].item()))


def test_the_ranking_loss_is_that_of_all_pairs():
    model, x, y = model_of().train(), videos(6, 1, 3), torch.tensor([2, 0, 1])
    with record(model) as trace:
        answer = model(x)
    losses = []
    for i, length in enumerate(x.lengths):
        clips = x.x[i, :length]
        score, says = model.scores.scorer(clips)[:, 0], model.net(clips).softmax(1)[:, y[i]]
        for a in range(length):
            losses += [(0.5 - (score[a] - score[b])).clamp(min=0) for b in range(length) if says[a] > says[b]]
    assert len(losses) == 15 + 0 + 3
    loss = SalienceRank(0.5)(answer, y, trace)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    loss.backward()
    assert all(p.grad.any() for p in model.scores.parameters()) and all(p.grad is None for p in model.net.parameters())
    with record(model.eval()) as trace:
        assert SalienceRank(0.5)(model(x), y, trace) == 0
    model.train()
    with record(model) as trace:
        answer = model(videos(1, 1))
    assert SalienceRank()(answer, y[:2], trace) == 0, "no pair, no loss"


def test_the_scorer_learns_which_clips_the_network_can_read():
    """One clip of six shows the class; the network knows it, and a scorer of half its cost is to find it."""
    torch.manual_seed(0)
    net = nn.Linear(8, 2)
    with torch.no_grad():
        net.weight.copy_(4 * torch.eye(8)[:2])
        net.bias.zero_()
    model = ClipSampling(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)), net.requires_grad_(False), 1, 2)

    def draw(rows):
        y, told = torch.randint(2, (rows,)), torch.randint(6, (rows,))
        x = 0.1 * torch.randn(rows, 6, 8)
        x[torch.arange(rows), told, y] += 1.0
        x[torch.arange(rows), told, 7] += 1.0
        return x, y, told

    optimizer = torch.optim.Adam(model.scores.parameters(), 0.03)
    x, y, told = draw(200)
    before = (model.eval()(x).argmax(1) == y).float().mean()
    for _ in range(60):
        batch, classes, _ = draw(32)
        with record(model.train()) as trace:
            answer = model(batch)
        optimizer.zero_grad()
        (SalienceRank(0.2) + 0.0 * train.CrossEntropy())(answer, classes, trace).backward()
        optimizer.step()
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    assert before < 0.8 and right > 0.95
    assert trace[""][0][torch.arange(200), told].mean() > 0.95


def test_videos_are_cut_into_clips():
    x = Sequences(torch.arange(2 * 7.0).reshape(2, 7, 1, 1, 1), torch.tensor([7, 4]))
    clips, lengths = cut(x, 3)
    assert clips[..., 0, 0, 0].tolist() == [[[0, 1, 2], [3, 4, 5]], [[7, 8, 9], [10, 11, 12]]]
    assert lengths.tolist() == [2, 1]
    assert cut(x.x, 7).lengths.tolist() == [1, 1]
    with pytest.raises(InputError, match="a video of 4 frames has no clip of 5"):
        cut(x, 5)
    with pytest.raises(ConfigError, match="frames must be at least 1, got 0"):
        cut(x, 0)


def test_what_does_not_fit_together_is_refused():
    for clips, classes in ((0, 3), (2, 0)):
        with pytest.raises(ConfigError, match="must be at least 1, got 0"):
            ClipSampling(nn.Identity(), nn.Identity(), clips, classes)
    x = torch.randn(2, 6, 12)
    with pytest.raises(StructureError, match=r"scorer returned a tensor of shape \(12, 2\)"):
        ClipSampling(nn.Linear(12, 2), nn.Linear(12, 3), 2, 3)(x)
    with pytest.raises(StructureError, match=r"network returned a tensor of shape \(12, 4\); expected \(rows, 3\)"):
        ClipSampling(nn.Linear(12, 1), nn.Linear(12, 4), 2, 3)(x)
    for shape in ((2, 6), (2, 0, 3, 1, 2, 2)):
        with pytest.raises(InputError, match="expected .batch, clips, ...., none of them 0"):
            model_of()(torch.randn(shape).double())
    with pytest.raises(InputError, match="lengths from 0 to 3"):
        model_of()(videos(3, 0))
    with pytest.raises(ConfigError, match="margin is -1"):
        SalienceRank(-1)
    with record(model_of()) as trace, pytest.raises(StructureError, match="is named 'body'"):
        SalienceRank(layer="body")(torch.zeros(1), torch.zeros(1, dtype=torch.int64), trace)
