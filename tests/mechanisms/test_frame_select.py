"""Frame select: each frame at the size its policy picks, or not at all; what is left out is not computed."""

import pytest
import torch
from torch import nn

from dynanet import train
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences
from dynanet.gates.rules import Gumbel, RelaxedTopK
from dynanet.mechanisms.frame_select import EvenUse, FrameCost, FrameSelect
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.nets.spatial_transformer import resize
from dynanet.session import Session

SIZES, SKIPS = (2, (5, 3), 6), (1, 2, 4)
LOOK, MEMORY = 2 * 4 * 5, 4 * 6 * (5 + 6) + 6 * 6  # the policy's network; LSTM and scores


def net(pixels, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * pixels, 3))


def layer(skips=SKIPS, light=False, rule=None, std=6.0):
    nets = [net(h * w, seed) for seed, (h, w) in enumerate(((2, 2), (5, 3), (6, 6)))]
    look = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh())
    head = nn.Linear(6, 3) if light else None
    model = FrameSelect(
        look, nets[light:], SIZES, features=5, hidden=6, num_classes=3, skips=skips, light=head, rule=rule
    )  # fmt: skip
    torch.manual_seed(29)  # a policy that does all there is to do
    for weights in model.policy.parameters():
        nn.init.normal_(weights)
    nn.init.normal_(model.policy.gate.scorer.weight, std=std)
    nn.init.zeros_(model.policy.gate.scorer.bias)
    return model.double()


def videos(*lengths, frames=9):
    torch.manual_seed(len(lengths))
    return Sequences(torch.randn(len(lengths), frames, 2, 6, 6).double(), torch.tensor(lengths))


def by_hand(model, video):
    """One video (T, 2, 6, 6), with if and else: its answer, the decision on every frame, frames looked at, and MACs."""
    state, decided, logits, looked, macs = None, [], [], [], 0
    while len(decided) < len(video):
        t = len(decided)
        looked.append(t)
        state = model.policy.cell(model.policy.net(video[t : t + 1]), state)
        action = model.policy.gate.scorer(state[0]).argmax().item()
        macs += LOOK + MEMORY
        if action >= len(SIZES):
            decided += [action] * SKIPS[action - len(SIZES)]
            continue
        decided.append(action)
        if action == 0 and model.light is not None:
            logits.append(model.light(state[0]))
            macs += 18
        else:
            at = model.nets[action - (model.light is not None)][1]
            logits.append(at(resize(video[t : t + 1], SIZES[action])))
            macs += at[1].weight.numel()
    answer = torch.cat(logits).mean(0) if logits else torch.zeros(3).double()
    return answer, decided[: len(video)], looked, macs


def actions(*columns):
    """The same decisions for all videos, frame by frame (no matter which where the policy does not look)."""
    left = iter(columns)
    return lambda d: nn.functional.one_hot(torch.tensor(next(left)), d.keep.shape[1]).to(d.keep).expand_as(d.keep)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_frame_is_seen_as_the_policy_says(sparse, light):
    model = execute(layer(light=light).eval(), sparse=sparse)
    x = videos(9, 9, 1, 4, 9, 7, 9, 2, 9, 9, 8, 9)
    cost = CostModel(model, x)
    with torch.no_grad(), record(model) as trace, CountMacs() as count:
        answers = model(x)
    used = set()
    for i, length in enumerate(x.lengths):
        expected, decided, looked, macs = by_hand(model, x.x[i, :length])
        torch.testing.assert_close(answers[i], expected, rtol=1e-12, atol=1e-12)
        assert trace[""][0][i, :length].argmax(1).tolist() == decided
        assert not trace[""][0][i, length:].any() and (trace[""][0][i, :length].sum(1) == 1).all()
        assert trace["policy"][0][i, :, 0].nonzero().flatten().tolist() == looked
        assert cost.spent(trace)[i].item() == macs
        used |= set(decided)
    assert used == set(range(6)), "a dull example"
    if sparse:
        assert count.total == cost.spent(trace).sum().item()


def test_frames_of_a_size_run_together_over_the_whole_batch():
    model, x = execute(layer().eval(), sparse=True), videos(*[9] * 20)
    seen = {}
    for u, at in enumerate(model.nets):
        at.register_forward_hook(lambda m, args, y, u=u: seen.setdefault(u, []).append(len(args[0])))
    with torch.no_grad(), record(model) as trace:
        model(x)
    frames = trace[""][0].sum((0, 1)).tolist()
    assert seen == {u: [frames[u]] for u in range(3)} and min(frames[:3]) > 0
    with torch.no_grad(), forced(model, actions(*[1] * 9)):
        seen.clear()
        model(x)
    assert seen == {1: [180]}


