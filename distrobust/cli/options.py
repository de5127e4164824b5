"""What several commands take."""

from __future__ import annotations

from pathlib import Path

import click

SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a value of the file; repeatable.",
)
FILE = click.argument("file", type=click.Path(path_type=Path))
