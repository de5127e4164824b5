"""How long is a step across a slow link, and how many bytes, for every way to exchange ResNet-50's gradients?

    python benchmarks/step.py [--links 100mbit 1gbit] [--hosts 2] [--steps 15] [--densities 0.01 0.001 0.0001]

What `distrobust bench step` measures, with two peers added: a plain Deep Gradient Compression and a PowerSGD (see
peers.py). All methods take turns in one run on each link. Needs the slow-link lab: root, or user namespaces.
"""

from __future__ import annotations

import argparse
import sys

import record

from distrobust.bench import comparison
from distrobust.bench.methods import Method, percent, standard
from distrobust.lab import hosts as lab
from distrobust.lab.link import parse_link


def peers(densities: list[float]) -> list[Method]:
    return [
        *(Method(f"plain DGC {percent(d)}, fp16 + int32", "peers:dgc", {"density": d}) for d in densities),
        Method("PowerSGD rank 1 (our own)", "peers:power_sgd", {"rank": 1}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15, help="rounds: steps of every method that count")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.001, 0.0001])
    parser.add_argument("--peer-densities", type=float, nargs="+", default=[0.01, 0.001])
    parser.add_argument("--values", nargs="*", default=[], help="value codes; none: the default one")
    parser.add_argument("--name", default="step", help="of the record; an empty one writes none")
    arguments = parser.parse_args()

    reason = lab.why_not()
    if reason is not None:
        sys.exit(reason)
    methods = [*standard(arguments.densities, arguments.values), *peers(arguments.peer_densities)]
    measured = {}
    for link in arguments.links:
        compared = comparison.compare(
            methods, parse_link(link), arguments.hosts, arguments.steps, say=lambda line: print(line, file=sys.stderr)
        )
        print("\n".join(comparison.table(compared)), end="\n\n")
        measured[link] = compared.to_json()
    if arguments.name:
        question = "How long is a step across a slow link, and how many bytes, for every way to exchange gradients?"
        print(record.write(arguments.name, question, {"links": measured}))


if __name__ == "__main__":
    main()
