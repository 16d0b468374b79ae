"""A recurrent gate: one small LSTM, shared by all blocks of a chain, that decides block after block."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.errors import check_sizes
from dynanet.core.gate import Gate, Rule


class RecurrentGate(nn.Module):
    """SkipNet's recurrent gate (Wang et al. 2018, arXiv:1711.09485, section 3.2): pool, project, LSTM, one score.

    Each block has its own linear projection, as widths differ; the LSTM and the score are shared. Every row computes
    all steps of the gate, as its memory sees the input of each block, run or not.

    Args:
        channels: of the input of every block, in order.
        rule: from scores to keep.
        embedding: width of the projections.
        hidden: width of the memory.
        bias: initial bias of the score. Positive: every block runs at first.

    Raises:
        ConfigError: no blocks, or a width below 1.
    """

    def __init__(
        self, channels: Sequence[int], rule: Rule, *, embedding: int = 10, hidden: int = 10, bias: float = 2.0
    ) -> None:
        super().__init__()
        check_sizes(blocks=len(channels), channels=channels, embedding=embedding, hidden=hidden)
        self.project = nn.ModuleList(nn.Linear(width, embedding) for width in channels)
        self.cell = nn.LSTMCell(embedding, hidden)
        score = nn.Linear(hidden, 1)
        nn.init.constant_(score.bias, bias)
        self.gate = Gate(score, rule)

    @property
    def blocks(self) -> int:
        """Number of blocks that it decides on."""
        return len(self.project)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An empty memory for the rows of x: (B, hidden) twice."""
        empty = x.new_zeros(x.shape[0], self.cell.hidden_size)
        return empty, empty

    def forward(self, k: int, x: Tensor, memory: Any) -> tuple[Decision, Any]:
        """Decide on block k.

        Args:
            k: which block.
            x: its input, (B, C) or (B, C, ...), which is averaged.
            memory: what this returned for block k - 1, or `start`.

        Returns:
            A Decision with keep (B, 1), and the memory for the next block.
        """
        pooled = x.flatten(2).mean(2) if x.dim() > 2 else x
        memory = self.cell(self.project[k](pooled), memory)
        return self.gate(memory[0]), memory