def test_without_jumps_the_policy_looks_at_all_frames_in_one_call():
    calls = []
    for skips, frames in (((1,), [16]), ((), [16]), ((1, 4), [2, 2, 2, 2])):
        model, x = execute(layer(skips=skips).eval(), sparse=True), videos(9, 7)
        model.policy.net.register_forward_hook(lambda m, args, y: calls.append(len(args[0])))
        with torch.no_grad(), forced(model, actions(*[0] * 9)):
            model(x)
        assert calls[: len(frames)] == frames
        calls.clear()


def test_a_skip_leaves_out_the_frames_after_it():
    model, x = execute(layer().eval(), sparse=True), videos(9)
    with torch.no_grad(), forced(model, actions(5, 0, 0, 0, 2, 4, 0, 3, 0)), record(model) as trace:
        answer = model(x)
    assert trace[""][0][0].argmax(1).tolist() == [5, 5, 5, 5, 2, 4, 4, 3, 0]
    assert trace["policy"][0][0, :, 0].tolist() == [1, 0, 0, 0, 1, 1, 0, 1, 1]
    expected = (model.nets[2](x.x[:, 4]) + model.nets[0](x.x[:, 8])) / 2
    torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_none_seen_answers_zeros_and_several_sizes_are_averaged(sparse):
    model, x = execute(layer().eval(), sparse=sparse), videos(4, 4, frames=4)
    for nothing in (lambda d: torch.zeros_like(d.keep), actions(3, 3, 3, 3), actions(5, 0, 0, 0)):
        with torch.no_grad(), forced(model, nothing):
            assert torch.equal(model(x), torch.zeros(2, 3).double())
    with torch.no_grad(), forced(model, everything), record(model) as trace:
        answers = model(x)
    assert trace["policy"][0].all()
    each = torch.stack([at(x.x.flatten(0, 1)).unflatten(0, (2, 4)) for at in model.nets])
    torch.testing.assert_close(answers, each.mean((0, 2)))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("batch, frames", [(0, 9), (1, 1), (1, 9), (64, 3)])
def test_any_batch_and_any_number_of_frames(sparse, batch, frames):
    model, x = execute(layer().eval(), sparse=sparse), torch.randn(batch, frames, 2, 6, 6).double()
    with torch.no_grad():
        answers = model(x)
    assert answers.shape == (batch, 3)
    for i in range(min(batch, 5)):
        torch.testing.assert_close(answers[i], by_hand(model, x[i])[0], rtol=1e-12, atol=1e-12)


