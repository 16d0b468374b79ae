"""The parts of the report that are words and tables, in the order of a reader's questions."""

import numpy as np

from dynanet.report.blocks import compute_colour, facts, parts_bar, table
from dynanet.report.findings import Findings, Promise
from dynanet.report.markup import Markup, join, tag
from dynanet.report.words import maybe_percent, pairs, percent, points, quantity, short_percent


def answer_section(f: Findings) -> Markup:
    """The title, the answer in sentences, and every budget in a table."""
    o, each = f.origin, f.operation
    done, change, margin = each.outcome, each.change, each.change_margin
    if points(change) == "0.0":
        compared = "as many as by"
    else:
        compared = f"{points(abs(change))[1:]} points {'more' if change > 0 else 'less'} than by"
    first = (
        f"At the budget “{each.name}” a sample takes {percent(done.macs / f.full.macs)} of the full model's compute "
        f"({quantity(done.macs)} of {quantity(f.full.macs)} MACs in the mean). {percent(done.accuracy)} of "
        f"{f.samples:,} test samples are answered right, {compared} the full model (95 % interval of the difference: "
        f"{points(change - margin)} to {points(change + margin)} points)."
    )
    if each.ms is not None and f.full_ms is not None and each.ms > 0:
        speed = (
            f"A sample takes {each.ms:.3g} ms, {f.full_ms / each.ms:.2f} times as fast as the full model. {f.how_timed}"
        )
    else:
        speed = "Its speed was not measured."
    worth = (
        f"If as many samples left at every exit, but drawn by lot, {percent(each.random)} would be right: looking at "
        f"the sample is worth {points(done.accuracy - each.random)} points."
    )
    data = "" if o.data == f.title else o.data
    source = [data, _model(f), o.device, o.commit and f"commit {o.commit}", o.date]
    return join([
        tag("h1", f.title),
        tag("p.soft", " · ".join(each for each in source if each)),
        tag("p.answer", first),
        tag("p", speed),
        tag("p", worth),
        tag("h2", "At each budget"),
        _budgets(f),
    ])  # fmt: skip


def exits_section(f: Findings) -> Markup:
    """What happens at every exit, at the explained budget."""
    rows = []
    for k, each in enumerate(f.exits):
        cost = join([percent(each.macs / f.full.macs), tag("small", f"{quantity(each.macs)} MACs")])
        shares = [percent(each.share), maybe_percent(each.right), maybe_percent(each.full), percent(each.alone)]
        rows.append([f"exit {k + 1}", cost, *shares])
    early = [(each.share, each.right, each.full) for each in f.exits[:-1]]
    share = sum(part for part, _, _ in early)
    said = "Nobody leaves before the last exit."
    if share:
        right, full = (sum(each[0] * (each[i] or 0) for each in early) / share for i in (1, 2))
        said = (
            f"{percent(share)} of the samples leave before the last exit. {percent(right)} of them are answered right; "
            f"the full model would answer {percent(full)} of the same samples right."
        )
    titles = [
        "",
        "cost, of full",
        "leave here",
        "of these right",
        "full model on these",
        "all samples, if all left here",
    ]
    return join([
        tag("h2", "Where samples leave"),
        tag("p", "At the budget “", f.operation.name, "”: ", said),
        table(titles, rows, "Accuracies on the test samples. What goes on to later exits is harder, so fewer of these "
              "are right there: that is as it should be."),
    ])  # fmt: skip


def classes_section(f: Findings) -> Markup:
    """Which classes are dear, and what leaving early does to each."""
    costs, names = [each.macs / f.full.macs for each in f.exits], [f"exit {k + 1}" for k in range(len(f.exits))]
    key = [
        tag("li", tag("span.swatch", at={"style": f"background:{compute_colour(cost)[0]}"}), f"{name}: {percent(cost)}")
        for name, cost in zip(names, costs, strict=True)
    ]
    rows = [
        [
            tag("td.name", each.name, tag("small", f"{each.samples:,} samples")),
            percent(each.spent),
            join([percent(each.right), tag("small", f"{points(each.right - each.full)} points")]),
            tag("td.wide", parts_bar(each.share.tolist(), costs, names)),
        ]
        for each in f.classes
    ]
    said = "At the same budget, on the test samples. One sample of a small class moves its accuracy by points."
    if f.absent:
        said += f" Without a test sample: {', '.join(f.absent)}."
    titles = ["class", "mean cost, of full", "right, against full", "samples that leave at each exit, %"]
    return join([tag("h3", "By class, the dearest first"), tag("ul.legend", *key), table(titles, rows, said)])


