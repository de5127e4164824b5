"""The operator would take every RayJob we render, and our copy of its rules notices when it would not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.operator_rules import QUEUE_LABEL, problems
from tests.k8s.rendered import CASES, EXAMPLE, NAMES, run_documents, the

Break = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(("file", "overlay"), CASES, ids=NAMES)
def test_the_operator_would_take_it(file: Path, overlay: str | None) -> None:
    assert problems(the(run_documents(file, overlay), "RayJob")) == []


def _workers(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]  # type: ignore[no-any-return]


BREAKS: list[tuple[str, Break]] = [
    ("47 characters", lambda job: job["metadata"].update(name="a" * 48)),
    ("DNS-1035", lambda job: job["metadata"].update(name="1st")),
    ("exactly one", lambda job: job["spec"].update(clusterSelector={"a": "b"}, backoffLimit=0)),
    ("shutdownAfterJobFinishes", lambda job: job["spec"].update(shutdownAfterJobFinishes=False)),
    ("SidecarMode", lambda job: job["spec"].update(submissionMode="SidecarMode")),
    ("backoffLimit", lambda job: job["spec"].update(clusterSelector=job["spec"].pop("rayClusterSpec"))),
    ("minReplicas is at most", lambda job: _workers(job).update(minReplicas=9)),
    ("replicas lies between", lambda job: _workers(job).update(replicas=1)),
    ("not in both", lambda job: _workers(job).update(resources={"CPU": "1"})),
    ("labels are", lambda job: _workers(job)["rayStartParams"].update(labels="a=b")),
    ("needs rayVersion 2.52", lambda job: job["spec"]["rayClusterSpec"].update(rayVersion="2.51.0")),
    ("InteractiveMode", lambda job: job["spec"].update(submissionMode="InteractiveMode")),
    ("can be suspended", lambda job: job["spec"].update(suspend=True, shutdownAfterJobFinishes=False)),
    ("above 0", lambda job: job["spec"].update(activeDeadlineSeconds=0)),
    ("at least 0", lambda job: job["spec"].update(backoffLimit=-1)),
    ("at least one container", lambda job: _workers(job)["template"]["spec"].update(containers=[])),
    ("Redis", lambda job: _workers(job)["rayStartParams"].update({"redis-username": "a"})),
    ("shut down with it", lambda job: job["spec"].update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0)),
    ("autoscaling", lambda job: job["spec"]["rayClusterSpec"].update(enableInTreeAutoscaling=True)),
]


@pytest.mark.parametrize(("problem", "break_it"), BREAKS, ids=[problem for problem, _ in BREAKS])
def test_a_job_the_operator_refuses_is_noticed(problem: str, break_it: Break) -> None:
    job = copy.deepcopy(the(run_documents(EXAMPLE, "kueue"), "RayJob"))
    assert QUEUE_LABEL in job["metadata"]["labels"]
    break_it(job)
    assert any(problem in found for found in problems(job)), problems(job)
