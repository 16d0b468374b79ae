"""Blood cells: a small anchor-free detector, static, with positions that halt (SACT), and with layers left out.

    python recipes/bccd.py train halting-0.02 --data DIR     # a name of NETWORKS, or several; all if none
    python recipes/bccd.py measure --data DIR                # test images, looked at once: results/bccd.csv
    python recipes/bccd.py speed --data DIR                  # on a quiet machine: results/bccd_speed.csv
    python recipes/bccd.py picture --data DIR                # docs/bccd.png

DIR holds BCCD in Pascal VOC's layout. Images are 144 x 192 pixels, 205 to train on, 87 held out, 72 to test. Cut to what a
core does in minutes: one feature level, 24 epochs from random weights, bfloat16 autocast. Beside every dynamic network
stand the full one, the static one of the same MACs (interpolated between three sizes) and the same network obeying another
image's decisions.
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dynanet import Budget, CostModel, execute, forced, record, zoo
from dynanet.bench.comparison import compare
from dynanet.bench.machine import append_rows
from dynanet.data.augment import channel_stats
from dynanet.data.detection import Normalize, RandomResizedFlipBoxes, to_memory
from dynanet.data.voc import load_voc
from dynanet.mechanisms.position_halting import PositionPonderCost
from dynanet.report.positions import beside_boxes, units_per_position
from dynanet.tasks.detection.decoding import decode
from dynanet.tasks.detection.loss import DetectionLoss
from dynanet.tasks.detection.precision import average_precision
from dynanet.train import (
    Batches,
    BudgetPenalty,
    TargetRate,
    adamw,
    fit,
    load_weights,
    newest,
    one_cycle,
    tighten_budget,
)
from dynanet.train.checkpoint import step_files

SIZE = (144, 192)
STATIC = {"static-1.0": (2, 6), "static-0.6": (1, 3), "static-0.4": (1, 1)}  # units at each resolution


def static(depths):
    return zoo.detector_static(num_classes=3, depths=depths), lambda cost: (DetectionLoss(), ())


def halting(tau):
    """Weighted with the ponder cost's share in the loss."""
    return zoo.detector_halting(num_classes=3), lambda cost: (DetectionLoss() + tau * PositionPonderCost(), ())


def skip(share):
    """A budget, tightened over the first half of training."""

    def objective(cost):
        budget = BudgetPenalty(Budget(macs=share * cost.full), cost)
        return DetectionLoss() + 4.0 * budget, (tighten_budget(budget),)

    return zoo.detector_skip(num_classes=3), objective


def skip_rates(share):
    """Gates with normed scores, each drawn to run for this share of the images."""
    return zoo.detector_skip(num_classes=3, bias=1.0, norm=True), lambda cost: (
        DetectionLoss() + 4.0 * TargetRate(share),
        (),
    )


NETWORKS = {
    **{name: partial(static, depths) for name, depths in STATIC.items()},
    "halting-0.02": partial(halting, 0.02),
    "halting-0.05": partial(halting, 0.05),
    "skip-0.65": partial(skip, 0.65),
    "skip-rates-0.5": partial(skip_rates, 0.5),
}


class Blood:
    """The data, opened."""

    def __init__(self, folder, seed=0, batch=8) -> None:
        self.train, self.held_out, self.test = (to_memory(load_voc(folder, p), SIZE) for p in ("train", "val", "test"))
        mean, std = channel_stats(self.train.images)
        self.plain = Normalize(mean, std)
        self.batches = Batches(
            self.train,
            batch,
            shuffle=True,
            drop_last=True,
            seed=seed,
            collate=RandomResizedFlipBoxes(mean, std).collate,
        )
        self.validation = Batches(self.held_out, 29, collate=self.plain.collate)

    def inputs(self, part):
        """Of all images of a part, (N, 3, H, W)."""
        return self.plain.collate([part[k] for k in range(len(part))])[0]


def train(args):
    data = Blood(args.data, args.seed)
    for name in args.names or NETWORKS:
        torch.manual_seed(args.seed)
        model, objective = NETWORKS[name]()
        model = model.to(memory_format=torch.channels_last)
        cost = CostModel(model, torch.zeros(1, 3, *SIZE))
        objective, schedules = objective(cost)
        run = fit(
            model, data.batches, data.validation, objective=objective, epochs=args.epochs, folder=args.runs / name,
            optimizer=adamw(2e-3, weight_decay=0.05), scheduler=one_cycle(warmup=0.15), schedules=schedules, cost=cost,
            seed=args.seed, resume=True, progress=False, monitor="val/loss", lower_is_better=True,
            trainer_options={"precision": "bf16-mixed", "gradient_clip_val": 5.0, "check_val_every_n_epoch": 4},
        )  # fmt: skip
        found = evaluate(model.eval(), cost, data, data.held_out)
        print(name, {k: round(v, 4) for k, v in {**run.metrics, **found}.items()}, flush=True)


