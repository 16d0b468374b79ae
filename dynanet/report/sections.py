"""The sections of the report that are text and tables."""

import numpy as np

from dynanet.report.blocks import compute_colour, facts, parts_bar, swatch, table
from dynanet.report.evaluation import Evaluation
from dynanet.report.findings import Findings, Point, Promise
from dynanet.report.markup import Markup, join, tag
from dynanet.report.words import maybe_percent, percent, points, quantity, short_percent


def answer_section(f: Findings) -> Markup:
    """The title, the result in sentences, and a table of all operating points."""
    each = f.evaluation
    done = each.outcome
    change = points(each.change)
    low, high = (points(each.change + sign * each.change_margin) for sign in (-1, 1))
    compared = "the same as" if change == "0.0" else f"{change} points against"
    result = (
        f"At the operating point “{each.name}” the model computes {percent(done.macs / f.full.macs)} of its full MACs "
        f"({quantity(done.macs)} of {quantity(f.full.macs)} per sample on average). Its accuracy on {f.samples:,} test "
        f"samples is {percent(done.accuracy)}, {compared} the full model (95 % interval of the difference: {low} to "
        f"{high} points)."
    )
    speed = "Time was not measured."
    if each.ms is not None and f.full_ms is not None and each.ms > 0:
        speed = (
            f"A sample takes {each.ms:.3g} ms, {f.full_ms / each.ms:.2f} times as fast as the full model. {f.how_timed}"
        )
    baseline = (
        f"Random exits at the same rates reach an accuracy of {percent(each.random)}; gain over random exits: "
        f"{points(done.accuracy - each.random)} points."
    )
    o = f.origin
    data = "" if o.data == f.title else o.data
    source = [data, o.network, o.device, o.commit and f"commit {o.commit}", o.date]
    return join([
        tag("h1", f.title),
        tag("p.soft", " · ".join(each for each in source if each)),
        tag("p.answer", result),
        tag("p", speed),
        tag("p", baseline),
        tag("h2", "Operating points"),
        _operating_points(f),
    ])  # fmt: skip


def exits_section(f: Findings) -> Markup:
    """Cost, exit rate and accuracies of every exit, at the explained operating point."""
    rows = []
    for k, each in enumerate(f.exits):
        cost = join([percent(each.macs / f.full.macs), tag("small", f"{quantity(each.macs)} MACs")])
        shares = [percent(each.share), maybe_percent(each.right), maybe_percent(each.full), percent(each.alone)]
        rows.append([f"exit {k + 1}", cost, *shares])
    early = f.exits[:-1]
    share = sum(each.share for each in early)
    said = "No sample leaves before the last exit."
    if share:
        right = sum(each.share * (each.right or 0) for each in early) / share
        full = sum(each.share * (each.full or 0) for each in early) / share
        said = (
            f"{percent(share)} of the samples leave before the last exit, with an accuracy of {percent(right)}; the "
            f"full model reaches {percent(full)} on the same samples."
        )
    titles = ["", "MACs, of full", "exit rate", "accuracy of these", "full model on these", "accuracy, single exit"]
    return join([
        tag("h2", "Exits"),
        tag("p", "At the operating point “", f.evaluation.name, "”: ", said),
        table(titles, rows, "Accuracies on the test samples. Harder samples reach the later exits, so a lower accuracy "
              "of these is expected there. Single exit: if all samples left there."),
    ])  # fmt: skip


def classes_section(f: Findings) -> Markup:
    """Cost, accuracy and exit rates of every class, at the explained operating point."""
    costs = [each.macs / f.full.macs for each in f.exits]
    names = [f"exit {k + 1}" for k in range(len(f.exits))]
    key = [swatch(compute_colour(c)[0], f"{name}: {percent(c)}") for name, c in zip(names, costs, strict=True)]
    rows = [
        [
            tag("td.name", each.name, tag("small", f"{each.samples:,} samples")),
            percent(each.spent),
            join([percent(each.right), tag("small", f"{points(each.right - each.full)} points")]),
            tag("td.wide", parts_bar(each.share.tolist(), costs, names)),
        ]
        for each in f.classes
    ]
    said = "At the same operating point, on the test samples. The accuracy of a small class has a wide interval."
    if f.absent:
        said += f" Without a test sample: {', '.join(f.absent)}."
    titles = ["class", "mean MACs, of full", "accuracy, against full", "exit rates, %"]
    return join([tag("h3", "Classes, most expensive first"), tag("ul.legend", *key), table(titles, rows, said)])


