"""Making data sets: data digits."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Make data sets."""


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
def digits(directory: Path) -> None:
    """Write scikit-learn's digits to DIRECTORY as Parquet."""
    from distrobust.data import write_digits

    click.echo(str(write_digits(directory)))


COMMANDS = (data,)
