"""The command line. A mistake is answered in one line on standard error with exit code 2, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from distrobust import __version__
from distrobust import config as configuration
from distrobust.config import Config
from distrobust.errors import ConfigError, DistrobustError
from distrobust.train.rundir import Outcome, RunDirectory

_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a value of the file; repeatable.",
)
_FILE = click.argument("file", type=click.Path(path_type=Path))


def main() -> None:
    """Runs the command line of this process and exits."""
    try:
        commands.main(standalone_mode=False)
    except DistrobustError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(error.format_message())
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(text: str) -> None:
    print(f"distrobust: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="distrobust")
def commands() -> None:
    """Adversarial fine-tuning over compressed gradients, across slow links."""


@commands.command()
@_FILE
@_SET
@click.option("--launcher", type=click.Choice(["ray", "torchrun", "local"]), help="Short for cluster.launcher.")
def train(file: Path, overrides: tuple[str, ...], launcher: str | None) -> None:
    """Run, or continue, the job that FILE describes (see launch/)."""
    from distrobust.train import faults, launch

    arguments = [*overrides, *([f"cluster.launcher={launcher}"] if launcher else [])]
    config = configuration.absolute(configuration.load(file, arguments))
    faults.check_allowed(config.faults)
    directory = RunDirectory(config.run.dir)
    if launch.is_torchrun():
        first = os.environ["RANK"] == "0"
        with directory.held() if first else contextlib.nullcontext():
            if first:
                directory.open(config)
            with _console() as console:
                outcome = launch.run_under_torchrun(config, [console] if first else [])
        outcome.raise_if_failed()  # each rank for itself: the others may not have met the error
        if not first:
            return
    else:
        outcome = _launch(config, directory)
    _finish(directory, outcome)


def _launch(config: Config, directory: RunDirectory) -> Outcome:
    """Starts the workers from this process and waits for them."""
    from distrobust.train import launch, stall

    launcher = config.cluster.launcher
    if launcher == "local":
        launch.check_local(config)
    with directory.held():
        directory.open(config)
        if launcher == "local":
            with _console() as console:
                return launch.run_here(config, console)
        with _followed(directory), stall.named(directory.stacks):
            if launcher == "torchrun":
                return launch.spawn_torchrun(config)
            from distrobust.cluster.ray_train import run_on_ray

            return run_on_ray(config)


@commands.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data", "data_path", required=True, type=click.Path(path_type=Path), help="Directory with test.parquet."
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


@commands.command()
@_FILE
@_SET
@click.option("--generations", default=4, show_default=True, type=click.IntRange(1), help="More of them continue.")
@click.option("--population", default=6, show_default=True, type=click.IntRange(2), help="Candidates of a generation.")
@click.option("--choices", default="0,0.1,1", show_default=True, help="Multipliers a layer may get; 0 freezes it.")
def search(file: Path, overrides: tuple[str, ...], generations: int, population: int, choices: str) -> None:
    """Search for model.rates: which layers to freeze, and how fast to train the others (P-Transfer).

    Each candidate is a run of FILE with one worker in this process, below run.dir; keep train.epochs small. The best is
    the one of highest robust accuracy on held-out rows. Starting again continues.
    """
    from distrobust.train import transfer_search

    try:
        multipliers = [float(choice) for choice in choices.split(",")]
    except ValueError:
        raise ConfigError(f"search --choices: got {choices!r}, wanted numbers such as 0,0.1,1") from None
    config = configuration.absolute(configuration.load(file, overrides))
    for line in transfer_search.command(config, generations, population, multipliers):
        click.echo(line)


@commands.command()
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


@commands.command()
@_FILE
@_SET
def simulate(file: Path, overrides: tuple[str, ...]) -> None:
    """Run the federated simulation that FILE describes (see launch/federated-digits.yaml)."""
    from distrobust.federated import settings
    from distrobust.federated.command import command

    config = settings.load(file, overrides)
    elsewhere: Any = None
    if config.execute.actors is not None:
        from distrobust.cluster.ray_clients import on_actors as elsewhere
    done = command(config, click.echo, elsewhere)
    path = _report(config.run.dir)
    if path is not None:
        click.echo(f"report: {path}")
    if not done:
        sys.exit(130)  # as a shell says of a program ended by Ctrl-C


@commands.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html."""
    from distrobust.report.run import write_report

    click.echo(str(write_report(run)))


@commands.command()
@_FILE
@_SET
def config(file: Path, overrides: tuple[str, ...]) -> None:
    """Print FILE with every default filled in."""
    from distrobust.federated import settings

    values = configuration.read(file, overrides)
    parse = settings.parse if "clients" in values else configuration.parse
    click.echo(configuration.dump(parse(values, str(file))), nl=False)


