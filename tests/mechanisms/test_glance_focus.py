import copy

import pytest
import torch
from torch import nn

from dynanet import Budget, calibrate, train
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.gates.confidence import LearnedGate, Patience, PerExit
from dynanet.mechanisms.glance_focus import (
    GlanceFocus,
    JoinedHead,
    LearnedCrops,
    PlacePolicy,
    PlaceReward,
    RandomCrops,
    RecurrentHead,
    SampledCrops,
)
from dynanet.nets.spatial_transformer import crop, resize
from dynanet.session import Session
from dynanet.testing import check_equal, check_neighbours


def encoder(channels=3, width=4):
    first, second = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def glances(channels=3, *, width=4, glance_size=6, crop_size=5, glimpses=3, head=None, threshold=torch.inf, **options):
    model = GlanceFocus(
        encoder(channels, width),
        encoder(channels, width),
        PlacePolicy(width, width=3, hidden=4, grid=3),
        head or RecurrentHead(width, 6, 3),
        glance_size=glance_size,
        crop_size=crop_size,
        glimpses=glimpses,
        **options,
    )
    model.thresholds.fill_(threshold)
    nn.init.normal_(model.policy.place.weight, std=3.0)  # so that it looks somewhere
    return model


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 3, 13, 11)


def between(model, x):
    """Thresholds of which each lets some of the rows go on that reach it."""
    with torch.no_grad(), record(model.eval()) as trace:
        model.thresholds.fill_(torch.inf)
        model(x)
        here = torch.ones(len(x), dtype=torch.bool)
        for k, call in enumerate(trace.calls):
            model.thresholds[k] = call.decision.score[here].mean()
            here &= call.decision.score[:, 0] < model.thresholds[k]


def by_hand(model, image, limit):
    """One image (1, C, H, W), glimpse by glimpse: the answer, how many were taken, and their MACs."""
    place = looked = seen = None
    with torch.no_grad(), CountMacs() as count:
        for k in range(limit):
            look = resize(image, model.glance_size) if k == 0 else crop(image, place, model.crop_size)
            features = (model.glance if k == 0 else model.focus)(look)
            logits, seen = model.head(features, seen)
            if k + 1 == limit:
                break
            place, looked = model.policy(features, looked)
            if model.confidence(logits).item() >= model.thresholds[k]:
                break
    return logits, k + 1, count.total


@pytest.mark.parametrize("head", ["recurrent", "joined"])
def test_a_row_gets_what_it_gets_alone_and_costs_what_it_ran(x, head):
    model = glances(head=None if head == "recurrent" else JoinedHead(4, 3, 3)).double().eval()
    x = x.double()
    between(model, x)
    cost = CostModel(model, x[:1])
    execute(model, sparse=True)
    with torch.no_grad(), record(model) as trace:
        answers = model(x)
    spent, taken = cost.spent(trace), set()
    for i in range(6):
        expected, glimpses, macs = by_hand(model, x[i : i + 1], 3)
        torch.testing.assert_close(answers[i : i + 1], expected, rtol=1e-12, atol=1e-12)
        assert spent[i].item() == pytest.approx(macs)
        taken.add(glimpses)
    assert len(taken) > 1, "a dull example"


def test_who_leaves_at_the_glance_has_no_crop_cut(x, monkeypatch):
    model = execute(glances(threshold=-torch.inf).eval(), sparse=True)
    seen = []
    model.focus.register_forward_hook(lambda m, args, y: seen.append(args[0].shape))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.answers(x)[0])
        seen.clear()
        model(x)
        assert seen == []
        model.thresholds.fill_(torch.inf)
        torch.testing.assert_close(model(x), model.answers(x)[2])
        seen.clear()
        model(x)
        assert seen == [(6, 3, 5, 5)] * 2


@pytest.mark.parametrize("channels", [1, 200])
@pytest.mark.parametrize("height, width", [(13, 11), (3, 4), (5, 17), (1, 1)])
def test_images_of_any_size_and_any_channels(channels, height, width):
    """Smaller than a crop too, in one direction or both."""
    torch.manual_seed(0)
    model, x = glances(channels, crop_size=(7, 5), glimpses=2), torch.randn(3, channels, height, width)
    between(model, x)
    check_equal(model, x, draws=1)


def test_neighbours_do_not_matter(x):
    model = glances()
    between(model, x)
    check_neighbours(model, x)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("threshold", [-torch.inf, torch.inf])
