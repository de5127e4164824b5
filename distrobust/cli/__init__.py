"""The command line. A mistake is answered in one line on standard error with exit code 2, and nothing is lost.

Every command's modules are imported when it runs, so that --help is quick and a missing extra bothers nobody else.
"""

from __future__ import annotations

import sys

import click

from distrobust import __version__
from distrobust.cli import bench, datasets, jobs, machines, models
from distrobust.errors import DistrobustError


def main() -> None:
    """Runs the command line of this process and exits."""
    try:
        commands.main(standalone_mode=False)
    except DistrobustError as error:
        _fail(str(error))
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # click 8.1 prints it by itself
            error.show()
            sys.exit(2)
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


for _room in (bench, datasets, jobs, machines, models):
    for _command in _room.COMMANDS:
        commands.add_command(_command)
