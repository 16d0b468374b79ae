"""Parts of a model that stand still while the others learn: a trained network under a gate that is being trained."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override


class Frozen(Callback):
    """Modules without gradients and in eval mode during a run: weights and the statistics of norms stay.

    `fit(model, ..., callbacks=[Frozen(model[0], model[1].net)])`. Dropout inside is off too. A dynamic layer inside
    decides hard. After the run parameters take gradients as they did before.

    Args:
        modules: parts of the model.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self._learning = [p for module in modules for p in module.parameters() if p.requires_grad]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimizer is made, which then takes the other parameters only."""
        for module in self.modules:
            module.requires_grad_(False)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Whatever has put the model in train mode since."""
        for module in self.modules:
            module.eval()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As it was."""
        for p in self._learning:
            p.requires_grad_(True)
