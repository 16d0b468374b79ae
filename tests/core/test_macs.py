"""Hand counts against what CountMacs sees. torch's own counter would answer 0 for many of these on the CPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, execute, record
from dynanet.core.errors import StructureError
from dynanet.core.macs import CountMacs

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]
B, T, D, H = 2, 5, 8, 2  # samples, tokens, features, heads


def counted(f, mode=torch.no_grad):
    with mode(), CountMacs() as count:
        f()
    return count.total


def attention(tokens=T, rows=B):
    """Projections in and out, then two products per pair of tokens."""
    return rows * (tokens * 4 * D * D + tokens * tokens * 2 * D)


def recurrent(gates, inputs, hidden, layers=1, directions=1):
    return sum(
        B * T * directions * gates * hidden * ((inputs if layer == 0 else hidden * directions) + hidden)
        for layer in range(layers)
    )


x = torch.randn(B, T, D)
q, k, v = torch.randn(B, H, T, 4), torch.randn(B, H, 7, 4), torch.randn(B, H, 7, 3)
mask = torch.ones(T, 7, dtype=torch.bool)
image = torch.randn(B, 4, 7, 9)

PRODUCTS = {
    "linear": (lambda: F.linear(x, torch.ones(3, D), torch.ones(3)), B * T * D * 3),
    "linear without bias": (lambda: F.linear(x, torch.ones(3, D)), B * T * D * 3),
    "linear, one row": (lambda: F.linear(x[0, 0], torch.ones(3, D)), D * 3),
    "linear, bfloat16": (lambda: F.linear(x.bfloat16(), torch.ones(3, D).bfloat16()), B * T * D * 3),
    "matmul": (lambda: x @ torch.ones(D, 4), B * T * D * 4),
    "einsum": (lambda: torch.einsum("btd,bsd->bts", x, x), B * T * T * D),
    "bmm": (lambda: torch.bmm(x, x.mT), B * T * T * D),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(B, T, T), x, x.mT), B * T * T * D),
    "addbmm": (lambda: torch.addbmm(torch.zeros(T, T), x, x.mT), B * T * T * D),
    "mv": (lambda: torch.mv(x[0], torch.ones(D)), T * D),
    "addmv": (lambda: torch.addmv(torch.zeros(T), x[0], torch.ones(D)), T * D),
    "dot": (lambda: torch.dot(x[0, 0], x[0, 1]), D),
    "vdot": (lambda: torch.vdot(x[0, 0], x[0, 1]), D),
    "elementwise": (lambda: (x * x + x).sum(), 0),
    "conv": (lambda: F.conv2d(image, torch.ones(6, 4, 3, 3), padding=1), B * 6 * 63 * 4 * 9),
    "conv, strided, in groups": (
        lambda: F.conv2d(image, torch.ones(6, 2, 3, 3), stride=2, padding=1, groups=2),
        B * 6 * 20 * 2 * 9,
    ),
    "conv, depthwise": (lambda: F.conv2d(image, torch.ones(4, 1, 3, 3), groups=4), B * 4 * 35 * 9),
    "conv, dilated": (lambda: F.conv2d(image, torch.ones(6, 4, 3, 3), dilation=2), B * 6 * 15 * 4 * 9),
    "conv1d": (lambda: F.conv1d(x, torch.ones(3, T, 3)), B * 3 * 6 * T * 3),
    "conv, transposed": (
        lambda: F.conv_transpose2d(image, torch.ones(4, 6, 3, 3), stride=2),
        B * 4 * 63 * 6 * 9,
    ),
    "conv, transposed, in groups": (
        lambda: F.conv_transpose2d(image, torch.ones(4, 3, 3, 3), groups=2),
        B * 4 * 63 * 3 * 9,
    ),
    "attention": (lambda: F.scaled_dot_product_attention(q, k, k), B * H * T * 7 * 8),
    "attention, float64": (lambda: F.scaled_dot_product_attention(q.double(), k.double(), k.double()), B * H * T * 56),
    "attention, masked": (lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask), B * H * T * 7 * 8),
    "attention, narrow values": (lambda: F.scaled_dot_product_attention(q, k, v), B * H * T * 7 * 7),
    "attention, causal": (lambda: F.scaled_dot_product_attention(k, k, k, is_causal=True), B * H * 7 * 7 * 8),
    "distances": (lambda: torch.cdist(x, x), B * T * T * D),
    "bilinear": (lambda: F.bilinear(x[:, 0], x[:, 1, :3], torch.ones(5, D, 3)), B * 5 * D * 3),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, mode):
    f, macs = PRODUCTS[name]
    assert counted(f, mode) == macs


LAYERS = {
    "lstm": (lambda: nn.LSTM(D, 3, batch_first=True), recurrent(4, D, 3)),
    "lstm, two layers, both ways": (
        lambda: nn.LSTM(D, 3, 2, batch_first=True, bidirectional=True),
        recurrent(4, D, 3, 2, 2),
    ),
    "gru": (lambda: nn.GRU(D, 3, batch_first=True), recurrent(3, D, 3)),
    "gru, two layers, both ways": (
        lambda: nn.GRU(D, 3, 2, batch_first=True, bidirectional=True),
        recurrent(3, D, 3, 2, 2),
    ),
    "rnn": (lambda: nn.RNN(D, 3, batch_first=True), recurrent(1, D, 3)),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(D, H, 16, batch_first=True, dropout=0.0),
        attention() + B * T * 2 * D * 16,
    ),
    "transformer layer, norm first": (
        lambda: nn.TransformerEncoderLayer(D, H, 16, batch_first=True, norm_first=True),
        attention() + B * T * 2 * D * 16,
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, mode):
    make, macs = LAYERS[name]
    layer = make().eval()
    assert counted(lambda: layer(x), mode) == macs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_in_eval(mode, batch_first, need_weights):
    """Without gradients torch takes a fast path, in one operator of its own."""
    layer = nn.MultiheadAttention(D, H, batch_first=batch_first).eval()
    tokens = x if batch_first else x.transpose(0, 1)
    assert counted(lambda: layer(tokens, tokens, tokens, need_weights=need_weights), mode) == attention()


def test_multihead_attention_across():
    layer, context = nn.MultiheadAttention(D, H, batch_first=True).eval(), torch.randn(B, 7, D)
    macs = B * (T * 2 * D * D + 7 * 2 * D * D + T * 7 * 2 * D)
    assert counted(lambda: layer(x, context, context)) == macs


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_that_packs_what_padding_masks():
    """Its fast path leaves padded tokens out of the linears, and computes attention on the padded rectangle."""
    layer = nn.TransformerEncoderLayer(D, H, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3).eval()
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    macs = 8 * (4 * D * D + 2 * D * 16) + B * T * T * 2 * D
    assert counted(lambda: encoder(x, src_key_padding_mask=padding)) == 3 * macs
    with torch.enable_grad():
        everywhere = counted(lambda: encoder(x, src_key_padding_mask=padding), torch.enable_grad)
    assert everywhere == 3 * (attention() + B * T * 2 * D * 16), "with gradients there is no fast path"


def test_packed_sequences_cost_their_own_length():
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 2], batch_first=True)
    for layer, gates in ((nn.LSTM(D, 3), 4), (nn.GRU(D, 3), 3)):
        assert counted(lambda layer=layer: layer(packed)) == 7 * gates * 3 * (D + 3)


def test_recurrent_layers_as_on_a_gpu():
    """cuDNN's operator, asked on the meta device: it takes all layers' weights at once."""
    weights = [torch.ones(s, device="meta") for s in ((12, D), (12, 3), (12,), (12,), (12, 3), (12, 3), (12,), (12,))]
    h = torch.ones(2, B, 3, device="meta")
    arguments = (x.to("meta"), weights, 4, None, h, h, 2, 3, 0, 2, True, 0.0, False, False, [], None)
    assert counted(lambda: torch.ops.aten._cudnn_rnn(*arguments)) == recurrent(4, D, 3, layers=2)


@pytest.mark.parametrize(
    ("left", "right", "offsets", "macs"),
    [
        ((6, 16), (2, 16, 8), True, 6 * 16 * 8),
        ((2, 3, 16), (2, 16, 8), False, 2 * 3 * 16 * 8),
        ((4, 32), (32, 8), True, 4 * 32 * 8),
    ],
)
def test_grouped_products(left, right, offsets, macs):
    a, b = torch.ones(left, device="meta").bfloat16(), torch.ones(right, device="meta").bfloat16()
    ends = torch.ones(2, device="meta", dtype=torch.int32) if offsets else None
    assert counted(lambda: torch.ops.aten._grouped_mm(a, b.transpose(-2, -1).contiguous().mT, ends)) == macs


def test_branches_and_loops_count_what_ran():
    twice, once = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), nn.Linear(D, D)
    for condition, products in ((True, 2), (False, 1)):
        macs = counted(lambda c=condition: torch.cond(torch.tensor(c), lambda t: twice(t), lambda t: once(t), (x,)))
        assert macs == products * B * T * D * D


def test_an_operator_that_cannot_be_looked_into_is_refused_and_not_counted_as_nothing():
    class Opaque(torch._ops.HigherOrderOperator):
        def __call__(self, *args):
            return super().__call__(*args)

    with pytest.raises(StructureError, match="opaque_to_macs"):
        counted(lambda: Opaque("opaque_to_macs")(torch.ones(2)), torch.inference_mode)


def test_fake_tensors_count_as_real_ones():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert counted(lambda: nn.Linear(4, 3)(torch.randn(2, 4))) == 24


def test_the_backward_pass_counts_when_it_runs_inside():
    layer, rows = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    assert counted(lambda: layer(rows).sum().backward(), torch.enable_grad) == 3 * 24, "forward, for x, for the weight"


def test_counts_add_up_over_calls_and_end_with_the_block():
    layer = nn.Linear(4, 3)
    with torch.no_grad(), CountMacs() as count:
        layer(torch.randn(2, 4))
        layer(torch.randn(1, 4))
    layer(torch.randn(9, 4))
    assert count.total == 36 and count.macs == {None: 36}


class Two(Dynamic):
    """Two units beside each other, and one linear that always runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.small = nn.Linear(4, 4), nn.Linear(4, 4)
        self.large = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x)
        keep = self.tap(Decision(torch.stack([x[:, 0] > 0, x[:, 1] > 0], 1).to(x), x[:, :2])).keep
        x = self.run(0, self.small, keep[:, 0], x, otherwise=x)
        return self.run(1, self.large, keep[:, 1], x, otherwise=x)


def test_macs_belong_to_the_innermost_unit_that_ran():
    model, rows = execute(Two().eval(), sparse=True), torch.randn(20, 4)
    with torch.no_grad(), record(model) as trace, CountMacs(trace) as count:
        model(rows)
    first, second = trace[""][0].sum(0).tolist()
    assert count.macs == {None: 20 * 16, ("", range(0, 1)): first * 16, ("", range(1, 2)): second * 64}
    assert CostModel(model, rows).unit[""].tolist() == [16, 64]
