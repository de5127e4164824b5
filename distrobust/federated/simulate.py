"""The rounds: choose clients, run the clock, train those who arrive, add up what they sent, move the model.

What a client sees of the server is `shared`: the model itself or, with compressed downloads, the sum of the messages
so far; what those left out stays in the server's residual. A client that was there before downloads the messages it
missed, or the whole model where that is shorter.

An update counts if its message arrives in time and is finite. Otherwise it leaves no trace: the client's residual and
control variate stay as they were before the round. So for every client, over the rounds in which its message arrived:
sent + kept = accumulated.

SCAFFOLD's control variates (option II: c_i <- c_i - c + (x - y) / (steps x rate)) follow from the update, so the server
computes them for itself from what it received, and the upload is no longer than without; the download carries c too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrobust.adversarial import Attack, Score, count_correct, score
from distrobust.compression.memory import Rule
from distrobust.errors import DivergedError
from distrobust.federated import batches, local, network, partition, personal, server, timeline
from distrobust.federated.attacked import Adversary, threat_of
from distrobust.federated.availability import Availability
from distrobust.federated.coding import Coder, compress
from distrobust.federated.dataset import Dataset, Rows
from distrobust.federated.draws import Integers
from distrobust.federated.links import Links
from distrobust.federated.network import load_
from distrobust.federated.personal import Personal
from distrobust.federated.projected import projected
from distrobust.federated.rows import Rows as Vectors
from distrobust.federated.settings import SimulateConfig
from distrobust.federated.timeline import ARRIVED, LATE, LOST, SURPLUS, Course

PATIENCE = 10  # rounds in a row without one update, after which there is no point in going on
NOBODY = 10_000  # rounds in a row in which nobody could be reached: a week of retries once a minute
NATURAL, ROBUST = Attack("none"), Attack("pgd", steps=20)
FLOAT_BYTES = 256 * 2**20  # of images that are converted once, instead of whenever a client takes them


@dataclass
class Totals:
    """Sums over rounds. Bytes are messages' real lengths; `wasted`: of clients whose update did not count."""

    updates: int = 0
    late: int = 0
    surplus: int = 0
    lost: int = 0
    nonfinite: int = 0
    short_rounds: int = 0  # with fewer clients to be reached than were wanted
    download_bytes: int = 0
    upload_bytes: int = 0
    wasted_download_bytes: int = 0
    wasted_upload_bytes: int = 0
    download_s: float = 0.0  # of all clients together, as the next three
    compute_s: float = 0.0
    upload_s: float = 0.0
    wait_s: float = 0.0


@dataclass
class Round:
    """What one round adds up."""

    mean: server.WeightedMean
    control: Tensor  # sum of the changes of c_i
    losses: list[float] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)  # places in the round's clients


