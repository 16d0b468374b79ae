"""A bundle that loads is, byte for byte, the bundle that was written; everything else is one line of BundleError."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.core import files
from dynanet.core.errors import BundleError, ConfigError
from dynanet.export.bundles import bundle, load, read
from dynanet.export.card import Card
from dynanet.export.config import Inputs
from dynanet.zoo.staged_resnets import staged_resnet
from tests.export.edits import CANARY, NAMES, WEIGHTS, Tiny, edit_json, reseal, tiny
from tests.export.hostile import cases

BUILDERS = {"tiny": tiny}
INPUTS = Inputs(channels=2, size=(8, 8), mean=(0.5, 0.25), std=(1, 2.0))
CASES = list(cases())


def make() -> Tiny:
    """A trained and calibrated model, as far as a bundle can tell."""
    torch.manual_seed(0)
    model = tiny(num_classes=3)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else 7)
    return model


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "bundle"
    bundle(make(), folder, classes=["a", "b", "ä"], inputs=INPUTS, mean_macs=1.5, worst_macs=2)
    return folder


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "bundle")


# --- what is written comes back -------------------------------------------------------------------------------------


def test_exits_that_are_off_stay_off(tmp_path):
    torch.manual_seed(0)
    model = staged_resnet(num_classes=3, widths=(4, 8), depths=(2, 1), context=0).eval()
    model.thresholds.fill_(-0.5)
    bundle(model, tmp_path / "on")
    model.active = (1, 2)
    bundle(model, tmp_path / "off")
    again = load(tmp_path / "off", {"staged_resnet": staged_resnet})
    assert again.active == (1, 2) and again.steps == 2
    x = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert load(tmp_path / "on", {"staged_resnet": staged_resnet}).active == (0, 1, 2)
    edit_json(tmp_path / "off" / "config.json", {"active": {"": [2, 1]}})
    reseal(tmp_path / "off")
    with pytest.raises(BundleError, match="expected ascending numbers of exits"):
        load(tmp_path / "off", {"staged_resnet": staged_resnet})


def test_the_model_comes_back(tmp_path):
    model = make()
    model.limit = 1
    fingerprint = bundle(model, tmp_path / "a", classes=["a", "b", "ä"], inputs=INPUTS, mean_macs=1.5, worst_macs=2)
    found = read(tmp_path / "a", BUILDERS, fingerprint=fingerprint)
    assert found.classes == ["a", "b", "ä"] and found.inputs == INPUTS
    assert (found.mean_macs, found.worst_macs, found.fingerprint) == (1.5, 2, fingerprint)
    assert found.model.limit == 1 and not found.model.training
    x = torch.rand(5, 2, 8, 8)
    assert torch.equal(found.model(x), model.eval()(x))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in found.model.state_dict().items())
    assert sorted(os.listdir(tmp_path / "a")) == sorted(NAMES) and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("threshold", [torch.inf, -torch.inf, 0.5])
def test_thresholds_may_be_infinite(tmp_path, threshold):
    model = make()
    model.thresholds.fill_(threshold)
    bundle(model, tmp_path / "a")
    assert load(tmp_path / "a", BUILDERS).thresholds.item() == threshold


def test_the_same_model_gives_the_same_bytes(tmp_path):
    assert bundle(make(), tmp_path / "a") == bundle(make(), tmp_path / "b")
    again = load(tmp_path / "a", BUILDERS)
    assert bundle(again, tmp_path / "c") == bundle(make(), tmp_path / "b")


def test_tied_and_strided_weights_come_back(tmp_path):
    model = make()
    model.heads[1].weight = model.heads[0].weight
    model.first[0].weight.data = model.first[0].weight.data.to(memory_format=torch.channels_last)
    bundle(model, tmp_path / "a")
    again = load(tmp_path / "a", BUILDERS)
    assert torch.equal(again.heads[1].weight, model.heads[0].weight)
    assert torch.equal(again.first[0].weight, model.first[0].weight)


def test_loading_leaves_the_seed_alone(good):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load(good, BUILDERS)
    assert torch.equal(torch.rand(3), expected)


def test_another_fingerprint_is_another_bundle(good):
    with pytest.raises(BundleError, match="another bundle"):
        load(good, BUILDERS, fingerprint="0" * 64)


def test_the_card_says_what_it_was_told(tmp_path):
    rows = [{"budget (MACs)": 1.25e7, "test accuracy (%)": 91.3, "a|b": "c|d\n"}, {"budget (MACs)": 5, "a|b": ""}]
    card = Card(summary="For tests.", results=rows, data="None at all.", licence="CC0-1.0", citation="@misc{x}")
    bundle(make(), tmp_path / "a", card=card, inputs=INPUTS)
    text = (tmp_path / "a" / "README.md").read_text()
    for part in ("For tests.", "| 12,500,000 | 91.3 | c\\|d |", "None at all.", "CC0-1.0", "@misc{x}", "dynanet.load("):
        assert part in text
    assert f"parameters: {sum(p.numel() for p in make().parameters())}" in text


# --- what cannot be written -----------------------------------------------------------------------------------------


def rebuilt(change):
    model = make()
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (nn.Linear(2, 2), {}, "not built by a function of the zoo"),
        (rebuilt(lambda m: m.heads[0].weight.data.fill_(torch.nan)), {}, "heads.0.weight holds nan"),
        (rebuilt(lambda m: m.heads.append(nn.Linear(4, 3))), {}, "heads.2"),
        (rebuilt(lambda m: m.first.append(nn.ReLU())), {}, "first.2' is now ReLU"),
        (rebuilt(lambda m: m.double()), {}, "F64"),
        (rebuilt(lambda m: m.register_buffer("z", torch.zeros(1, dtype=torch.complex64))), {}, "complex64"),
        (tiny(num_classes=3, tags=nn.ReLU()), {}, "tags of tiny is ReLU"),
        (make(), {"classes": ["a"]}, "1 classes"),
        (make(), {"classes": ["a", "b", torch.ones(1)]}, "classes"),
        (make(), {"inputs": Inputs(3)}, "3 channels"),
        (make(), {"mean_macs": float("nan")}, "mean MACs"),
        (make(), {"card": Card(summary="x" * 2_000_000)}, "README.md is longer"),
    ],
)
def test_what_would_not_load_is_not_written(tmp_path, model, arguments, says):
    with pytest.raises(BundleError, match=says):
        bundle(model, tmp_path / "a", **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 0},
        {"channels": 2, "size": (3,)},
        {"channels": 2, "mean": (1,)},
        {"channels": 1, "std": (0,)},
        {"channels": 1, "rate": 0},
    ],
)
def test_inputs_mean_something(wrong):
    with pytest.raises(ConfigError):
        Inputs(**wrong)


@pytest.mark.parametrize("there", ["README.md", "thesis.tex", None])
def test_what_is_not_a_bundle_is_left_alone(tmp_path, there):
    place = tmp_path / "a"
    if there:
        place.mkdir()
        (place / there).write_text("mine")
    else:
        place.write_text("mine")
    with pytest.raises(BundleError):
        bundle(make(), place)
    assert (place / there if there else place).read_text() == "mine" and os.listdir(tmp_path) == ["a"]


def test_a_bundle_is_replaced_and_an_empty_folder_filled(copy):
    model = make()
    model.thresholds.fill_(0.125)
    bundle(model, copy)
    assert load(copy, BUILDERS).thresholds.item() == 0.125
    (copy.parent / "b").mkdir()
    bundle(model, copy.parent / "b")
    assert sorted(os.listdir(copy.parent)) == ["b", "bundle"]


@pytest.mark.parametrize("nth", range(4))
def test_a_full_disk_leaves_the_old_bundle(copy, monkeypatch, nth):
    """The disk is full at the nth of the four files."""
    real, calls = os.fsync, iter(range(100))

    def full(handle):
        if next(calls) == 2 * nth:  # each file is synced, then its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    model = make()
    model.thresholds.fill_(0.125)
    with pytest.raises(BundleError, match="No space left on device"):
        bundle(model, copy)
    assert load(copy, BUILDERS).thresholds.item() != 0.125 and os.listdir(copy.parent) == ["bundle"]


def test_no_parent_folder(tmp_path):
    with pytest.raises(BundleError, match="No such file"):
        bundle(make(), tmp_path / "missing" / "a")


def test_a_save_that_was_killed_says_where_the_bundle_is(copy):
    aside = copy.with_name(f".{copy.name}.0123abcd.old")
    copy.rename(aside)
    with pytest.raises(BundleError, match=aside.name):
        load(copy, BUILDERS)


# --- the hostile corpus ---------------------------------------------------------------------------------------------


def test_the_good_one_loads_and_reseals(copy):
    reseal(copy)
    load(copy, BUILDERS)


def test_the_corpus_is_large_and_each_case_has_its_name():
    assert len(CASES) >= 200 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile(copy, case):
    case.edit(copy)
    seconds, memory = time.process_time(), Memory()
    with pytest.raises(BundleError) as caught:
        load(copy, BUILDERS)
    assert time.process_time() - seconds < 1
    assert memory.grown() < 64_000_000
    message = str(caught.value)
    assert case.says in message
    assert message.isprintable() and len(message) < 600
    assert not copy.with_name(CANARY).exists()


class Memory:
    """By how many bytes the peak of this process has risen above what it held; Linux says so, elsewhere 0."""

    def __init__(self) -> None:
        self.before = 0
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
            self.before = self.read("VmRSS")

    def grown(self) -> int:
        return self.read("VmHWM") - self.before if self.before else 0

    def read(self, key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_the_measure_of_memory_sees_memory():
    memory = Memory()
    if not memory.before:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    torch.ones(25_000_000)
    assert memory.grown() > 90_000_000


def test_loading_imports_no_compiler(good):
    """Building on the meta device imports torch._dynamo for some calls; that would be four seconds per process."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.export.edits import tiny
