"""CamVid: a street scene's easy pixels labelled early, beside the same network without exits.

    python recipes/camvid.py train --data DIR [NAME ...]      # names of NETWORKS; all if none
    python recipes/camvid.py measure --data DIR               # those that are trained
    python recipes/camvid.py picture --data DIR --out docs/camvid.png

DIR holds CamVid in SegNet's layout. Thresholds are found on its validation split, and the test split is looked at once.
A cascade is measured at every budget, and beside random exits at the same rates; rows of speed have the accuracy of
held-out positions, by which to choose a budget. `static, same weights` is the cascade's own last
exit with nothing skipped. Frames are timed one by one, the cascade and its dense rivals interleaved in one process.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dynanet import Budget, CostModel, execute, forced, record, zoo
from dynanet.bench.comparison import dense_engines
from dynanet.bench.machine import append_rows
from dynanet.bench.timing import paired, ratio
from dynanet.calibrate.frontier import with_thresholds
from dynanet.core.dynamic import everything
from dynanet.core.files import write_atomically
from dynanet.experiment import RequestedBudgets, Run
from dynanet.experiment.config import Data, Experiment, Model, Recipe
from dynanet.mechanisms.pixel_cascade import left_at
from dynanet.report.colours import class_colours, ramp
from dynanet.report.pictures import png
from dynanet.session import Session

NETWORKS = {
    "cascade": Model("layer_cascade"),
    "static": Model("layer_cascade_static"),
    "static-0.7": Model("layer_cascade_static", {"width_multiplier": 0.7}),
}
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3)


def opened(name, args):
    """The run of a network."""
    recipe = Recipe(epochs=args.epochs, batch=8, lr=0.05, weight_decay=5e-4, seed=args.seed, precision="bf16-mixed")
    return Run(args.runs / name, Experiment(Data("camvid", place=args.data), NETWORKS[name], recipe))


def train(args):
    """Train those that were named; what was trained already is left alone, what was stopped goes on."""
    for name in args.names or NETWORKS:
        print(name, opened(name, args).train(resume=True), flush=True)


def measure(args):
    """Test figures of all that were trained, and the frames per second of the cascade."""
    args.results.mkdir(parents=True, exist_ok=True)
    about = {"data": opened("cascade", args).data.title, "epochs": args.epochs, "seed": args.seed}
    for name in NETWORKS:
        if not (args.runs / name / "model").exists():
            print(f"{name} is not trained")
            continue
        run = opened(name, args)
        if name == "cascade":
            run.calibrate(RequestedBudgets(shares=SHARES))
        results = run.evaluate()
        rows = [
            {"network": name, "point": p["name"], "macs": p["macs"], "full_macs": results["full_macs"],
             "miou": p["miou"], "pixel_accuracy": p["pixel_accuracy"], **p["by_class"]["iou"]}
            for p in results["points"]
        ]  # fmt: skip
        for row in rows:
            print({key: row[key] for key in ("network", "point", "macs", "miou", "pixel_accuracy")}, flush=True)
        append_rows(args.results / "camvid.csv", rows, about)
    run = opened("cascade", args)
    rows = [timed(run, choice, args.rounds) for choice in run.operating_points]
    append_rows(args.results / "camvid_speed.csv", rows, about)


@torch.no_grad()
def timed(run, choice, rounds, frames=24):
    """Milliseconds per test frame at a budget, beside the same weights without skipping."""
    full = run.full_macs
    x = torch.cat([x for x, _ in run.data.test])[:: run.data.test.samples // frames][:frames]
    model = with_thresholds(run.model, choice.thresholds)
    session, cost = Session(model, x[:1], batches=(1,)), CostModel(model, x[:1])
    static = as_static(run.model)
    engines = dense_engines(static, x[:1])
    with record(session) as trace:
        sparse = session(x[:4])
    dense = execute(model, sparse=False)(x[:4])
    alike = float((sparse.argmax(1) == dense.argmax(1)).float().mean())
    assert alike > 0.999, f"the session labels {1 - alike:.2%} of the pixels otherwise"

    def kept():
        with forced(session, everything):
            for frame in x.split(1):
                session(frame)

    contestants = {name: (lambda engine=engine: [engine([f]) for f in x.split(1)]) for name, engine in engines.items()}
    seconds = paired({"session": lambda: [session(f) for f in x.split(1)], "kept": kept, **contestants}, rounds=rounds)
    best = min(contestants, key=lambda name: np.median(seconds[name]))
    with record(session) as trace:
        session(x)
    spent = float(cost.spent(trace).mean())
    times, low, high = ratio(seconds[best], seconds["session"])
    row = {
        "budget": f"{choice.budget.macs / full:.0%}", "macs": spent, "full_macs": full, "frames": len(x), "batch": 1,
        "threads": torch.get_num_threads(), "rounds": rounds, "held_out_accuracy": choice.accuracy,
        "held_out_full": run.frontier.choose(Budget(macs=full)).accuracy,
        "session_ms": 1e3 * float(np.median(seconds["session"])) / len(x),
        "static_ms": 1e3 * float(np.median(seconds[best])) / len(x), "static_engine": best,
        "kept_ms": 1e3 * float(np.median(seconds["kept"])) / len(x),
        "times": times, "spread": f"{low:.2f}-{high:.2f}", "of_flop_ratio": times / (cost.full / spent),
    }  # fmt: skip
    print(row, flush=True)
    return row


def as_static(cascade):
    """The cascade's backbone, stages and last exit as a static network."""
    static = zoo.layer_cascade_static(**cascade.architecture.arguments)
    encoder, *residuals, head = static.net
    encoder.load_state_dict(cascade.backbone.state_dict())
    for residual, cell in zip(residuals, [cell for cells in cascade.stages for cell in cells], strict=True):
        residual.cell.load_state_dict(cell.state_dict())
    head.load_state_dict(cascade.exits[-1].state_dict())
    return static.eval()


@torch.no_grad()
def picture(args, images=4):
    """Of test images the exit at which every position left, and the classes found. `report` shows them with the images,
    which are not ours to hand on.
    """
    run = opened("cascade", args)
    problem, (model, setting) = run.data, run.explained()
    x, y = (torch.cat(each) for each in zip(*problem.test, strict=True))
    chosen = torch.linspace(0, len(x) - 1, images).long()
    x, size = x[chosen], y.shape[1:]
    with record(execute(model, sparse=True)) as trace:
        found = model(x).argmax(1)
    exits = len(model.thresholds)
    left = torch.nn.functional.interpolate(left_at(trace)[:, None].float(), size=size, mode="nearest")[:, 0]
    stages = ramp(exits + 1)[left.long().numpy()]
    classes = class_colours(len(problem.classes))[found.numpy()]
    whole = np.concatenate([np.concatenate(list(row), 1) for row in (stages, classes)], 0).astype(np.uint8)
    write_atomically(args.out, lambda file: file.write(png(np.ascontiguousarray(whole))))
    print(
        f"{args.out}: at {setting}; shares of the exits {[round(float((left == k).float().mean()), 3) for k in range(exits + 1)]}"
    )


def main():
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "measure", "picture"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "camvid")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("docs") / "camvid.png")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    {"train": train, "measure": measure, "picture": picture}[args.what](args)


if __name__ == "__main__":
    main()
