"""A session against the same weights without skipping: equivalence first, then the four numbers, in one process."""

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynanet.bench.paired import paired, ratio
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import ConfigError, InputError
from dynanet.core.halt import Halt
from dynanet.infer.engines import Eager, Engine, OnnxRuntime, folded, onnx_runtime
from dynanet.infer.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One cell of a comparison: a batch size on so many threads.

    Attributes:
        batch: samples per call.
        threads: of torch and of ONNX Runtime.
        samples: timed per round.
        rounds: interleaved repetitions; the figures are medians.
        session_ms: of the session, per sample.
        stream_ms: of `session.stream` with this batch, per sample; NaN for a model without steps.
        reference_ms: of the untouched model in eager torch: everything computed, thresholds applied afterwards.
        best_dense_ms: of the quickest engine for the full network (last answer only).
        best_dense: which engine that is.
        over_reference: reference_ms / session_ms.
        over_same_engine: the session on its dearest path (`CostModel.dearest`) / session_ms. First of the four numbers.
        over_best_dense: best_dense_ms / session_ms. Second.
        over_flop_ratio: over_same_engine / macs_ratio. Third.
        over_latency_theory: the engines' own time for the same calls / session_ms. Fourth: 1 means that deciding,
            gathering and scattering cost nothing.
        stream_over_latency_theory: the same for the stream: the session's engine time / stream_ms.
        macs_ratio: MACs of the dearest path / MACs spent.
        spread: interquartile range of the per-round over_reference, as "low-high".
    """

    batch: int
    threads: int
    samples: int
    rounds: int
    session_ms: float
    stream_ms: float
    reference_ms: float
    best_dense_ms: float
    best_dense: str
    over_reference: float
    over_same_engine: float
    over_best_dense: float
    over_flop_ratio: float
    over_latency_theory: float
    stream_over_latency_theory: float
    macs_ratio: float
    spread: str


def compare(
    model: nn.Module,
    samples: Tensor,
    *,
    batches: Sequence[int] = (1, 8, 64, 256),
    threads: Sequence[int] = (1,),
    rounds: int = 7,
    full: nn.Module | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time a model with its thresholds against the same weights without skipping.

    Args:
        model: as deployed: with the thresholds (or gates) that decide.
        samples: real inputs; at least as many as the largest batch.
        batches: samples per call.
        threads: how many threads to try.
        rounds: interleaved repetitions.
        full: the network to beat in `over_best_dense`; the model itself, with everything kept, if None. Give one where
            units exclude each other (widths, branches): the dense form of such a model computes more than any row runs.
        cache: of exported graphs.
        tell: gets a line per cell as it is done.

    Returns:
        One row per batch and thread count.

    Raises:
        ConfigError: batches, threads or rounds below 1.
        InputError: fewer samples than the largest batch, or answers that are not those of the dense model.
    """
    if not batches or min(batches) < 1:
        raise ConfigError(f"batches is {list(batches)}; expected samples per call, 1 or more each")
    if not threads or min(threads) < 1 or rounds < 1:
        raise ConfigError(f"threads is {list(threads)} and rounds is {rounds}; expected 1 or more of each")
    if len(samples) < max(batches):
        raise InputError(f"{len(samples)} samples for a batch of {max(batches)}; give more samples or smaller batches")
    model = copy.deepcopy(model).eval()
    before, rows = torch.get_num_threads(), []
    try:
        for n in threads:
            torch.set_num_threads(n)
            busy = os.getloadavg()[0]
            if n > 1 and busy > (os.cpu_count() or 1) - n + 0.5:
                log.warning("other programs run (load %.1f): they inflate times and ratios on %d threads", busy, n)
            session = Session(model, samples[:1], threads=n, batches=sorted({*batches, 1, 4, 16}), cache=cache)
            check_equivalent(model, session, samples)
            for batch in batches:
                rows.append(_row(model, full, session, samples, batch, rounds, cache))
                tell(line(rows[-1]))
    finally:
        torch.set_num_threads(before)
    return rows


def line(row: Row) -> str:
    """A row in a line of text."""
    speeds = f"{row.session_ms:.3f} ms/sample, {row.over_reference:.2f} times the untouched model"
    engines = f"{row.over_same_engine:.2f} the same engine dense, {row.over_best_dense:.2f} the best ({row.best_dense})"
    theory = f"{row.over_flop_ratio:.2f} of the FLOP ratio, {row.over_latency_theory:.2f} of the latency theory"
    stream = f"; stream {row.stream_ms:.3f} ms/sample, {row.stream_over_latency_theory:.2f} of the latency theory"
    told = f"batch {row.batch:>3}, {row.threads} thread(s): {speeds}; {engines}; {theory}"
    return told + (stream if math.isfinite(row.stream_ms) else "")


def check_equivalent(model: nn.Module, session: Session, samples: Tensor, margin: float = 1e-3) -> None:
    """The session answers what the dense model answers, decisions within `margin` of a threshold aside.

    Raises:
        InputError: it does not.
    """
    model = execute(folded(model), sparse=False)
    with torch.no_grad(), record(model) as dense:
        expected = model(samples)
    with record(session) as sparse:
        answer = session(samples)
    differs = ((answer - expected).abs() > 1e-3 + 1e-3 * expected.abs()).flatten(1).any(1)
    decided_alike = torch.ones_like(differs)
    for name in sparse.keys():  # a sparse run may stop before the last decisions: nobody was left
        for ours, theirs in zip(sparse[name], dense[name], strict=False):
            decided_alike &= (ours == theirs).flatten(1).all(1)
    allowed = max(1, round(margin * len(samples)))
    if bool((differs & decided_alike).any()) or int(differs.sum()) > allowed:
        raise InputError(
            f"{int(differs.sum())} of {len(samples)} answers of the session differ from the dense model's, "
            f"{int((differs & decided_alike).sum())} of them after the same decisions; nothing is timed"
        )


