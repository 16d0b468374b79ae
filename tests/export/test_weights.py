import io

import pytest
import safetensors.torch
import torch
from torch import nn

from dynanet.core.errors import BundleError
from dynanet.export.weights import (
    MOST_HEADER_BYTES,
    compare,
    content,
    describe,
    header,
    parse_weights,
    state,
)


@pytest.fixture
def tensors():
    return {
        "conv.weight": torch.randn(2, 3, 1, 1),
        "norm.running_var": torch.rand(4) + 0.5,
        "norm.num_batches_tracked": torch.tensor(7),
        "thresholds": torch.tensor([torch.inf, -torch.inf]),
    }


def test_tensors_come_back(tensors):
    found = parse_weights(safetensors.torch.save(tensors), {name: value.to("meta") for name, value in tensors.items()})
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_header_says_what_the_tensors_are_and_where_they_begin(tensors):
    data = safetensors.torch.save(tensors)
    found, start = header(io.BytesIO(data))
    assert found == describe(tensors)
    assert found["conv.weight"] == "F32 [2, 3, 1, 1]" and found["norm.num_batches_tracked"] == "I64 []"
    assert len(data) - start == sum(value.numel() * value.element_size() for value in tensors.values())


def test_a_state_is_a_contiguous_copy():
    model = nn.Sequential(nn.Conv2d(4, 4, 2), nn.Linear(3, 3), nn.Linear(3, 3)).to(memory_format=torch.channels_last)
    model[2].weight = model[1].weight
    found = state(model)
    assert all(value.is_contiguous() and not value.requires_grad for value in found.values())
    assert torch.equal(found["1.weight"], found["2.weight"])
    assert found["1.weight"].data_ptr() != found["2.weight"].data_ptr(), "tied ones are duplicated"
    with torch.no_grad():
        model[0].bias.fill_(5)
    assert not (found["0.bias"] == 5).any()
    assert state(nn.Linear(2, 1, device="meta"))["weight"].is_meta


@pytest.mark.parametrize(
    ("buffer", "says"),
    [
        (torch.zeros(2, dtype=torch.complex64), "extra is torch.complex64"),
        (torch.eye(2).to_sparse(), "extra is torch.float32 torch.sparse_coo; a bundle holds dense tensors of F64"),
    ],
)
def test_tensors_that_no_file_holds_are_named(buffer, says):
    model = nn.Linear(2, 2)
    model.register_buffer("extra", buffer)
    with pytest.raises(BundleError, match=says):
        state(model)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"[]", "expected a JSON object"),
        (b'{"a": 1}', "model.safetensors: 'a' has 1; expected exactly data_offsets, dtype, shape"),
        (b'{"a": {"dtype": 1, "shape": [], "data_offsets": [0, 0]}}', "expected dtype and shape"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 0]}}', "expected dtype and shape"),
    ],
)
def test_headers_that_are_none_are_refused(head, says):
    with pytest.raises(BundleError, match=says):
        header(io.BytesIO(len(head).to_bytes(8, "little") + head))


def test_a_header_that_claims_to_be_huge_is_not_read():
    file = io.BytesIO((MOST_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(BundleError, match="starts with a header of 1,000,001 bytes; expected at most 1,000,000"):
        header(file)
    assert file.tell() == 8


def test_the_first_difference_is_named():
    compare({"a": "F32 [1]"}, {"a": "F32 [1]"}, "expected")
    for found, says in (
        ({"a": "F32 [2]"}, r"has 'F32 \[2\]' for 'a', the manifest says 'F32 \[1\]'"),
        ({}, r"has 'nothing' for 'a'"),
        ({"a": "F32 [1]", "b": "I64 []"}, r"has 'I64 \[\]' for 'b', the manifest says 'nothing'"),
    ):
        with pytest.raises(BundleError, match=says):
            compare(found, {"a": "F32 [1]"}, "the manifest says")


def test_a_file_of_another_size_is_not_read(tensors, tmp_path):
    data = safetensors.torch.save(tensors)
    for written in (data, data + b"x", data[:-1]):
        (tmp_path / "file").write_bytes(written)
        with (tmp_path / "file").open("rb") as file:
            _, start = header(file)
            if written == data:
                assert content(file, start, tensors) == data
                continue
            with pytest.raises(BundleError, match=f"has {len(written):,} bytes, expected {len(data):,}; it is damaged"):
                content(file, start, tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv.weight", torch.nan),
        ("conv.weight", torch.inf),
        ("norm.running_var", -1.0),
        ("norm.running_var", torch.inf),
        ("thresholds", torch.nan),
    ],
)
def test_numbers_that_no_trained_model_has_are_refused(tensors, name, value):
    tensors[name].view(-1)[-1] = value
    with pytest.raises(BundleError, match=f"{name} holds {value}, which is not valid in a trained model"):
        parse_weights(safetensors.torch.save(tensors), tensors)


def test_bytes_that_are_no_tensors_are_refused(tensors):
    with pytest.raises(BundleError, match="is damaged"):
        parse_weights(safetensors.torch.save(tensors)[:-1], tensors)
    with pytest.raises(BundleError, match="it belongs to another model"):
        parse_weights(safetensors.torch.save(tensors), {"conv.weight": tensors["conv.weight"]})
