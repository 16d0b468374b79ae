"""Trains a model with an exit switched off on two processes. For `test_lightning.py`. `python exit_off.py FOLDER
STRATEGY`; Lightning starts it a second time for the second process. Prints what came of it.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from train_toys import data

from dynanet import train
from dynanet.core.errors import ConfigError
from dynanet.mechanisms.early_exit import EarlyExit

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

if __name__ == "__main__":
    torch.manual_seed(0)
    model = EarlyExit([nn.Linear(8, 8) for _ in range(3)], [nn.Linear(8, 3) for _ in range(3)])
    model.active = (0, 2)
    try:
        done = train.fit(
            model,
            train.Batches(data(32), 4, shuffle=True),
            objective=train.MultiExit(),
            epochs=2,
            folder=Path(sys.argv[1]),
            accelerator="cpu",
            devices=2,
            strategy=sys.argv[2],
            progress=False,
        )
        told = f"trained for {done.trainer.global_step} steps"
    except ConfigError as error:
        told = f"refused: {error}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(told, flush=True)
    os._exit(0)
