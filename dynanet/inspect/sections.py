"""The parts of the report that any model has, in the order of a reader's questions."""

from collections.abc import Sequence

import numpy as np

from dynanet.inspect.charts import Axis, Series, quantity, scatter, spectrum
from dynanet.inspect.colours import css, ink, ramp
from dynanet.inspect.findings import Findings, Operation
from dynanet.inspect.markup import Markup, join, tag
from dynanet.inspect.pictures import data_uri, stride
from dynanet.inspect.samples import Sample

LEVELS = 101  # of the ramp, one per percent of the full MACs
THUMBNAIL = 96  # pixels on the longer side
AROUND = 12  # pixels of the scene on each side of a sample's pixel


def answer(f: Findings) -> Markup:
    """The title, the answer in sentences, and every budget in a table."""
    return join([
        tag("h1", f.title),
        tag("p.soft", " · ".join(each for each in (f.origin.data, f.origin.model, f.origin.date) if each)),
        *_sentences(f),
        tag("h2", "At each budget"),
        _budgets(f),
    ])  # fmt: skip


def cost_section(f: Findings) -> Markup:
    """Accuracy against MACs, and against milliseconds where they are known."""
    unit = quantity(f.full.macs).partition(" ")[2]
    scale = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    macs = _chart(
        f, [None if p is None else p / scale for p in _macs(f)], f"MACs per sample, mean{unit and ', ' + unit}"
    )
    note = "The vertical axis does not begin at zero."
    figures = [tag("figure", tag("h3", "Accuracy against MACs"), macs, tag("figcaption", note))]
    if _full_ms(f) is None:
        figures.append(tag("p.soft", "Time was not measured here, so there is no curve against milliseconds."))
    else:
        ms = _chart(f, _ms(f), "milliseconds per sample, mean")
        caption = f"{note} {_how_timed(f)}"
        figures.append(tag("figure", tag("h3", "Accuracy against time"), ms, tag("figcaption", caption)))
    said = (
        "Up and to the left is better. The blue line must lie above the dashed one: it says what the same shares of "
        "samples would reach at the same exits if lots were drawn instead of looking at the sample."
        if f.line
        else "Up and to the left is better."
    )
    return join([tag("h2", "What accuracy costs"), tag("p", said), tag("div.pair", *figures)])


def exits_section(f: Findings) -> Markup:
    """What happens at every exit, at the explained budget."""
    rows = []
    for k, each in enumerate(f.exits):
        said = [f"{k + 1}", quantity(each.macs), _percent(each.macs / f.full.macs), _percent(each.share)]
        rows.append([*said, _maybe(each.right), _maybe(each.full), _percent(each.alone)])
    early = [each for each in f.exits[:-1] if each.right is not None and each.full is not None]
    share = sum(each.share for each in early)
    said = "Nobody leaves early at this budget."
    if share:
        right = sum(each.share * (each.right or 0) for each in early) / share
        full = sum(each.share * (each.full or 0) for each in early) / share
        said = (
            f"{_percent(share)} of the samples leave before the last exit. Of these {_percent(right)} are answered "
            f"right; the full model answers {_percent(full)} of the same samples right."
        )
    titles = [
        "exit",
        "MACs",
        "share of full",
        "leave here",
        "of these right",
        "the full model on these",
        "all samples here",
    ]
    return join([
        tag("h2", "Where samples leave"),
        tag("p", "At the budget ", tag("b", f.operations[f.explained].name), ". ", said),
        _table(titles, rows, "Accuracies on the test samples. A falling third column from the right is as it should be:"
               " what leaves late is hard."),
    ])  # fmt: skip


def classes_section(f: Findings) -> Markup:
    """Which classes are dear, and what leaving early does to each."""
    entries = [
        tag("li", tag("span.swatch", at={"style": f"background:{_exit_colour(f, k)[0]}"}), f"exit {k + 1}: "
            f"{_percent(each.macs / f.full.macs)}")
        for k, each in enumerate(f.exits)
    ]  # fmt: skip
    rows = []
    for each in f.classes:
        lost = each.right - each.full
        rows.append([
            tag("td.name", each.name, tag("small", f"{each.samples:,} samples")),
            _percent(each.spent),
            join([_percent(each.right), tag("small", f"{_points(lost)} points")]),
            tag("td.wide", _bar(f, each.share)),
        ])  # fmt: skip
    absent = f" Without a test sample: {', '.join(f.absent)}." if f.absent else ""
    return join([
        tag("h3", "By class, the dearest first"),
        tag("ul.legend", *entries),
        _table(
            ["class", "mean MACs, of full", "right, against full", "share that leaves at each exit, %"], rows,
            "At the same budget. Classes with few samples swing by several points from one sample to the next." + absent,
        ),
    ])  # fmt: skip


