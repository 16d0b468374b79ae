"""The command line: dynanet train | calibrate | evaluate | bench | predict | report | export-bundle | demo."""

import json as json_
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonargparse
import torch

from dynanet.cli.arguments import Parser, command_name, written_out
from dynanet.core.errors import ConfigError, DynanetError
from dynanet.experiment.config import Data, Experiment, Model, Recipe


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit code: 0, 2 for an error that the user can correct, or 130 if stopped.

    Raises:
        SystemExit: with code 2, after one line on stderr, for arguments that no command takes; with 0 after --help.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with _warnings_in_a_line():
            jsonargparse.auto_cli(
                {command_name(command): command for command in COMMANDS},
                args=written_out(sys.argv[1:] if arguments is None else arguments) or ["--help"],
                parser_class=Parser,
                prog="dynanet",
                config_help="a YAML file with these options; what is given beside it counts more",
                description="Networks that decide, input by input, how much to compute, and really skip the rest. "
                "Begin with: dynanet demo",
            )
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):  # as Lightning ends
            raise
        print("dynanet: stopped; a training run goes on with --resume", file=sys.stderr)
        return 130
    except DynanetError as error:
        print(f"dynanet: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dynanet: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 2
    return 0


def train(
    out: Path,
    data: Data = Data(),  # noqa: B008  (frozen)
    model: Model = Model(),  # noqa: B008
    recipe: Recipe = Recipe(),  # noqa: B008
    resume: bool = False,
    json: bool = False,
) -> None:
    """Train a network and save it in a run folder.

    Without more it trains the hyperspectral pixel classifier on Indian Pines.
    Digits: dynanet train runs/digits --data.name digits --model.name staged_resnet
    The run's config.yaml says what it was; `--config` takes such a file.

    Args:
        out: the run folder; new, unless you resume.
        data: where the data comes from.
        model: which network of the zoo, and its arguments.
        recipe: how it is trained.
        resume: go on where a run in this folder was stopped.
        json: print the result as JSON, and nothing else.
    """
    from dynanet.experiment.run import Run

    experiment = Experiment(data, model, recipe)
    if resume and experiment == Experiment() and (out / "config.yaml").exists():
        experiment = Experiment.read(out / "config.yaml")  # no options: those of the stopped run
    run = Run(out, experiment)
    metrics = run.train(resume=resume, progress=not json)
    exits = [f"{value:.2%}" for name, value in metrics.items() if name.startswith("val/accuracy/")]
    shown = sorted({round(k * (len(exits) - 1) / 7) for k in range(8)}) if len(exits) > 8 else range(len(exits))
    which = f"exits {', '.join(str(k + 1) for k in shown)}" if len(exits) > 8 else "by exit"
    by_exit = f"; {which}: {', '.join(exits[k] for k in shown)}" if exits else ""
    figures = [f"{what} {metrics[name]:{form}}" for name, what, form in HELD_OUT if name in metrics]
    reached = f"{figures[0]}{by_exit}" if figures else "this run had come to its end"
    lines = [reached, f"saved in {out}/model"]
    lines.append(f"next: dynanet {'calibrate' if run.has_exits else 'evaluate'} {out}")
    _say(json, metrics, lines)


def calibrate(
    run: Path,
    shares: list[float] | None = None,
    risk: float | None = 0.05,
    confidence: float = 0.9,
    json: bool = False,
) -> None:
    """Find the thresholds for budgets, in one pass over held-out data.

    Args:
        run: a trained run.
        shares: mean budgets, as shares of the full model's MACs; 75, 50 and 25 % if not given.
        risk: the share of samples that may lose the full model's right answer, promised with `confidence`.
        confidence: of that promise.
        json: print the result as JSON.
    """
    from dynanet.experiment.budgets import RequestedBudgets, described, in_words
    from dynanet.experiment.run import Run

    opened = Run(run)
    points = opened.calibrate(RequestedBudgets(shares, risk, confidence))
    rows = [
        {"requested": in_words(p.budget, opened.full_macs), "macs": p.macs, "held_out_accuracy": p.accuracy,
         "thresholds": p.thresholds.tolist(), "shares": p.share.tolist(), "promised": p.promised, "note": p.note}
        for p in points
    ]  # fmt: skip
    lines = [described(point, opened.full_macs) for point in points]
    if shares is None and (left_out := opened.unreachable):
        lines.append(f"left out, as no path is that cheap: {', '.join(f'{share:.0%}' for share in left_out)}")
    _say(json, {"operating_points": rows}, [*lines, f"next: dynanet evaluate {run}"])


def evaluate(run: Path, json: bool = False) -> None:
    """Measure every exit and every calibrated budget on test data; of a network without exits, the trained one.

    Args:
        run: a calibrated run; of a network without exits any trained one.
        json: print the result as JSON.
    """
    from dynanet.experiment.run import Run

    results = Run(run).evaluate()
    _say(json, results, [*_reached(results), f"next: dynanet report {run}"])


def _reached(results: dict[str, Any]) -> list[str]:
    lines = [f"{results['data']}: {results['test_samples']} test samples"]
    if "points" in results:
        width = max(len(point["name"]) for point in results["points"])
        for point in results["points"]:
            figures = ", ".join(f"{k} {v:.3f}" for k, v in point.items() if isinstance(v, float) and k != "macs")
            share = point["macs"] / results["full_macs"]
            lines.append(f"  {point['name']:{width}}  {point['macs']:14,.0f} MACs ({share:4.0%})  {figures}")
        return lines
    width = max(len(row["requested"]) for row in [*results["operating_points"], {"requested": "all at exit 1"}])
    for k, (macs, right) in enumerate(zip(results["macs_per_exit"], results["accuracy_per_exit"], strict=True)):
        lines.append(f"  {f'all at exit {k + 1}':{width}}  {macs:14,.0f} MACs         accuracy {right:7.2%}")
    for row in results["operating_points"]:
        lines.append(
            f"  {row['requested']:{width}}  {row['test_macs']:14,.0f} MACs ({row['test_macs_share']:4.0%})  accuracy "
            f"{row['test_accuracy']:7.2%}  ({_lost(row['lost'])}; random exits of the same rates "
            f"{row['random_exits_accuracy']:.2%})"
        )
    return lines


def _lost(share: float) -> str:
    return f"{'gained' if share < 0 else 'lost'} {abs(100 * share):.2f} points"


def bench(
    run: Path,
    share: float = 0.5,
    batches: list[int] | None = None,
    threads: list[int] | None = None,
    rounds: int = 7,
    json: bool = False,
) -> None:
    """Time a model at a budget against the same weights without skipping, equivalence asserted first.

    Args:
        run: a calibrated run; of a network without exits any trained one.
        share: the budget, as a share of the full model's MACs. Not of a network without exits.
        batches: samples per call; those of 1, 8, 64 and 256 that the test split can fill, if not given.
        threads: how many threads to try; 1 and all of them, if not given.
        rounds: interleaved repetitions; figures are medians.
        json: print the result as JSON.
    """
    from dataclasses import asdict

    from dynanet.experiment.run import Run

    counts = threads if threads else sorted({1, os.cpu_count() or 1})
    rows = Run(run).bench(
        share=share, batches=batches, threads=counts, rounds=rounds, echo=(lambda line: None) if json else print
    )
    _say(json, {"rows": [asdict(row) for row in rows]}, [f"rows added to {run}/bench.csv"])


def predict(model: Path, inputs: Path, out: Path | None = None, json: bool = False) -> None:
    """Classify inputs with a saved model, really skipping.

    Args:
        model: a bundle (or a run, whose full model is taken).
        inputs: an .npy file of one input (C, H, W) or several (N, C, H, W), as the model takes them; an image file or
            a folder of images; a .wav file or a folder of them; or a .txt file with a sentence per line.
        out: a CSV file for the answers; printed if not given.
        json: print the result as JSON.
    """
    from dynanet.experiment.prediction import predict as answers

    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is not a folder; make it first, or choose another --out")
    rows = answers(model, inputs)
    if out is not None:
        from dynanet.core.files import write_csv

        write_csv(out, rows, ("input", "class"))
    shown = [f"{r['input']}: {r['class']} (exit {r['exit']}, {r['macs']:,.0f} MACs)" for r in rows]
    _say(json, {"answers": rows}, [f"{len(rows)} answers in {out}"] if out is not None else shown)


def report(run: Path, out: Path | None = None, static: list[Path] | None = None, json: bool = False) -> None:
    """Write the report: one HTML file that shows where the compute went.

    Args:
        run: a calibrated run; of a network without exits any trained one.
        out: the file; report.html in the run folder, if not given.
        static: runs of networks without exits on the same data, to show beside it.
        json: print the result as JSON.
    """
    from dynanet.experiment.report import static_point, write_report
    from dynanet.experiment.run import Run

    path = write_report(Run(run), out, static=[static_point(Run(each)) for each in static or ()])
    _say(json, {"report": str(path)}, [f"report: {path}"])


def export_bundle(run: Path, out: Path, share: float | None = None, json: bool = False) -> None:
    """Save a model to hand on: weights, configuration, checksums and a model card. No code, no pickle.

    Args:
        run: a run.
        out: the folder of the bundle.
        share: calibrated for this share of the full model's MACs; the full model, if not given.
        json: print the result as JSON.
    """
    from dynanet.experiment.run import Run

    fingerprint = Run(run).export(out, share)
    _say(json, {"bundle": str(out), "fingerprint": fingerprint}, [f"bundle: {out}", f"fingerprint: {fingerprint}"])


def demo(out: Path = Path("runs/demo"), seed: int = 0, json: bool = False) -> None:
    """The whole job on a real scene, in two minutes: train, calibrate, measure, time, and write the report.

    Indian Pines: 145 x 145 pixels, 200 bands, 16 classes; fields are cut, so that train and test do not share pixels.

    Args:
        out: the run folder; what an earlier demo left there is replaced.
        seed: of the split and of training.
        json: print the result as JSON.
    """
    import shutil
    import time

    from dynanet.experiment.budgets import RequestedBudgets, described
    from dynanet.experiment.report import write_report
    from dynanet.experiment.run import Run

    start = time.monotonic()
    # One thread trains this small network in well under a minute, and a busy machine does not slow it tenfold.
    torch.set_num_threads(1)

    def step(title: str) -> None:
        if not json:
            print(f"\n[{time.monotonic() - start:4.0f} s] {title}", flush=True)

    def experiment(seed: int) -> Experiment:
        return Experiment(data=Data(seed=seed), recipe=Recipe(seed=seed))

    if out.exists() and any(out.iterdir()):
        if not (out / "config.yaml").exists():
            raise DynanetError(f"{out} is not empty and not a run; choose another folder with --out")
        earlier = Experiment.read(out / "config.yaml")
        if earlier != experiment(earlier.data.seed):
            raise DynanetError(
                f"{out} holds a run of another experiment than the demo's; choose another folder with --out"
            )
        shutil.rmtree(out)
    run = Run(out, experiment(seed))
    step("Training a classifier of hyperspectral pixels, with three exits")
    run.train(progress=not json)
    step("Calibrating three budgets and one promised risk, in one pass over held-out pixels")
    for point in run.calibrate(RequestedBudgets()):
        if not json:
            print("  " + described(point, run.full_macs))
    step("Test pixels, looked at once")
    results = run.evaluate()
    if not json:
        print("\n".join(_reached(results)))
    step("Timing, interleaved in one process: the session against the same weights without skipping")
    rows = run.bench(batches=(1, 64), rounds=5, echo=(lambda line: None) if json else (lambda line: print("  " + line)))
    step("Report, with the whole scene classified")
    path = write_report(run)
    if not json:
        print(f"\nOpen {path} in a browser. {time.monotonic() - start:.0f} s in all.")
    else:
        from dataclasses import asdict

        _say(json, {"report": str(path), "results": results, "bench": [asdict(row) for row in rows]}, [])


def _say(json: bool, content: dict[str, Any], lines: list[str]) -> None:
    if json:
        print(json_.dumps(_finite(json_.loads(json_.dumps(content, default=float))), indent=2, allow_nan=False))
    else:
        print("\n".join(lines))


def _finite(content: Any) -> Any:
    """The content without infinities, which JSON does not have: they become "inf", NaN (not measured) null."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content


HELD_OUT = (("val/accuracy", "held-out accuracy", ".2%"), ("val/loss", "held-out loss", ".4f"))
COMMANDS = (train, calibrate, evaluate, bench, predict, report, export_bundle, demo)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        print(f"dynanet: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
