"""Indian Pines: the pixel classifier with exits on fresh splits, beside an SVM and a static network of the same recipe.

    python recipes/indian_pines.py --seeds 20 21 22 23 24 --results results --scene
    python recipes/indian_pines.py --seeds 20 21 22 23 24 --results results --static

Per split seed: train, calibrate on held-out pixels, look at the test pixels once. MACs are those of the job, a whole
scene with the stem run once per pixel. Every seed is a row of results/indian_pines.csv, whatever it says. With --static
the networks to compare with: the same layers with one exit, at the full width and narrower, to the MACs of the budgets.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

from dynanet.bench.machine import append_rows
from dynanet.experiment import RequestedBudgets, Run, static_point
from dynanet.experiment.config import Data, Experiment, Model, Recipe


def svm(scene):
    """Test accuracy of an RBF SVM on the spectra."""
    machine = SVC(C=100, gamma=1 / 200)
    spectra = {part: scene.cube[:, scene.mask(part)].T.numpy() for part in ("train", "test")}
    machine.fit(spectra["train"], scene.targets("train").numpy())
    return float((machine.predict(spectra["test"]) == scene.targets("test").numpy()).mean())


CHANNELS = {"100": 64, "50": 44, "25": 30}  # of the static network's blocks, for about so many % of the MACs


def statics(seed, args):
    """Static networks of three sizes, by the same recipe on the same split."""
    for share, channels in CHANNELS.items():
        model = Model("spectral_static", {"blocks": [[[channels, 2], [channels, 1]], [[channels, 1]]]})
        run = Run(args.runs / f"{seed}-static-{share}", Experiment(Data(seed=seed), model, Recipe(seed=seed)))
        run.train(progress=False, resume=True)
        reached = static_point(run)
        row = {"seed": seed, "share": share, "channels": channels, "accuracy": reached.accuracy}
        row["macs_share"] = reached.macs / Run(args.runs / str(seed)).full_macs
        append_rows(args.results / "indian_pines_static.csv", [row], {})
        print(row, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--runs", type=Path, default=Path("runs/indian_pines"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--static", action="store_true", help="only the static networks")
    parser.add_argument("--scene", action="store_true", help="time the whole scene too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.mkdir(exist_ok=True)
    path = args.results / "indian_pines.csv"
    if args.static:
        for seed in args.seeds:
            statics(seed, args)
        return
    for seed in args.seeds:
        run = Run(args.runs / str(seed), Experiment(data=Data(seed=seed), recipe=Recipe(seed=seed)))
        start = time.monotonic()
        run.train(progress=False)
        seconds = time.monotonic() - start
        run.calibrate(RequestedBudgets(shares=(0.75, 0.5, 0.35, 0.25), risk=0.05))
        found = run.evaluate()
        row = {
            "seed": seed,
            "svm": svm(run.data.scene),
            "full": found["accuracy_per_exit"][-1],
            "exits": " ".join(f"{a:.4f}" for a in found["accuracy_per_exit"]),
            "train_seconds": round(seconds, 1),
        }
        for choice, share in zip(found["operating_points"], ("75", "50", "35", "25", "risk"), strict=True):
            row[f"at_{share}"] = choice["test_accuracy"]
            row[f"random_{share}"] = choice["random_exits_accuracy"]
            row[f"macs_{share}"] = choice["test_macs_share"]
        if args.scene:
            for share in (0.5, 0.25):
                _, timed = run.scene(share)
                row[f"scene_times_{share:.0%}"] = timed["speed_up"]
                row[f"scene_macs_{share:.0%}"] = timed["macs_share"]
        append_rows(path, [row], {"threads": torch.get_num_threads()})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    rows = list(csv.DictReader(path.open()))
    for name in ("svm", "full", "at_50", "random_50", "at_25", "macs_50", "macs_25"):
        values = [float(r[name]) for r in rows if r.get(name)]
        if values:
            print(f"median {name}: {np.median(values):.4f}  ({min(values):.4f} to {max(values):.4f})")


if __name__ == "__main__":
    main()