def samples_section(f: Findings) -> Markup:
    """The easiest and the hardest samples, and the surest mistakes."""
    groups = (
        ("The easiest", "They leave first, and the model is surest of them.", f.easy),
        ("The hardest", "They go on to the end, and the model is least sure of them.", f.hard),
        (
            "The surest mistakes",
            "Wrong answers that left early and looked sure: no threshold catches these.",
            f.mistakes,
        ),
    )
    parts = [tag("h2", "Easy and hard samples")]
    said = "At most two of a class are shown."
    if f.shown is not None and f.shown.spectra is not None:
        unit = f" ({f.shown.unit})" if f.shown.unit else ""
        said += (
            f" Blue: the sample's spectrum{unit}; grey: the mean spectrum of its true class among the test samples. All "
            "have one vertical scale."
        )
    if _crops(f):
        side = 2 * AROUND + 1
        said += f" Each picture shows {side} × {side} pixels of the scene; the square is the sample."
    parts.append(tag("p.soft", said))
    for title, what, samples in groups:
        if samples:
            cards = [_card(f, sample) for sample in samples]
            parts += [tag("h3", title), tag("p.soft", what), tag("div.cards", *cards)]
    return join(parts)


def promise_section(f: Findings) -> Markup | None:
    """The risks that were asked for: promised or not, and what was observed."""
    if not f.promises:
        return None
    parts = [tag("h2", "What is promised")]
    for each in f.promises:
        operation = each.operation
        if each.kept:
            said = tag("span.good", "Promised.")
        else:
            said = tag("span.bad", "Not promised.")
        thresholds = ", ".join(
            f"exit {k + 1}: {'nobody leaves' if t == np.inf else 'everybody leaves' if t == -np.inf else f'score ≥ {t:.4g}'}"
            for k, t in enumerate(operation.choice.thresholds)
        )
        facts = {
            "asked": f"leaving early turns a right answer into a wrong one for at most {_percent(each.risk)} of samples, "
            f"with confidence {_percent(each.confidence)}",
            "answer": join([said, f" {operation.choice.note}" if operation.choice.note else ""]),
            "thresholds": thresholds,
            "held out": "not given"
            if each.tested is None
            else f"{each.tested:,} samples tested the thresholds; "
            f"{(f.origin.held_out_samples or 0) - each.tested:,} others proposed them",
            "spends": f"{_percent(operation.outcome.macs / f.full.macs)} of the full MACs on the test samples",
            "seen on test": f"{_percent(operation.lost)} of {f.samples:,} test samples lost their right answer",
        }
        parts += [tag("h3", operation.name), _facts(facts)]
    parts.append(tag("p.soft", (
        "The promise speaks of the draw of the held-out samples: in at least the stated share of draws the mean loss over "
        "samples of the same kind stays within the risk. It says nothing about samples of another kind, nor about a "
        "single one. Where held-out samples depend on each other, as neighbouring pixels do, it is weaker than it looks."
    )))  # fmt: skip
    return join(parts)


def reading_section(f: Findings) -> Markup:
    """How to read the report, and what its numbers are not."""
    how = [
        "A MAC is one multiply-accumulate of a convolution, linear layer, matrix product or attention. “Full” is the same "
        "model with every sample at the last exit.",
        "“By lot” sends as many samples to every exit, but draws them. What is above that line is what looking at the "
        "sample is worth.",
        "A point is one hundredth: from 80 % to 79 % is one point. Intervals are 95 % intervals that treat test samples "
        "as independent.",
        "Dark blue is little compute and yellow is much, in all bars and maps of compute.",
    ]
    what_not = [
        f"The thresholds were fitted on {f.origin.held_out or 'held-out samples'}, the accuracies are measured on "
        f"{f.origin.test}. They hold for samples of that kind. Confidence on other data can be worth less, and then both "
        "accuracy and cost differ.",
        "MACs are not time. Gathering, the gates and small batches cost time and no MACs; believe the milliseconds, "
        "where they were measured, and only for that device, batch size and number of threads.",
        "Few budgets and one training run are shown; another seed moves every figure.",
    ]
    if f.scene is not None:
        what_not += [
            "Answers on unlabelled pixels cannot be checked. They are drawn faint and hatched and count in no accuracy; "
            "their compute counts in the map.",
            "Training and test pixels can be neighbours across the cut between them, and pixels of one field resemble "
            "each other. Accuracy on a place that the model never saw near its training pixels is lower, and the intervals "
            "are too narrow.",
            "Edges of fields are dear partly because the patch round such a pixel shows more than one cover.",
        ]
    return join([
        tag("h2", "How to read this"), tag("ul", *(tag("li", each) for each in how)),
        tag("h2", "What these numbers are not"), tag("ul", *(tag("li", each) for each in what_not)),
    ])  # fmt: skip


