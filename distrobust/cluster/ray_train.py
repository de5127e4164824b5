"""The main job through Ray Train: one worker per device, restarted together from the last checkpoint when one dies.

Ray starts processes and watches them; numbers go out of band, through the run directory, because a report to
Ray Train waits for its controller's poll (2 s by default). Checkpoints are ours for the same reason, and so that they
are the same under torchrun.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from distrobust import config as configuration
from distrobust.cluster.connect import connected
from distrobust.config import Config
from distrobust.errors import CommError
from distrobust.train.launch import BACKENDS
from distrobust.train.rundir import Outcome, RunDirectory
from distrobust.train.stopping import supervised


def run_on_ray(config: Config) -> Outcome:
    """Runs the job on Ray workers and returns its outcome.

    Ctrl-C, or SIGTERM from a job manager, asks the workers to write a checkpoint and leave; a second one gives up
    waiting.
    Raises CommError when workers died more often than cluster.max_failures allows.
    """
    directory = RunDirectory(config.run.dir)
    with connected(config):
        failure = supervised(lambda: _trainer(config).fit(), directory)
    outcome = directory.outcome()
    if outcome is not None:
        return outcome
    reason = " ".join(str(failure or "the workers ended without a word").split())
    raise CommError(
        f"Ray Train gave up after {config.cluster.max_failures} restarts: {reason[:300]}; start again to continue from "
        "the last checkpoint"
    )


def _trainer(config: Config) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = config.cluster
    resources: dict[str, float] = {"CPU": settings.threads}
    scaling: dict[str, Any] = {"num_workers": settings.workers}
    if settings.min_workers is not None:
        scaling["num_workers"] = (settings.min_workers, settings.workers)
        scaling["elastic_resize_monitor_interval_s"] = settings.resize_every_s
    if settings.gpu:
        resources["GPU"] = 1
    return TorchTrainer(
        worker,
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=TorchConfig(backend=BACKENDS[settings.gpu], timeout_s=math.ceil(settings.timeout_s)),
        scaling_config=ScalingConfig(use_gpu=settings.gpu, resources_per_worker=resources, **scaling),
        run_config=RunConfig(
            # a fresh name each time: Ray would continue a run of the same name, and we continue ours
            name=f"{config.run.dir.name}-{int(time.time() * 1000)}",
            storage_path=str(config.run.dir / "ray"),
            failure_config=FailureConfig(
                max_failures=settings.max_failures,
                controller_failure_limit=settings.max_failures,  # type: ignore[call-arg]  # known to Ray Train V2
            ),
        ),
    )


def worker(values: dict[str, Any]) -> None:
    """What every Ray Train worker runs; the process group is Ray's."""
    import ray.train
    import ray.train.torch

    from distrobust.train import job

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    config = configuration.parse(values["config"], "driver")
    outcome = job.run(config, ray.train.torch.get_device(), [])
    ray.train.report({"status": outcome.status})
