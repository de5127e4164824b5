"""The main job through Ray Train: one worker per device, restarted together from the last checkpoint when one dies.

Ray starts processes and watches them; numbers go out of band, through the run directory, because a report to
Ray Train waits for its controller's poll (2 s by default). Checkpoints are ours for the same reason, and so that they
are the same under torchrun.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from typing import Any

from distrobust import config as configuration
from distrobust.cluster.ray_session import check_resources, session
from distrobust.config import Config
from distrobust.errors import CommError
from distrobust.train.launch import BACKENDS
from distrobust.train.rundir import Outcome, RunDirectory


def run_on_ray(config: Config) -> Outcome:
    """Runs the job on Ray workers and returns its outcome.

    Ctrl-C asks the workers to write a checkpoint and leave; a second one gives up waiting.
    Raises CommError when workers died more often than cluster.max_failures allows.
    """
    # before ray is imported: its workers would otherwise change into a directory of their own, and start as if no
    # accelerator variable were set
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    settings = config.cluster
    directory = RunDirectory(config.run.dir)
    cpus = settings.workers * settings.threads
    with session(settings.address, "cluster.address", cpus, _environment(config)):
        wanted = {"CPU": cpus, "GPU": settings.workers if settings.gpu else 0}
        check_resources(wanted, f"cluster: {settings.workers} workers|cluster.workers or cluster.threads")
        failure = _fit(config, directory)
    outcome = directory.outcome()
    if outcome is not None:
        return outcome
    reason = " ".join(str(failure or "the workers ended without a word").split())
    raise CommError(
        f"Ray Train gave up after {settings.max_failures} restarts: {reason[:300]}; start again to continue from the "
        "last checkpoint"
    )


def _fit(config: Config, directory: RunDirectory) -> BaseException | None:
    """Runs the trainer in a thread of its own: Ray would otherwise take over Ctrl-C and abort without a checkpoint."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            _trainer(config).fit()
        except BaseException as error:  # Ray raises KeyboardInterrupt here too
            failures.append(error)

    def ask_to_stop(number: int, _frame: object) -> None:
        directory.stop.touch()
        signal.signal(number, signal.default_int_handler)  # the second one interrupts

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    previous = signal.signal(signal.SIGINT, ask_to_stop)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    finally:
        signal.signal(signal.SIGINT, previous)
    return failures[0] if failures else None


def _trainer(config: Config) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = config.cluster
    resources: dict[str, float] = {"CPU": settings.threads}
    if settings.gpu:
        resources["GPU"] = 1
    return TorchTrainer(
        worker,
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=TorchConfig(backend=BACKENDS[settings.gpu], timeout_s=math.ceil(settings.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
        ),
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


def _environment(config: Config) -> dict[str, str]:
    settings = config.cluster
    variables = {"OMP_NUM_THREADS": str(settings.threads)}
    if settings.interface is not None:
        variables.update(GLOO_SOCKET_IFNAME=settings.interface, NCCL_SOCKET_IFNAME=settings.interface)
    return variables