def test_a_session_is_the_eager_sparse_form():
    model, x = execute(layer().float().eval(), sparse=True), videos(9, 9, 1, 4, 9, 7)
    x = Sequences(x.x.float(), x.lengths)
    session = Session(model, x, engines="eager", batches=(4,))
    with torch.no_grad(), record(model) as trace:
        expected = model(x)
    with record(session) as ran:
        torch.testing.assert_close(session(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ran[""][0], trace[""][0]) and torch.equal(ran["policy"][0], trace["policy"][0])
    assert len(session.engines()) == 3 + 3  # the policy's network, memory and scores; one per size


def test_in_training_all_networks_see_all_frames_and_draws_decide():
    model, x = layer(std=0.5).train(), videos(9, 5, 9, 2)
    rows = []
    for at in model.nets:
        at.register_forward_hook(lambda m, args, y: rows.append(len(args[0])))
    with record(model) as trace:
        answer = model(x)
    keep, there = trace[""][0], torch.arange(9) < x.lengths[:, None]
    assert rows == [36] * 3 and torch.equal(keep.sum(2).round(), there.double())
    assert set(keep.detach().round(decimals=9).unique().tolist()) == {0.0, 1.0}
    answer.square().sum().backward(retain_graph=True)
    assert all(p.grad.any() for p in (*model.nets.parameters(), *model.policy.parameters()))
    with torch.no_grad():
        drawn = {tuple(_actions(model, x)) for _ in range(5)}
    assert len(drawn) == 5
    soft = layer(rule=RelaxedTopK()).train()
    with record(soft) as trace:
        soft(x)
    assert torch.equal(trace["policy"][0][..., 0], there.double()), "a soft rule leaves out nothing"


def _actions(model, x):
    with record(model) as trace:
        model(x)
    return trace[""][0].argmax(2).flatten().tolist()


def test_cost_and_even_use_move_the_gate():
    model, x = layer(std=0.1).train(), videos(9, 5, 9, 2, 9, 9)
    cost = CostModel(model, x)
    with record(model) as trace:
        answer = model(x)
    keep = trace[""][0].detach()
    used = keep.sum((0, 1)) / keep.sum()
    terms = FrameCost(cost), EvenUse()
    values = [term(answer, None, trace) for term in terms]
    assert values[0].item() == pytest.approx(cost.spent(trace).mean().item() / cost.full)
    assert values[1].item() == pytest.approx((used - 1 / 6).square().sum().sqrt().item())
    scores = model.policy.gate.scorer
    for value in values:
        (gradient,) = torch.autograd.grad(value, scores.bias, retain_graph=True)
        assert gradient.any() and gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(values[0], scores.bias)
    assert gradient[2] > 0 and gradient[2] == gradient.max(), "the dearest size is to become rarer"
    with forced(model, lambda d: d.keep * 0 + 1), record(model) as trace:
        answer = model(x)
    even = EvenUse()(answer, None, trace)
    assert even == 0 and torch.autograd.grad(even, scores.bias)[0].isfinite().all()


def test_a_policy_learns_which_frames_are_worth_the_large_size():
    """One frame of six tells the class, by fine stripes that vanish at the small size; a mark says which one."""
    torch.manual_seed(0)

    def seeing(side):
        return nn.Sequential(nn.Conv2d(1, 8, (1, 2)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    look = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    model = FrameSelect(look, [seeing(2), seeing(8)], (2, 8), features=8, hidden=8, num_classes=2, skips=(1, 2))

    def draw(rows):
        y, told = torch.randint(2, (rows,)), torch.randint(6, (rows,))
        x = 0.1 * torch.randn(rows, 6, 1, 8, 8)
        stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(8, 8)
        x[torch.arange(rows), told] += torch.where(y[:, None, None] > 0, stripes, stripes.T)[:, None] + 1.0
        return x, y, told

    cost = CostModel(model, draw(1)[0])
    objective = train.CrossEntropy() + 0.5 * (FrameCost(cost) + EvenUse())
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(150):
        x, y, _ = draw(64)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y, told = draw(300)
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    large = trace[""][0][..., 1]
    hit = large[torch.arange(300), told].mean()
    assert right > 0.9 and hit > 0.9 and large.mean() < 0.4


def test_what_does_not_fit_together_is_refused():
    def make(nets=3, sizes=SIZES, look=None, **options):
        numbers = {"features": 5, "hidden": 6, "num_classes": 3} | options
        return FrameSelect(look or nn.Linear(8, 5), [net(4)] * nets, sizes, **numbers)

    for sizes in ((), (6, 2, 8), (2, 2, 6)):
        with pytest.raises(ConfigError, match="smallest first"):
            make(sizes=sizes)
    for skips in ((0, 1), (2, 1), (1, 1), (1.5,)):
        with pytest.raises(ConfigError, match="ascending whole numbers of frames"):
            make(skips=skips)
    with pytest.raises(ConfigError, match="size must be at least 1"):
        make(sizes=(0, 2, 4))
    with pytest.raises(ConfigError, match="hidden must be at least 1, got 0"):
        make(hidden=0)
    with pytest.raises(StructureError, match="3 sizes and 2 networks; give one"):
        make(nets=2)
    with pytest.raises(StructureError, match="3 sizes and 3 networks beside a light head; .* none for the first"):
        make(light=nn.Linear(6, 3))
    with pytest.raises(StructureError, match="keeps 2 of sizes and skips"):
        make(rule=RelaxedTopK(2))
    with pytest.raises(StructureError, match="holds dynamic layers"):
        make(look=LayerSkip(nn.Linear(8, 8), Gate(nn.Linear(8, 1), Gumbel())))
    with pytest.raises(StructureError, match=r"policy's network returned a tensor of shape \(18, 4\); .* \(rows, 5\)"):
        make(look=nn.Sequential(nn.Flatten(), nn.Linear(8, 4)))(torch.randn(2, 9, 2, 6, 6))
    model = layer().float()
    with pytest.raises(StructureError, match=r"returned a tensor of shape \(18, 4\); expected \(rows, 3\)"):
        model.nets[0] = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
        model(torch.randn(2, 9, 2, 6, 6))
    for shape in ((2, 2, 6, 6), (2, 0, 2, 6, 6)):
        with pytest.raises(InputError, match="expected .batch, frames, C, H, W."):
            model(torch.randn(shape))
    with pytest.raises(InputError, match="lengths from 0 to 3"):
        model(videos(3, 0))
    skipless = nn.Linear(3, 3)
    with record(skipless) as trace, pytest.raises(StructureError, match="model with FrameSelect layers"):
        EvenUse()(torch.zeros(1), None, trace)