from dynanet.export.bundles import load
load({str(good)!r}, {{"tiny": tiny}})
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.sampled_from(NAMES), st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.integers(0, 1))
@example(WEIGHTS, 0.999999, 0, 1)
def test_no_changed_byte_loads(copy, good, name, at, byte, gone):
    data = (good / name).read_bytes()
    at = int(at * len(data))
    changed = data[:at] + bytes([byte]) + data[at + gone :]
    (copy / name).write_bytes(changed)
    try:
        load(copy, BUILDERS)
    except BundleError:
        assert changed != data
    else:
        assert changed == data
    finally:
        (copy / name).write_bytes(data)


@FUZZ
@given(st.sampled_from([WEIGHTS, "config.json"]), st.data())
def test_what_an_attacker_seals_is_refused_or_harmless(copy, good, name, data):
    """Any splice of a file whose hashes are then made to fit: BundleError, or the architecture with finite numbers."""
    content = (good / name).read_bytes()
    end = int.from_bytes(content[:8], "little") + 8 if name == WEIGHTS else len(content)  # the header is what is parsed
    start = data.draw(st.integers(0, end - 1))
    stop = data.draw(st.integers(start, min(end, start + 8)))
    json = st.sampled_from([b"1", b"-1", b"null", b"[]", b"{}", b'"', b"9" * 30])
    new = data.draw(st.one_of(st.binary(max_size=8), json))
    (copy / name).write_bytes(content[:start] + new + content[stop:])
    reseal(copy)
    try:
        model = load(copy, BUILDERS)
    except BundleError as error:
        assert str(error).isprintable()
    else:
        assert isinstance(model, Tiny) and all(v.isfinite().all() for v in model.state_dict().values())
    finally:
        (copy / name).write_bytes(content)


def test_the_config_alone_decides_nothing_about_code(copy):
    """A name that is not in the builders is never looked up anywhere else."""
    config = json.loads((copy / "config.json").read_text()) | {"architecture": "hostile.tiny"}
    (copy / "config.json").write_text(json.dumps(config))
    reseal(copy)
    with pytest.raises(BundleError, match=re.escape("'hostile.tiny'; expected one of tiny")):
        load(copy, BUILDERS)
