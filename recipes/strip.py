"""Draw docs/strip.png: a scene, the compute spent on every pixel, and accuracy against MACs.

    dynanet demo --out runs/demo
    python recipes/strip.py runs/demo

The first two pictures are those of the demo's report (Indian Pines, the split of seed 0, a budget of 50 % of the MACs). The
chart shows medians over the splits of `results/indian_pines.csv` and `results/indian_pines_static.csv`.
"""

import argparse
import base64
import io
import re
from pathlib import Path

import numpy as np
from rows import ROOT, rows

SIZE = (1800, 500)
SIDE = 392  # of the two pictures
TOP = 58
CHART = (1040, TOP, 1770, TOP + SIDE - 40)  # left, top, right, bottom of the axes
INK, GREY, LIGHT = (26, 30, 34), (96, 103, 112), (222, 226, 230)
COLOURS = {"early exit": (0, 137, 107), "random exits": (196, 120, 20), "static network": (96, 103, 112)}


def points():
    """Name: (share of the MACs, test accuracy) of every budget, medians over the splits."""
    found, static = rows("indian_pines.csv"), rows("indian_pines_static.csv")

    def median(where, column):
        return float(np.median([float(row[column]) for row in where]))

    macs = [median(found, f"macs_{share}") for share in (25, 50)]
    shares = sorted({row["share"] for row in static}, key=int)
    return {
        "early exit": [
            *zip(macs, (median(found, f"at_{share}") for share in (25, 50)), strict=True),
            (1.0, median(found, "full")),
        ],
        "random exits": list(zip(macs, (median(found, f"random_{share}") for share in (25, 50)), strict=True)),
        "static network": [
            (median(mine, "macs_share"), median(mine, "accuracy"))
            for mine in ([row for row in static if row["share"] == share] for share in shares)
        ],
    }


def pictures(report):
    """The scene and its map of compute, as they are embedded in a report."""
    from PIL import Image

    found = re.findall(r'<img class="pixels" src="data:image/png;base64,([^"]+)"', report.read_text())
    if len(found) < 2:
        raise SystemExit(f"{report} shows no scene; make it with `dynanet demo --out {report.parent}`")
    return [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in found[:2]]


def draw(report):
    """The strip, a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(24)
    titles = ("Hyperspectral scene", "Compute spent per pixel")
    for k, (title, picture) in enumerate(zip(titles, pictures(report), strict=True)):
        left = 20 + k * (SIDE + 60)
        pen.text((left, TOP - 14), title, INK, font, anchor="ls")
        strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, TOP))
    pen.text((20 + SIDE + 60, TOP + SIDE + 8), "dark: first exit    bright: whole network", GREY, font)
    pen.text((20, TOP + SIDE + 8), "Indian Pines, 145 x 145 pixels", GREY, font)
    _chart(pen, font)
    return strip


def _chart(pen, font):
    left, top, right, bottom = CHART
    shown = points()
    accuracies = [accuracy for line in shown.values() for _, accuracy in line]
    low, high = np.floor(50 * min(accuracies)) / 50, np.ceil(50 * max(accuracies)) / 50

    def at(macs, accuracy):
        return left + macs / 1.05 * (right - left), bottom - (accuracy - low) / (high - low) * (bottom - top)

    pen.text((left - 66, TOP - 14), "Test accuracy against MACs, medians of 5 splits", INK, font, anchor="ls")
    for accuracy in np.arange(low, high + 0.001, 0.02):
        y = at(0, accuracy)[1]
        pen.line([(left, y), (right, y)], LIGHT, 2)
        pen.text((left - 10, y), f"{100 * accuracy:.0f} %", GREY, font, anchor="rm")
    for macs in (0, 0.25, 0.5, 0.75, 1.0):
        pen.text((at(macs, low)[0], bottom + 12), f"{100 * macs:.0f} %", GREY, font, anchor="mt")
    for name, line in shown.items():
        places = [at(*point) for point in line]
        pen.line(places, COLOURS[name], 4)
        for x, y in places:
            pen.ellipse([x - 8, y - 8, x + 8, y + 8], COLOURS[name])
        x, y = places[-1]
        if name == "random exits":
            pen.text((x + 18, y), name, COLOURS[name], font, anchor="lm")
        else:
            pen.text((x, y + 40), name, COLOURS[name], font, anchor="rs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with report.html, as `dynanet demo` leaves it")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "strip.png")
    args = parser.parse_args()
    draw(args.run / "report.html").save(args.out, optimize=True)


if __name__ == "__main__":
    main()