def promise_section(f: Findings) -> Markup | None:
    """The requested risks, whether they are promised, and the observed losses."""
    if not f.promises:
        return None
    return join([
        tag("h2", "Promised risks"),
        *(_promise(f, each) for each in f.promises),
        tag("p.soft",
            "A promise is about the draw of the held-out samples: in at least the stated share of draws the mean loss "
            "over samples of the same distribution stays within the risk. It does not cover other distributions or "
            "single samples, and is weaker than stated where held-out samples depend on each other, as neighbouring "
            "pixels do."),
    ])  # fmt: skip


def reading_section(f: Findings) -> Markup:
    """How to read the report, and the limits of its figures."""
    how = [
        "A MAC is one multiply-accumulate of a convolution, linear layer, matrix product or attention. “Full” is the "
        "same model with every sample at the last exit.",
        "Random exits is a baseline: the same share of samples leaves at every exit, chosen at random. The gain over "
        "it is what the confidence of the exits contributes.",
        "A point is one percentage point. Intervals are 95 % intervals for independent test samples.",
        "In bars and maps of compute, dark blue is little compute and yellow is the full model's.",
    ]
    limits = [
        f"Thresholds were fitted on {f.origin.held_out or 'held-out samples'}, accuracies measured on {f.origin.test}. "
        "On data of another distribution the model can be overconfident, and cost and accuracy differ.",
        "MACs are not time. Gathering rows, gates and small batches take time without MACs. Measured milliseconds hold "
        "for their device, batch size and number of threads.",
        "The figures are of one trained model and vary with the seed of training.",
    ]
    if f.scene is not None:
        limits += [
            "Answers on unlabelled pixels cannot be checked. They are drawn faint and hatched and count in no "
            "accuracy; their compute is in the map.",
            "Training, held-out and test pixels can be neighbours across a split, and pixels of a field resemble each "
            "other. Accuracy is lower far from training pixels, and the intervals are too narrow.",
            "A model that sees patches sees several classes at the edge of a field, which is one reason for the higher "
            "cost there.",
        ]
    return join([
        tag("h2", "How to read this report"), tag("ul", *(tag("li", each) for each in how)),
        tag("h2", "Limits of these figures"), tag("ul", *(tag("li", each) for each in limits)),
    ])  # fmt: skip


def origin_section(f: Findings) -> Markup:
    """Where every figure comes from."""
    o = f.origin
    held_out = o.held_out + (f" ({o.held_out_samples:,} samples)" if o.held_out_samples is not None else "")
    own = {
        "data": o.data,
        "measured on": f"{o.test} ({f.samples:,} samples, {len(f.class_names)} classes)",
        "thresholds from": held_out.strip(),
        "speed": f.how_timed or "not measured",
    }
    return join([tag("h2", "Origin of the figures"), facts(own | o.known())])


def _operating_points(f: Findings) -> Markup:
    """All operating points between the full model and static networks."""
    rows = [
        _row(
            f,
            join(["full model", tag("small", "all at the last exit")]),
            join([quantity(f.full.macs)]),
            f.full_ms,
            join([percent(f.full.accuracy), _interval(*f.full_interval)]),
            classes=(f.full_class_mean, f.full_kappa),
        )
    ]
    rows += [_evaluation_row(f, each) for each in f.evaluations]
    rows += [_static_row(f, each) for each in f.static]
    timed = bool(f.how_timed) or any(point.ms is not None for point in f.static)
    left_out = set() if timed else {"ms per sample"}
    if not f.unbalanced:
        left_out |= {"mean class accuracy", "kappa"}
    titles = [title for title in rows[0] if title not in left_out]
    said = (
        f"Measured on {f.origin.test}; thresholds from {f.origin.held_out or 'held-out samples'}. Small figures below "
        "accuracies are 95 % intervals. The marked operating point is the one explained below."
    )
    notes = [tag("p.soft", f"{each.name}: {each.point.note}.") for each in f.evaluations if each.point.note]
    cells = [[row[title] for title in titles] for row in rows]
    return join([table(titles, cells, said, marked=1 + f.explained), *notes])


