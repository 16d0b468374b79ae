"""Tables along a scale: accuracy over MACs of `cifar10_frontier.py`, points predicted again of `camvid_points.py`, letters of
`shakespeare_depths.py`.
"""

import numpy as np
from mechanism_tables import NOTHING
from rows import percent, quiet, rows, source, times


def short():
    """MSDNet, RANet, a cascade and static networks after the same few epochs: every exit, and every fifth budget."""
    found = rows("cifar10_short_frontier.csv")
    if not found:
        return NOTHING
    static = sorted((float(r["macs"]), float(r["accuracy"])) for r in found if r["network"].startswith("static"))
    lines = [
        f"**RANet beside MSDNet**: CIFAR-10, {found[0]['epochs']} epochs each, which is far too few to compare with published "
        "figures and the same for all (the cascade is two static networks). All at exit k: every image is answered at that exit. "
        "Budgets: thresholds from held-out images, beside random exits at the same rates.",
        source(found, "cifar10_short_frontier.csv"),
        "",
        "| network | answers | MACs | test accuracy | static, same MACs | random exits |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["network"] for row in found):
        cell = [row for row in found if row["network"] == name]
        for row in cell[::5] if "early exit" in name else cell:
            macs, accuracy = float(row["macs"]), float(row["accuracy"])
            network, _, answers = name.partition(", ")
            inside = answers and static[0][0] <= macs <= static[-1][0]
            same = np.interp(np.log(macs), np.log([m for m, _ in static]), [a for _, a in static]) if inside else None
            random = row.get("random_exits_accuracy")
            lines.append(
                f"| {network} | {answers} | {macs / 1e6:.1f} M | {percent(accuracy)} | "
                f"{'' if same is None else percent(same)} | {percent(float(random)) if random else ''} |"
            )
    return lines


def points():
    """How many points are worth predicting again."""
    found = rows("camvid_points.csv")
    if not found:
        return NOTHING
    lines = [
        f"Segmentation: {found[0]['data']}; one network, trained for {found[0]['epochs']} epochs from random weights, with the given number of "
        "points predicted again after each of three doublings. Random: as many, anywhere. Milliseconds of the session, frame by frame, "
        "one thread.",
        source(found, "camvid_points.csv"),
        "",
        "| points | mIoU | pixel accuracy | MACs | ms | times faster than everywhere | random points, mIoU |",
        "|---|---|---|---|---|---|---|",
    ]
    timed = quiet(found)
    for row in found:
        speed = f"{float(row['ms']):.1f} | {times(float(row['over_everywhere']))}" if row in timed else " | "
        quality = " | ".join(percent(float(row[key])) for key in ("miou", "pixel_accuracy"))
        random = percent(float(row["random_miou"])) if row["random_miou"] else ""
        lines.append(f"| {row['points']} | {quality} | {float(row['macs']) / 1e6:.0f} M | {speed} | {random} |")
    return lines


def depths():
    """Mixture-of-Depths beside fewer blocks."""
    found = rows("shakespeare_depths.csv")
    if not found:
        return NOTHING
    lines = [
        f"Tiny Shakespeare, letter by letter, a causal transformer of {found[0]['width']} features after {found[0]['steps']} steps; "
        "bits per letter of the test part, the fewer the better; decisions are the predictor's, letter by letter. Static: fewer "
        "blocks (interpolated). Random: every sequence with the decisions of another.",
        source(found, "shakespeare_depths.csv"),
        "",
        "| | bits | MACs per letter | gated blocks run for | static, same MACs | all blocks | random |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        others = [f"{float(row[key]):.3f}" if row[key] else "" for key in ("static_bits", "full_bits", "random_bits")]
        kept = percent(float(row["kept"])) if row["static_bits"] else ""
        lines.append(
            f"| {row['network']} | {float(row['bits']):.3f} | {float(row['macs']) / 1e3:.0f} k | {kept} | {' | '.join(others)} |"
        )
    return lines
