"""Running what a job file describes: train, search, simulate; and reading it: config, report."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from distrobust import config as configuration
from distrobust.cli.options import FILE, SET
from distrobust.config import Config
from distrobust.errors import ConfigError
from distrobust.train.rundir import Outcome, RunDirectory


@click.command()
@FILE
@SET
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
            if first and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                directory.open(config)  # not again: what ended the earlier start, or was asked of it, still holds
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


@click.command()
@FILE
@SET
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


@click.command()
@FILE
@SET
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


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html."""
    from distrobust.report.run import write_report

    click.echo(str(write_report(run)))


@click.command()
@FILE
@SET
def config(file: Path, overrides: tuple[str, ...]) -> None:
    """Print FILE with every default filled in."""
    from distrobust.federated import settings

    values = configuration.read(file, overrides)
    parse = settings.parse if "clients" in values else configuration.parse
    click.echo(configuration.dump(parse(values, str(file))), nl=False)


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
    from distrobust.train import launch

    outcome.raise_if_failed()
    report_path = _report(directory.path)
    if outcome.status == "stopped":
        print(f"stopped at {outcome.text}, start again to continue", file=sys.stderr)
        # as a shell says of a program ended by Ctrl-C; torchrun would take it for a failure and start anew
        sys.exit(0 if launch.is_torchrun() else 130)
    print_summary(jsonl.read(directory.metrics), sys.stdout, report_path)


def _report(directory: Path) -> Path | None:
    """Writes the report; None, with a line that says why, where it cannot be drawn."""
    from distrobust.report.run import write_report

    try:
        return write_report(directory)
    except ConfigError as error:
        print(f"no report: {error}", file=sys.stderr)
    return None


COMMANDS = (train, search, simulate, report, config)
