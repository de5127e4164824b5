"""Where a rendered run finds what it needs on a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distrobust.config.section import (
    Count,
    Quantity,
    Section,
)


class KubernetesConfig(Section):
    image: str | None = None
    """The program's image, as the nodes know it; null: distrobust:VERSION-cpu, or -cuda with cluster.gpu."""
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")] | None = None
    """Of the RayJob: up to 47 lower-case letters, digits and dashes, a letter first; null: the name of run.dir."""
    claim: str = "distrobust"
    """Volume claim mounted at /shared in every pod, for data and runs; relative paths of this file are on it."""
    claim_size: Quantity = "50Gi"
    """Of the claim, where it is made here."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """Of the claim; ReadWriteOnce on clusters of one node only."""
    storage_class: str | None = None
    """Of the claim; null: the cluster's default."""
    memory: Quantity = "8Gi"
    """Of each worker; its pod gets it whole and no more."""
    head_memory: Quantity = "8Gi"
    """Of the head, where Ray's controllers and the driver live."""
    bandwidth: Quantity | None = None
    """Limit of each worker's network each way, in bits a second, such as 100M; needs the CNI's bandwidth plugin."""
    queue: str | None = None
    """Kueue's local queue; null: not queued."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often the operator starts over with a new cluster; each start continues from the last checkpoint."""
    deadline_s: Count = 86_400
    """The run is ended after so long, with all retries."""