def origin_section(f: Findings) -> Markup:
    """Where every figure comes from."""
    o = f.origin
    held_out = f"{o.held_out or 'not given'}" + (f" ({o.held_out_samples:,} samples)" if o.held_out_samples else "")
    facts = {
        "data": o.data,
        "measured on": f"{o.test} ({f.samples:,} samples, {len(f.class_names)} classes)",
        "thresholds from": held_out,
        "model": o.model,
        "speed": _how_timed(f) or "not measured",
        "device": o.device,
        "versions": ", ".join(f"{name} {version}" for name, version in o.versions.items()),
        "commit": o.commit,
        "date": o.date,
    } | dict(o.more)
    return join([tag("h2", "Where these figures come from"), _facts(facts)])


def _sentences(f: Findings) -> list[Markup]:
    each = f.operations[f.explained]
    done = each.outcome
    low, high = each.change - each.change_margin, each.change + each.change_margin
    first = tag("p.answer", (
        f"At the budget “{each.name}” a sample takes {_percent(done.macs / f.full.macs)} of the full model's compute "
        f"({quantity(done.macs)} of {quantity(f.full.macs)} MACs on average), and {_percent(done.accuracy)} of "
        f"{f.samples:,} test samples are answered right: {_compared(each.change)} the full model "
        f"(95 % interval {_points(low)} to {_points(high)})."
    ))  # fmt: skip
    second = (
        f"If as many samples left at every exit, but drawn by lot, {_percent(each.random)} would be right: looking at the "
        f"sample is worth {_points(done.accuracy - each.random)} points. "
    )
    ms, full = _operation_ms(each), _full_ms(f)
    if ms is not None and full is not None:
        second += f"It takes {ms:.3g} ms per sample, {full / ms:.2f} times as fast as the full model. {_how_timed(f)}"
    else:
        second += "Its speed was not measured."
    return [first, tag("p", second)]


def _budgets(f: Findings) -> Markup:
    full_ms = _full_ms(f)
    titles = ["budget", "MACs per sample", "ms per sample", f"right, of {f.samples:,}", "against full, points"]
    titles += ["by lot"] + ["mean of classes", "kappa"] * f.unbalanced
    beyond = [_percent(f.full_class_mean), f"{f.full_kappa:.3f}"] if f.unbalanced else []
    rows = [[
        join(["full model", tag("small", "all at the last exit")]), quantity(f.full.macs), _time(full_ms, None),
        join([_percent(f.full.accuracy), _interval(f.full_low, f.full_high)]), "", "", *beyond,
    ]]  # fmt: skip
    for each in f.operations:
        asked = each.choice.asked.macs
        share = f"{_percent(each.outcome.macs / f.full.macs)} of full"
        if asked is not None:
            share += f", {each.outcome.macs / asked:.2f} × asked"
        beyond = [_percent(each.class_mean), f"{each.kappa:.3f}"] if f.unbalanced else []
        promised = {None: "", True: "promised", False: "not promised"}[each.choice.promised]
        rows.append([
            join([each.name, tag("small", promised) if promised else None]),
            join([quantity(each.outcome.macs), tag("small", share)]),
            _time(_operation_ms(each), full_ms),
            join([_percent(each.outcome.accuracy), _interval(each.low, each.high)]),
            join([_points(each.change), tag("small", f"± {100 * each.change_margin:.1f}")]),
            _percent(each.random), *beyond,
        ])  # fmt: skip
    for point in f.static:
        rows.append([
            join([point.name, tag("small", "static, to compare")]),
            join([quantity(point.macs), tag("small", f"{_percent(point.macs / f.full.macs)} of full")]),
            _time(point.ms, full_ms), _percent(point.accuracy), _points(point.accuracy - f.full.accuracy), "",
            *[""] * (2 * f.unbalanced),
        ])  # fmt: skip
    said = (
        f"Measured on {f.origin.test}; thresholds from {f.origin.held_out or 'held-out samples'}. The marked budget is "
    )
    notes = [tag("p.soft", f"{each.name}: {each.choice.note}.") for each in f.operations if each.choice.note]
    return join([_table(titles, rows, said + "explained below.", marked=1 + f.explained), *notes])


