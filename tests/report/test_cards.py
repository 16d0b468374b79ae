import numpy as np

from dynanet.report import Samples, page
from dynanet.report.cards import samples_section
from tests.report.pages import NAMES, Reader, whole


def test_pictures_of_samples_are_shown(draw, operating_points):
    pictures = np.random.default_rng(0).integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    names = [f"images/{i:04d}.png" for i in range(400)]
    f = whole(draw, operating_points, scene=None, shown=Samples(pictures=pictures, names=names))
    read = Reader(page(f))
    cards = len(f.easy) + len(f.hard) + len(f.mistakes)
    assert sum(tag == "img" for tag, _ in read.elements) == cards
    assert f"images/{f.hard[0].row:04d}.png" in read.said


def test_every_card_says_what_the_sample_is_and_where_it_lies(draw, operating_points):
    f = whole(draw, operating_points)
    made = samples_section(f)
    cards = made.split('<figure class="card">')[1:]
    samples = (*f.easy, *f.hard, *f.mistakes)
    for card, sample in zip(cards, samples, strict=True):
        row, column = f.shown.positions[sample.row]
        assert f"<b>{NAMES[sample.label]}</b>" in card and f"row {row}, column {column}" in card
        assert f"exit {sample.exit + 1}, {100 * sample.spent:.0f} % of full MACs" in card
        assert ("wrong" in card) == (sample.answer != sample.label)
        differs = sample.exit < len(f.exits) - 1 and sample.full != sample.answer
        assert (f"full model: “{NAMES[sample.full]}”" in card) == differs
        assert "data:image/png;base64," in card and 'class="spectrum"' in card


def test_samples_of_which_nothing_is_known_are_numbered(draw, operating_points):
    f = whole(draw, operating_points, shown=None)
    made = samples_section(f)
    assert all(f"test sample {sample.row}<" in made for sample in (*f.easy, *f.hard, *f.mistakes))
    assert "<img" not in made and "<svg" not in made
