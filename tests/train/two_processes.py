"""Trains one model three times: alone, by two processes, and by two that are stopped and resumed. For
`test_lightning.py`. `python two_processes.py FOLDER`; Lightning starts it a second time for the second process.
"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import nn
from train_toys import data

from dynanet import train
from dynanet.mechanisms.early_exit import EarlyExit

torch.set_num_threads(1)
warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)


class Stop(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 5:
            raise KeyError("stopped")


def fitted(folder: Path, processes: int, **options) -> None:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.ReLU())]
    train.fit(
        EarlyExit(stages, [nn.Linear(16, 3), nn.Linear(16, 3)]),
        train.Batches(data(32), 8 // processes, shuffle=True),
        train.Batches(data(12), 4),
        objective=train.MultiExit(distill=0.5),
        equilibrium=True,
        epochs=2,
        folder=folder,
        checkpoint_every=2,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        progress=False,
        **options,
    )


if __name__ == "__main__":
    home = Path(sys.argv[1])
    fitted(home / "two", 2)
    try:
        fitted(home / "resumed", 2, callbacks=[Stop()])
    except KeyError:
        pass
    fitted(home / "resumed", 2, resume=True)
    if torch.distributed.get_rank() == 0:
        torch.distributed.destroy_process_group()
        fitted(home / "one", 1)
