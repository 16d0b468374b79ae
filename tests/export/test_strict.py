import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet.core.errors import BundleError
from dynanet.export.strict import MOST_CHARACTERS, MOST_INTEGER, MOST_ITEMS, check_keys, dump, line, parse, plain, short

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=3))
def test_what_is_dumped_is_parsed_again(value):
    assert parse(dump(value), "a file") == value == json.loads(dump(value))


def test_every_key_has_its_line():
    assert dump({"a": {"b": [1, 2]}, "c": {}}) == b'{\n  "a": {\n    "b": [1, 2]\n  },\n  "c": {}\n}'


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_json_is_not_dumped(number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump({"a": number})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "a": 2}', "a file is damaged: a key occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', "a key occurs twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "a file is damaged"),
        (b"", "a file is damaged"),
        (b"[" * 200_000, "a file is damaged"),
        (b"[1]", r"a file holds \[1\]; expected a JSON object"),
        (b"null", "holds None"),
    ],
)
def test_other_json_is_refused_in_one_line(text, says):
    with pytest.raises(BundleError, match=says) as caught:
        parse(text, "a file")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_keys_are_exactly_the_expected_ones():
    check_keys({"a": 1, "b": 2}, {"b", "a"}, "config")
    for other in ({"a": 1}, {"a": 1, "b": 2, "c": 3}, [], None):
        with pytest.raises(BundleError, match="config has .*; expected exactly a, b"):
            check_keys(other, {"a", "b"}, "config")


@pytest.mark.parametrize("value", [None, True, -MOST_INTEGER, 0.5, "ä" * MOST_CHARACTERS, [[[[1]]]], [0] * MOST_ITEMS])
def test_plain_values_within_the_limits_stay(value):
    assert plain(value, "x") == value


def test_tuples_become_lists():
    assert plain((1, ("a", (None,))), "x") == [1, ["a", [None]]]


@pytest.mark.parametrize(
    "value",
    [
        MOST_INTEGER + 1, -MOST_INTEGER - 1, float("nan"), float("inf"), "a" * (MOST_CHARACTERS + 1), "a\nb", {"a": 1},
        b"a", {1}, [0] * (MOST_ITEMS + 1), [[[[[1]]]]], [1, [object()]],
    ],
)  # fmt: skip
def test_values_beyond_the_limits_are_refused(value):
    with pytest.raises(BundleError, match=r"^x is .*; expected whole numbers up to 1,000,000, finite numbers"):
        plain(value, "x")


@settings(max_examples=50, deadline=None)
@given(st.text() | st.lists(st.text()) | st.integers(0, 4000).map(lambda digits: 10**digits))
def test_quotes_are_one_short_line(value):
    for quote in (short(value), line(ValueError(value))):
        assert len(quote) <= 160 and "\n" not in quote
    assert line(KeyError()) == "KeyError", "an error without words has its name"
