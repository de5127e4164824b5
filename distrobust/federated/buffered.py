"""FedBuff: asynchronous rounds (Nguyen et al., AISTATS 2022, algorithm 1).

`per_round` clients are at work at any time, each from the model that was current when it began; as soon as one is done
or lost, another begins. The server moves whenever K updates have arrived, by their mean, each discounted by its
staleness tau, the number of moves since its client began:

    D = sum_i w_i (x - y)_i / sqrt(1 + tau_i) / sum_i w_i        w_i: rows, or 1

What is a round elsewhere is a move of the server here; a wait for somebody who can be reached counts as one, too, for
who is there. A client is at work once at a time, and not again before its update has been used. Bytes and times are
counted when a client is done; what is under way at the end is not.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrobust.errors import DivergedError
from distrobust.federated import draws, server, timeline
from distrobust.federated.draws import Integers, Purpose
from distrobust.federated.patience import NOBODY, PATIENCE
from distrobust.federated.simulate import Simulation
from distrobust.federated.timeline import ARRIVED, Course
from distrobust.federated.totals import Round


@dataclass(frozen=True, order=True)
class Job:
    """A client at work. Ordered by when it ends, and by `number` where that is the same."""

    end_s: float
    number: int  # of all jobs begun before
    client: int
    version: int  # moves of the server before it began
    fate: int
    download_bytes: int
    upload_bytes: int
    download_s: float
    compute_s: float
    upload_s: float


class Buffered(Simulation):
    """A simulation whose steps end with the K-th arrival: rounds.buffer."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.jobs: list[Job] = []  # a heap
        self.num_jobs = 0
        self.num_waits = 0
        self.starts: dict[int, Tensor] = {}  # version -> the model that clients at work began with

    def step(self) -> dict[str, Any]:
        """Until the server has moved; returns its record. Raises DivergedError if that cannot be hoped for."""
        started = time.perf_counter()
        begin_s = self.clock_s
        arrived, lost = self._collect(self.config.rounds.buffer or 1)
        jobs = sorted(arrived, key=lambda job: job.client) + lost
        clients = np.array([job.client for job in jobs], dtype=np.int64)
        rows = [self.parts_of(client)[0] for client in clients.tolist()]
        this = Round(server.WeightedMean(self.network.spec.n), torch.zeros_like(self.control))
        begun = [job.version for job in jobs[: len(arrived)]]
        starts = [self.starts[version] for version in begun]
        discounts = [(1 + self.round - version) ** -0.5 for version in begun]
        self._train(np.arange(len(arrived)), clients, rows, this, starts, discounts)
        self._move(this)
        course = self._course(jobs, self.clock_s - begin_s)
        staleness = float(np.mean([self.round - version for version in begun]))
        self.clock_s = begin_s  # which the record counts from
        record = {**self._end(clients, course, this, started), "staleness": staleness}
        self.last_seen.update({job.client: job.version for job in (*jobs, *self.jobs)})
        self.clock_s = begin_s + course.duration_s
        self.starts = {job.version: self.starts[job.version] for job in self.jobs}
        self.patience.look(record["round"], len(clients), course, this)
        return record

    def _collect(self, wanted: int) -> tuple[list[Job], list[Job]]:
        """Runs the clock until `wanted` have arrived: those, and the jobs that were lost meanwhile."""
        arrived: list[Job] = []
        lost: list[Job] = []
        waited = 0
        while len(arrived) < wanted:
            self._begin({job.client for job in arrived})
            if not self.jobs:
                self.clock_s += self.config.rounds.retry_s
                self.num_waits += 1
                waited += 1
                if waited == NOBODY:
                    who = "no other client" if arrived else "no client"
                    raise DivergedError(f"move {self.round}: {who} could be reached; raise availability.share")
                continue
            job = heapq.heappop(self.jobs)
            self.clock_s = max(self.clock_s, job.end_s)
            (arrived if job.fate == ARRIVED else lost).append(job)
            if not arrived and len(lost) == PATIENCE * self.config.clients.per_round:
                raise DivergedError(f"move {self.round}: every client was lost in its upload; lower links.drop_out")
        return arrived, lost

    def _begin(self, waiting: set[int]) -> None:
        """Starts clients until `per_round` are at work, as far as they can be reached."""
        missing = self.config.clients.per_round - len(self.jobs)
        busy = waiting | {job.client for job in self.jobs}
        reached = self.availability.select(missing + len(busy), self.round + self.num_waits, self.clock_s)
        free = np.array([client for client in reached.tolist() if client not in busy], dtype=np.int64)
        keys = draws.uniform(self.config.run.seed, Purpose.SELECTION, self.round, free, self.num_jobs)
        for client in free[np.argsort(keys, kind="stable")[:missing]].tolist():
            self._begin_one(client)

    def _begin_one(self, client: int) -> None:
        number, self.num_jobs = self.num_jobs, self.num_jobs + 1
        one: Integers = np.array([client])
        course = self._run_clock(one, [self.parts_of(client)[0]], 1, number)
        self.last_seen[client] = self.round
        self.starts.setdefault(self.round, self.shared)
        lengths = (int(course.download_bytes[0]), int(course.upload_bytes[0]))
        times = (float(course.download_s[0]), float(course.compute_s[0]), float(course.upload_s[0]))
        end_s = self.clock_s + course.duration_s
        heapq.heappush(self.jobs, Job(end_s, number, client, self.round, int(course.fate[0]), *lengths, *times))

    def _course(self, jobs: list[Job], duration_s: float) -> Course:
        """Of the jobs that ended during a step."""
        columns = {name: np.array([getattr(job, name) for job in jobs]) for name in asdict(jobs[0])}
        names = ("fate", "download_bytes", "upload_bytes", "download_s", "compute_s", "upload_s")
        return timeline.Course(
            **{name: columns[name] for name in names},
            has_model=np.ones(len(jobs), dtype=np.bool_),
            wait_s=np.zeros(len(jobs)),
            duration_s=duration_s,
            fastest_s=np.inf,
        )

    def extra_state(self) -> dict[str, Any]:
        counts = {"num_jobs": self.num_jobs, "num_waits": self.num_waits}
        return {"jobs": [asdict(job) for job in self.jobs], "starts": self.starts, **counts}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.jobs = [Job(**job) for job in state["jobs"]]
        self.num_jobs, self.starts = state["num_jobs"], state["starts"]
        self.num_waits = state.get("num_waits", 0)  # 0.1.0 did not count them
