"""Kills a training run at random moments until it has finished, and compares its end with an undisturbed run's.

A program of its own, for `test_resume.py`: it imports torch and Lightning once, trains only in forked children, and
prints what happened as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)

from toys import run  # noqa: E402

from dynanet import train  # noqa: E402
from dynanet.core.files import write_atomically  # noqa: E402
from dynanet.train import checkpoint, saving  # noqa: E402, F401

OPTIONS = {"samples": 60, "epochs": 3, "checkpoint_every": 2}
EPOCH_STEPS = 12


class Slow:
    """A disk that takes its time, so that kills fall into saves."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        for part in range(0, len(content), 8192):
            self.file.write(content[part : part + 8192])
            self.file.flush()
            time.sleep(0.004)


def child(folder: Path, slow: bool) -> int:
    """Fork a process that trains to the end; answer its id."""
    process = os.fork()
    if process:
        return process
    try:
        if slow:
            checkpoint.write_atomically = lambda path, write: write_atomically(path, lambda file: write(Slow(file)))
        run(folder, resume=True, **OPTIONS)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(process: int) -> bool:
    found, status = os.waitpid(process, os.WNOHANG)
    if found and status != 0:
        sys.exit(f"a run failed by itself: status {status}")
    return found != 0


def main(folder: Path) -> None:
    dice = random.Random(int.from_bytes(os.urandom(4), "little"))
    alone = child(folder / "alone", slow=False)
    while not ended(alone):
        time.sleep(0.05)
    killed, kills, in_saves, after_a_save, corrupt = folder / "killed", 0, 0, 0, 0
    finished = False
    while not finished:
        before = set(killed.glob("step-*.ckpt"))
        process = child(killed, slow=kills < 14)
        aim_at_save = kills % 2 == 0
        deadline = None
        while True:
            if ended(process):
                finished = True
                break
            now = time.monotonic()
            saving_now = any(killed.glob(".*.tmp"))
            progressed = set(killed.glob("step-*.ckpt")) != before
            if deadline is None and progressed and (saving_now or not aim_at_save):
                deadline = now + dice.uniform(0, 0.01 if aim_at_save else 0.15)
            if kills < 14 and deadline is not None and now >= deadline:
                in_saves += any(killed.glob(".*.tmp"))
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                kills += 1
                after_a_save += bool(progressed)
                corrupt += sum(not checkpoint.is_whole(path) for path in killed.glob("*.ckpt"))
                break
            time.sleep(0.0005)
    ends = [train.load_checkpoint(train.newest(folder / name)) for name in ("alone", "killed")]
    weights, momenta = [e["state_dict"] for e in ends], [e["optimizer_states"][0]["state"] for e in ends]
    equal = ends[0]["global_step"] == ends[1]["global_step"] == 3 * EPOCH_STEPS
    equal &= all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    equal &= all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
    told = {"kills": kills, "kills_in_saves": in_saves, "kills_after_a_save": after_a_save, "corrupt": corrupt}
    print(json.dumps({**told, "equal": bool(equal)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