@commands.command(context_settings={"ignore_unknown_options": True})
@click.option("--hosts", default=3, show_default=True, type=click.IntRange(1, 64), help="Simulated on this machine.")
@click.option("--link", default="100mbit", show_default=True, help="Bandwidth between hosts: 10mbit, 1gbit, ...")
@click.option("--cpus", default=1, show_default=True, type=click.IntRange(1), help="Of each host, as Ray counts them.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def lab(hosts: int, link: str, cpus: int, command: tuple[str, ...]) -> None:
    """Run COMMAND in a Ray cluster made here: network namespaces joined by a slow link, a Ray node in each.

    In it RAY_ADDRESS is set, and cluster.address is 10.231.0.1:6379. Afterwards every interface's bytes are printed,
    and nothing stays. Needs root or user namespaces.
    """
    from distrobust.cluster import lab as cluster_lab

    code = cluster_lab.command(hosts, link, cpus, command, lambda line: click.echo(line, err=True))
    if code != 0:
        sys.exit(code)


@commands.group()
def k8s() -> None:
    """Kubernetes manifests for the KubeRay operator; k8s/README.md says how to use them."""


@k8s.command()
@_FILE
@_SET
@click.option("--overlay", metavar="NAME", help="Overrides before those of --set: cpu, gpu or kueue.")
@click.option(
    "--part",
    type=click.Choice(["run", "namespace", "monitoring"]),
    default="run",
    show_default=True,
    help="A run, or what a namespace needs once: claim and files pod; what Prometheus is told.",
)
def render(file: Path, overrides: tuple[str, ...], overlay: str | None, part: str) -> None:
    """Print the manifest that runs FILE: RayJob, its configuration, network policy, disruption budget."""
    from distrobust.k8s import tree

    click.echo(tree.render(file, overrides, overlay, part), nl=False)


@k8s.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("k8s"))
def write(directory: Path) -> None:
    """Bring the generated files below DIRECTORY (k8s, in the repository) up to date."""
    from distrobust.k8s import tree

    for path in tree.write(directory, directory.parent / "launch/digits.yaml"):
        click.echo(str(path))


@commands.group()
def data() -> None:
    """Make data sets."""


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
def digits(directory: Path) -> None:
    """Write scikit-learn's digits to DIRECTORY as Parquet."""
    from distrobust.data import write_digits

    click.echo(str(write_digits(directory)))


@commands.group()
def bench() -> None:
    """Measure what compression is worth on this machine, across a slow link made on it."""


_DENSITIES = click.option(
    "--densities", default="0.01,0.001", show_default=True, help="Shares of the coordinates sent."
)
_THREADS = click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="torch threads per host."
)
_OUT = click.option("--out", type=click.Path(path_type=Path), help="Also write everything measured, as JSON.")


@bench.command()
@click.option("--link", default="100mbit", show_default=True, help="Bandwidth between hosts: 10mbit, 1gbit, ...")
@click.option("--hosts", default=2, show_default=True, type=click.IntRange(2, 64), help="Simulated on this machine.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1, 10_000), help="Steps of every method.")
@_DENSITIES
@click.option("--values", default="", help="Value codes, such as 4bit,fp16; empty: the default one.")
@_THREADS
@_OUT
def step(link: str, hosts: int, steps: int, densities: str, values: str, threads: int, out: Path | None) -> None:
    """Time and bytes of a step for dense, 16-bit, PowerSGD and distrobust, ResNet-50's shapes.

    Hosts are network namespaces on this machine (root or user namespaces); where that is not allowed, processes over
    loopback, whose time on the link is computed.
    """
    from distrobust.bench import comparison

    for line in comparison.command(link, hosts, steps, densities, values, threads, out):
        click.echo(line)


@bench.command()
@click.option("--bandwidth", default="100mbit", show_default=True, help="Of every worker's link, each way.")
@click.option("--latency", default="1ms", show_default=True, help="From one worker to another.")
@_DENSITIES
@click.option("--values", default="", help="Value code, such as 4bit; empty: the default one.")
@click.option("--parameters", default=25_557_032, show_default=True, type=click.IntRange(1), help="Of the model.")
@click.option("--lab", is_flag=True, help="Also measure steps on hosts made here, and compare the model with them.")
@click.option("--hosts", default="2,4,8", show_default=True, help="Numbers of hosts of the lab.")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(1, 1000), help="Steps of each in the lab.")
@_THREADS
@click.option("--plot", type=click.Path(path_type=Path), help="Draw both to this .png, .svg or .pdf.")
@_OUT
def crossover(bandwidth: str, latency: str, densities: str, lab: bool, **others: Any) -> None:
    """For how many workers, on which link, is a compressed step faster than a dense or 16-bit one?

    Compression and decoding are timed on this machine; step times for 2 to 1024 workers are computed from them and
    the link. With --lab the same is measured for a few hosts, to see how far the computation can be trusted.
    """
    from distrobust.bench import crossing

    for line in crossing.command(bandwidth, latency, densities, in_lab=lab, **others):
        click.echo(line)


@contextlib.contextmanager
def _console() -> Iterator[Any]:
    from distrobust.metrics.console import Console

    console = Console()
    try:
        yield console
    finally:
        console.close()


@contextlib.contextmanager
def _followed(directory: RunDirectory) -> Iterator[None]:
    """Shows the records that workers in other processes write, while the block runs."""
    from distrobust.metrics import jsonl

    ended = threading.Event()

    def follow(write: Callable[[dict[str, Any]], None]) -> None:
        for record in jsonl.follow(directory.metrics, ended.is_set, from_end=True):
            write(record)

    with _console() as console:
        thread = threading.Thread(target=follow, args=(console.write,), name="console", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _finish(directory: RunDirectory, outcome: Outcome) -> None:
    """Report and summary, or the error, or how to continue."""
    from distrobust.metrics import jsonl
    from distrobust.metrics.console import print_summary

    outcome.raise_if_failed()
    report_path = _report(directory.path)
    if outcome.status == "stopped":
        print(f"stopped at {outcome.text}, start again to continue", file=sys.stderr)
        sys.exit(130)  # as a shell says of a program ended by Ctrl-C: the job is not complete
    print_summary(jsonl.read(directory.metrics), sys.stdout, report_path)


def _report(directory: Path) -> Path | None:
    """Writes the report; None, with a line that says why, where it cannot be drawn."""
    from distrobust.report.run import write_report

    try:
        return write_report(directory)
    except ConfigError as error:
        print(f"no report: {error}", file=sys.stderr)
    return None
