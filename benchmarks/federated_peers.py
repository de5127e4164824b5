"""One simulator's turn: `federated_peers.py NAME REGISTERED PER_ROUND MODEL ROUNDS DATA`, for federated_speed.py.

Every client trains 4 steps of 16 on its own 64 rows, SGD with rate 0.1, float32, one torch thread.
The first round is not timed. The peers do not import anything of ours but the data set and the network.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust import models
from distrobust.federated import dataset, settings
from distrobust.federated.simulate import Simulation

ROWS, BATCH, RATE = 64, 16, 0.1


def configuration(registered: int, per_round: int, model: str, data: Path, **execute: Any) -> settings.SimulateConfig:
    values = {
        "data": {"path": str(data)},
        "model": model,
        "clients": {"registered": registered, "per_round": per_round, "rows": ROWS},
        "local": {"batch_size": BATCH, "rate": RATE},
        "execute": execute,
    }
    return settings.parse(values, "benchmark")


def task(model: str, data: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, all training images in [0, 1] and their labels."""
    found = dataset.load(configuration(1, 1, model, data))
    net = models.build(model, found.source.num_classes, found.source.shape, *moments(found), seed=0)
    return net, found.train.images.float() / 255, found.train.labels


def moments(found: dataset.Dataset) -> tuple[list[float], list[float]]:
    """Mean and standard deviation for each channel, as `distrobust simulate` takes them."""
    channels = found.source.shape[0]
    return [0.5] * channels, [0.25] * channels


def rows_of(client: int, num_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(client).choice(num_rows, ROWS, replace=False)


def distrobust(executor: str, registered: int, per_round: int, model: str, rounds: int, data: Path) -> None:
    config = configuration(registered, per_round, model, data, executor=executor, cohort=50 if model == "mlp" else 10)
    found = dataset.load(config)
    net = models.build(model, 10, found.source.shape, *moments(found), seed=0)
    with Simulation(config, found, net, data / "scratch") as simulation:
        for _ in range(1 + rounds):
            assert simulation.step()["updates"] == per_round
            tick()


def pfl(registered: int, per_round: int, model: str, rounds: int, data: Path) -> None:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    net, images, labels = task(model, data)

    def loss(x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        return F.cross_entropy(net(x), y)

    net.loss, net.metrics = loss, lambda *_: {}  # type: ignore[assignment]

    def dataset_of(client: Any) -> Any:
        rows = torch.from_numpy(rows_of(int(client), len(labels)))
        return PyTorchTensorDataset((images[rows], labels[rows]), user_id=str(client))

    users = FederatedDataset(dataset_of, get_user_sampler("random", list(range(registered))))
    wrapped = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    backend = SimulatedBackend(users, users)
    algorithm = FederatedAveraging()
    hyper = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH)
    params = NNAlgorithmParams(
        central_num_iterations=1 + rounds, evaluation_frequency=10**9, train_cohort_size=per_round, val_cohort_size=None
    )

    class Tick(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            tick()
            return False, Metrics()

    algorithm.run(params, backend, wrapped, hyper, callbacks=[Tick()], send_metrics_to_platform=False)


def flower(registered: int, per_round: int, model: str, rounds: int, data: Path) -> None:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        net, images, labels = _task(model, data)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        rows = torch.from_numpy(rows_of(int(context.node_config["partition-id"]), len(labels)))
        optimizer = torch.optim.SGD(net.parameters(), RATE)
        for own in rows[torch.randperm(ROWS)].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[own]), labels[own]).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": ROWS})}
        return Message(content=RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=per_round / registered,
            fraction_evaluate=0.0,
            min_available_nodes=registered,
            min_train_nodes=per_round,
        )
        arrays = ArrayRecord(task(model, data)[0].state_dict())

        def evaluate(number: int, _: ArrayRecord) -> MetricRecord | None:
            if number:
                tick()
            return None

        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1 + rounds, evaluate_fn=evaluate)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app, client_app, registered, backend_config=resources)  # type: ignore[arg-type]


_task = functools.cache(task)  # once in each of Flower's actors
ENDS: list[tuple[float, float]] = []


def tick() -> None:
    """A round is over."""
    ENDS.append((time.perf_counter(), time.process_time()))


def main() -> None:
    name, model, data = sys.argv[1], sys.argv[4], Path(sys.argv[6])
    registered, per_round, rounds = (int(sys.argv[i]) for i in (2, 3, 5))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if name in ("flower", "pfl"):
        {"flower": flower, "pfl": pfl}[name](registered, per_round, model, rounds, data)
    else:
        distrobust(name, registered, per_round, model, rounds, data)
    (began, began_cpu), (ended, ended_cpu) = ENDS[0], ENDS[-1]
    updates = per_round * (len(ENDS) - 1)
    found = {
        "updates": updates,
        "seconds": ended - began,
        "cpu_seconds": None if name == "flower" else ended_cpu - began_cpu,  # whose work is in other processes
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
