"""The abstract data module, and what an opened one holds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from dynanet.data.indian_pines import IndianPines
from dynanet.datamodules.inputs import InputForm
from dynanet.tasks.classification import Classification
from dynanet.tasks.task import Task
from dynanet.train.batches import Batches


@dataclass(frozen=True)
class Opened:
    """A data set that has been read.

    Attributes:
        title: the name and the split; printed beside every accuracy.
        classes: names, in the order of the labels.
        inputs: what the inputs are: images, sequences or sentences.
        train: augmented and shuffled batches.
        held_out: batches for calibration: not augmented, not trained on.
        test: batches, not augmented; for the final figures only.
        task: the objective and the scores.
        scene: the hyperspectral image whose pixels the samples are; None of other data.
    """

    title: str
    classes: Sequence[str]
    inputs: InputForm
    train: Batches
    held_out: Batches
    test: Batches
    task: Task = Classification()
    scene: IndianPines | None = None


@dataclass(kw_only=True, eq=False)
class DataModule(ABC):
    """A data set. It is read when one of its properties is first used, and once.

    A subclass is a dataclass whose fields are the options of the set, and has a `setup` that reads it. The options
    `place`, `split`, `seed`, `hold_out` and `size` are those of `dynanet.experiment.Data`: a set in the table
    `DATA_MODULES` is opened with them by name, by a `Run` and by the command line.

    Args:
        batch: training samples per step.
        shuffle_seed: of the order of training samples and of their augmentation.
    """

    batch: int = 128
    shuffle_seed: int = 0

    @abstractmethod
    def setup(self) -> Opened:
        """Read the data set.

        Raises:
            DataError: it cannot be read.
            ConfigError: an option that does not fit the data.
        """

    @cached_property
    def opened(self) -> Opened:
        """What `setup` returned."""
        return self.setup()

    @property
    def title(self) -> str:
        """The name and the split of the data."""
        return self.opened.title

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of the labels."""
        return self.opened.classes

    @property
    def inputs(self) -> InputForm:
        """What the inputs are."""
        return self.opened.inputs

    @property
    def train(self) -> Batches:
        """Training batches, augmented and shuffled."""
        return self.opened.train

    @property
    def held_out(self) -> Batches:
        """Batches for calibration."""
        return self.opened.held_out

    @property
    def test(self) -> Batches:
        """Batches for the final figures."""
        return self.opened.test

    @property
    def task(self) -> Task:
        """The objective and the scores."""
        return self.opened.task

    @property
    def scene(self) -> IndianPines | None:
        """The hyperspectral image whose pixels the samples are, if they are."""
        return self.opened.scene

    @property
    def arguments(self) -> dict[str, int]:
        """The arguments of a network that the data determines: classes, channels, lengths."""
        return {"num_classes": len(self.classes), **self.inputs.arguments}

    def example(self, rows: int = 1) -> Tensor:
        """A batch of `rows` synthetic inputs, of the largest size that the data has."""
        return self.inputs.example(rows)

    def test_samples(self, count: int) -> Any:
        """The first `count` test inputs (fewer if there are fewer) in one batch, as a session takes it."""
        return self.inputs.samples(self.test, count)

    def cut(self, x: Any) -> Any:
        """A batch without the padding that all of its samples share."""
        return self.inputs.cut(x)
