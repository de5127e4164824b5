"""How many client updates a second does the simulator do, beside Flower and pfl-research?

    python benchmarks/federated_speed.py --peers DIR [--data CIFAR10] [--turns 3]

4 steps of 16 on 64 rows each, one torch thread: an MLP of 9,610 parameters on digits, 100 clients a round, and the
small group-norm CNN on CIFAR-10, 10 a round. Contenders are processes of their own that take turns, so that a noisy
machine is noisy for all; Flower has two Ray actors, all others one process. Figures are medians over turns, of wall
time; where the work is done in one process also of processor time, which other programs disturb less. --peers: a
directory for the peers' packages, which is made if it is missing: an environment that shares this one's torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
from peer_environment import environment_of

from distrobust import data

PACKAGES = ("flwr[simulation]==1.41.0", "pfl==0.6.0")
PEERS = ("flower", "pfl")
CASES: list[tuple[str, int, int, dict[str, int]]] = [  # model, registered, a round, contender -> timed rounds
    ("mlp", 1_000, 100, {"batched": 30, "serial": 10, "pfl": 5, "flower": 2}),
    ("mlp", 10_000, 100, {"batched": 30, "serial": 10, "pfl": 5}),
    ("mlp", 100_000, 100, {"batched": 30}),
    ("mlp", 1_000_000, 100, {"batched": 10}),
    ("cnn_gn", 1_000, 10, {"batched": 1, "serial": 1, "pfl": 1}),
]
LIMIT_S = 420


def turn(
    python: Path, name: str, registered: int, per_round: int, model: str, rounds: int, path: Path
) -> dict[str, Any]:
    """What one run of a contender measured; an error in place of figures if it did not end in time."""
    settings = {"OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    environment = os.environ | settings | {"PYTHONPATH": str(Path(__file__).parents[1])}
    script = Path(__file__).with_name("federated_peers.py")
    command = [python, script, name, str(registered), str(per_round), model, str(rounds), str(path)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LIMIT_S} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": " ".join(ran.stderr.splitlines()[-1:])[:200]}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return {**found, "load_average": os.getloadavg()[0]}


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns that were measured."""
    done = [one for one in turns if "error" not in one]
    if not done:
        return {"turns": turns}
    timed = [one for one in done if one["cpu_seconds"] is not None]
    return {
        "updates_per_s": statistics.median(one["updates"] / one["seconds"] for one in done),
        "updates_per_cpu_s": statistics.median(one["updates"] / one["cpu_seconds"] for one in timed) if timed else None,
        "peak_mb": max(one["peak_mb"] for one in timed) if timed else None,
        "turns": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="directory of the peers' environment")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as Parquet; without it no CNN")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    theirs = environment_of(arguments.peers.absolute(), PACKAGES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        digits = data.write_digits(Path(folder) / "digits")
        for model, registered, per_round, contenders in CASES:
            path = digits if model == "mlp" else arguments.data
            if path is None:
                continue
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
            for number in range(arguments.turns):
                for name in contenders if number % 2 == 0 else reversed(contenders):
                    python = theirs if name in PEERS else Path(sys.executable)
                    turns[name].append(turn(python, name, registered, per_round, model, contenders[name], path))
                    print(model, registered, name, turns[name][-1], flush=True)
            found = {name: summary(own) for name, own in turns.items()}
            rows.append({"model": model, "registered": registered, "per_round": per_round, "contenders": found})
    versions = {"peers": PACKAGES, "turns": arguments.turns}
    print(record.write("federated_speed", (__doc__ or "").splitlines()[0], {**versions, "rows": rows}))


if __name__ == "__main__":
    main()
