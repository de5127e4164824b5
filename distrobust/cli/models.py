"""What is asked of model files: evaluate, ensemble."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory with test.parquet; read by the columns that the run read, where it has them.",
)
@click.option(
    "--attacks",
    default="pgd",
    show_default=True,
    metavar="LIST",
    help="Of pgd, autoattack, foolbox (a second opinion), square (without gradients), curve (over eps); or all.",
)
@click.option("--eps", default="8/255", show_default=True, help="Budget, inputs in [0, 1].")
@click.option("--norm", default="linf", show_default=True, help="Of the ball: linf, l2 or l1.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="PGD steps.")
@click.option("--restarts", default=1, show_default=True, type=click.IntRange(1), help="PGD starts; the worst counts.")
@click.option("--curve-eps", metavar="LIST", help="Budgets of the curve, as 2/255,4/255; default: 1/4 to 2 times eps.")
@click.option(
    "--source", type=click.Path(path_type=Path), help="Other model file: try on this one what fools that one."
)
@click.option("--no-checks", is_flag=True, help="Skip the extra attacks that look for reasons to distrust the numbers.")
@click.option("--images", default=0, show_default=True, type=click.IntRange(0), help="Evenly spaced; 0: all.")
@click.option("--batch", default=100, show_default=True, type=click.IntRange(1), help="Images attacked together.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Processes to share batches.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="Of torch, each; 0: all cores.")
@click.option("--gpu", is_flag=True, help="One GPU a process.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep results; default: beside the model file.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the record here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw accuracy against eps to this .png, .svg or .pdf.")
def evaluate(
    checkpoint: Path,
    data_path: Path,
    attacks: str,
    eps: str,
    norm: str,
    steps: int,
    restarts: int,
    curve_eps: str | None,
    source: Path | None,
    no_checks: bool,
    out: Path | None,
    workers: int,
    json_path: Path | None,
    plot: Path | None,
    **others: Any,
) -> None:
    """Clean and robust accuracy of a model file (models/*.pt of a run), with reasons to distrust it.

    Every finished batch is kept: the same command continues after an interruption, and with more --attacks does
    only those. Under torchrun its ranks share the batches.
    """
    from distrobust.adversarial.threat import Threat
    from distrobust.evaluation.suite import Suite, parse_budget, parse_names
    from distrobust.report import evaluation as report_evaluation
    from distrobust.train.evaluation import Job
    from distrobust.train.evaluation_ranks import evaluate as evaluate_job

    if plot is not None:
        report_evaluation.check_plot(plot)
    if json_path is not None:
        report_evaluation.check_directory("--json", json_path)
    names = parse_names(attacks, transfer=source is not None)
    suite = Suite(
        Threat(norm, parse_budget(eps)),  # type: ignore[arg-type]  # checks the name
        tuple(dict.fromkeys([*names, *(["curve"] if curve_eps or plot else [])])),
        steps=steps,
        restarts=restarts,
        curve=tuple(parse_budget(part) for part in curve_eps.split(",")) if curve_eps else (),
        checks=not no_checks,
    )
    directory = checkpoint.with_suffix(".evaluation") if out is None else out
    job = Job(checkpoint, data_path, suite, directory, source=source, **others)
    record = evaluate_job(job, workers, _progress if sys.stderr.isatty() else None)
    if record is None:
        return  # a rank of torchrun that is not the first
    for line in report_evaluation.lines(record):
        click.echo(line)
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=1) + "\n")
    if plot is not None:
        report_evaluation.draw(plot, record)
    click.echo(f"Record: {json_path or directory / 'evaluation.json'}" + (f", plot: {plot}" if plot else ""))


def _progress(attack: str, done: int, total: int) -> None:
    print(f"\r\033[K{attack}: {done} of {total} batches\r", end="", file=sys.stderr, flush=True)


@click.command()
@click.argument("pre_trained", type=click.Path(path_type=Path))
@click.argument("fine_tuned", type=click.Path(path_type=Path))
@click.option("--data", "data_path", required=True, type=click.Path(path_type=Path), help="Directory of the data set.")
@click.option("--alphas", default=11, show_default=True, type=click.IntRange(2), help="Mixtures, both ends included.")
@click.option("--eps", multiple=True, default=["8/255"], show_default=True, help="Repeatable; the first decides.")
@click.option("--norm", type=click.Choice(["linf", "l2", "l1"]), default="linf", show_default=True)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="PGD steps.")
@click.option("--images", default=0, show_default=True, type=click.IntRange(0), help="Images attacked; 0: all.")
@click.option(
    "--statistics",
    type=click.Choice(["none", "clean", "adversarial"]),
    default="none",
    show_default=True,
    help="Training images to re-estimate batch-norm statistics on; clean ones trade robustness for clean accuracy.",
)
@click.option("--held-out", type=click.FloatRange(0, 1, True, True), help="Share; default: that of FINE_TUNED's run.")
@click.option("--seed", type=click.IntRange(0), help="Of the held-out rows; default: that of FINE_TUNED's run.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for ensemble.json and its plot.")
@click.option("--write", metavar="A", help="Also write this mixture (a number, or best) as a model file into --out.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="torch threads; 0: all cores.")
def ensemble(
    pre_trained: Path,
    fine_tuned: Path,
    data_path: Path,
    eps: tuple[str, ...],
    norm: str,
    alphas: int,
    write: str | None,
    threads: int,
    **others: Any,
) -> None:
    """Mix two model files, (1 - a) PRE_TRAINED + a FINE_TUNED, and choose a on held-out rows (WiSE-FT).

    Clean and PGD accuracy of every mixture on the rows that FINE_TUNED's run held out; then the test numbers of the
    chosen one and of both ends.
    """
    from distrobust.report import ensemble as report_ensemble
    from distrobust.train import ensembling

    if others["out"] is not None:
        report_ensemble.check()
    lines = ensembling.command(pre_trained, fine_tuned, data_path, eps, norm, alphas, write, threads, **others)
    for line in lines:
        click.echo(line)
    if others["out"] is not None:
        plot = others["out"] / "ensemble.svg"
        report_ensemble.draw(others["out"] / ensembling.RECORD, plot)
        click.echo(f"written: {plot}")


COMMANDS = (evaluate, ensemble)
