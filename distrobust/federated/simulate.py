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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrobust.compression.memory import Rule
from distrobust.errors import DivergedError
from distrobust.evaluation import Score
from distrobust.federated import batches, deadline, evaluation, network, partition, personal, server, timeline, totals
from distrobust.federated.availability import Availability
from distrobust.federated.coding import Coder, compress
from distrobust.federated.dataset import Dataset, Rows
from distrobust.federated.draws import Floats, Integers
from distrobust.federated.links import Links
from distrobust.federated.patience import Patience
from distrobust.federated.personal import Personal
from distrobust.federated.rows import Rows as Vectors
from distrobust.federated.settings import SimulateConfig
from distrobust.federated.timeline import ARRIVED, Course
from distrobust.federated.totals import Round, Totals
from distrobust.federated.work import Answer, Task, Worker, Workers

FLOAT_BYTES = 256 * 2**20  # of images that are converted once, instead of whenever a client takes them


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
        self.worker = Worker(config, module, self.images, self.labels)
        self.workers: Workers = self.worker.here
        self.network, self.upload = self.worker.network, self.worker.upload
        n = self.network.spec.n
        self.server = server.Server(network.flat(module), config.server)
        self.shared = self.server.x.clone()
        self.download = Coder(self.network.spec.sizes, config.download) if config.download is not None else None
        self.server_residual = torch.zeros(1, n)
        self.dense_bytes = 4 * n
        self.upload_bytes = self.upload.num_bytes if self.upload is not None else self.dense_bytes
        control = self.dense_bytes if config.local.control_variates else 0
        trained_on = (self.partition.num_clients, lambda client: self.parts_of(client)[0])
        deadline.check(config, self.links, *trained_on, self.dense_bytes + control, self.upload_bytes)
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
        self.patience = Patience(config)

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        for vectors in (self.residuals, self.velocities, self.controls):
            vectors.close()

    def step(self) -> dict[str, Any]:
        """One round; returns its record. Raises DivergedError after too many rounds in a row without an update."""
        started = time.perf_counter()
        config, rounds = self.config, self.config.rounds
        wanted = config.clients.per_round
        to_start = min(self.partition.num_clients, int(np.ceil(wanted * (1 + rounds.over_selection))))
        clients = np.sort(self.availability.select(to_start, self.round, self.clock_s))
        rows = [self.parts_of(client)[0] for client in clients.tolist()]
        course = self._run_clock(clients, rows, wanted, self.round)
        arrived = np.flatnonzero(course.fate == ARRIVED)
        this = Round(server.WeightedMean(self.network.spec.n), torch.zeros_like(self.control))
        self._train(arrived, clients, rows, this)
        self._move(this)
        self.totals.short_rounds += len(clients) < to_start
        record = self._end(clients, course, this, started)
        self.clock_s += course.duration_s if len(clients) else rounds.retry_s
        self.patience.look(record["round"], len(clients), course, this)
        return record

    def _end(self, clients: Integers, course: Course, this: Round, started: float) -> dict[str, Any]:
        """Counts everything; returns the record of the round, which began at `started` on this host's clock."""
        ended_s = self.clock_s + course.duration_s
        seconds = time.perf_counter() - started
        record = totals.record(self.round, ended_s, clients, self.partition.num_clients, course, this, seconds)
        self.totals.add(record)
        self.last_seen.update(dict.fromkeys(clients[course.has_model].tolist(), self.round))
        self.round += 1
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
            self.upload_bytes,
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

    def _train(
        self,
        arrived: Integers,
        clients: Integers,
        rows: list[Integers],
        this: Round,
        starts: Sequence[Tensor] | None = None,
        discounts: Sequence[float] | None = None,
    ) -> None:
        """Trains the clients at the places `arrived`, cohort by cohort, and adds up what they send.

        starts, discounts: of each of those clients, where it began and how much its update counts; default: the
        current model, and all of it.
        """
        size = self.config.execute.cohort
        places = [range(first, min(first + size, len(arrived))) for first in range(0, len(arrived), size)]

        def tasks() -> Iterator[Task]:
            for place in places:
                start = self.shared if starts is None else torch.stack([starts[i] for i in place])
                chosen = arrived[place.start : place.stop]
                yield self._task(clients[chosen], [rows[i] for i in chosen], start)

        for place, answer in zip(places, self.workers(tasks()), strict=True):
            chosen = arrived[place.start : place.stop]
            weights = server.weights_of([len(rows[i]) for i in chosen], self.config.server)
            shares = [(w, 1.0 if discounts is None else discounts[i]) for w, i in zip(weights, place, strict=True)]
            counts = self._receive(clients[chosen].tolist(), answer, this, shares)
            this.nonfinite += chosen[~counts.numpy()].tolist()
            this.losses += answer.losses[counts].tolist()

    def _task(self, clients: Integers, rows: list[Integers], start: Tensor) -> Task:
        numbers, upload = clients.tolist(), self.config.upload
        correction = self.control - self.controls.read(numbers) if self.config.local.control_variates else None
        v = self.residuals.read(numbers) if upload is not None and upload.residual else None
        u = self.velocities.read(numbers) if upload is not None and upload.momentum else None
        return Task(self.round, clients, rows, start, correction, v, u)

    def _receive(self, clients: list[int], answer: Answer, this: Round, shares: list[tuple[float, float]]) -> Tensor:
        """Adds to the mean what the server reads, each with its share: (weight, discount); keeps what clients keep.

        Returns which updates count (C,) bool.
        """
        counts = answer.counts
        counted = counts.nonzero().view(-1).tolist()
        kept = [clients[i] for i in counted]
        needed, received = self.config.local.control_variates, answer.updates  # as the server reads them
        if received is not None:
            for i in counted:
                this.mean.add(None, received[i], *shares[i])
        elif self.upload is not None and answer.messages is not None:
            received = torch.zeros(len(clients) if needed else 0, self.network.spec.n)
            for i, message in zip(counted, answer.messages, strict=True):
                places, values = self.upload.decode(message, self.round)
                this.mean.add(places, values, *shares[i])
                if needed:
                    received[i, places] = values
            for vectors, state in ((self.residuals, answer.v), (self.velocities, answer.u)):
                if state is not None:
                    vectors.write(kept, state[counts])
        if needed and received is not None:
            change = received / (answer.steps[:, None] * self.config.local.rate) - self.control
            self.controls.write(kept, (self.controls.read(clients) + change)[counts])
            this.control += change[counts].sum(0)
        return counts

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

    def extra_state(self) -> dict[str, Any]:
        """What other kinds of simulation keep between steps besides."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse."""

    def accuracies(self, rows: Rows) -> dict[str, Score]:
        """Of the model that clients have: clean, and robust if they train against an attack."""
        return evaluation.scores(self.config, self.module, self.shared, rows)

    def class_shares(self) -> Floats:
        """(clients, classes): for `evaluation.of_clients`."""
        classes = self.availability.num_classes
        return evaluation.class_shares(self.partition, self.labels.numpy(), classes, self.config.run.seed)

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
