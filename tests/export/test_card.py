"""A card is for people: figures as they read them, no Python but what is meant to be typed."""

import numpy as np
import pytest

from dynanet.export.card import Card, render
from dynanet.export.config import Inputs

ONE = Inputs(channels=1, size=(8, 8), mean=(0.3054,), std=(0.376123,))


def lines(facts):
    return [line for line in render(Card(), "tiny", {"num_classes": 3}, facts).splitlines() if line.startswith("- ")]


def test_facts_are_in_words():
    facts = {"parameters": 1234567, "MACs, mean": 621367.4666666667, "MACs, worst": None, "input": ONE, "classes": 10}
    assert lines(facts) == [
        "- built by: `tiny(num_classes=3)`",
        "- parameters: 1,234,567",
        "- MACs, mean: 621,367",
        "- MACs, worst: not given",
        "- input: 1 channel, 8 x 8 pixels, minus 0.3054, divided by 0.3761",
        "- classes: 10",
    ]


def test_limits_are_named_and_no_line_says_that_there_are_none():
    assert lines({"step limit": {"exits": 2, "": 3}})[1:] == ["- step limit: 2 (exits), 3 (the model itself)"]
    assert lines({"step limit": {}})[1:] == []


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (Inputs(channels=1), "1 channel, any size, not normalised"),
        (Inputs(3, None, (0.5, 0.25, 1.0)), "3 channels, any size, minus 0.5, 0.25, 1"),
        (
            Inputs(200, (7, 9), (0.5,) * 200, (2.0,) * 200),
            "200 channels, 7 x 9 pixels, minus one number per channel (in config.json), "
            "divided by one number per channel (in config.json)",
        ),
    ],
)
def test_inputs_are_in_words(inputs, said):
    assert lines({"input": inputs})[1:] == [f"- input: {said}"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, "0.5"), (0.912345, "0.9123"), (999.96, "1000"), (2024, "2024"), (12345.6, "12,346"), (1e18, "1e+18"),
        (-98765.4, "-98,765"), (np.float32(1.25e7), "12,500,000"), (np.int64(70000), "70,000"),
        (10**400, f"{10**400:,}"),
        (float("nan"), "nan"), (True, "True"), ("a", "a"),
    ],
)  # fmt: skip
def test_figures_of_results(value, said):
    assert f"| {said} |" in render(Card(results=[{"x": value}]), "tiny", {}, {})
