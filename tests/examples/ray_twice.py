"""Runs launch/examples/ray_train_loop.py with a worker that dies once: `ray_twice.py FOLDER`."""

import os
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray_train_loop

FOLDER = Path(sys.argv[1])


def dies_once(config: dict[str, Any]) -> None:
    """train_loop; worker 0 is gone after its second report, the first time."""
    report, gone = ray.train.report, FOLDER / "gone"

    def report_and_die(metrics: dict[str, Any], checkpoint: ray.train.Checkpoint) -> None:
        report(metrics, checkpoint=checkpoint)
        if metrics["step"] == 80 and ray.train.get_context().get_world_rank() == 0 and not gone.exists():
            gone.touch()
            os._exit(1)

    ray.train.report = report_and_die
    train_loop(config)


if __name__ == "__main__":
    FOLDER.mkdir()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    train_loop = ray_train_loop.train_loop
    ray.cloudpickle.register_pickle_by_value(ray_train_loop)
    ray_train_loop.train_loop = dies_once
    ray_train_loop.main([str(FOLDER)])
    ray.shutdown()
