"""For how many workers, on which link, does compression pay, and how far can the computation be trusted?

    python benchmarks/crossover.py [--bandwidth 1gbit] [--latency 0.1ms] [--hosts 2,4,8] [--steps 5] [--values 4bit]

What `distrobust bench crossover --lab --plot` prints, as a record and a plot. Local costs and steps of the lab's hosts
are measured; what is said of other numbers of workers is computed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import record

from distrobust.bench import crossing
from distrobust.lab import hosts as lab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--latency", default="0.1ms")
    parser.add_argument("--hosts", default="2,4,8")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--values", default="4bit")
    parser.add_argument("--densities", default="0.01,0.001")
    a = parser.parse_args()
    reason = lab.why_not()
    if reason is not None:
        sys.exit(reason)
    plot = record.RESULTS / "crossover.svg"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "crossover.json"
        for line in crossing.command(
            a.bandwidth, a.latency, a.densities, a.values, 25_557_032, True, a.hosts, a.steps, 1, plot, out
        ):
            print(line)
        found = json.loads(out.read_text())
    print(record.write("crossover", (__doc__ or "").splitlines()[0], found))


if __name__ == "__main__":
    main()
