"""Batches whose order and randomness are a function of (seed, epoch, batch): what makes a resumed run the same run."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from dynanet.core.errors import ConfigError
from dynanet.train.seeds import seed_of, seeded


class Batches:
    """Batches of a dataset that can be resumed at any batch.

    Every pass is an epoch with an order of its own. While a batch is made, by the dataset and `collate`, the global
    generators of torch, numpy and Python are seeded from (seed, epoch, batch), so augmentation may draw from them, in
    this process or in workers, and draws the same in a run that was resumed in mid-epoch.

    Under `torch.distributed`, n processes share each epoch: batch k of all of them together is batch k that one
    process would make with n times the batch size (its randomness aside). So that all do the same number of steps, the
    last batches are filled up from the beginning of the order; in a single process no sample comes twice.

    Args:
        dataset: map-style; samples are what `collate` takes.
        batch_size: samples per batch and process.
        shuffle: draw a new order for every epoch; else the dataset's order.
        seed: of the order and of what the samples draw.
        drop_last: leave out a last batch that is not full.
        collate: from a list of samples to a batch.
        workers: processes that make batches; 0 makes them in this process.
        pin_memory: for faster copies to a GPU.

    Raises:
        ConfigError: a batch size below 1, or a dataset that cannot fill one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        collate: Callable[[list[Any]], Any] = default_collate,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.collate = collate
        self.workers = workers
        self.pin_memory = pin_memory
        self.samples = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        if batch_size < 1 or len(self) < 1:
            raise ConfigError(
                f"batches of {batch_size} from {self.samples} samples (drop_last={drop_last}) come to none; expected a "
                f"batch size between 1 and the number of samples"
            )
        self._next = (0, 0)  # (epoch, batch) that comes next
        self._skip = 0  # batches of the next pass that a resumed run has already trained on

    @classmethod
    def of(cls, loader: "Batches | DataLoader", seed: int = 0) -> "Batches":
        """The batches that a DataLoader would make: its dataset, sizes, workers; shuffled if it shuffles.

        Raises:
            ConfigError: a sampler other than the default ones, or a dataset that is not map-style.
        """
        if isinstance(loader, Batches):
            return loader
        readable = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if not readable or loader.batch_size is None:
            raise ConfigError(
                f"a run that can be resumed needs train.Batches or a DataLoader that batches a map-style dataset; got "
                f"{type(loader).__name__}"
            )
        if type(loader.sampler) not in (RandomSampler, SequentialSampler):
            raise ConfigError(
                f"the DataLoader's sampler is a {type(loader.sampler).__name__}, which cannot be resumed; use "
                f"shuffle=True or False, or train.Batches of a dataset in the order you want"
            )
        return cls(
            loader.dataset,
            loader.batch_size,
            shuffle=isinstance(loader.sampler, RandomSampler),
            seed=seed,
            drop_last=loader.drop_last,
            collate=loader.collate_fn,
            workers=loader.num_workers,
            pin_memory=loader.pin_memory,
        )

    def __len__(self) -> int:
        """Batches per epoch and process."""
        full = self.batch_size * _world()
        return self.samples // full if self.drop_last else -(-self.samples // full)

    def __iter__(self) -> Iterator[Any]:
        # A generator: it reads its start when the first batch is requested, after a checkpoint was restored.
        epoch = self._next[0]
        first = self._skip
        total = len(self)
        self._skip = 0
        plans = self.plan(epoch)[first:]
        loader: DataLoader = DataLoader(
            _Planned(self.dataset, self.collate),
            sampler=plans,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=_generator(0),  # so that starting a pass draws nothing from the global one
        )
        for batch, made in enumerate(loader, first + 1):
            self._next = (epoch, batch) if batch < total else (epoch + 1, 0)
            yield made

    def plan(self, epoch: int) -> "list[EpochPlan]":
        """The samples and the seed of each of this process's batches of an epoch."""
        order = torch.arange(self.samples)
        if self.shuffle:
            order = torch.randperm(self.samples, generator=_generator(seed_of(self.seed, epoch, "order")))
        world, rank = _world(), _rank()
        needed = len(self) * self.batch_size * world
        if world > 1 and needed > self.samples:
            order = order.repeat(-(-needed // self.samples))[:needed]
        groups = order[:needed].split(self.batch_size * world)
        return [
            EpochPlan(group[rank::world].tolist(), seed_of(self.seed, epoch, batch, rank, "samples"))
            for batch, group in enumerate(groups)
        ]

    def state_dict(self) -> dict[str, int]:
        """The epoch and the batch that come next."""
        return {"epoch": self._next[0], "batch": self._next[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass at the saved epoch and batch."""
        self._next = (state["epoch"], state["batch"])
        self._skip = state["batch"]

    def __repr__(self) -> str:
        return (
            f"Batches({self.samples} samples, {self.batch_size} x {_world()}, shuffle={self.shuffle}, "
            f"seed={self.seed}, drop_last={self.drop_last})"
        )


class EpochPlan(NamedTuple):
    """One batch of an epoch: the indices of its samples, and the seed of what they draw."""

    indices: list[int]
    seed: int


class _Planned(Dataset):
    """A dataset whose items are batches, made from their plans in this process or in a worker."""

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, plan: EpochPlan) -> Any:
        with seeded(plan.seed):
            return self.collate(_samples(self.dataset, plan.indices))


def _unchanged(batch: Any) -> Any:
    return batch


def _samples(dataset: Dataset, indices: Sequence[int]) -> list[Any]:
    together = getattr(dataset, "__getitems__", None)  # torch's protocol for datasets that read samples together
    return together(indices) if together is not None else [dataset[i] for i in indices]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _world() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
