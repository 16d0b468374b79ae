"""A layer answers the same as an exported program and as an ONNX graph, at batches that the export never saw."""

import warnings

import pytest
import torch


def check_portable(layer, x):
    """torch.export and torch.onnx.export with a dynamic batch; the graph runs in ONNX Runtime."""
    layer, batch = layer.eval(), torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    batches = [x, x[:2], x[:1], torch.cat([x, -x, 2 * x])]
    with torch.no_grad():
        expected = [layer(b) for b in batches]
        for b, y in zip(batches, expected, strict=True):
            torch.testing.assert_close(program.module()(b), y, rtol=1e-4, atol=1e-5)
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        graph = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for b, y in zip(batches, expected, strict=True):
        answer = torch.from_numpy(session.run(None, {name: b.numpy()})[0])
        torch.testing.assert_close(answer, y, rtol=1e-4, atol=1e-5)


def check_alone(layer, x):
    """A batch is its samples one by one; an empty one is empty; gradients reach every parameter."""
    layer = layer.double().eval()
    x = x.double()
    y = layer(x)
    torch.testing.assert_close(y, torch.cat([layer(row[None]) for row in x]), rtol=1e-12, atol=1e-12)
    assert layer(x[:0]).shape == (0, *y.shape[1:])
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