def promise_section(f: Findings) -> Markup | None:
    """The risks that were asked for: promised or not, and what was observed."""
    if not f.promises:
        return None
    return join([
        tag("h2", "What is promised"),
        *(_promise(f, each) for each in f.promises),
        tag("p.soft",
            "The promise is about the draw of the held-out samples: in at least the stated share of draws the mean "
            "loss over samples of the same kind stays within the risk. It says nothing of samples of another kind, "
            "nor of a single one. Where held-out samples depend on each other, as neighbouring pixels do, it is "
            "weaker than it looks."),
    ])  # fmt: skip


def reading_section(f: Findings) -> Markup:
    """How to read the report, and what its numbers are not."""
    how = [
        "A MAC is one multiply-accumulate of a convolution, linear layer, matrix product or attention. “Full” is the "
        "same model with every sample at the last exit.",
        "“By lot” sends as many samples to every exit, but draws which. What the model reaches beyond that is what "
        "looking at the sample is worth.",
        "A point is one hundredth: from 80 % to 79 % is one point. Intervals are 95 % intervals, if test samples are "
        "independent.",
        "Dark blue is little compute, yellow is the full model's, in all bars and maps of compute.",
    ]
    what_not = [
        f"Thresholds were fitted on {f.origin.held_out or 'held-out samples'}, accuracies measured on {f.origin.test}. "
        "They hold for samples of that kind: on others the model can be surer than it should be, and cost and accuracy "
        "differ.",
        "MACs are not time. Gathering rows, gates and small batches take time and no MACs. Believe the milliseconds "
        "where they were measured, for that device, batch size and number of threads.",
        "One trained model is shown. Another seed moves every figure.",
    ]
    if f.scene is not None:
        what_not += [
            "Answers on unlabelled pixels cannot be checked. They are drawn faint and hatched and count in no "
            "accuracy; what was spent on them is in the map of compute.",
            "Training, held-out and test pixels can be neighbours across a cut, and the pixels of a field resemble "
            "each other. Far from all training pixels accuracy is lower, and the intervals are narrower than they "
            "should be.",
            "A model that looks at a patch sees several covers at the edge of a field: edges are dear partly for that.",
        ]
    return join([
        tag("h2", "How to read this"), tag("ul", *(tag("li", each) for each in how)),
        tag("h2", "What these numbers are not"), tag("ul", *(tag("li", each) for each in what_not)),
    ])  # fmt: skip


def origin_section(f: Findings) -> Markup:
    """Where every figure comes from."""
    o = f.origin
    held_out = o.held_out + (f" ({o.held_out_samples:,} samples)" if o.held_out_samples is not None else "")
    known = {
        "data": o.data,
        "measured on": f"{o.test} ({f.samples:,} samples, {len(f.class_names)} classes)",
        "thresholds from": held_out.strip(),
        "model": _model(f),
        "speed": f.how_timed or "not measured",
        "device": o.device,
        "versions": ", ".join(f"{name} {version}" for name, version in o.versions.items()),
        "commit": o.commit,
        "date": o.date,
    }
    return join([tag("h2", "Where these figures come from"), facts(known | dict(o.more))])


def _model(f: Findings) -> str:
    o = f.origin
    return f"{o.model} ({pairs(o.arguments)})" if o.model and o.arguments else o.model or pairs(o.arguments)


