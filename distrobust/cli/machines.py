"""Where jobs run: a lab of hosts on this machine, Kubernetes."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from distrobust.cli.options import FILE, SET


@click.command(context_settings={"ignore_unknown_options": True})
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


@click.group()
def k8s() -> None:
    """Kubernetes manifests for the KubeRay operator; k8s/README.md says how to use them."""


@k8s.command()
@FILE
@SET
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


COMMANDS = (lab, k8s)
