from dynanet.report.words import maybe_percent, pairs, percent, points, quantity, short_percent


def test_figures_are_short_and_signed():
    assert [quantity(v) for v in (0, 7, 999.0, 1000.0, 929_400, 3.976e6, 1e10)] == [
        "0", "7", "999", "1.00 k", "929 k", "3.98 M", "10.0 G",
    ]  # fmt: skip
    assert [points(v) for v in (0.0004, -0.0004, 0.012, -0.059)] == ["0.0", "0.0", "+1.2", "−5.9"]


def test_arguments_are_pairs():
    given = {"widths": [16, (32, 64)], "rate": 0.10000000001, "kind": "se", "more": {"a": None}}
    assert pairs(given) == "widths=[16, [32, 64]], rate=0.1, kind=se, more=(a=None)"
    assert pairs({}) == ""


def test_figures_do_not_turn_at_the_edge_of_a_unit():
    assert quantity(1e-3) == "0.00100" and quantity(2.5) == "2.50" and quantity(-1500.0) == "-1.50 k"
    assert quantity(1e17).endswith(" T")


def test_shares_are_percentages_and_none_is_a_dash():
    assert (percent(0.5), percent(0.5, 0), maybe_percent(0.5)) == ("50.0 %", "50 %", "50.0 %")
    assert maybe_percent(None) == "–" and maybe_percent(0.0) == "0.0 %"
    assert [short_percent(share) for share in (0.05, 0.125, 1.0)] == ["5 %", "12.5 %", "100 %"]