def _budgets(f: Findings) -> Markup:
    timed = bool(f.how_timed) or any(point.ms is not None for point in f.static)
    titles = [
        "budget",
        "MACs per sample",
        *["ms per sample"] * timed,
        f"right, of {f.samples:,}",
        "against full, points",
    ]
    titles += ["right by lot", *["mean of classes", "kappa"] * f.unbalanced]
    right = join([percent(f.full.accuracy), _interval(*f.full_interval)])
    rows = [
        [
            join(["full model", tag("small", "all at the last exit")]),
            *[quantity(f.full.macs), *[_time(f.full_ms, None)] * timed, right, "", ""],
            *[percent(f.full_class_mean), f"{f.full_kappa:.3f}"] * f.unbalanced,
        ]
    ]
    for each in f.operations:
        asked, promised = (
            each.choice.budget.macs,
            {None: None, True: "promised", False: "not promised"}[each.choice.promised],
        )
        share = percent(each.outcome.macs / f.full.macs) + " of full"
        if asked is not None:
            share += f", {each.outcome.macs / asked:.2f} × asked"
        rows.append([
            join([each.name, promised and tag("small", promised)]),
            join([quantity(each.outcome.macs), tag("small", share)]),
            *[_time(each.ms, f.full_ms)] * timed,
            join([percent(each.outcome.accuracy), _interval(each.low, each.high)]),
            join([points(each.change), tag("small", f"± {100 * each.change_margin:.1f}")]),
            percent(each.random),
            *[percent(each.class_mean), f"{each.kappa:.3f}"] * f.unbalanced,
        ])  # fmt: skip
    for point in f.static:
        share = "" if point.macs is None else f"{percent(point.macs / f.full.macs)} of full"
        rows.append([
            join([point.name, tag("small", "static, to compare")]),
            "–" if point.macs is None else join([quantity(point.macs), tag("small", share)]),
            *[_time(point.ms, f.full_ms)] * timed,
            percent(point.accuracy), points(point.accuracy - f.full.accuracy), "", *["", ""] * f.unbalanced,
        ])  # fmt: skip
    said = (
        f"Measured on {f.origin.test}; thresholds from {f.origin.held_out or 'held-out samples'}. Small figures below "
        "accuracies are 95 % intervals. The marked budget is the one that this report explains."
    )
    notes = [tag("p.soft", f"{each.name}: {each.choice.note}.") for each in f.operations if each.choice.note]
    return join([table(titles, rows, said, marked=1 + f.explained), *notes])


def _promise(f: Findings, each: Promise) -> Markup:
    choice, outcome = each.operation.choice, each.operation.outcome
    verdict = tag("span.good", "Promised.") if each.kept else tag("span.bad", "Not promised.")
    held_out = ""
    if each.tested is not None and f.origin.held_out_samples is not None:
        others = f.origin.held_out_samples - each.tested
        held_out = f"{each.tested:,} samples tested the thresholds; {others:,} others proposed them"
    known = {
        "asked": "leaving early may turn a right answer into a wrong one for at most "
        f"{short_percent(each.risk)} of samples, with confidence {short_percent(each.confidence)}",
        "answer": join([verdict, f" It {choice.note}." if choice.note else None]),
        "thresholds": _thresholds(choice.thresholds),
        "held out": held_out,
        "spent": f"{percent(outcome.macs / f.full.macs)} of the full MACs, on the test samples",
        "seen": f"{percent(each.operation.lost)} of {f.samples:,} test samples lost their right answer",
    }
    return join([tag("h3", each.operation.name), facts(known)])


def _thresholds(thresholds: np.ndarray) -> str:
    words = [
        "nobody leaves" if t == np.inf else "all leave" if t == -np.inf else f"leave at a score of {t:.4g} or more"
        for t in thresholds.tolist()
    ]
    if len(set(words)) == 1:
        return f"{words[0]}, at every exit before the last"
    return "; ".join(f"exit {k + 1}: {word}" for k, word in enumerate(words))


def _time(ms: float | None, full: float | None) -> object:
    if ms is None:
        return "–"
    return join([f"{ms:.3g}", tag("small", f"{full / ms:.2f} × as fast") if full is not None and ms > 0 else None])


def _interval(low: float, high: float) -> Markup:
    return tag("small", f"{100 * low:.1f} to {100 * high:.1f}")