def test_no_row_and_one(x, rows, threshold):
    model = glances(threshold=threshold).eval()
    for sparse in (False, True):
        assert execute(model, sparse=sparse)(x[:rows]).shape == (rows, 3)


@pytest.mark.parametrize(
    "engine, confidence",
    [("eager", None), ("eager", Patience()), ("eager", PerExit([LearnedGate()] * 2)), ("onnxruntime", None)],
)
def test_a_session_is_the_eager_sparse_form(x, engine, confidence):
    model = glances(confidence=confidence, glimpses=2 if engine == "onnxruntime" else 3).eval()
    if isinstance(confidence, Patience):
        model.thresholds.fill_(1.0)  # to agree with the glance is enough
    else:
        between(model, x)
    execute(model, sparse=True)
    session = Session(model, x, engines=engine, batches=(4,))
    cost = CostModel(model, x[:1])
    with torch.no_grad():
        for batch in (x, x[:1], x[:0]):
            with record(model) as trace:
                expected = model(batch)
            with record(session) as ran:
                answers = session(batch)
            torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)
            if len(batch):
                torch.testing.assert_close(cost.spent(ran), cost.spent(trace))
        streamed = torch.stack(list(session.stream(iter(x), batch=2)))
    torch.testing.assert_close(streamed, model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="another size"):
        session(x[..., :-1])


def test_calibration_finds_thresholds_for_budgets():
    torch.manual_seed(0)
    model, x = glances().eval(), torch.randn(80, 3, 13, 11)
    with torch.no_grad():
        y = model.answers(x)[2].argmax(1)  # so that the last answers are right
    cost = CostModel(model, x[:1])
    frontier = calibrate.calibrate(model, [(x, y)], cost)
    budget = Budget(macs=0.7 * float(frontier.table.mean_macs[-1]))
    early, choice = execute(frontier.at(budget), sparse=True), frontier.choose(budget)
    with torch.no_grad(), record(early) as trace:
        answers = early(x)
    spent = cost.spent(trace).mean().item()
    assert spent == pytest.approx(choice.macs) and spent <= budget.macs
    assert (answers.argmax(1) == y).double().mean().item() == pytest.approx(choice.accuracy)
    capped = frontier.at(Budget(cap_macs=float(frontier.table.most_expensive[1])))
    torch.testing.assert_close(capped(x), model.answers(x)[1])


def test_in_training_every_glimpse_answers_every_row(x):
    model = glances(threshold=-torch.inf).train()
    with record(model) as trace:
        answer = model(x)
    assert [len(logits) for logits in trace.answers[""]] == [6, 6, 6]
    torch.testing.assert_close(answer, trace.answers[""][2])


def test_steered_places_learn_from_the_loss_and_encoders_not_from_the_policy(x):
    class LastOnly(nn.Module):
        """So that the glance can reach the last answer through the policy only."""

        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 3)

        def forward(self, features, memory):
            return self.map(features.mean((2, 3))), None

    model = glances(head=LastOnly(), glimpses=2).train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.policy.place.parameters())
    assert not any(p.grad.any() for p in model.glance.parameters())


@pytest.mark.parametrize("places", [RandomCrops(), SampledCrops(0.2)])
def test_places_are_random_in_training_only(x, places):
    model, wanted = glances(places=places), torch.rand(4, 2)
    steered = copy.deepcopy(model)
    steered.places = LearnedCrops()
    torch.testing.assert_close(model.eval()(x), steered.eval()(x))
    place, likelihood = places.train()(wanted)
    assert not torch.equal(place, wanted) and place.min() >= 0 and place.max() <= 1
    assert (likelihood is not None) == isinstance(places, SampledCrops)
    place, likelihood = places.eval()(wanted)
    assert place is wanted and likelihood is None


