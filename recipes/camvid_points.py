"""CamVid: coarse labels made anew where they are unsure (PointRend), beside the same head everywhere and nowhere.

    python recipes/camvid_points.py train --data DIR
    python recipes/camvid_points.py measure --data DIR

DIR holds CamVid in SegNet's layout. One network, trained once: an encoder labels an eighth of the image, features at a half
are what the head sees. `measure` looks at the test split with so many points after each doubling as `POINTS` says, chosen
beforehand; beside them stand as many points drawn by lot, no points at all and all of them, of the same weights.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dynanet import CostModel, execute, forced
from dynanet.bench.machine import append_rows
from dynanet.bench.timing import paired, ratio
from dynanet.experiment import Data
from dynanet.mechanisms.point_refine import PointHead, PointLoss, PointRefine
from dynanet.nets.resnet import basic_block
from dynanet.session import Session
from dynanet.train import fit, load_weights, newest, one_cycle, sgd
from dynanet.train.checkpoint import step_files

POINTS = (256, 1024, 4096)
WIDTHS = (32, 64, 96, 128)


class Coarse(nn.Module):
    """Images to (features at a half, logits at an eighth); a quarter of a giga-MAC at 180 x 240 pixels."""

    def __init__(self, classes) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU())
        self.quarter = nn.Sequential(nn.Conv2d(half, quarter, 3, 2, 1, bias=False), nn.BatchNorm2d(quarter), nn.ReLU())
        self.eighth = basic_block(quarter, eighth, stride=2)
        self.sixteenth = nn.Sequential(basic_block(eighth, sixteenth, stride=2), basic_block(sixteenth, sixteenth))
        self.classify = nn.Conv2d(eighth + sixteenth, classes, 1)

    def forward(self, x):
        """Down, and one step up."""
        half = self.stem(x)
        eighth = self.eighth(self.quarter(half))
        deep = functional.interpolate(self.sixteenth(eighth), size=eighth.shape[2:], mode="bilinear")
        return half, self.classify(torch.cat([eighth, deep], 1))


def opened(args):
    """The problem and the network, not trained."""
    problem = Data("camvid", place=args.data).open(batch=8, seed=args.seed)
    torch.manual_seed(args.seed)
    classes = len(problem.classes)
    return problem, PointRefine(Coarse(classes), PointHead(WIDTHS[0], classes), points=POINTS[1])


def train(args):
    """From random weights; what was stopped goes on."""
    problem, model = opened(args)
    model = model.to(memory_format=torch.channels_last)
    run = fit(
        model, problem.train, problem.held_out, objective=PointLoss(problem.task.ignore), epochs=args.epochs,
        folder=args.runs, optimizer=sgd(0.05, weight_decay=5e-4), scheduler=one_cycle(warmup=0.15), seed=args.seed,
        resume=True, progress=False, monitor="val/loss", lower_is_better=True,
        trainer_options={"precision": "bf16-mixed", "check_val_every_n_epoch": 10},
    )  # fmt: skip
    print(run.metrics)


def measure(args):
    """Test figures, and milliseconds per image, of every number of points."""
    problem, model = opened(args)
    if max(step_files(args.runs), default=0) != args.epochs * len(problem.train):
        raise SystemExit(f"not trained to the end of {args.epochs} epochs: {args.runs}")
    load_weights(model, newest(args.runs))
    execute(model.eval(), sparse=True)
    x = torch.cat([x for (x, _), _ in zip(problem.test, range(2), strict=False)])[:24]
    sessions, rows = {}, []
    for name, points in {"nowhere": 1, **{str(n): n for n in POINTS}, "everywhere": None}.items():
        model.points = points
        model.threshold.fill_(-torch.inf if name == "nowhere" else torch.inf)
        cost = CostModel(model, x[:1])
        row = {"points": name, **scored(problem, model, cost), "all_macs": cost.full}
        if points in POINTS:
            torch.manual_seed(args.seed)
            with forced(model, drawn):
                row |= {f"random_{key}": value for key, value in scored(problem, model, cost).items()}
        rows.append(row)
        sessions[name] = Session(model, x[:1], batches=(1,))
    with torch.no_grad():
        frames = x.split(1)
        seconds = paired(
            {n: lambda s=s: [s(frame) for frame in frames] for n, s in sessions.items()}, rounds=args.rounds
        )
    for row in rows:
        mine = seconds[row["points"]]
        row["ms"] = 1e3 * float(np.median(mine)) / len(frames)
        row["over_everywhere"] = ratio(seconds["everywhere"], mine)[0]
        print(row, flush=True)
    columns = dict.fromkeys(key for row in rows for key in row)
    about = {"data": problem.title, "epochs": args.epochs, "seed": args.seed, "threads": 1}
    append_rows(args.results / "camvid_points.csv", [{c: row.get(c, "") for c in columns} for row in rows], about)


def scored(problem, model, cost):
    """mIoU, pixel accuracy and MACs on the test split."""
    found = problem.task.score(model, problem.test, cost)
    return {**found.figures, "macs": found.macs}


def drawn(decision):
    """As many points, anywhere."""
    keep = decision.keep.flatten(1)
    chosen = torch.rand_like(keep).topk(int(keep[0].sum()), dim=1).indices
    return torch.zeros_like(keep).scatter(1, chosen, 1.0).view_as(decision.keep)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid_points"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"train": train, "measure": measure}[args.what](args)
