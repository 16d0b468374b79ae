"""CIFAR-10: networks with early exits, and static ones of other sizes trained by the same recipe.

    python recipes/cifar10.py staged --data DIR --out runs/cifar10/staged
    python recipes/cifar10.py static --width 0.5 --data DIR --out runs/cifar10/static-0.5
    python recipes/cifar10.py msdnet --data DIR --out runs/cifar10/msdnet
    python recipes/cifar10.py ranet --epochs 3 --data DIR --out runs/cifar10_short/ranet   # beside others of 3 epochs

DIR holds the parquet files of the Hugging Face hub's `cifar10`. SGD with Nesterov momentum, one cycle, crop and flip;
5,000 training images are held out for calibration and never seen. The state is saved after every epoch, and a run that
was stopped goes on from there. Your own loop works as well as `train.fit`: this is one.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from dynanet import zoo
from dynanet.core.dynamic import record
from dynanet.core.files import write_atomically
from dynanet.data.augment import CropFlip, channel_stats, normalise
from dynanet.data.parquet import load_parquet
from dynanet.data.splits import hold_out


def build(args):
    if args.model == "staged":
        return zoo.staged_resnet(num_classes=10, depths=(1, 2, 2), context=64)
    if args.model == "static":
        return zoo.static_resnet(num_classes=10, depths=(1, 2, 2), width_multiplier=args.width)
    return {"msdnet": zoo.msdnet, "ranet": zoo.ranet}[args.model](num_classes=10)


def objective_for(args):
    if args.model == "static":
        return lambda answer, y, trace: nn.functional.cross_entropy(answer, y)
    from dynanet.train.objectives import MultiExit

    return MultiExit(distill=0.5)


def accuracy(model, x, y, mean, std):
    """Of every exit, or of the only one."""
    model.eval()
    right = 0
    with torch.no_grad():
        for i in range(0, len(x), 500):
            batch = normalise(x[i : i + 500], mean, std)
            answers = model(batch) if isinstance(model, nn.Sequential) else torch.stack(model.answers(batch))
            right = right + (answers.argmax(-1) == y[i : i + 500]).sum(-1)
    return [round(r / len(x), 4) for r in torch.as_tensor(right).reshape(-1).tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=["staged", "static", "msdnet", "ranet"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out = hold_out(load_parquet(args.data, "train").to_memory(), 5000, seed=0)
    test = load_parquet(args.data, "test").to_memory()
    mean, std = channel_stats(train.images)
    draws = torch.Generator()
    augment = CropFlip(mean, std, generator=draws)

    model, objective = build(args).to(memory_format=torch.channels_last), objective_for(args)  # a tenth faster or more
    steps = len(train) // 128
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.2, anneal_strategy="linear"
    )
    state, done, seconds = args.out / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done, seconds = saved["epoch"], saved["seconds"]

    for epoch in range(done, args.epochs):
        start, total = time.monotonic(), 0.0
        draws.manual_seed(1000 * args.seed + epoch)  # the order and the crops follow from the epoch alone
        model.train()
        for rows in torch.randperm(len(train), generator=draws)[: steps * 128].split(128):
            with torch.autocast("cpu", torch.bfloat16), record(model) as trace:
                loss = objective(model(augment(train.images[rows])), train.labels[rows], trace)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds += time.monotonic() - start
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
            "seconds": seconds,
        }
        write_atomically(state, lambda file, saved=saved: torch.save(saved, file))
        shown = accuracy(model, held_out.images, held_out.labels, mean, std) if epoch % 5 == 4 else ""
        print(f"epoch {epoch + 1} loss {total / steps:.3f} {seconds:.0f} s held out {shown}", flush=True)
    print("test", accuracy(model, test.images, test.labels, mean, std), flush=True)


if __name__ == "__main__":
    main()
