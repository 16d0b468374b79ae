"""Golden files freeze the zoo: parameters, MACs, shapes and logits from key-seeded weights.

After a change that is meant, write them anew with `DYNANET_FREEZE=1 pytest tests/zoo/test_golden.py`, and say why.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from dynanet import zoo
from dynanet.zoo.reference import macs_per_exit, paper_flops

GOLDEN = Path(__file__).parent / "golden"
MODELS = {
    "msdnet_small": lambda: zoo.msdnet(num_classes=10, blocks=3),
    "msdnet_min_plain": lambda: zoo.msdnet(
        num_classes=7, in_channels=5, blocks=3, base=2, step_mode="even", prune="min", bottleneck=False, growth=4,
        growth_factors=(2, 2, 4), bottleneck_factors=(1, 1, 1), reduction=0.7,
    ),
    "msdnet_imagenet_small": lambda: zoo.msdnet(
        num_classes=12, blocks=2, base=3, step=2, step_mode="even", channels=8, growth=4, growth_factors=(1, 2, 4, 4),
        bottleneck_factors=(1, 2, 4, 4), head="imagenet",
    ),
    "ranet_small": lambda: zoo.ranet(num_classes=10, blocks=2, block_step=1, step=2, channels=8, growth=4),
    "staged_resnet": lambda: zoo.staged_resnet(num_classes=10),
    "staged_resnet_plain": lambda: zoo.staged_resnet(num_classes=10, exits=(0, 2, 3), context=0),
}  # fmt: skip
SIZE = {"msdnet_imagenet_small": 64}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_was(name, seeded, seeded_input):
    model = seeded(MODELS[name]())
    found = figures(model, name, seeded_input)
    path = GOLDEN / f"{name}.json"
    if os.environ.get("DYNANET_FREEZE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    logits, golden_logits = found.pop("logits"), golden.pop("logits")
    assert found == golden
    for here, then in zip(logits, golden_logits, strict=True):
        spread = then["std"]
        assert here["first"] == pytest.approx(then["first"], abs=1e-4 * spread)
        assert here["mean"] == pytest.approx(then["mean"], abs=1e-4 * spread)
        assert here["std"] == pytest.approx(spread, rel=1e-4)


def figures(model, name, seeded_input) -> dict:
    channels = next(model.parameters()).shape[1]
    size = SIZE.get(name, 32)
    state = model.state_dict()
    with torch.no_grad():
        answers = model.answers(seeded_input((2, channels, size, size)))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs_per_exit(model, (channels, size, size)),
        "msdnet_flops": paper_flops(model, (channels, size, size)),
        "shapes": [list(answer.shape) for answer in answers],
        "state": {key: list(state[key].shape) for key in state if not key.endswith("num_batches_tracked")},
        "logits": [
            {"mean": answer.mean().item(), "std": answer.std().item(), "first": answer[:, :3].flatten().tolist()}
            for answer in answers
        ],
    }
