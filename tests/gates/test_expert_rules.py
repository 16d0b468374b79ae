import pytest
import torch

from dynanet.core.errors import ConfigError
from dynanet.gates.expert_rules import BatchCoupledTopK, BiasedTopK
from dynanet.gates.rules import TopK

E = 4


def test_the_bias_evens_out_the_load():
    torch.manual_seed(0)
    rule, score = BiasedTopK(1, E, rate=0.02), torch.randn(400, E) * 0.3 + torch.tensor([1.0, 0.0, 0.0, 0.0])
    before = rule.eval()(score).mean(0)
    assert not rule.bias.any()  # nothing is learnt in eval mode
    rule.train()
    for _ in range(100):
        rule(score)
    after = rule.eval()(score).mean(0)
    assert before.max() > 0.8
    assert after.max() < 0.4
    assert rule.bias[0] == rule.bias.min()


def test_a_capacity_serves_first_choices_and_earlier_rows_first():
    rule = BatchCoupledTopK(2, capacity=0.75)  # room for ceil(0.75 * 4 * 2 / 3) = 2 rows
    score = torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [2.0, 3.0, 1.0], [1.0, 3.0, 2.0]])
    assert rule(score).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert torch.equal(BatchCoupledTopK(2, capacity=3.0)(score), TopK(2)(score))
    assert rule(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: BiasedTopK(5, 4), "k = 5 of 4"),
        (lambda: BiasedTopK(0, 4), "k = 0 of 4"),
        (lambda: BatchCoupledTopK(0, 1.0), "k = 0"),
        (lambda: BatchCoupledTopK(1, 0.0), "capacity = 0"),
    ],
)
def test_what_is_refused(make, what):
    with pytest.raises(ConfigError, match=what):
        make()
