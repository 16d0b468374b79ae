"""Kills a training run at random moments until it has finished, and compares its end with an undisturbed run's.

A program of its own, for `test_resume.py`: it imports torch and Lightning once, trains only in forked children, and
prints what happened as JSON. `python kill_and_resume.py FOLDER [KILLS]`.
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

from train_toys import run  # noqa: E402

from dynanet import train  # noqa: E402
from dynanet.core.files import write_atomically  # noqa: E402
from dynanet.train import checkpoint, fitting  # noqa: E402, F401

SAMPLES, BATCHES = 60, 12
KINDS = ("in a save", "after a save", "any time")


class Slow:
    """A disk that takes its time, so that kills fall into saves."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, content):
        for part in range(0, len(content), 8192):
            self.file.write(content[part : part + 8192])
            self.file.flush()
            time.sleep(0.004)


def start(folder: Path, epochs: int, slow: bool) -> int:
    """Fork a process that trains to the end; answer its id."""
    process = os.fork()
    if process:
        return process
    try:
        if slow:
            checkpoint.write_atomically = lambda path, write: write_atomically(path, lambda file: write(Slow(file)))
        run(folder, samples=SAMPLES, epochs=epochs, checkpoint_every=2, resume=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(process: int) -> bool:
    found, status = os.waitpid(process, os.WNOHANG)
    if found and status != 0:
        sys.exit(f"a run failed by itself: status {status}")
    return found != 0


def kill(process: int, folder: Path, kind: str) -> bool | None:
    """Kill when the time has come; answer whether that was in a save, or None if the run ended first."""
    saved_before, at = set(folder.glob("step-*.ckpt")), None
    if kind == "any time":
        at = time.monotonic() + random.uniform(0, 0.5)
    while not ended(process):
        now, half_written = time.monotonic(), any(folder.glob(".*.tmp"))
        if at is None and set(folder.glob("step-*.ckpt")) != saved_before and (half_written or kind != "in a save"):
            at = now + random.uniform(0, 0.01 if kind == "in a save" else 0.1)
        if at is not None and now >= at:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return any(folder.glob(".*.tmp"))
        time.sleep(0.0005)
    return None


def main(folder: Path, wanted: int) -> None:
    epochs = max(4, wanted)  # three would do where training is slow; a quick machine gets far between two kills
    alone = start(folder / "alone", epochs, slow=False)
    while not ended(alone):
        time.sleep(0.05)
    killed, kills, in_saves, corrupt = folder / "killed", 0, 0, 0
    while kills < wanted:
        in_save = kill(start(killed, epochs, slow=True), killed, KINDS[kills % 3])
        if in_save is None:
            sys.exit(f"the run finished after only {kills} kills; make it longer")
        kills, in_saves = kills + 1, in_saves + in_save
        corrupt += sum(not checkpoint.is_whole(path) for path in killed.glob("*.ckpt"))
    last = start(killed, epochs, slow=False)
    while not ended(last):
        time.sleep(0.05)
    ends = [train.load_checkpoint(train.newest(folder / name)) for name in ("alone", "killed")]
    weights, momenta = [e["state_dict"] for e in ends], [e["optimizer_states"][0]["state"] for e in ends]
    equal = ends[0]["global_step"] == ends[1]["global_step"] == epochs * BATCHES
    equal &= all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    equal &= all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
    left = len(list(killed.glob(".*")))
    print(json.dumps({"kills": kills, "in_saves": in_saves, "corrupt": corrupt, "left": left, "equal": bool(equal)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12)
