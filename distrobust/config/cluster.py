"""Who starts the workers, how many there are, and how they find and wait for each other."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distrobust.config.section import Count, Positive, Seconds, Section

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|(^|_)KEY($|_)", re.IGNORECASE)


class ClusterConfig(Section):
    launcher: Literal["ray", "torchrun", "local"] = "ray"
    """ray: Ray Train; torchrun: torch's own launcher, no Ray; local: one rank in this process."""
    workers: Count = 2
    """Ranks, one a device. Residuals belong to a rank and are dealt out anew when their number changes."""
    min_workers: Count | None = None
    """ray only: go on with as few as this many while nodes are missing; null: wait until all are back."""
    resize_every_s: Positive = 60.0
    """With min_workers: seconds between looks for nodes that came, and before a run goes on without a lost one;
    a resize is a restart from the last checkpoint."""
    threads: Count = 1
    """torch threads per worker; more workers x threads than cores is far slower, not faster."""
    gpu: bool = False
    """One GPU per worker, nccl instead of gloo."""
    address: str | None = None
    """Address of an existing Ray cluster; null starts a private one on this machine and stops it afterwards."""
    interface: str | None = None
    """Network interface for gloo and nccl; null: on several hosts that towards the head, on one what gloo chooses."""
    auth: Literal["token", "disabled"] | None = None
    """Ray's RAY_AUTH_MODE; null: what the environment says, and Ray's own choice for a private Ray."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of every worker. They are written to the run directory, so names of secrets are refused."""
    start_timeout_s: Seconds = 60.0
    """How long an existing cluster may take to answer and to have what the workers need; then it is an error."""
    timeout_s: Positive = 120.0
    """A collective that takes longer is an error on every rank that is still alive; half of it without a step, and each
    leaves its stacks in RUN/stacks."""
    health_check_s: Positive = 0.5
    """Seconds between Ray's looks at its workers: how soon a dead one is noticed."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often Ray restarts all workers after one died; each restart continues from the last checkpoint."""
    slow_ratio: Annotated[float, Field(gt=1.0)] | None = 3.0
    """A rank whose own part of a step takes so many times the others' median is reported; null: none is."""

    @model_validator(mode="after")
    def _fits(self) -> ClusterConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        if self.min_workers is not None and self.launcher != "ray":
            raise ValueError(f"min_workers goes with launcher ray, got launcher {self.launcher}")
        secrets = [name for name in self.environment if _SECRET.search(name)]
        if secrets:
            raise ValueError(
                f"environment holds {secrets[0]}, which looks like a secret and would be written to the run directory; "
                "set it on the machines themselves, outside of this file"
            )
        return self

    @property
    def sizes(self) -> range:
        """Every number of workers the run may have."""
        return range(self.min_workers or self.workers, self.workers + 1)
