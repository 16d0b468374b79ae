import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.hypernetwork import HyperConv2d, KernelWriter, LayerCode, SampleCode
from tests.nets.portable import check_alone, check_portable


def predicted(**settings):
    return HyperConv2d(KernelWriter(5, 4, 6, 3, hidden=7), SampleCode(4, 5), **settings)


def test_a_writer_is_two_linear_maps():
    """One row of the kernel per input channel, by the same second map."""
    torch.manual_seed(0)
    writer, z = KernelWriter(5, 4, 6, 3, hidden=7), torch.randn(2, 5)
    kernel = writer(z)
    assert kernel.shape == (2, 6, 4, 3, 3)
    for i in range(4):
        a = F.linear(z, writer.spread.weight[7 * i : 7 * i + 7], writer.spread.bias[7 * i : 7 * i + 7])
        torch.testing.assert_close(kernel[:, :, i], writer.write(a).reshape(2, 6, 3, 3))


def test_a_batch_is_the_loop():
    torch.manual_seed(0)
    layer, x = predicted(stride=2, padding=1).double(), torch.randn(5, 4, 9, 8).double()
    kernels = layer.writer(layer.encode(x))
    rows = [F.conv2d(row[None], k, layer.bias[0], 2, 1) for row, k in zip(x, kernels, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(rows), rtol=1e-12, atol=1e-12)
    assert (kernels[0] - kernels[1]).abs().max() > 1e-3
    check_alone(layer, x)


def test_layers_share_a_writer_and_differ_by_their_codes():
    torch.manual_seed(0)
    writer = KernelWriter(5, 4, 4, 3)
    model = nn.Sequential(*(HyperConv2d(writer, LayerCode(5), padding=1, bias=False) for _ in range(10)))
    written = sum(p.numel() for p in writer.parameters())
    assert sum(p.numel() for p in model.parameters()) == written + 10 * 5
    assert (writer(model[0].encode(None)) - writer(model[1].encode(None))).abs().max() > 1e-3
    check_alone(model, torch.randn(3, 4, 6, 6))


def test_kernels_start_as_a_relu_network_wants_them():
    torch.manual_seed(0)
    kernels = KernelWriter(32, 64, 64, 3)(torch.randn(8, 32))
    assert kernels.var().item() == pytest.approx(2 / (64 * 9), rel=0.2)


@pytest.mark.parametrize("make", [predicted, lambda: HyperConv2d(KernelWriter(5, 4, 6, 3), LayerCode(5))])
def test_portable(make):
    torch.manual_seed(0)
    check_portable(make(), torch.randn(3, 4, 7, 6))


@pytest.mark.parametrize("code, per_batch", [(SampleCode(4, 5), 5), (LayerCode(5), 1)])
def test_what_it_costs(code, per_batch):
    layer, x = HyperConv2d(KernelWriter(5, 4, 6, 3, hidden=7), code, padding=1), torch.randn(5, 4, 9, 8)
    with CountMacs() as count:
        layer(x)
    coding = 4 * 5 if per_batch == 5 else 0
    assert count.total == per_batch * (coding + 4 * 7 * (5 + 6 * 9)) + 5 * 9 * 8 * 6 * 4 * 9


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: KernelWriter(0, 4, 6, 3),
        lambda: KernelWriter(5, 4, 6, 0),
        lambda: KernelWriter(5, 4, 6, 3, hidden=0),
        lambda: SampleCode(4, 1),
        lambda: predicted(padding=-1),
    ],
)
def test_bad_sizes(wrong):
    with pytest.raises(ConfigError, match="must be at least"):
        wrong()