def _evaluation_row(f: Findings, each: Evaluation) -> dict[str, object]:
    share = percent(each.outcome.macs / f.full.macs) + " of full"
    budget = each.point.budget.macs
    if budget is not None:
        share += f", {each.outcome.macs / budget:.2f} × budget"
    promise = {None: None, True: "risk promised", False: "risk not promised"}[each.point.promised]
    return _row(
        f,
        join([each.name, promise and tag("small", promise)]),
        join([quantity(each.outcome.macs), tag("small", share)]),
        each.ms,
        join([percent(each.outcome.accuracy), _interval(each.low, each.high)]),
        change=join([points(each.change), tag("small", f"± {100 * each.change_margin:.1f}")]),
        random=percent(each.random),
        classes=(each.class_mean, each.kappa),
    )


def _static_row(f: Findings, each: Point) -> dict[str, object]:
    cost: object = "–"
    if each.macs is not None:
        cost = join([quantity(each.macs), tag("small", f"{percent(each.macs / f.full.macs)} of full")])
    name = join([each.name, tag("small", "static, for comparison")])
    return _row(f, name, cost, each.ms, percent(each.accuracy), change=points(each.accuracy - f.full.accuracy))


def _row(
    f: Findings,
    name: object,
    cost: object,
    ms: float | None,
    accuracy: object,
    *,
    change: object = "",
    random: object = "",
    classes: tuple[float, float] | None = None,
) -> dict[str, object]:
    """The cells of a network by column; `classes` are its mean class accuracy and kappa."""
    return {
        "operating point": name,
        "MACs per sample": cost,
        "ms per sample": _time(ms, f.full_ms),
        f"accuracy on {f.samples:,}": accuracy,
        "against full, points": change,
        "accuracy, random exits": random,
        "mean class accuracy": "" if classes is None else percent(classes[0]),
        "kappa": "" if classes is None else f"{classes[1]:.3f}",
    }


def _promise(f: Findings, each: Promise) -> Markup:
    point = each.evaluation.point
    verdict = tag("span.good", "Promised.") if each.kept else tag("span.bad", "Not promised.")
    held_out = ""
    if each.tested is not None and f.origin.held_out_samples is not None:
        others = f.origin.held_out_samples - each.tested
        held_out = f"{each.tested:,} samples tested the thresholds; {others:,} others proposed them"
    known = {
        "requested": "early exits turn a correct answer into a wrong one for at most "
        f"{short_percent(each.risk)} of samples, with confidence {short_percent(each.confidence)}",
        "result": join([verdict, f" The model {point.note}." if point.note else None]),
        "thresholds": _thresholds(point.thresholds),
        "held out": held_out,
        "compute": f"{percent(each.evaluation.outcome.macs / f.full.macs)} of the full MACs, on the test samples",
        "observed": f"{percent(each.evaluation.lost)} of {f.samples:,} test samples lost their correct answer",
    }
    return join([tag("h3", each.evaluation.name), facts(known)])


def _thresholds(thresholds: np.ndarray) -> str:
    words = [_threshold(each) for each in thresholds.tolist()]
    if len(set(words)) == 1:
        return f"{words[0]}, at every exit before the last"
    return "; ".join(f"exit {k + 1}: {word}" for k, word in enumerate(words))


def _threshold(threshold: float) -> str:
    if threshold == np.inf:
        return "no sample leaves"
    if threshold == -np.inf:
        return "all samples leave"
    return f"leave at a score of {threshold:.4g} or more"


def _time(ms: float | None, full: float | None) -> object:
    if ms is None:
        return "–"
    if full is None or ms <= 0 or ms == full:
        return f"{ms:.3g}"
    return join([f"{ms:.3g}", tag("small", f"{full / ms:.2f} × as fast")])


def _interval(low: float, high: float) -> Markup:
    return tag("small", f"{100 * low:.1f} to {100 * high:.1f}")
