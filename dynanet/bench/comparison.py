"""A session against the same weights without skipping: first equal answers, then the four ratios, in one process."""

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dynanet.bench.dense import check_dense, dense_engines, rectangle_engines
from dynanet.bench.timing import paired, ratio
from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, layers, record
from dynanet.core.errors import ConfigError, InputError
from dynanet.core.halt import Halt, highest_score
from dynanet.data.ragged import Sequences, trimmed
from dynanet.ops.native.attention import ATTEND_PACKED
from dynanet.session.engines import Engine
from dynanet.session.plan import folded
from dynanet.session.selector import EnginesByBatch
from dynanet.session.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One cell of a comparison: a batch size and a number of threads.

    Attributes:
        batch: samples per call.
        threads: of torch and of ONNX Runtime.
        samples: timed per round.
        rounds: interleaved repetitions; the figures are medians.
        session_ms: of the session, per sample.
        stream_ms: of `session.stream` with this batch, per sample; NaN for a model without steps.
        reference_ms: of the untouched model in eager torch: everything computed, thresholds applied afterwards.
        best_dense_ms: of the fastest engine for the full network (last answer only). Samples of different lengths run
            in the same batches, each padded to its own longest sample.
        best_dense: the name of that engine.
        over_reference: reference_ms / session_ms.
        over_same_engine: the session on its most expensive path (`CostModel.most_expensive`) / session_ms. First of
            the four ratios. A path ends with its sample.
        over_best_dense: best_dense_ms / session_ms. Second.
        over_flop_ratio: over_same_engine / macs_ratio. Third.
        over_latency_theory: time of the session's computing alone (`latency_theory`) / session_ms. Fourth: 1 means
            that deciding, gathering and scattering cost nothing.
        stream_over_latency_theory: the same time / stream_ms.
        macs_ratio: MACs of the most expensive path / MACs spent.
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
    samples: Any,
    *,
    batches: Sequence[int] = (1, 8, 64, 256),
    threads: Sequence[int] = (1,),
    rounds: int = 7,
    full: nn.Module | None = None,
    cut: Callable[[Any], Any] | None = None,
    cache: Path | None = None,
    echo: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time a model with its thresholds against the same weights without skipping.

    Args:
        model: as deployed: with the thresholds (or gates) that decide.
        samples: real inputs; at least as many as the largest batch. A tensor, or `data.ragged.Sequences`.
        batches: samples per call.
        threads: numbers of threads to try.
        rounds: interleaved repetitions.
        full: the network to beat in `over_best_dense`; the model itself, with everything kept, if None. Needed where
            units exclude each other (widths, branches): the dense form of such a model computes more than any row runs.
        cut: for samples of different lengths: cuts a batch to the rectangle that its longest sample needs, as input of
            engines that skip nothing. Not needed for `Sequences`; None for samples of one size.
        cache: of exported graphs.
        echo: called with a line per cell.

    Returns:
        One row per batch and thread count.

    Raises:
        ConfigError: batches, threads or rounds below 1.
        InputError: fewer samples than the largest batch, or answers that are not those of the dense model.
    """
    if cut is None and isinstance(samples, Sequences):
        cut = trimmed
    if not batches or min(batches) < 1:
        raise ConfigError(f"batches is {list(batches)}; expected samples per call, 1 or more each")
    if not threads or min(threads) < 1 or rounds < 1:
        raise ConfigError(f"threads is {list(threads)} and rounds is {rounds}; expected 1 or more of each")
    if (count := _count(samples)) < max(batches):
        raise InputError(f"{count} samples for a batch of {max(batches)}; give more samples or smaller batches")
    model = copy.deepcopy(model).eval()
    example = _longest(samples, cut)
    rows = []
    before = torch.get_num_threads()
    try:
        for n in threads:
            torch.set_num_threads(n)
            busy = os.getloadavg()[0]
            if n > 1 and busy > (os.cpu_count() or 1) - n + 0.5:
                log.warning("other programs run (load %.1f): they inflate times and ratios on %d threads", busy, n)
            session = Session(model, example, threads=n, batches=sorted({*batches, 1, 4, 16}), cache=cache)
            check_equivalent(model, session, samples)
            rivals = _rivals(model if full is None else copy.deepcopy(full).eval(), samples, cut, cache, echo)
            job = _Job(model, session, samples, cut, CostModel(model, example), rivals)
            for batch in batches:
                rows.append(_row(job, batch, rounds))
                echo(line(rows[-1]))
    finally:
        torch.set_num_threads(before)
    return rows


def line(row: Row) -> str:
    """Format a row as one line of text."""
    speeds = f"{row.session_ms:.3f} ms/sample, {row.over_reference:.2f} times the untouched model"
    engines = f"{row.over_same_engine:.2f} the same engine dense, {row.over_best_dense:.2f} the best ({row.best_dense})"
    theory = f"{row.over_flop_ratio:.2f} of the MAC saving, scheduling efficiency {row.over_latency_theory:.2f}"
    stream = f"; stream {row.stream_ms:.3f} ms/sample, scheduling efficiency {row.stream_over_latency_theory:.2f}"
    text = f"batch {row.batch:>3}, {row.threads} thread(s): {speeds}; {engines}; {theory}"
    return text + stream if math.isfinite(row.stream_ms) else text


def check_equivalent(model: nn.Module, session: Session, samples: Any, margin: float = 1e-3) -> None:
    """Check that a session answers what the dense model answers.

    A share of samples, `margin`, may be decided otherwise: their scores round to the other side of a threshold.

    Raises:
        InputError: more answers differ, or one after the same decisions.
    """
    model = execute(folded(model), sparse=False)
    with torch.no_grad(), record(model) as dense:
        expected = model(samples)
    with record(session) as sparse:
        answer = session(samples)
    differs = ((answer - expected).abs() > 1e-3 + 1e-3 * expected.abs()).flatten(1).any(1)
    same_decisions = torch.ones_like(differs)
    for name in sparse.keys():
        # Not strict: a sparse run ends before the last decisions when no row is left.
        for ours, theirs in zip(sparse[name], dense[name], strict=False):
            same_decisions &= (ours == theirs).flatten(1).all(1)
    allowed = max(1, round(margin * len(differs)))
    if bool((differs & same_decisions).any()) or int(differs.sum()) > allowed:
        raise InputError(
            f"{int(differs.sum())} of {len(differs)} answers of the session differ from the dense model's, "
            f"{int((differs & same_decisions).sum())} of them after the same decisions; nothing is timed"
        )


class LatencyTheory(NamedTuple):
    """The computing that a session does for some batches, without deciding, gathering and scattering.

    Attributes:
        engines: its engine calls in order, with their inputs.
        attention: its calls of native attention between engines, with their arguments. Packed tokens have no engine
            for their attention.
    """

    engines: list[tuple[EnginesByBatch, list[Tensor]]]
    attention: list[tuple[Callable, list[Any]]]

    def run_engines(self) -> None:
        """Repeat the engine calls."""
        for engine, inputs in self.engines:
            engine(inputs)

    def run(self) -> None:
        """Repeat all calls: the shortest time in which the session could answer."""
        self.run_engines()
        for operator, arguments in self.attention:
            operator(*arguments)


def latency_theory(session: Session, groups: Sequence[Any]) -> LatencyTheory:
    """Record the computing that a session does for these batches."""
    engines: list[tuple[EnginesByBatch, list[Tensor]]] = []
    attention = _AttentionCalls(lambda: len(engines))
    for engine in session.engines():
        engine.listener = lambda inputs, engine=engine: engines.append((engine, [t.clone() for t in inputs]))
    try:
        with attention:
            _each(session, groups)
    finally:
        for engine in session.engines():
            engine.listener = None
    between = attention.calls.get(0, [])
    for number, (engine, inputs) in enumerate(engines, start=1):
        later = attention.calls.get(number, [])
        if later:  # those that an eager engine made itself are in its time already
            with _AttentionCalls(lambda: 0) as inside, torch.no_grad():
                engine(inputs)
            between += later[len(inside.calls.get(0, [])) :]
    return LatencyTheory(engines, between)


class _AttentionCalls(TorchDispatchMode):
    """Keeps the calls of native attention, with their arguments, by a number that is current at the call."""

    def __init__(self, number: Callable[[], int]) -> None:
        super().__init__()
        self.calls: dict[int, list[tuple[Callable, list[Any]]]] = {}
        self._number = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ATTEND_PACKED:
            arguments = [t.clone() if isinstance(t, Tensor) else t for t in args]
            self.calls.setdefault(self._number(), []).append((func, arguments))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Job:
    """A comparison on one number of threads.

    Attributes:
        model: as deployed.
        session: of it.
        samples: all of them.
        cut: a batch to its rectangle; None for samples of one size.
        cost: of the model.
        rivals: engines of the full network.
    """

    model: nn.Module
    session: Session
    samples: Any
    cut: Callable[[Any], Any] | None
    cost: CostModel
    rivals: dict[str, Engine]


def _rivals(
    full: nn.Module, samples: Any, cut: Callable[[Any], Any] | None, cache: Path | None, echo: Callable[[str], None]
) -> dict[str, Engine]:
    """Make engines of the full network; those for rectangles are checked to answer as the model does."""
    if cut is None:
        return dense_engines(full, samples, cache, echo)
    groups = _groups(samples, 64)
    engines = rectangle_engines(full, groups[0], echo)
    check_dense(engines, full, groups, [cut(x) for x in groups])
    return engines


def _row(job: _Job, batch: int, rounds: int) -> Row:
    # Enough samples for a stable mean of where they exit, few enough that a round stays short.
    count = max(batch, min(_count(job.samples), 64 if batch == 1 else 256) // batch * batch)
    samples = _rows(job.samples, slice(0, count))
    with torch.no_grad():
        seconds = paired(_contestants(job, samples, batch), rounds=rounds)
    return _figures(job, samples, batch, seconds)


def _contestants(job: _Job, samples: Any, batch: int) -> dict[str, Callable[[], object]]:
    """Everything that is timed on these samples, by name: `_figures` reads the names."""
    session = job.session
    groups = _groups(samples, batch)
    rectangles = groups if job.cut is None else [job.cut(x) for x in groups]
    flat = [tree_leaves(x) for x in rectangles]
    contestants: dict[str, Callable[[], object]] = {
        "session": partial(_each, session, groups),
        "theory": latency_theory(session, groups).run,
        "same": partial(_run_most_expensive, job, groups),
        "reference": partial(_each, partial(_reference, job.model), rectangles),
    }
    for name, engine in job.rivals.items():
        contestants[name] = partial(_each, engine, flat)
    if isinstance(session.model, Halt):
        singles = [_rows(samples, i) for i in range(_count(samples))]
        contestants["stream"] = lambda: list(session.stream(singles, batch=batch))
    return contestants


def _figures(job: _Job, samples: Any, batch: int, seconds: dict[str, np.ndarray]) -> Row:
    count = _count(samples)
    ms = {name: 1e3 * float(np.median(s)) / count for name, s in seconds.items()}
    best = min(job.rivals, key=lambda name: ms[name])
    over_reference, low, high = ratio(seconds["reference"], seconds["session"])
    over_same = ratio(seconds["same"], seconds["session"])[0]
    macs_ratio = _kept(job, samples) / _spent(job, samples)
    streamed = "stream" in seconds
    return Row(
        batch=batch,
        threads=torch.get_num_threads(),
        samples=count,
        rounds=len(seconds["session"]),
        session_ms=ms["session"],
        stream_ms=ms["stream"] if streamed else math.nan,
        reference_ms=ms["reference"],
        best_dense_ms=ms[best],
        best_dense=best,
        over_reference=over_reference,
        over_same_engine=over_same,
        over_best_dense=ratio(seconds[best], seconds["session"])[0],
        over_flop_ratio=over_same / macs_ratio,
        over_latency_theory=ratio(seconds["theory"], seconds["session"])[0],
        stream_over_latency_theory=ratio(seconds["theory"], seconds["stream"])[0] if streamed else math.nan,
        macs_ratio=macs_ratio,
        spread=f"{low:.2f}-{high:.2f}",
    )


def _each(function: Callable[[Any], object], inputs: Sequence[Any]) -> None:
    for x in inputs:
        function(x)


def _count(x: Any) -> int:
    return tree_leaves(x)[0].shape[0]


def _rows(x: Any, rows: slice | int) -> Any:
    return tree_map(lambda t: t[rows], x)


def _groups(x: Any, batch: int) -> list[Any]:
    return [_rows(x, slice(first, first + batch)) for first in range(0, _count(x), batch)]


def _longest(samples: Any, cut: Callable[[Any], Any] | None) -> Any:
    """The first sample; of samples of different lengths the longest, in which every unit runs."""
    if cut is None:
        return _rows(samples, slice(0, 1))
    return max(_groups(samples, 1), key=lambda x: tree_leaves(cut(x))[0].shape[1])


def _reference(model: nn.Module, x: Any) -> object:
    """What published code does: compute everything, then look where it would have stopped."""
    if not isinstance(model, Halt):
        return execute(model, sparse=False)(x)
    answers = model.answers(x)
    sure = torch.stack([answer.softmax(-1).amax(-1) for answer in answers])
    return torch.stack(answers), sure


@contextmanager
def _on_most_expensive(job: _Job) -> Iterator[None]:
    with job.cost.most_expensive(job.session):
        for layer in layers(job.session).values() if job.cut is not None else ():
            if isinstance(layer, Halt):
                layer.force = _to_the_end
        yield


def _to_the_end(decision: Decision) -> Tensor:
    """Keep every row that has steps left."""
    return (decision.score < highest_score(decision.score.dtype)).to(decision.keep)


def _run_most_expensive(job: _Job, groups: Sequence[Any]) -> None:
    with _on_most_expensive(job):
        _each(job.session, groups)


def _kept(job: _Job, samples: Any) -> float:
    """MACs per sample of the most expensive path."""
    if job.cut is None:
        return job.cost.worst
    with _on_most_expensive(job):  # of these samples; the cost model's is that of the longest one
        return _spent(job, samples)


def _spent(job: _Job, samples: Any) -> float:
    with record(job.session) as trace:
        job.session(samples)
    return float(job.cost.spent(trace).mean()) if trace.calls else job.cost.always