def finished(args):
    """The networks whose training has come to its end; of the others nothing is measured."""
    steps = args.epochs * (205 // 8)
    there = {name: max(step_files(args.runs / name), default=0) for name in NETWORKS if (args.runs / name).exists()}
    left_out = [name for name in NETWORKS if there.get(name) != steps]
    if left_out:
        print(f"not trained to the end, left out: {', '.join(left_out)}", flush=True)
    return [name for name in NETWORKS if name not in left_out]


def trained(name, args):
    model, _ = NETWORKS[name]()
    load_weights(model, newest(args.runs / name))
    return model.eval(), CostModel(model, torch.zeros(1, 3, *SIZE))


@torch.no_grad()
def evaluate(model, cost, data, part, decide=False):
    """mAP and MACs per image; with `decide`, every image obeys the decisions of the one before it."""
    x, found, spent, maps = data.inputs(part), [], [], []
    execute(model, sparse=not decide)
    for some in x.split(24):
        with record(model) as trace:
            answer = model(some)
        if decide:
            with forced(model, of_another(trace)), record(model) as trace:
                answer = model(some)
        found += decode(answer, SIZE)
        spent.append(cost.spent(trace) if trace.calls else torch.full((len(some),), cost.full))
        if any(call.keep.dim() == 4 for call in trace.calls):
            maps.append(units_per_position(trace, SIZE))
    score = average_precision(found, part.boxes, part.classes)
    row = {"macs": float(torch.cat(spent).mean()), "map": score.mean, "map_50": score.at_50, "map_75": score.at_75}
    row |= {f"map_{name}": value for name, value in score.classes.items()}
    row["macs_spread"] = float(torch.cat(spent).std())
    if maps:
        row |= {
            f"units_{k}": v for k, v in beside_boxes(torch.cat(maps), [b.boxes for b in part.boxes])._asdict().items()
        }
    return row


def of_another(trace):
    """Replays a pass, every image with the decisions of the one before it: as many units, and not for this input."""
    keeps = iter([call.decision.keep[..., -1:].roll(1, 0) for call in trace.calls])
    return lambda decision: next(keeps)


def measure(args):
    data = Blood(args.data, args.seed)
    about = {"data": "BCCD, test", "height": SIZE[0], "width": SIZE[1], "epochs": args.epochs, "seed": args.seed}
    rows = []
    for name in finished(args):
        model, cost = trained(name, args)
        row = {"network": name, "full_macs": cost.full, **evaluate(model, cost, data, data.test)}
        if name not in STATIC:
            chance = evaluate(model, cost, data, data.test, decide=True)
            curve = sorted((r["macs"], r["map"], r["map_50"]) for r in rows if r["network"] in STATIC)
            macs, means, at_50 = zip(*curve, strict=True)
            row |= {
                "static_map": float(np.interp(np.log(row["macs"]), np.log(macs), means)),
                "static_map_50": float(np.interp(np.log(row["macs"]), np.log(macs), at_50)),
                "random_map": chance["map"], "random_map_50": chance["map_50"], "random_macs": chance["macs"],
            }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    append_rows(args.results / "bccd.csv", rows, about)


def speed(args):
    data = Blood(args.data, args.seed)
    for name in args.names or finished(args):
        model, _ = trained(name, args)
        rows = compare(model, data.inputs(data.test), batches=(1, 8), rounds=args.rounds, echo=print)
        append_rows(
            args.results / "bccd_speed.csv", [asdict(row) for row in rows], {"network": name, "data": "BCCD, test"}
        )


@torch.no_grad()
def picture(args):
    """Of test images the boxes found, over how many units every position took. The images are not ours to hand on."""
    from matplotlib import pyplot

    data = Blood(args.data, args.seed)
    names = [name for name in finished(args) if name.startswith("halting")]
    rows = [0, 24, 48]  # of the test images; not chosen by what they show
    x = data.inputs(data.test)[rows]
    figure, axes = pyplot.subplots(len(names), len(rows), figsize=(4 * len(rows), 3 * len(names)), squeeze=False)
    for name, line in zip(names, axes, strict=True):
        model, _ = trained(name, args)
        with record(execute(model, sparse=True)) as trace:
            answer = model(x)
        for axis, found, units in zip(
            line, decode(answer, SIZE, least=0.3), units_per_position(trace, SIZE), strict=True
        ):
            shown = axis.imshow(units, cmap="magma", vmin=0)
            axis.set_title(f"{name}: units per position")
            figure.colorbar(shown, ax=axis, fraction=0.035)
            for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
                corner, sides = box[:2], (box[2] - box[0], box[3] - box[1])
                axis.add_patch(pyplot.Rectangle(corner, *sides, fill=False, edgecolor=f"C{label}", linewidth=1.2))
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(args.docs / "bccd.png", dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "measure", "speed", "picture"])
    parser.add_argument("names", nargs="*", help="of networks; all if none")
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/bccd"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    {"train": train, "measure": measure, "speed": speed, "picture": picture}[arguments.what](arguments)
