"""What a model remembers of its making is enough to make it again."""

import pytest
import torch
from torch import nn

from dynanet.core.architecture import architecture, architecture_of


@architecture
def line(features: int, outputs: int = 2, *, bias: bool = True) -> nn.Module:
    """A line."""
    return nn.Linear(features, outputs, bias=bias)


@pytest.mark.parametrize("model", [line(3), line(3, 2), line(outputs=2, features=3, bias=True)])
def test_however_arguments_are_given_they_are_remembered_by_name_with_defaults(model):
    found = architecture_of(model)
    assert found.name == "line" and found.arguments == {"features": 3, "outputs": 2, "bias": True}


def test_name_and_arguments_make_the_model_again():
    first = line(3, bias=False)
    again = architecture_of(first).builder(**architecture_of(first).arguments)
    assert architecture_of(again) == architecture_of(first)
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(torch.ones(1, 3)), first(torch.ones(1, 3)))


def test_a_model_may_be_changed_without_changing_what_others_remember():
    first, second = line(3), line(4)
    architecture_of(first).arguments["features"] = 9
    assert architecture_of(second).arguments["features"] == 4 and architecture_of(line(3)).arguments["features"] == 3


def test_a_model_that_no_builder_made_remembers_nothing():
    model = nn.Linear(3, 1)
    assert architecture_of(model) is None
    model.architecture = "linear"
    assert architecture_of(model) is None


def test_what_is_remembered_is_no_weight():
    assert list(line(3).state_dict()) == ["weight", "bias"]


def test_arguments_without_names_cannot_be_remembered():
    with pytest.raises(AssertionError):
        architecture(lambda *widths: nn.Linear(*widths))
    with pytest.raises(AssertionError):
        architecture(lambda **options: nn.Linear(**options))