def _row(
    model: nn.Module,
    full: nn.Module | None,
    session: Session,
    samples: Tensor,
    batch: int,
    rounds: int,
    cache: Path | None,
) -> Row:
    # Enough samples for a stable mean of where they exit, few enough that a round stays short.
    count = max(batch, min(len(samples), 64 if batch == 1 else 256) // batch * batch)
    groups = samples[:count].split(batch)
    engines = dense_engines(model if full is None else copy.deepcopy(full).eval(), groups[0], cache)
    cost = CostModel(model, samples[:1])
    calls = _engine_calls(session, groups)
    contestants: dict[str, Callable[[], object]] = {
        "session": lambda: [session(x) for x in groups],
        "theory": lambda: [engine(inputs) for engine, inputs in calls],
        "same": lambda: _dearest(session, cost, groups),
        "reference": lambda: [_reference(model, x) for x in groups],
        **{name: lambda engine=engine: [engine([x]) for x in groups] for name, engine in engines.items()},
    }
    if isinstance(session.model, Halt):
        contestants["stream"] = lambda: list(session.stream(samples[:count], batch=batch))
    with torch.no_grad():
        seconds = paired(contestants, rounds=rounds)
    best = min(engines, key=lambda name: np.median(seconds[name]))
    ms = {name: 1e3 * float(np.median(s)) / count for name, s in seconds.items()}
    over_reference, low, high = ratio(seconds["reference"], seconds["session"])
    over_same = ratio(seconds["same"], seconds["session"])[0]
    kept, spent = cost.worst, _spent(session, cost, samples[:count])
    streamed = "stream" in seconds
    return Row(
        batch=batch, threads=torch.get_num_threads(), samples=count, rounds=rounds,
        session_ms=ms["session"], stream_ms=ms.get("stream", float("nan")), reference_ms=ms["reference"],
        best_dense_ms=ms[best], best_dense=best,
        over_reference=over_reference, over_same_engine=over_same,
        over_best_dense=ratio(seconds[best], seconds["session"])[0],
        over_flop_ratio=over_same / (kept / spent),
        over_latency_theory=ratio(seconds["theory"], seconds["session"])[0],
        stream_over_latency_theory=ratio(seconds["theory"], seconds["stream"])[0] if streamed else float("nan"),
        macs_ratio=kept / spent, spread=f"{low:.2f}-{high:.2f}",
    )  # fmt: skip


def _reference(model: nn.Module, x: Tensor) -> object:
    """What published code does: compute everything, then look where it would have stopped."""
    if not isinstance(model, Halt):
        return execute(model, sparse=False)(x)
    answers = model.answers(x)
    sure = torch.stack([answer.softmax(-1).amax(-1) for answer in answers])
    return torch.stack(answers), sure


def _dearest(session: Session, cost: CostModel, groups: Sequence[Tensor]) -> None:
    with cost.dearest(session):
        for x in groups:
            session(x)


def _spent(session: Session, cost: CostModel, samples: Tensor) -> float:
    """MACs per sample."""
    with record(session) as trace:
        session(samples)
    return float(cost.spent(trace).mean()) if trace.calls else cost.always


class _Last(nn.Module):
    """The full network: every step, the last answer. What it does not need (earlier exits) drops out of the graph."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.model.answers(x)[-1] if isinstance(self.model, Halt) else self.model(x),)


def dense_engines(model: nn.Module, x: Tensor, cache: Path | None = None) -> dict[str, Engine]:
    """The ways to run a full network without skipping: eager in both memory formats, ONNX Runtime."""
    model = execute(folded(model), sparse=False)
    example = x[:1].repeat(2, *[1] * (x.dim() - 1))
    with torch.no_grad(), forced(model, everything):
        batch = torch.export.Dim("batch")
        graph = torch.export.export(_Last(model), (example,), dynamic_shapes=({0: batch},)).module()
        engines: dict[str, Engine] = {"eager": Eager(graph)}
        if x.dim() == 4:
            engines["eager channels_last"] = _ChannelsLast(graph)
        if onnx_runtime() is not None:
            engines["onnxruntime"] = OnnxRuntime(
                graph, [example], threads=torch.get_num_threads(), workspaces=True, cache=cache
            )
    return engines


class _ChannelsLast(Eager):
    """Eager on channels-last images; the weights follow the input."""

    name = "eager channels_last"

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs."""
        return super().__call__([t.contiguous(memory_format=torch.channels_last) for t in inputs])


def _engine_calls(session: Session, groups: Sequence[Tensor]) -> list[tuple[Any, list[Tensor]]]:
    """Every engine call that the session makes for these batches, in order, with its inputs."""
    calls: list[tuple[Any, list[Tensor]]] = []
    with _listening(session, calls):
        for x in groups:
            session(x)
    return calls


@contextmanager
def _listening(session: Session, calls: list[tuple[Any, list[Tensor]]]) -> Iterator[None]:
    for engine in session.engines():
        engine.listener = lambda inputs, engine=engine: calls.append((engine, [t.clone() for t in inputs]))
    try:
        yield
    finally:
        for engine in session.engines():
            engine.listener = None
