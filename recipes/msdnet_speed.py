"""MSDNet, or RANet, on CIFAR-sized images, budgeted: what the session is worth in milliseconds. All is random.

    python recipes/msdnet_speed.py --repeats 5 --threads 1 --results results      # or `msdnet_speed.py ranet ...`

The authors' budgeted networks for CIFAR (MSDNet: 5 exits, 58 million MACs; RANet: 6 exits, 61 million) with thresholds
that let samples out in geometric shares, as their protocol does (ratio 0.5, of five exits: 52, 26, 13, 6 and 3 %, about
3.8 times fewer MACs). Speed does not depend on what the answers mean, so nothing is trained here. Every repeat is a process of
its own; every row of every repeat is kept.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dynanet import zoo
from dynanet.bench.comparison import compare
from dynanet.bench.machine import append_rows
from dynanet.calibrate.budgeted import geometric, thresholds_for_share

NETWORKS = {"msdnet": ("MSDNet", zoo.msdnet), "ranet": ("RANet", zoo.ranet)}


def network(build, x):
    """Random weights, batch norms as after training, thresholds for geometric shares on these inputs."""
    model = build(num_classes=10)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    model.eval()
    with torch.no_grad():
        answers = [torch.cat(parts) for parts in zip(*(model.answers(b) for b in x.split(64)), strict=True)]
        scores = torch.cat([model.confidence(answer) for answer in answers[:-1]], 1).double().numpy()
    model.thresholds.copy_(torch.from_numpy(thresholds_for_share(scores, geometric(model.steps, 0.5))))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", nargs="?", default="msdnet", choices=NETWORKS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    if args.repeats > 1:
        own = [
            sys.executable,
            __file__,
            args.network,
            "--repeats",
            "1",
            "--rounds",
            str(args.rounds),
            "--results",
            str(args.results),
        ]
        own += ["--threads", *map(str, args.threads), "--batches", *map(str, args.batches)]
        for _ in range(args.repeats):
            subprocess.run(own, check=True)
        return
    torch.manual_seed(0)
    x = torch.randn(512, 3, 32, 32) * 2 * torch.rand(512, 1, 1, 1)
    title, build = NETWORKS[args.network]
    model = network(build, x)
    rows = compare(model, x, batches=args.batches, threads=args.threads, rounds=args.rounds, echo=print)
    args.results.mkdir(exist_ok=True)
    about = {"network": f"{title} CIFAR budgeted, {model.steps} exits, random weights", "exits": "geometric, ratio 0.5"}
    append_rows(args.results / f"{args.network}_speed.csv", [asdict(row) for row in rows], about)
    print("median over batches of this process:", np.median([row.over_reference for row in rows]).round(2))


if __name__ == "__main__":
    main()