def _chart(f: Findings, xs: list[float | None], title: str) -> Markup:
    """Accuracy against the cost of everything there is, in the order of `_costs`."""
    everything = iter(xs)
    lists: list[tuple[str, str, Sequence, list[str], str, bool]] = [
        ("exits drawn by lot", "random", [p.accuracy for p in f.random], [], "", True),
        ("by its own confidence", "frontier", [p.accuracy for p in f.line], [], "", True),
        ("all samples at one exit", "alone", [p.accuracy for p in f.alone],
         [f"exit {k + 1}" for k in range(len(f.alone) - 1)] + [""], "diamond", False),
        ("static networks", "static", [p.accuracy for p in f.static], [p.name for p in f.static], "square", False),
        ("full model", "full", [f.full.accuracy], ["full"], "square", False),
        ("budgets", "budget", [p.outcome.accuracy for p in f.operations if p.choice.asked.risk is None],
         [p.name for p in f.operations if p.choice.asked.risk is None], "circle", False),
        ("risk levels", "promised", [p.outcome.accuracy for p in f.operations if p.choice.asked.risk is not None],
         [p.name for p in f.operations if p.choice.asked.risk is not None], "triangle", False),
    ]  # fmt: skip
    series = []
    for name, look, accuracy, labels, mark, line in lists:
        points = [(next(everything), 100 * a) for a in accuracy]
        known = [i for i, (x, _) in enumerate(points) if x is not None]
        shown = [labels[i] for i in known] if labels else []
        series.append(Series(name, look, [points[i] for i in known], mark, line, shown))
    costs = [x for each in series for x, _ in each.points]
    log = min(costs) > 0 and max(costs) > 20 * min(costs)
    described = f"Accuracy against {title}. The figures are in the tables above and below."
    return scatter(
        Axis(title + (", logarithmic" if log else ""), log, zero=not log), Axis("right, %"), series, described
    )


def _macs(f: Findings) -> list[float]:
    """In the order of `_chart`."""
    plain = [p.outcome.macs for p in f.operations if p.choice.asked.risk is None]
    risky = [p.outcome.macs for p in f.operations if p.choice.asked.risk is not None]
    lines = [p.macs for p in (*f.random, *f.line, *f.alone)]
    return lines + [p.macs for p in f.static] + [f.full.macs] + plain + risky


def _ms(f: Findings) -> list[float | None]:
    """In the order of `_chart`."""
    plain = [_operation_ms(p) for p in f.operations if p.choice.asked.risk is None]
    risky = [_operation_ms(p) for p in f.operations if p.choice.asked.risk is not None]
    lines = [p.ms for p in (*f.random, *f.line, *f.alone)]
    return lines + [p.ms for p in f.static] + [_full_ms(f)] + plain + risky


def _operation_ms(each: Operation) -> float | None:
    return each.outcome.ms if each.ms is None else each.ms


def _full_ms(f: Findings) -> float | None:
    return f.full.ms if f.timing is None else f.timing.full


def _how_timed(f: Findings) -> str:
    if f.timing is not None:
        lines = " Lines follow from the measured time of every exit." if f.full.ms is not None and f.line else ""
        return f"Measured: {f.timing.how}.{lines}"
    return "" if f.full.ms is None else "Times follow from the measured time of every exit, not from whole runs."


def _card(f: Findings, sample: Sample) -> Markup:
    shown, names = f.shown, f.class_names
    right = sample.label == sample.answer
    parts: list[Markup | None] = []
    where = ""
    if shown is not None:
        if shown.pictures is not None:
            parts.append(_picture(shown.pictures[sample.row], f"sample of class {names[sample.label]}"))
        if shown.positions is not None:
            row, column = shown.positions[sample.row].tolist()
            where = f"row {row}, column {column}"
            if _crops(f):
                parts.append(_crop(f, row, column))
        if shown.spectra is not None:
            parts.append(_spectrum(f, sample))
        if shown.names is not None:
            where = ", ".join(each for each in (shown.names[sample.row], where) if each)
    where = where or f"test sample {sample.row}"
    said = (
        tag("p", tag("b", names[sample.label]), ": answered ", tag("span.good", "right"))
        if right
        else tag(
            "p",
            tag("b", names[sample.label]),
            ": ",
            tag("span.bad", "wrong"),
            ", answered ",
            tag("b", names[sample.answer]),
        )
    )
    cost = f"exit {sample.exit + 1}, {_percent(sample.spent)} of the MACs"
    return tag("figure.card", *parts, said, tag("p.soft", cost), tag("p.soft", where))


