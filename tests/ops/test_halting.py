import pytest
import torch
from torch import nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, execute, record
from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.ops.halting import halting_calls, halting_scores, ponder_cost


class Halting(Dynamic):
    """Logs two decisions about sums of halting scores: three steps."""

    def forward(self, x):
        sums = torch.cat([x, x + 0.3], 1)
        for k in range(2):
            score = sums[:, k : k + 1]
            self.tap(Decision((score < 1).to(score.dtype), score), first=k)
        return x


def test_steps_and_remainder_by_hand():
    x = torch.tensor([[0.2], [0.9], [1.5]], requires_grad=True)
    model = Halting()
    with record(model) as trace:
        model(x)
    calls = halting_calls(trace, "")
    scores = halting_scores(calls)
    torch.testing.assert_close(scores[0], x)
    torch.testing.assert_close(scores[1], torch.full((3, 1), 0.3))
    cost = ponder_cost([call.keep for call in calls], scores)
    # The first row takes 3 steps with remainder 0.5, the second 2 with 0.1, the third 1 with all of it.
    torch.testing.assert_close(cost, torch.tensor((3 + 0.5 + 2 + 0.1 + 1 + 1) / 3))
    cost.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[-1.0], [-1.0], [0.0]]) / 3)


def test_several_passes_and_missing_rows_are_refused():
    model, x = Halting(), torch.zeros(3, 1)
    with record(model) as trace:
        model(x)
        model(x)
    with pytest.raises(StructureError, match="ran several times"):
        halting_calls(trace, "")
    gate = Gate(nn.Identity(), Threshold(0.5))
    outer = execute(LayerSkip(Halting(), gate).eval(), sparse=True)
    with record(outer) as trace:
        outer(torch.tensor([[0.0], [1.0]]))
    with pytest.raises(StructureError, match="only some rows"):
        halting_calls(trace, "block")
