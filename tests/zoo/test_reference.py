"""Against what the authors' networks answered (../shared/parity), and what a wrong checkpoint gets."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import CheckpointError, ConfigError
from dynanet.zoo import load_reference, msdnet, ranet
from dynanet.zoo.reference import macs_per_exit, paper_flops, reference_state_dict

PARITY = Path(os.environ.get("DYNANET_DATA", Path(__file__).parents[2].parent / "shared")) / "parity"
CASES = sorted([*PARITY.glob("msdnet*.json"), *PARITY.glob("ranet*.json")])
SMALL = {"data": "cifar10", "nBlocks": 2, "base": 1, "step": 1, "stepmode": "even", "nChannels": 4, "growthRate": 2}


@pytest.mark.parametrize("path", CASES or [None], ids=lambda path: path.stem if path else "absent")
def test_the_authors_logits(path, weight, seeded_input):
    if path is None:
        pytest.skip(f"no parity cases in {PARITY}")
    case = json.loads(path.read_text())
    state = {
        key: weight(key, shape) if dtype == "float32" else torch.zeros(shape, dtype=torch.int64)
        for key, shape, dtype in case["keys"]
    }
    model = load_reference(case["system"], case["config"], state)
    with torch.no_grad():
        answers = model.answers(seeded_input(case["input_shape"]))
    theirs = np.load(path.with_suffix(".npz"))
    assert len(answers) == len(theirs.files)
    for k, answer in enumerate(answers):
        logits = theirs[f"logits_{k}"]
        np.testing.assert_allclose(answer.numpy(), logits, rtol=0, atol=1e-5 * logits.std())
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    assert paper_flops(model, tuple(case["input_shape"][1:])) == case["counter_flops_per_exit"]
    assert list(reference_state_dict(model)) == [key for key, _, _ in case["keys"]]
    parallel = load_reference(
        case["system"], case["config"], {f"module.{key}": tensor for key, tensor in state.items()}
    )
    assert all(
        torch.equal(a, b) for a, b in zip(parallel.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_exits_that_are_off_are_not_counted():
    """What is left is what a cost model measures, exit by exit."""
    model = msdnet(num_classes=10, blocks=4, channels=4, growth=2)
    before = macs_per_exit(model, (3, 32, 32)), paper_flops(model, (3, 32, 32))
    model.active = (1, 3)
    x = torch.zeros(1, 3, 32, 32)
    cost = CostModel(model, x)
    with torch.no_grad(), record(model.eval()) as trace:
        model(x)
    macs = macs_per_exit(model, (3, 32, 32))
    assert macs == cost.steps(trace)[0].tolist()
    for after, all_on in zip((macs, paper_flops(model, (3, 32, 32))), before, strict=True):
        assert len(after) == 2 and after[0] < all_on[1] and after[1] < all_on[3]


@pytest.mark.parametrize("prune", ["max", "min"])
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("data", ["cifar100", "ImageNet"])
def test_there_and_back(prune, bottleneck, data, seeded, seeded_input):
    """Our weights under the authors' names load back to the same network, every branch of the configuration."""
    factors = [1, 2, 4] if data == "cifar100" else [1, 1, 2, 2]
    config = {**SMALL, "data": data, "base": 3, "prune": prune, "bottleneck": bottleneck}
    config |= {"grFactor": factors, "bnFactor": factors}
    model = msdnet(
        num_classes=100 if data == "cifar100" else 1000, blocks=2, base=3, step_mode="even", channels=4, growth=2,
        prune=prune, bottleneck=bottleneck, growth_factors=factors, bottleneck_factors=factors,
        head="cifar" if data == "cifar100" else "imagenet",
    )  # fmt: skip
    again = load_reference("MSDNet", config, reference_state_dict(seeded(model)))
    x = seeded_input((2, 3, 32, 32))
    for one, other in zip(model.answers(x), again.answers(x), strict=True):
        assert torch.equal(one, other)


def test_the_authors_names():
    names = list(reference_state_dict(msdnet(num_classes=2, blocks=2, head="imagenet")))
    for name in (
        "blocks.0.0.layers.0.0.bias",
        "blocks.0.0.layers.1.net.1.running_mean",
        "blocks.0.1.layers.0.conv_normal.net.0.weight",
        "blocks.1.0.layers.0.conv_down.net.3.weight",
        "blocks.1.1.m.0.net.0.weight",
        "classifier.1.m.1.net.0.weight",
        "classifier.1.linear.bias",
    ):
        assert name in names


RANET = {"data": "ImageNet", "nBlocks": 1, "block_step": 1, "step": 2, "nChannels": 2, "growthRate": 4}
RANET |= {"scale_list": "1-2-2", "grFactor": [2, 1, 1], "bnFactor": "2-1-1", "nScales": 3}