class Simulation:
    """Everything that lasts from round to round. Close it, or use it in a `with` block: it may hold files."""

    def __init__(self, config: SimulateConfig, data: Dataset, module: nn.Module, scratch: Path) -> None:
        self.config, self.module = config, module
        fits = 4 * data.train.images.numel() <= FLOAT_BYTES
        self.images = data.train.images.float().div_(255) if fits else data.train.images
        self.labels = data.train.labels
        seed, labels = config.run.seed, data.train.labels.numpy()
        self.partition = partition.make(config.clients, labels, data.source.num_classes, seed, data.groups)
        self.availability = Availability(config.availability, seed, self.partition, labels, data.source.num_classes)
        self.links = Links(config.links, seed)
        self.network = network.network(module)
        if config.local.gradients == "target_projection":
            self.network = projected(module, self.network, seed)
        n = self.network.spec.n
        self.server = server.Server(network.flat(module), config.server)
        self.shared = self.server.x.clone()
        sizes = self.network.spec.sizes
        self.upload = Coder(sizes, config.upload) if config.upload is not None else None
        self.download = Coder(sizes, config.download) if config.download is not None else None
        self.server_residual = torch.zeros(1, n)
        self.dense_bytes = 4 * n
        self.message_bytes = [0]  # of all downloads before round 0, 1, ...
        self.last_seen: dict[int, int] = {}  # the round whose model a client has
        kept = (
            config.upload is not None and config.upload.residual,
            config.upload is not None and config.upload.momentum,
        )
        limit = config.execute.memory_limit_bytes // max(1, sum(map(bool, (*kept, config.local.control_variates))))
        self.residuals = Vectors(n, limit, scratch / "residuals.f32")
        self.velocities = Vectors(n, limit, scratch / "velocities.f32")
        self.controls = Vectors(n, limit, scratch / "controls.f32")
        self.control = torch.zeros(n)
        self.round, self.clock_s = 0, 0.0
        self.totals = Totals()
        self._idle = self._nobody = 0

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        for vectors in (self.residuals, self.velocities, self.controls):
            vectors.close()

    def step(self) -> dict[str, Any]:
        """One round; returns its record. Raises DivergedError after PATIENCE rounds in a row without an update."""
        started = time.perf_counter()
        config, rounds = self.config, self.config.rounds
        wanted = config.clients.per_round
        to_start = min(self.partition.num_clients, int(np.ceil(wanted * (1 + rounds.over_selection))))
        clients = np.sort(self.availability.select(to_start, self.round, self.clock_s))
        rows = [self.parts_of(client)[0] for client in clients.tolist()]
        course = self._run_clock(clients, rows, wanted, self.round)
        arrived = np.flatnonzero(course.fate == ARRIVED)
        this = Round(server.WeightedMean(self.network.spec.n), torch.zeros_like(self.control))
        size = config.execute.cohort
        for start in range(0, len(arrived), size):
            self._cohort(arrived[start : start + size], clients, rows, this)
        self._move(this)
        self._count(clients, course, this, to_start)
        record = self._record(clients, course, this, time.perf_counter() - started)
        self.round += 1
        self.clock_s += course.duration_s if len(clients) else rounds.retry_s
        self._idle = 0 if this.losses else self._idle + (len(clients) > 0)
        self._nobody = 0 if len(clients) else self._nobody + 1
        if self._idle == PATIENCE or self._nobody == NOBODY:
            raise DivergedError(self._why_idle(len(clients), course, this))
        return record

    def parts_of(self, client: int) -> tuple[Integers, Integers]:
        """The rows a client trains on, and those set apart for a comparison with its personal model, if any."""
        rows = self.partition.rows_of(client)
        settings = self.config.personal
        if settings is None:
            return rows, rows[:0]
        return personal.set_apart(rows, client, settings.test, self.config.run.seed)

    def _run_clock(self, clients: Integers, rows: list[Integers], wanted: int, number: int) -> Course:
        """number: separates the random numbers of a client's attempts."""
        settings = self.config.rounds
        examples = [batches.num_examples(len(own), self.config.local) for own in rows]
        return timeline.run(
            self.links,
            clients,
            self.clock_s,
            np.array([self.download_length(client) for client in clients.tolist()], dtype=np.int64),
            self.upload.num_bytes if self.upload is not None else self.dense_bytes,
            np.array(examples, dtype=np.int64),
            wanted=wanted,
            deadline_s=settings.deadline_s,
            drop_out=self.config.links.drop_out,
            seed=self.config.run.seed,
            round_number=number,
        )

    def download_length(self, client: int) -> int:
        """Bytes a client needs to have the current model."""
        control = self.dense_bytes if self.config.local.control_variates else 0
        seen = self.last_seen.get(client)
        if self.download is None or seen is None:
            return self.dense_bytes + control
        return min(self.dense_bytes, self.message_bytes[self.round] - self.message_bytes[seen]) + control

    def _cohort(
        self,
        chosen: Integers,
        clients: Integers,
        rows: list[Integers],
        this: Round,
        starts: Tensor | None = None,
        discounts: Sequence[float] | None = None,
    ) -> None:
        """Trains the clients at the places `chosen` and adds up what they send.

        starts (C, n): where they begin; default: the current model. discounts: of each update in the mean.
        """
        config = self.config
        numbers = clients[chosen]
        plan = batches.make([rows[i] for i in chosen], numbers, config.local, config.run.seed, self.round)
        own = self.controls.read(numbers.tolist()) if config.local.control_variates else None
        adversary = None
        if config.attack is not None:
            adversary = Adversary(self.network, config.attack, config.run.seed, self.round, numbers)
        trained = local.EXECUTORS[config.execute.executor](
            self.network,
            self.shared if starts is None else starts,
            plan,
            self.images,
            self.labels,
            config.local,
            self.control - own if own is not None else None,
            adversary,
        )
        weights = server.weights_of([len(rows[i]) for i in chosen], config.server)
        shares = list(zip(weights, discounts or [1.0] * len(weights), strict=True))
        counts, received = self._received(numbers.tolist(), trained.updates, this, shares)
        this.nonfinite += chosen[~counts.numpy()].tolist()
        this.losses += trained.losses[counts].tolist()
        if own is not None:
            change = received / (plan.steps[:, None] * config.local.rate) - self.control
            kept = numbers[counts.numpy()].tolist()
            self.controls.write(kept, (own + change)[counts])
            this.control += change[counts].sum(0)

    def _received(
        self, clients: list[int], updates: Tensor, this: Round, shares: list[tuple[float, float]]
    ) -> tuple[Tensor, Tensor]:
        """Which updates count (C,) bool, and all as the server reads them (C, n).

        Adds those to the mean, each with its share: (weight, discount).
        """
        settings = self.config.upload
        if self.upload is None or settings is None:
            counts = network.is_finite(updates)
            for i in counts.nonzero().view(-1).tolist():
                this.mean.add(None, updates[i], *shares[i])
            return counts, updates
        rule = Rule(momentum=settings.momentum, masking=settings.masking)
        v = self.residuals.read(clients) if settings.residual else torch.zeros_like(updates)
        u = self.velocities.read(clients) if settings.momentum else None
        sent = compress(self.upload, rule, updates, v, u, self.round)
        received = torch.zeros_like(updates)
        counts = torch.tensor([one is not None for one in sent.coded], dtype=torch.bool)
        for i, one in enumerate(sent.coded):
            if one is not None:
                places, values = self.upload.decode(one.message, self.round)
                received[i, places] = values
                this.mean.add(places, values, *shares[i])
        kept = [client for client, one in zip(clients, sent.coded, strict=True) if one is not None]
        if settings.residual:
            self.residuals.write(kept, sent.v[counts])
        if sent.u is not None:
            self.velocities.write(kept, sent.u[counts])
        return counts, received

    def _move(self, this: Round) -> None:
        """The server's step, and the message with which clients will follow it."""
        sent_bytes = 0
        if this.losses:
            move = self.server.step(this.mean.value())
            self.control += this.control / self.partition.num_clients
            if self.download is None:
                self.shared = self.server.x.clone()
            else:
                rule = Rule(momentum=0.0)
                coded = compress(self.download, rule, move[None], self.server_residual, None, self.round)
                one = coded.coded[0]
                if one is None:
                    raise DivergedError(f"round {self.round}: the server's model is not finite; lower server.rate")
                sent_bytes = one.message.numel()
                self.server_residual = coded.v
                self.shared = self.shared.index_add(0, one.places, one.values, alpha=-1)
        self.message_bytes.append(self.message_bytes[-1] + sent_bytes)

    def _count(self, clients: Integers, course: Course, this: Round, to_start: int) -> None:
        totals = self.totals
        counted = course.fate == ARRIVED
        counted[this.nonfinite] = False
        totals.updates += int(counted.sum())
        totals.nonfinite += len(this.nonfinite)
        for fate, name in ((LATE, "late"), (SURPLUS, "surplus"), (LOST, "lost")):
            setattr(totals, name, getattr(totals, name) + int((course.fate == fate).sum()))
        totals.short_rounds += len(clients) < to_start
        for direction in ("download_bytes", "upload_bytes"):
            lengths = getattr(course, direction)
            setattr(totals, direction, getattr(totals, direction) + int(lengths.sum()))
            wasted = f"wasted_{direction}"
            setattr(totals, wasted, getattr(totals, wasted) + int(lengths[~counted].sum()))
        for name in ("download_s", "compute_s", "upload_s", "wait_s"):
            setattr(totals, name, getattr(totals, name) + float(getattr(course, name).sum()))
        for client in clients[course.has_model].tolist():
            self.last_seen[client] = self.round

    def _record(self, clients: Integers, course: Course, this: Round, seconds: float) -> dict[str, Any]:
        return {
            "event": "round",
            "time": time.time(),
            "round": self.round,
            "clock_s": self.clock_s + course.duration_s,
            "started": len(clients),
            "updates": len(this.losses),
            "late": int((course.fate == LATE).sum()),
            "surplus": int((course.fate == SURPLUS).sum()),
            "lost": int((course.fate == LOST).sum()),
            "nonfinite": len(this.nonfinite),
            "loss": float(np.mean(this.losses)) if this.losses else None,
            "download_bytes": int(course.download_bytes.sum()),
            "upload_bytes": int(course.upload_bytes.sum()),
            "download_s": float(course.download_s.sum()),
            "compute_s": float(course.compute_s.sum()),
            "upload_s": float(course.upload_s.sum()),
            "wait_s": float(course.wait_s.sum()),
            "host_s": seconds,
        }

    def extra_state(self) -> dict[str, Any]:
        """What other kinds of simulation keep between steps besides."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse."""

    def _why_idle(self, num_started: int, course: Course, this: Round) -> str:
        where = f"round {self.round - 1}: no update for {PATIENCE if num_started else NOBODY} rounds in a row"
        if this.nonfinite:
            return f"{where}: all that arrived were not finite; lower local.rate"
        if not num_started:
            return f"{where}: no client could be reached; raise availability.share"
        if self.config.rounds.deadline_s is not None and np.isfinite(course.fastest_s):
            return (
                f"{where}: rounds.deadline_s is {self.config.rounds.deadline_s:g}, and the fastest client of the last "
                f"round would have needed {course.fastest_s:.4g} s; raise it to more than that"
            )
        return f"{where}: every client was lost in its upload; lower links.drop_out"

    def accuracies(self, rows: Rows) -> dict[str, Score]:
        """Of the model that clients have: clean, and robust if they train against an attack."""
        model = load_(self.module, self.shared)
        model.eval()
        size, seed = self.config.evaluate.batch_size, self.config.run.seed
        threat = threat_of(self.config.attack) if self.config.attack is not None else None
        against = {"clean": (NATURAL, None), **({"robust": (ROBUST, threat)} if threat is not None else {})}
        found = {}
        for name, (attack, ball) in against.items():
            pairs = zip(rows.images.split(size), rows.labels.split(size), strict=True)
            found[name] = score(count_correct(model, pairs, attack, ball, seed), attack, ball, seed)
        return found

    def personal(self) -> Personal | None:
        """The clients' personal models next to the global one; None unless configured."""
        config = self.config
        if config.personal is None:
            return None
        return personal.evaluate(
            self.network,
            self.shared,
            self.parts_of,
            self.partition.num_clients,
            self.images,
            self.labels,
            config.personal,
            config.local,
            config.execute.cohort,
            config.run.seed,
        )


def run(
    simulation: Simulation,
    held_out: Rows,
    write: Callable[[dict[str, Any]], None],
    save: Callable[[], None],
    is_stopped: Callable[[], bool],
) -> bool:
    """All rounds, each one's record to `write`; every so often held-out accuracy and a checkpoint by `save`.

    False if it was stopped between two rounds, with a checkpoint.
    """
    config = simulation.config
    while simulation.round < config.rounds.number:
        write(simulation.step())
        done = simulation.round
        is_last = done == config.rounds.number
        if done % config.evaluate.every == 0 or is_last:
            accuracies = {name: one.accuracy for name, one in simulation.accuracies(held_out).items()}
            write({"event": "held_out", "time": time.time(), "round": done - 1, **accuracies})
            save()
        if is_stopped() and not is_last:
            save()
            return False
    return True
