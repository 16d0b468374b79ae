import pytest
import torch
from torch import nn

from dynanet import zoo
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, InputError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.token_drop import RankScorer, TokenDrop
from dynanet.session import Session
from dynanet.testing import check_dynamic

TINY = {"num_classes": 3, "in_channels": 2, "size": 12, "patch": 4, "width": 12, "depth": 3, "heads": 2}
DEIT_S = {"num_classes": 1000, "size": 224, "patch": 16, "width": 384, "depth": 12, "heads": 6, "expansion": 4}
BUILD = {
    "token_vit": lambda **more: zoo.token_vit(**TINY, **more),
    "dynamic_vit": lambda **more: zoo.dynamic_vit(**TINY, **{"drops": (1, 2), **more}),
    "evit": lambda **more: zoo.evit(**TINY, **{"drops": (0, 1), **more}),
    "a_vit": lambda **more: zoo.a_vit(**TINY, **{"shift": -0.5, **more}),
    "tome": lambda **more: zoo.tome(**TINY, **{"merge": 2, **more}),
    "tome, similar": lambda **more: zoo.tome(**TINY, **{"merge": None, "similarity": 0.4, **more}),
}


def make(name):
    """With weights large enough that tokens differ, in eval mode."""
    torch.manual_seed(0)
    model = BUILD[name]()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.4)
    for m in model.modules():
        if isinstance(m, TokenDrop) and name == "dynamic_vit":
            nn.init.normal_(m.gate.scorer.decide[-1].weight, std=20.0)
    return model.eval()


@pytest.mark.parametrize("name", ["evit", "a_vit"])  # halves of blocks, the class token alone
def test_they_keep_the_laws(name):
    check_dynamic(make(name), torch.randn(4, 2, 12, 12), draws=1, portable=False)


@pytest.mark.parametrize("name", BUILD)
def test_a_session_answers_and_decides_as_the_model(name):
    model, x = make(name), torch.randn(6, 2, 12, 12)
    session, cost = Session(model, x, engines="eager"), CostModel(model, x[:1])
    with torch.no_grad(), record(model) as dense, record(session) as sparse:
        torch.testing.assert_close(session(x), model(x), rtol=1e-4, atol=1e-5)
    for key in dense.keys():
        for ours, theirs in zip(sparse[key], dense[key], strict=True):
            assert torch.equal(ours, theirs)
    if name != "token_vit":
        assert cost.spent(sparse).mean() < cost.worst, "nothing was left out"


def test_macs_counted_by_hand():
    def block(n, width=12, expansion=2):
        return n * (4 + 2 * expansion) * width**2 + 2 * n * n * width

    x, ends = torch.randn(1, 2, 12, 12), 9 * 32 * 12 + 12 * 3
    assert CostModel(make("token_vit"), x).full == 3 * block(10) + ends
    model = make("tome")  # 10 tokens, then 8, 6, 4; keys of 6 are compared, all pairs
    with torch.no_grad(), CountMacs() as count:
        execute(model, sparse=True)(x)
    attended, fed = (10, 8, 6), (8, 6, 4)
    expected = sum(4 * n * 144 + 2 * n * n * 12 + n * n * 6 for n in attended) + sum(4 * n * 144 for n in fed)
    assert count.total == expected + ends


def deit(name, **more):
    """MACs of one image in DeiT-S, billions, and what was forced on it."""
    torch.manual_seed(0)
    model, x = getattr(zoo, name)(**DEIT_S, **more).eval(), torch.randn(1, 3, 224, 224)
    left = iter((0.7, 0.49, 0.343))

    def keep(decision):
        most = 1 + round(196 * next(left))
        return (torch.arange(decision.keep.shape[-2]) < most).to(decision.keep)[:, None].expand_as(decision.keep)

    with torch.no_grad(), forced(model, keep if name == "dynamic_vit" else None), CountMacs() as count:
        execute(model, sparse=True)(x)
    return count.total / 1e9


def test_figures_that_were_published():
    """DeiT-S: the tables of EViT's and DynamicViT's repositories, GFLOPs there."""
    assert round(deit("token_vit"), 1) == 4.6
    assert round(deit("evit", drops=(3, 6, 9), share=0.7), 1) == 3.0
    assert round(deit("evit", drops=(3, 6, 9), share=0.5), 1) == 2.3
    assert 2.9 <= deit("dynamic_vit", drops=(3, 6, 9)) < 3.0  # 2.9 there


@pytest.mark.parametrize("name", list(BUILD)[1:])
def test_weights_of_the_static_network_do(name):
    """With nothing dropped, the answers are the static network's."""
    static, model, x = make("token_vit"), make(name), torch.randn(3, 2, 12, 12)
    model.inherit(static)
    if name == "a_vit":
        nn.init.constant_(model.body.halting.shift, -1e4)  # all the weight on the last state
    with torch.no_grad(), forced(model, lambda d: torch.ones_like(d.keep)):
        torch.testing.assert_close(execute(model, sparse=True)(x), static(x))
    with pytest.raises(ConfigError, match="3 blocks cannot inherit from 2"):
        model.inherit(zoo.token_vit(**{**TINY, "depth": 2}))
    with pytest.raises(ConfigError, match="other sizes"):
        model.inherit(zoo.token_vit(**{**TINY, "num_classes": 5}))


def test_a_fixed_share_at_inference_is_one_line():
    model, x = make("dynamic_vit"), torch.randn(4, 2, 12, 12)
    for m in model.modules():
        if isinstance(m, TokenDrop):
            m.gate = Gate(RankScorer(m.gate.scorer), Threshold(1 / 3))
    with torch.no_grad(), record(model) as trace:
        model(x)
    assert [keep[0].sum(1).flatten().tolist() for keep in map(trace.__getitem__, trace.keys())] == [[7] * 4, [5] * 4]


@pytest.mark.parametrize("name", BUILD)
def test_empty_batches_and_other_sizes(name):
    model = execute(make(name), sparse=True)
    assert model(torch.zeros(0, 2, 12, 12)).shape == (0, 3)
    with pytest.raises(InputError, match="resize"):
        model(torch.zeros(1, 2, 12, 16))


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("token_vit", {"heads": 5}, "width must be a multiple of heads = 5, got 12"),
        ("token_vit", {"patch": 5}, "size must be a multiple of patch = 5"),
        ("token_vit", {"depth": 0}, "depth must be at least 1, got 0"),
        ("token_vit", {"num_classes": True}, "num_classes must be a whole number of at least 1, got True"),
        ("dynamic_vit", {"drops": (2, 1)}, "ascending"),
        ("dynamic_vit", {"drops": (3,)}, "0 to 2"),
        ("evit", {"drops": (1,), "share": 0.0}, "share must be .* got 0.0"),
        ("evit", {"drops": ()}, "drops must be .* got"),
        ("a_vit", {"eps": 1.0}, "eps = 1"),
        ("tome", {"similarity": 0.5}, "give one"),
    ],
)
def test_what_means_no_network_is_refused(name, wrong, says):
    with pytest.raises(ConfigError, match=says):
        getattr(zoo, name)(**{**TINY, **wrong})
