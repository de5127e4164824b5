"""How many images a second does adversarial training take, against others and against the bare passes?

    python benchmarks/training_speed.py --peers DIR [--rounds 5] [--only resnet9]

Steps of N-FGSM and PGD-7 training (batch 128 a rank, Linf 8/255, SGD with momentum) on random images:

    floor         the bare passes: k forward and backward to the input, one forward and backward to the parameters, SGD
    distrobust    train_step, dense; and with 1 % of the coordinates where there are two ranks
    torchattacks  a loop around its PGD and, for one step, FFGSM
    ART           AdversarialTrainerMadryPGD and, for one step, AdversarialTrainerFBFPyTorch; one process only

One torch thread a rank. Contenders are processes of their own that take turns, so that a noisy machine is noisy for
all; figures are medians over rounds. "fast" is bf16 autocast on channels-last images; the peers get it too, inside the
model they are given, since their code has no switch for it. --peers: a directory for their packages, which is made if
it is missing: an environment that shares this one's torch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peer_environment import environment_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distrobust import config as configuration
from distrobust import models
from distrobust.adversarial.attacks import cross_entropy_sum, input_gradient
from distrobust.comm.transport import Transport
from distrobust.optim.schedules import Schedule
from distrobust.train.checkpoint import Position
from distrobust.train.state import make_state
from distrobust.train.step import Recipe, train_step

BATCH, EPS, RATE = 128, 8 / 255, 0.01
PACKAGES = ("torchattacks==3.5.1", "adversarial-robustness-toolbox==1.20.1", "six==1.17.0")
METHODS = {"N-FGSM": 1, "PGD-7": 7}  # attack steps
STEPS = {"N-FGSM": 8, "PGD-7": 3}  # training steps in a turn
OURS, SPARSE = "distrobust", "distrobust, 1 %"
Turn = Callable[[int], None]  # takes so many training steps


class Given(nn.Module):
    """What the floor and the peers are given: float32 and contiguous outside; bf16 and channels-last inside if `fast`.

    A module of its own also because ART takes a bare nn.Sequential for a list of layers.
    """

    def __init__(self, net: nn.Module, fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.net = net.to(memory_format=torch.channels_last) if fast else net  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        if self.fast:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
            logits = self.net(x)
        return logits.float()


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """uint8 images and labels."""
    g = torch.Generator().manual_seed(rank)
    return torch.randint(256, (BATCH, 3, 32, 32), generator=g, dtype=torch.uint8), torch.randint(
        10, (BATCH,), generator=g
    )


def build(model: str) -> nn.Module:
    return models.build(model, 10, (3, 32, 32), [0.5] * 3, [0.25] * 3, seed=0)


def wrapped(net: nn.Module, ranks: int) -> nn.Module:
    return DistributedDataParallel(net) if ranks > 1 else net


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)


def distrobust(method: str, model: str, fast: bool, rank: int, density: float | None) -> Turn:
    attack = {"name": "pgd", "steps": 7} if method == "PGD-7" else {"name": "n_fgsm"}
    train = {"precision": "bf16" if fast else "fp32", "schedule": {"name": "constant", "peak": RATE, "warmup": 0.0}}
    compress = None if density is None else {"density": density, "warmup": 0.0}
    settings = {"data": {"path": "none"}, "train": train, "attack": attack, "compress": compress}
    config = configuration.parse(settings, "benchmark")
    net = build(model)
    if fast:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = make_state(
        net, Position(1, "train", 0), config.train, config.compress, None, 10**6, Transport(), torch.device("cpu")
    )
    recipe = Recipe(config.train, config.attack, Schedule("constant", RATE), 10**6, 0, False, 0, fast)
    images, labels = batch(rank)

    def turn(num_steps: int) -> None:
        for _ in range(num_steps):
            train_step(state, images, labels, recipe, rank)

    return turn


def floor(method: str, model: str, fast: bool, rank: int, ranks: int) -> Turn:
    inner = Given(build(model), fast)
    net, optimizer = wrapped(inner, ranks), sgd(inner)
    images, y = batch(rank)
    x = images.float().div_(255)

    def turn(num_steps: int) -> None:
        for _ in range(num_steps):
            inner.eval()
            for _ in range(METHODS[method]):
                input_gradient(inner, x, y, cross_entropy_sum)
            inner.train()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    return turn


def torchattacks(method: str, model: str, fast: bool, rank: int, ranks: int) -> Turn:
    import torchattacks

    inner = Given(build(model), fast)
    net, optimizer = wrapped(inner, ranks), sgd(inner)
    images, y = batch(rank)
    x = images.float().div_(255)
    attack = (
        torchattacks.PGD(inner, eps=EPS, alpha=2 / 255, steps=7)
        if method == "PGD-7"
        else torchattacks.FFGSM(inner, eps=EPS, alpha=10 / 255)
    )

    def turn(num_steps: int) -> None:
        for _ in range(num_steps):
            net.train()
            x_adv = attack(x, y)
            optimizer.zero_grad()
            F.cross_entropy(net(x_adv), y).backward()
            optimizer.step()

    return turn


def art(method: str, model: str, fast: bool, rank: int, ranks: int) -> Turn:
    from art.defences.trainer import AdversarialTrainerFBFPyTorch, AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    net = Given(build(model), fast)
    classifier = PyTorchClassifier(
        net, loss=nn.CrossEntropyLoss(), input_shape=(3, 32, 32), nb_classes=10, optimizer=sgd(net), clip_values=(0, 1)
    )
    images, labels = batch(rank)
    x, y = images.float().div_(255).numpy(), F.one_hot(labels, 10).numpy()
    made: Any
    if method == "PGD-7":
        made = AdversarialTrainerMadryPGD(
            classifier, nb_epochs=1, batch_size=BATCH, eps=EPS, eps_step=2 / 255, max_iter=7, num_random_init=1
        )
    else:
        made = AdversarialTrainerFBFPyTorch(classifier, eps=EPS)

    def turn(num_steps: int) -> None:
        if method == "PGD-7":
            made.trainer.fit(x.repeat(num_steps, 0), y.repeat(num_steps, 0), nb_epochs=1, batch_size=BATCH)
        else:
            made.fit(x.repeat(num_steps, 0), y.repeat(num_steps, 0), nb_epochs=1, batch_size=BATCH)

    return turn


def contend(name: str, method: str, model: str, fast: bool, rank: int, ranks: int, store: str) -> None:
    """A process: takes a turn for every line on standard input and answers with its seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    peers = {"floor": floor, "torchattacks": torchattacks, "ART": art}
    if name in peers:
        turn = peers[name](method, model, fast, rank, ranks)
    else:
        turn = distrobust(method, model, fast, rank, 0.01 if name == SPARSE else None)
    turn(2)
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        turn(int(line))
        print(f"seconds {time.perf_counter() - started}", flush=True)
    os._exit(0)


