"""Engines answer what the part itself answers, and a graph is exported once."""

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dynanet.core.errors import MissingExtraError, StructureError
from dynanet.session import engines
from dynanet.session.engines import Eager, Engine, OnnxRuntime, cache_folder
from dynanet.session.plan import folded
from dynanet.session.selector import fastest


class Part(nn.Module):
    """Three tensors in, of which one is not read; a float, a whole and a Boolean tensor out."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(2, 3, 3), scale
        self.unread = nn.Parameter(torch.ones(4))
        self.register_buffer("threshold", torch.tensor(torch.inf))

    def forward(self, image: Tensor, unread: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        y = self.scale * self.conv(image).mean((2, 3)) + shift
        return y, y.argmax(1), y > 0


def part(scale: float = 1.0) -> Part:
    torch.manual_seed(0)
    return Part(scale).eval().requires_grad_(False)


def inputs(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, *shape, generator=generator) for shape in ((2, 5, 5), (3,), (3,))]


def onnx(unit: nn.Module, cache: Path, *, workspaces: bool = True) -> OnnxRuntime:
    return OnnxRuntime(unit, inputs(2), threads=1, workspaces=workspaces, cache=cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workspaces", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 4, 16])
def test_answers_of_any_number_of_rows(chunk, workspaces, cache):
    unit = part()
    engine = onnx(unit, cache, workspaces=workspaces)
    engine = engine if chunk is None else engine.chunked(chunk)
    for rows in (1, 4, 5, 3, 33, 2, 16, 33):
        same(engine(inputs(rows)), Eager(unit)(inputs(rows)))


def test_rows_that_do_not_lie_side_by_side(cache):
    unit = part()
    engine = onnx(unit, cache)
    image, unread, shift = inputs(6)
    strided = [image.to(memory_format=torch.channels_last), unread.T.contiguous().T, shift.repeat(1, 2)[:, ::2]]
    assert not any(t.is_contiguous() for t in strided)
    same(engine(strided), Eager(unit)(strided))
    views = [t[2:5] for t in inputs(6)]
    same(engine(views), Eager(unit)(views))


def test_what_lies_at_the_same_address_may_change(cache):
    unit = part()
    engine, x = onnx(unit, cache), inputs(4)
    engine(x)
    for t in x:
        t.neg_()
    same(engine(x), Eager(unit)(x))


@pytest.mark.parametrize("workspaces", [True, False])
def test_who_owns_the_answers(workspaces, cache):
    engine = onnx(part(), cache, workspaces=workspaces)
    first = engine(inputs(4))
    kept = [t.clone() for t in first]
    second = engine([-t for t in inputs(4)])
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(first, second, strict=True)] == [workspaces] * 3
    assert torch.equal(first[0], kept[0]) != workspaces


def test_chunks_have_workspaces_of_their_own(cache):
    whole = onnx(part(), cache)
    chunked = whole.chunked(2)
    a = whole(inputs(4))
    b = chunked([-t for t in inputs(4)])
    same(a, Eager(part())(inputs(4)))
    assert a[0].data_ptr() != b[0].data_ptr()
    assert chunked.name == "onnxruntime, 2 at a time"


def test_a_graph_is_exported_once(cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this exports again")

    onnx(part(), cache)
    monkeypatch.setattr(torch.onnx, "export", refuse)
    same(onnx(part(), cache)(inputs(3)), Eager(part())(inputs(3)))
    with pytest.raises(StructureError, match="this exports again"):
        onnx(part(scale=2.0), cache)


def test_another_computation_is_another_graph(tmp_path):
    def graphs() -> int:
        return len(list(tmp_path.glob("*.onnx")))

    unit = part()
    onnx(unit, tmp_path)
    with torch.no_grad():
        unit.unread.zero_()
        unit.threshold.fill_(0.5)
    onnx(unit, tmp_path)
    assert graphs() == 1  # it reads neither
    with torch.no_grad():
        unit.conv.weight[0, 0, 0, 0] += 0.5
    same(onnx(unit, tmp_path)(inputs(3)), Eager(unit)(inputs(3)))
    assert graphs() == 2
    unit.scale = 3.0
    same(onnx(unit, tmp_path)(inputs(3)), Eager(unit)(inputs(3)))
    assert graphs() == 3
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".onnx"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "of another part"])
def test_a_damaged_graph_is_exported_again(damage, cache, tmp_path):
    kept = graph(part(), cache).read_bytes()
    if damage == "of another part":
        damaged = graph(part(scale=2.0), cache).read_bytes()
    else:
        damaged = {"truncated": kept[:-40], "empty": b"", "garbage": b"no graph" * 99}[damage]
    path = tmp_path / graph(part(), cache).name
    path.write_bytes(damaged)
    same(onnx(part(), tmp_path)(inputs(3)), Eager(part())(inputs(3)))
    assert path.read_bytes() == kept


def graph(unit: nn.Module, cache: Path) -> Path:
    onnx(unit, cache)
    return cache / f"{engines._digest(engines.exported(unit, inputs(2)), inputs(2))}.onnx"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_one_cannot_write_to(tmp_path):
    tmp_path.chmod(0o500)
    check_unkept(tmp_path / "engines")


def test_a_place_that_can_be_no_folder(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    unit = part()
    same(onnx(unit, tmp_path / "file")(inputs(3)), Eager(unit)(inputs(3)))
    said = [r.getMessage() for r in caplog.records if r.name.startswith("dynanet")]
    assert len(said) == 1 and "cannot be kept" in said[0] and "DYNANET_CACHE" in said[0]


def check_unkept(folder: Path) -> None:
    same(onnx(part(), folder)(inputs(3)), Eager(part())(inputs(3)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: (x if x.sum() > 0 else -x,),  # data decides what runs
        lambda x: (x * len(x.tolist()),),  # leaves the graph
        lambda x: (x.half() @ x.half().T,),  # a dtype that is not bound
    ],
)
def test_what_no_graph_can_hold_is_one_line(forward, tmp_path, capfd):
    class Unit(nn.Module):
        def forward(self, x):
            return forward(x)

    with pytest.raises(StructureError, match="that ONNX Runtime cannot run") as caught:
        OnnxRuntime(Unit(), [torch.randn(2, 3)], threads=1, workspaces=True, cache=tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert capfd.readouterr() == ("", "")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("DYNANET_CACHE", "/a")
    assert cache_folder() == Path("/a/engines")
    monkeypatch.delenv("DYNANET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/dynanet/engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/dynanet/engines")


def test_a_missing_runtime_is_told_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)  # as if it were not installed
    engines.onnx_runtime.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert engines.onnx_runtime() is None and engines.onnx_runtime() is None
        assert [r.name for r in caplog.records] == ["dynanet.session.engines"]
        with pytest.raises(MissingExtraError, match=r"pip install 'dynanet\[onnx\]'"):
            onnx(part(), tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        engines.onnx_runtime.cache_clear()


class Busy(Engine):
    def __init__(self, name: str, turns: int) -> None:
        self.name, self.turns, self.calls = name, turns, 0

    def __call__(self, given):
        self.calls += 1
        for _ in range(self.turns):
            given[0] @ given[0].T
        return list(given)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_quickest_is_chosen_by_measuring(threads):
    contestants = [Busy("slow", 30), Busy("quick", 1), Busy("middling", 10)]
    best, ms = fastest(contestants, [torch.randn(64, 64)], threads=threads, seconds=0.02)
    assert best.name == "quick" and min(ms, key=ms.get) == "quick" and list(ms) == ["slow", "quick", "middling"]
    assert len({engine.calls for engine in contestants}) == 1 and contestants[0].calls >= 4


def test_batch_norms_are_folded_into_a_copy():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1),
        nn.BatchNorm2d(2, track_running_stats=False),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    before = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    copied, x = folded(model), torch.randn(3, 2, 6, 6)
    assert [name for name, m in copied.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["4", "6"]
    assert [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)] == before
    assert model.training and not copied.training
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in copied.parameters())
    with torch.no_grad():
        torch.testing.assert_close(copied(x), model.eval()(x), rtol=1e-4, atol=1e-4)