def test_the_policy_gradient_is_that_of_the_log_density(x):
    """Of a normal distribution: d log p / d mean = (place - mean) / std^2, times what the glimpses were worth."""
    places, taken = SampledCrops(0.3), []
    model, y = glances(places=places), torch.tensor([0, 1, 2, 0, 1, 2])

    def see(module, inputs, outputs):
        taken.append((inputs[0], outputs[1]))

    places.register_forward_hook(see)
    with record(model.train()) as trace:
        answer = model(x)
    loss = PlaceReward(0.5)(answer, y, trace)
    wanted = [w for w, _ in taken]
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True)
    true = torch.stack([logits.softmax(1)[torch.arange(6), y] for logits in trace.answers[""]], 1).detach()
    second = true[:, 2] - true[:, 1]
    credit = torch.stack([true[:, 1] - true[:, 0] + 0.5 * second, second], 1)
    advantage = (credit - credit.mean(0)) * 6 / 5
    advantage = advantage / advantage.square().mean().sqrt()
    for k, (mean, likelihood) in enumerate(taken):
        (score,) = torch.autograd.grad(likelihood.sum(), mean, retain_graph=True)  # (place - mean) / std^2
        torch.testing.assert_close(likelihood[:, 0], -(score * 0.3).square().sum(1) / 2)
        torch.testing.assert_close(gradients[k], -score * advantage[:, k, None] / 6)
    loss.backward()
    assert all(p.grad is None for part in (model.glance, model.focus, model.head) for p in part.parameters())
    assert all(p.grad is not None for p in model.policy.parameters())


def textures(rows):
    """Two textures of the same mean, 6 x 6 of 24 x 24 pixels, at a random place: too fine for a glance."""
    y, x, at = torch.randint(2, (rows,)), 0.1 * torch.randn(rows, 1, 24, 24), torch.arange(6)
    stripes = (at % 2 * 2.0 - 1).expand(6, 6) + 0.7
    for i, (down, across) in enumerate(torch.randint(0, 19, (rows, 2)).tolist()):
        x[i, 0, down : down + 6, across : across + 6] += stripes if y[i] else stripes.T
    return x, y


def test_the_policy_learns_where_to_look():
    torch.manual_seed(0)
    model = GlanceFocus(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        PlacePolicy(8, width=8, hidden=32, grid=6), RecurrentHead(8, 16, 2),
        glance_size=6, crop_size=8, glimpses=2, places=SampledCrops(0.15),
    )  # fmt: skip
    objective, optimizer = train.MultiExit() + PlaceReward(), torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(200):
        x, y = textures(64)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y = textures(300)
    with torch.no_grad(), record(model.eval()) as trace:
        answer = model(x)
    glance, focus = ((logits.argmax(1) == y).float().mean() for logits in trace.answers[""])
    assert glance < 0.7 and focus > 0.85
    assert PlaceReward()(answer, y, trace) == 0


def test_nan_stays_in_its_row(x):
    model = glances().eval()
    between(model, x)
    clean = model(x)
    x[1, 2, 5, 3] = torch.nan
    for sparse in (False, True):
        rows = [0, 2, 3, 4, 5]
        torch.testing.assert_close(execute(model, sparse=sparse)(x)[rows], clean[rows])


def test_what_it_refuses(x):
    for wrong, says in (
        ({"glimpses": 0}, "glimpses must be at least 1, got 0"),
        ({"crop_size": 0}, "size must be at least 1"),
        ({"glance_size": (3,)}, "size must be a side or"),
    ):
        with pytest.raises(ConfigError, match=says):
            glances(**wrong)
    with pytest.raises(StructureError, match="one per exit but the last"):
        glances(confidence=PerExit([LearnedGate()]))
    with pytest.raises(ConfigError, match="standard deviation of 0"):
        SampledCrops(0)
    with pytest.raises(ConfigError, match="discount of 1.5"):
        PlaceReward(1.5)
    y, model = torch.tensor([0, 1, 2, 0, 1, 2]), glances()
    with record(model.train()) as trace:
        answer = model(x)
    with pytest.raises(StructureError, match="set by LearnedCrops.*give it SampledCrops"):
        PlaceReward()(answer, y, trace)
    with pytest.raises(StructureError, match="is named 'nobody'"):
        PlaceReward(halt="nobody")(answer, y, trace)
    model.places = SampledCrops()
    with forced(model, lambda d: torch.zeros_like(d.keep)), record(model) as trace:
        answer = model(x[:3])
    with pytest.raises(StructureError, match="use train mode"):
        PlaceReward()(answer, y, trace)


def test_one_glimpse_is_the_glance_alone(x):
    model = glances(glimpses=1).eval()
    with torch.no_grad():
        features = model.glance(resize(x, 6))
        torch.testing.assert_close(model(x), model.head(features, None)[0])
    with record(model.train()) as trace:
        answer = model(x)
    model.places = SampledCrops()
    assert PlaceReward()(answer, torch.zeros(6).long(), trace) == 0
