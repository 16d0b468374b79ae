"""Cards of the easiest samples, the hardest samples and the most confident mistakes."""

import numpy as np

from dynanet.report.charts import spectrum
from dynanet.report.findings import Findings
from dynanet.report.markup import Markup, join, tag
from dynanet.report.pictures import data_uri, stride
from dynanet.report.samples import PER_CLASS, Sample
from dynanet.report.words import percent

THUMBNAIL = 96  # pixels on the longer side
AROUND = 12  # pixels of the scene on each side of a sample's pixel


def samples_section(f: Findings) -> Markup:
    """Three rows of cards, at the explained operating point."""
    groups = (
        ("Easiest", "Earliest exit, highest confidence.", f.easy),
        ("Hardest", "Last exit, lowest confidence.", f.hard),
        ("Most confident mistakes", "Wrong answers, earliest exit and highest confidence first.", f.mistakes),
    )
    said = f"At the operating point “{f.evaluation.name}”; at most {PER_CLASS} of a class."
    if f.shown is not None and f.shown.spectra is not None:
        unit = f" in {f.shown.unit}" if f.shown.unit else ""
        said += (
            f" Blue is the sample's spectrum{unit}, grey the mean test spectrum of its true class, all on one vertical "
            "scale."
        )
    if _has_crops(f):
        side = 2 * AROUND + 1
        said += f" Each picture shows {side} × {side} pixels of the scene; the square marks the sample."
    parts = [tag("h2", "Easy and hard samples"), tag("p.soft", said)]
    for title, what, samples in groups:
        if samples:
            parts += [
                tag("h3", title),
                tag("p.soft", what),
                tag("div.cards", *(_card(f, sample) for sample in samples)),
            ]
    return join(parts)


def _card(f: Findings, sample: Sample) -> Markup:
    shown = f.shown
    names = f.class_names
    parts: list[Markup] = []
    known = []
    if shown is not None and shown.pictures is not None:
        parts.append(_picture(shown.pictures[sample.row], f"sample of class {names[sample.label]}"))
    elif _has_crops(f):
        parts.append(_crop(f, sample))
    if shown is not None and shown.spectra is not None:
        parts.append(_spectrum(f, sample))
    if shown is not None and shown.names is not None:
        known.append(shown.names[sample.row])
    if shown is not None and shown.positions is not None:
        row, column = shown.positions[sample.row].tolist()
        known.append(f"row {row}, column {column}")
    if sample.answer == sample.label:
        verdict = tag("p", tag("b", names[sample.label]), ", ", tag("span.good", "correct"))
    else:
        verdict = tag("p", tag("b", names[sample.label]), ", ", tag("span.bad", "wrong"), f": “{names[sample.answer]}”")
    return tag(
        "figure.card",
        *parts,
        verdict,
        tag("p.soft", f"exit {sample.exit + 1}, {percent(sample.spent, 0)} of full MACs"),
        _of_the_full_model(f, sample),
        tag("p.soft", "; ".join(known) or f"test sample {sample.row}"),
    )


def _of_the_full_model(f: Findings, sample: Sample) -> Markup | None:
    """The answer of the full model, where it differs or both are wrong."""
    if sample.exit == len(f.exits) - 1:
        return None
    if sample.full == sample.answer:
        return None if sample.answer == sample.label else tag("p.soft", "same answer of the full model")
    return tag("p.soft", f"full model: “{f.class_names[sample.full]}”")


def _has_crops(f: Findings) -> bool:
    shown = f.shown
    return f.scene is not None and shown is not None and shown.positions is not None and shown.pictures is None


def _picture(pixels: np.ndarray, said: str) -> Markup:
    step = stride(pixels.shape[0], pixels.shape[1], THUMBNAIL)
    return tag("img.pixels", at={"src": data_uri(pixels[::step, ::step]), "alt": said})


def _crop(f: Findings, sample: Sample) -> Markup:
    assert f.scene is not None and f.shown is not None and f.shown.positions is not None, "callers check"
    row, column = f.shown.positions[sample.row].tolist()
    side = 2 * AROUND + 1
    opaque = np.full((*f.scene.truth.shape, 1), 255, np.uint8)
    scene = np.concatenate([f.scene.colour, opaque], -1)  # beyond the edge it is transparent
    crop = np.pad(scene, ((AROUND, AROUND), (AROUND, AROUND), (0, 0)))[row : row + side, column : column + side]
    box = {"x": AROUND, "y": AROUND, "width": 1, "height": 1, "fill": "none"}
    overlay = tag(
        "svg",
        tag("rect", at=box | {"stroke": "#000000", "stroke-width": 0.9}),
        tag("rect", at=box | {"stroke": "#ffffff", "stroke-width": 0.45}),
        at={"viewBox": f"0 0 {side} {side}", "aria-hidden": "true"},
    )
    return tag("div.map", tag("img.pixels", at={"src": data_uri(crop), "alt": "the scene around the sample"}), overlay)


def _spectrum(f: Findings, sample: Sample) -> Markup:
    shown = f.shown
    assert shown is not None and shown.spectra is not None and f.class_spectra is not None, "callers check"
    cards = (*f.easy, *f.hard, *f.mistakes)
    drawn = np.concatenate([shown.spectra[[c.row for c in cards]], f.class_spectra[[c.label for c in cards]]])
    low = float(drawn.min())
    high = float(drawn.max())
    nm = np.asarray(shown.wavelengths_nm, dtype=float)
    order = np.argsort(nm, kind="stable")
    curves = (shown.spectra[sample.row][order], f.class_spectra[sample.label][order])
    return spectrum(
        nm[order], *curves, low, high if high > low else low + 1, "spectrum of the sample over its class's mean"
    )
