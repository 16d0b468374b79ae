"""Flags are flags, lists are lists, and an error is one line."""

import pytest

from dynanet.cli.arguments import Parser, command_name, written_out


def draw_lots(place: str, *, shares: list[float] | None = None, rounds: int = 3, json: bool = False) -> None:
    """Draw lots.

    Of all that take part.

    Args:
        place: where they are drawn.
        shares: of the lots.
        rounds: how often.
        json: print JSON.
    """


@pytest.fixture
def parser():
    parser = Parser()
    parser.add_function_arguments(draw_lots, as_positional=True)
    return parser


@pytest.mark.parametrize(
    "given",
    [["--shares", "0.5", "0.25"], ["--shares", "0.5,0.25"], ["--shares", "[0.5,0.25]"]],
)
def test_a_list_may_be_written_in_several_ways(given):
    first = written_out(["calibrate", "run", *given])
    assert first == ["calibrate", "run", "--shares", "[0.5,0.25]"]
    assert written_out(first) == first


def test_a_list_ends_where_the_next_option_begins():
    given = ["bench", "--batches", "1", "64", "--threads", "2", "--rounds", "5", "7"]
    assert written_out(given) == ["bench", "--batches", "[1,64]", "--threads", "[2]", "--rounds", "5", "7"]
    assert written_out(["--static", "a", "b/c", "--json"]) == ["--static", "[a,b/c]", "--json"]
    assert written_out(["--shares", "half"]) == ["--shares", "half"], "no number: the parser says so"
    assert written_out([]) == []


def test_a_command_is_typed_with_dashes():
    assert command_name(draw_lots) == "draw-lots"


def test_values_are_parsed_and_booleans_are_flags(parser):
    given = parser.parse_args(written_out(["here", "--shares", "0.5", "1", "--json"]))
    assert (given.place, given.shares, given.rounds, given.json) == ("here", [0.5, 1.0], 3, True)
    assert parser.parse_args(["here"]).json is False


def test_help_is_the_docstring(parser):
    said = parser.format_help()
    assert parser.usage == "dynanet draw-lots place [options]"
    for part in ("Draw lots.", "Of all that take part.", "how often (default: 3)", "print JSON"):
        assert part in said
    assert "print JSON (default" not in said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "place"),
        (["here", "--rounds", "few"], "rounds: expected int; got few"),
        (["here", "--round", "2"], "--round"),
        (["here", "--json=yes"], "json"),
    ],
)
def test_an_error_is_one_line_that_says_where_help_is(given, says, parser, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(given)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err
    assert err.startswith("dynanet: ") and err.endswith("; see: dynanet draw-lots --help\n")