def _crops(f: Findings) -> bool:
    shown = f.shown
    return f.scene is not None and shown is not None and shown.positions is not None and shown.pictures is None


def _picture(pixels: np.ndarray, said: str) -> Markup:
    step = stride(*pixels.shape[:2], THUMBNAIL)
    return tag("img.pixels", at={"src": data_uri(np.ascontiguousarray(pixels[::step, ::step])), "alt": said})


def _crop(f: Findings, row: int, column: int) -> Markup:
    assert f.scene is not None, "callers check"
    side = 2 * AROUND + 1
    colour = np.pad(f.scene.colour, ((AROUND, AROUND), (AROUND, AROUND), (0, 0)))[
        row : row + side, column : column + side
    ]
    box = {"x": AROUND, "y": AROUND, "width": 1, "height": 1, "fill": "none"}
    outer = tag("rect", at=box | {"stroke": "#000000", "stroke-width": 0.9})
    inner = tag("rect", at=box | {"stroke": "#ffffff", "stroke-width": 0.45})
    overlay = tag("svg", outer, inner, at={"viewBox": f"0 0 {side} {side}", "aria-hidden": "true"})
    picture = tag("img.pixels", at={"src": data_uri(np.ascontiguousarray(colour)), "alt": "the scene round the sample"})
    return tag("div.map", picture, overlay)


def _spectrum(f: Findings, sample: Sample) -> Markup:
    shown = f.shown
    assert shown is not None and shown.spectra is not None and shown.wavelengths_nm is not None, "callers check"
    assert f.usual_spectra is not None, "there are spectra"
    order = np.argsort(shown.wavelengths_nm, kind="stable")
    rows = [each.row for each in (*f.easy, *f.hard, *f.mistakes)]
    labels = [each.label for each in (*f.easy, *f.hard, *f.mistakes)]
    drawn = np.concatenate([shown.spectra[rows], f.usual_spectra[labels]])
    low, high = float(drawn.min()), float(drawn.max())
    nm, values = np.asarray(shown.wavelengths_nm)[order], shown.spectra[sample.row][order]
    usual = f.usual_spectra[sample.label][order]
    return spectrum(nm, values, usual, low, high if high > low else low + 1, "its spectrum")


def _bar(f: Findings, share: np.ndarray) -> Markup:
    parts = []
    for k, part in enumerate(share.tolist()):
        if part > 0:
            colour, text = _exit_colour(f, k)
            style = f"flex:{part:.4f} 1 0;background:{colour};color:{text}"
            said = f"{100 * part:.0f}" if part >= 0.08 else ""
            parts.append(tag("span", said, at={"style": style, "title": f"exit {k + 1}: {_percent(part)}"}))
    return tag("div.bar", *parts)


def _exit_colour(f: Findings, k: int) -> tuple[str, str]:
    """Its place on the ramp of compute, and the colour of text on it."""
    colour = ramp(LEVELS)[min(round((LEVELS - 1) * f.exits[k].macs / max(f.full.macs, 1e-30)), LEVELS - 1)]
    return css(colour), ink(colour)


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]], caption: str, marked: int | None = None) -> Markup:
    head = tag("tr", *(tag("th", title, at={"scope": "col"}) for title in titles))
    body = []
    for i, row in enumerate(rows):
        cells = [cell if isinstance(cell, Markup) and cell.startswith("<td") else tag("td", cell) for cell in row]
        body.append(tag("tr.explained" if i == marked else "tr", *cells))
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div.scroll", table)


def _facts(facts: dict[str, object]) -> Markup:
    return tag(
        "dl.facts",
        *(each for name, value in facts.items() for each in (tag("dt", name), tag("dd", value or "not given"))),
    )


def _time(ms: float | None, full: float | None) -> object:
    if ms is None:
        return "not measured"
    faster = [tag("small", f"{full / ms:.2f} × as fast")] if full is not None and ms > 0 else []
    return join([f"{ms:.3g}", *faster])


def _interval(low: float, high: float) -> Markup:
    return tag("small", f"{100 * low:.1f} to {100 * high:.1f}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _maybe(share: float | None) -> str:
    return "–" if share is None else _percent(share)


def _points(difference: float) -> str:
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _compared(change: float) -> str:
    text = f"{abs(100 * change):.1f}"
    return "as many as by" if text == "0.0" else f"{text} points {'more' if change > 0 else 'less'} than by"
