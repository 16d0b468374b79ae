import torch
from torch import nn

from dynanet.train import Batches, CrossEntropy, Frozen, fit


def test_what_is_frozen_stays_as_it_is_and_the_rest_learns(tmp_path):
    """Weights, statistics of norms, and what dropout would change; through the validation of two epochs."""
    torch.manual_seed(0)
    still = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    still[0].bias.requires_grad_(False)
    model = nn.Sequential(still, nn.Linear(8, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []
    still.register_forward_hook(lambda module, x, y: seen.append((module.training, module[3].training)))
    x = torch.randn(40, 6)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    run = fit(
        model, Batches(data, 8, shuffle=True), Batches(data, 8), objective=CrossEntropy(), epochs=2,
        folder=tmp_path / "run", lr=0.5, callbacks=[Frozen(still)], progress=False, accelerator="cpu",
    )  # fmt: skip
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("0."), key
    assert seen and not any(training for pair in seen for training in pair)
    assert run.metrics["val/accuracy"] > 0.6
    learning = {name for name, p in still.named_parameters() if p.requires_grad}
    assert learning == {"0.weight", "1.weight", "1.bias"}, "afterwards what learnt before may learn again"
