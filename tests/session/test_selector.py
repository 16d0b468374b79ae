"""Every engine that may run a unit is measured, and what is slow, missing or impossible is not taken."""

import pytest
import torch
from torch import nn

from dynanet.core.errors import StructureError
from dynanet.session import selector
from dynanet.session.engines import Eager
from dynanet.session.plan import StaticUnit
from dynanet.session.selector import EnginesByBatch, EngineSelector, fastest

CPU = torch.device("cpu")


class Double(nn.Module):
    def forward(self, x):
        return (2 * x, x[:, :1])


UNIT = StaticUnit("double", Double(), [torch.ones(1, 3)], workspaces=False)


def test_a_unit_without_onnx_runtime_runs_eager():
    chooser = EngineSelector("eager", (1, 8), 1, None, CPU)
    engines = chooser.engines(UNIT)
    assert not chooser.onnx and list(engines.engines) == [1] and not chooser.measured
    x = torch.randn(5, 3)
    assert all(torch.equal(a, b) for a, b in zip(engines([x]), Double()(x), strict=True))


def test_a_batch_without_rows_has_the_answers_shapes():
    answer, first = (
        EngineSelector("eager", (1,), 1, None, CPU).engines(UNIT).empty(torch.utils._pytree.tree_structure((0, 0)))
    )
    assert answer.shape == (0, 3) and first.shape == (0, 1)


def test_a_listener_hears_every_call():
    engines, heard = EnginesByBatch({1: Eager(Double())}, []), []
    engines([torch.ones(1, 3)])
    engines.listener = lambda inputs: heard.append(inputs[0].shape[0])
    for rows in (1, 4):
        engines([torch.ones(rows, 3)])
    assert heard == [1, 4]


@pytest.fixture
def no_graph(monkeypatch):
    def refuses(*_, **__):
        raise StructureError("no graph can hold it")

    monkeypatch.setattr(selector, "onnx_runtime", lambda: object())
    monkeypatch.setattr(selector, "OnnxRuntime", refuses)


def test_what_no_graph_can_hold_runs_eager(no_graph, caplog):
    chooser = EngineSelector("fastest", (1,), 1, None, CPU)
    assert [type(engine) for engine in chooser.engines(UNIT).engines.values()] == [Eager]
    assert "double runs eager: no graph can hold it" in caplog.text
    assert chooser.onnx, "other units may run in it"


def test_what_no_graph_can_hold_is_refused_where_eager_is_ruled_out(no_graph):
    with pytest.raises(StructureError, match="no graph can hold it"):
        EngineSelector("onnxruntime", (1,), 1, None, CPU).engines(UNIT)


def test_every_engine_runs_the_same_rows_as_often_as_the_others():
    class Counts(Eager):
        def __init__(self, name):
            super().__init__(Double())
            self.name, self.seen = name, []

        def __call__(self, inputs):
            self.seen.append(inputs[0].shape)
            return super().__call__(inputs)

    contestants = [Counts("a"), Counts("b")]
    best, ms = fastest(contestants, [torch.ones(7, 3)], threads=2, seconds=0.0)
    assert best in contestants and set(ms) == {"a", "b"} and max(ms.values()) < float("inf")
    assert contestants[0].seen == contestants[1].seen == [(7, 3)] * 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_repeated_in_their_own_layout(layout):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    many = selector._repeated(x, 3)
    assert torch.equal(many, torch.cat([x, x, x])) and many.is_contiguous(memory_format=layout)
