"""Where the exits of a network lie along its blocks."""

from collections.abc import Sequence

from torch import nn

from dynanet.core.errors import ConfigError


def check_exits(exits: Sequence[int], blocks: int, name: str = "exits") -> list[int]:
    """The numbers of the blocks that are followed by an exit.

    Args:
        exits: numbers counted from 0.
        blocks: how many there are.
        name: of the argument, for the message.

    Raises:
        ConfigError: numbers that are not ascending, or that leave out the last block.
    """
    found = [] if isinstance(exits, str) else list(exits)
    if not found or found != sorted(set(found)) or found[0] < 0 or found[-1] != blocks - 1:
        raise ConfigError(f"{name} must be ascending numbers from 0 to {blocks - 1}, the last included, got {exits!r}")
    return found


def split_at(blocks: Sequence[nn.Module], exits: Sequence[int], first: nn.Module | None = None) -> list[nn.Sequential]:
    """Stages that end with the blocks of these numbers; `first` comes in front of all blocks."""
    starts = [0, *(last + 1 for last in exits[:-1])]
    stages = [list(blocks[start : last + 1]) for start, last in zip(starts, exits, strict=True)]
    if first is not None:
        stages[0].insert(0, first)
    return [nn.Sequential(*stage) for stage in stages]