class Contender:
    def __init__(self, python: Path, *words: str, ranks: int, store: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self.errors = store.with_suffix(".err")
        with self.errors.open("w") as errors:
            self.processes = [
                subprocess.Popen(
                    [python, __file__, "contend", *words, str(rank), str(ranks), str(store)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                )
                for rank in range(ranks)
            ]
        self._answers("ready")

    def turn(self, num_steps: int) -> float:
        for process in self.processes:
            assert process.stdin is not None
            print(num_steps, file=process.stdin, flush=True)
        return max(float(answer.split()[1]) for answer in self._answers("seconds"))

    def _answers(self, word: str) -> list[str]:
        """The next line of each that begins with `word`: libraries may print, too."""
        found = []
        for process in self.processes:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith(word)), None)
            if line is None:
                why = self.errors.read_text().strip().rpartition("\n")[2]
                raise SystemExit(f"a contender ended: {' '.join(map(str, process.args))}: {why}")  # type: ignore[arg-type]
            found.append(line)
        return found

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def measure(python: Path, method: str, model: str, fast: bool, ranks: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Images a second of each contender, median over rounds in which they take turns."""
    names = ["floor", OURS, "torchattacks", *(["ART"] if ranks == 1 else [SPARSE])]
    contenders = {}
    for number, name in enumerate(names):
        chosen = Path(sys.executable) if name in ("floor", OURS, SPARSE) else python
        store = folder / f"store-{time.time_ns()}-{number}"
        contenders[name] = Contender(chosen, name, method, model, str(int(fast)), ranks=ranks, store=store)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(contenders[name].turn(STEPS[method]) / STEPS[method])
    for contender in contenders.values():
        contender.close()
    step_s = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "method": method,
        "model": model,
        "precision": "bf16, channels-last" if fast else "fp32",
        "ranks": ranks,
        "images_per_s": {name: ranks * BATCH / value for name, value in step_s.items()},
        "step_s": step_s,
        "all_step_s": seconds,
        "over_floor": step_s[OURS] / step_s["floor"],
        "times_faster_than_best_peer": min(v for n, v in step_s.items() if n in ("torchattacks", "ART")) / step_s[OURS],
    }


def main() -> None:
    if sys.argv[1:2] == ["contend"]:
        name, method, model, fast, rank, ranks, store = sys.argv[2:]
        contend(name, method, model, bool(int(fast)), int(rank), int(ranks), store)
        return
    import tempfile

    import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="directory of the peers' environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="model")
    arguments = parser.parse_args()
    python = environment_of(arguments.peers.absolute(), PACKAGES, "--no-deps")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, ranks, fast, method in itertools.product(("resnet9", "cnn"), (1, 2), (True, False), METHODS):
            if arguments.only not in model or (model == "cnn" and ranks == 2):
                continue
            row = measure(python, method, model, fast, ranks, arguments.rounds, Path(folder))
            rows.append(row)
            print({key: row[key] for key in row if key not in ("all_step_s", "step_s")}, flush=True)
    print(record.write("training_speed", __doc__.splitlines()[0], {"batch_per_rank": BATCH, "rows": rows}))


if __name__ == "__main__":
    main()