@pytest.mark.parametrize("data", ["cifar100", "ImageNet"])
@pytest.mark.parametrize("stepmode", ["even", "lg"])
def test_ranet_there_and_back(data, stepmode, seeded, seeded_input):
    model = ranet(
        num_classes=100 if data == "cifar100" else 1000, blocks=1, block_step=1, step=2, channels=2, growth=4,
        step_mode="even" if stepmode == "even" else "lin_grow", scales=(1, 2, 2), growth_factors=(2, 1, 1),
        bottleneck_factors=(2, 1, 1), head="cifar" if data == "cifar100" else "imagenet",
    )  # fmt: skip
    state = reference_state_dict(seeded(model))
    again = load_reference("RANet", {**RANET, "data": data, "stepmode": stepmode}, state)
    x = seeded_input((2, 3, 32, 32))
    for one, other in zip(model.answers(x), again.answers(x), strict=True):
        assert torch.equal(one, other)
    assert ("FirstLayer.layers.0.0.bias" in state) == (data == "ImageNet")
    for name in (
        "scale_flows.0.0.layers.1.conv_normal.net.3.weight",
        "scale_flows.1.0.layers.0.conv_up.net.0.weight",
        "scale_flows.1.0.conv_last.net.1.running_var",
        "scale_flows.2.0.trans.net.0.weight",
        "FirstLayer.layers.2.net.0.weight",
        "classifier.2.m.1.net.0.weight",
        "classifier.0.linear.bias",
    ):
        assert name in state


@pytest.mark.parametrize(
    "change, says",
    [
        ({"stepmode": "odd"}, "RANet's stepmode is 'odd'; expected 'even' or 'lg'"),
        ({"scale_list": "1-2"}, "scale_list has 2 factors for nScales 3"),
        ({"data": "mnist"}, "RANet's data is 'mnist'"),
        ({"compress_factor": 0}, "compress must be .* got 0"),
    ],
)
def test_a_ranet_configuration_that_means_no_network_is_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        load_reference("RANet", {**RANET, **change}, {})


def test_weights_of_another_ranet_are_refused():
    with pytest.raises(CheckpointError, match="of a RANet of this configuration: .* missing .*scale_flows.0.0"):
        load_reference("RANet", RANET, {})


@pytest.fixture
def state():
    return reference_state_dict(msdnet(num_classes=10, blocks=2, step_mode="even", channels=4, growth=2))


def test_old_checkpoints_without_counters_load(state):
    old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    load_reference("MSDNet", SMALL, old)


def test_the_command_lines_form_and_other_arguments(state):
    config = {**SMALL, "grFactor": "1-2-4", "bnFactor": "1-2-4", "nScales": 3, "lr": 0.1, "epochs": 300}
    load_reference("MSDNet", config, state)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda s: s.pop("classifier.1.linear.bias"), r"1 missing \(classifier.1.linear.bias\)"),
        (lambda s: s.update({"fc.weight": torch.zeros(1)}), r"1 unexpected \(fc.weight\)"),
        (lambda s: s.update({"classifier.0.linear.bias": torch.zeros(7)}), r"linear.bias is \(7,\), expected \(10,\)"),
        (lambda s: s.update({"classifier.0.linear.bias": "zeros"}), r"linear.bias is str, expected \(10,\)"),
        (lambda s: s.clear(), r"missing \(.*, .*, .*, \.\.\.\)"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(state, damage, says):
    damage(state)
    with pytest.raises(CheckpointError, match=says):
        load_reference("MSDNet", SMALL, state)


def test_a_whole_checkpoint_is_refused_with_advice(state):
    with pytest.raises(CheckpointError, match="'state_dict' entry"):
        load_reference("MSDNet", SMALL, {"epoch": 300, "state_dict": state})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"data": "mnist"}, "data is 'mnist'"),
        ({"grFactor": "1-x"}, "grFactor is '1-x'"),
        ({"bnFactor": [1, 2], "nScales": 3}, "bnFactor has 2 factors for nScales 3"),
        ({"bottleneck": "False"}, "bottleneck is 'False'"),
        ({"stepmode": "odd"}, "step_mode must be .* got 'odd'"),
    ],
)
def test_a_configuration_that_means_no_network_is_refused(state, change, says):
    with pytest.raises(ConfigError, match=says):
        load_reference("MSDNet", {**SMALL, **change}, state)


def test_unknown_systems_and_conventions_are_refused(state):
    with pytest.raises(ConfigError, match="unknown system 'MSDNET'"):
        load_reference("MSDNET", SMALL, state)
    with pytest.raises(ConfigError, match="unknown convention 'sact'"):
        paper_flops(msdnet(num_classes=2), (3, 32, 32), convention="sact")


def test_counting_leaves_the_model_as_it_is():
    model = msdnet(num_classes=2, blocks=2).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    paper_flops(model, (3, 32, 32))
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
