"""Freeze parts of a model during training: a trained network under a gate that is being trained."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override


class Frozen(Callback):
    """Keeps modules without gradients and in eval mode during a run, so that weights and norm statistics stay fixed.

    `fit(model, ..., callbacks=[Frozen(model[0], model[1].net)])`. Dropout inside is off too. A dynamic layer inside
    makes hard decisions. After the run parameters require gradients as before.

    Args:
        modules: parts of the model.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self._learning = [p for module in modules for p in module.parameters() if p.requires_grad]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn gradients off before the optimizer is made, which then takes the other parameters only."""
        for module in self.modules:
            module.requires_grad_(False)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the modules back in eval mode, as Lightning puts the model in train mode."""
        for module in self.modules:
            module.eval()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn gradients on again where they were on before."""
        for p in self._learning:
            p.requires_grad_(True)
