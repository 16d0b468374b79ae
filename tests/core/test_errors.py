"""Errors are one line that says what came and what to do, and checks refuse nothing that is right."""

import importlib

import pytest

from dynanet.core import errors
from dynanet.core.errors import ConfigError, DynanetError, MissingExtraError, check_choice, check_shares, check_sizes

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_can_be_caught_without_knowing_dynanet(kind):
    assert issubclass(kind, DynanetError) and issubclass(kind, ValueError)


@pytest.mark.parametrize("size", [1, 7, (1, 2), [3], ()])
def test_whole_numbers_of_at_least_one_are_sizes(size):
    check_sizes(width=size)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "width must be at least 1, got 0"),
        (-3, "width must be at least 1, got -3"),
        ((4, 0), r"width must be at least 1, got \(4, 0\)"),
        (2.0, "width must be a whole number of at least 1, got 2.0"),
        (True, "width must be a whole number of at least 1, got True"),
        ("8", "width must be a whole number of at least 1, got '8'"),
    ],
)
def test_what_is_no_size_is_named(size, says):
    with pytest.raises(ConfigError, match=says):
        check_sizes(depth=2, width=size)


def test_the_least_size_is_the_callers():
    check_sizes(0, width=0)
    with pytest.raises(ConfigError, match="at least 3, got 2"):
        check_sizes(3, width=2)


def test_a_choice_is_one_of_those_listed():
    check_choice("head", "cifar", ("cifar", "imagenet"))
    with pytest.raises(ConfigError, match="head must be one of 'cifar', 'imagenet', got 'mnist'"):
        check_choice("head", "mnist", ("cifar", "imagenet"))


def test_shares_lie_from_nought_to_one():
    check_shares(first=0.0, second=0.5, third=1)
    check_shares(positive=True, first=1e-9)
    for share in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="second must be a share between 0 and 1, got"):
            check_shares(first=0.3, second=share)
    with pytest.raises(ConfigError, match="first must be a share above 0 and at most 1, got 0"):
        check_shares(positive=True, first=0)


def test_what_is_installed_is_imported():
    assert errors.require("json", "onnx") is importlib.import_module("json")


@pytest.mark.parametrize("error", [ImportError("no such module"), RuntimeError("operator torchvision::nms")])
def test_what_cannot_be_imported_is_told_with_the_command_that_installs_it(error, monkeypatch):
    def fails(module):
        raise error

    monkeypatch.setattr(errors, "import_module", fails)
    with pytest.raises(MissingExtraError, match=r"pip install 'dynanet\[text\]'") as caught:
        errors.require("tokenizers", "text")
    assert str(error) in str(caught.value) and isinstance(caught.value, ImportError)
