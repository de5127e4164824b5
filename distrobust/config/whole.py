"""All sections together, and what one of them asks of another."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from distrobust.config.attack import AttackConfig
from distrobust.config.cluster import ClusterConfig
from distrobust.config.compress import CompressConfig
from distrobust.config.data import DataConfig
from distrobust.config.faults import FaultConfig
from distrobust.config.kubernetes import KubernetesConfig
from distrobust.config.model import ModelConfig
from distrobust.config.phase import NoiseConfig, PhaseConfig
from distrobust.config.run import CheckpointConfig, EvaluateConfig, MetricsConfig, RunConfig
from distrobust.config.section import (
    Section,
)


class Config(Section):
    data: DataConfig
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()
    pretrain: PhaseConfig | None = None
    """Natural training, dense, before the adversarial fine-tuning; null: start from model.weights or from scratch."""
    train: PhaseConfig = PhaseConfig()
    """Adversarial fine-tuning."""
    attack: AttackConfig | None = AttackConfig()
    """null: the `train` phase is natural training too."""
    compress: CompressConfig | None = CompressConfig()
    """null: dense."""
    noise: NoiseConfig | None = None
    """Learning rates per layer that follow the layer's gradient noise, during `train`; null: one rate for all."""
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    faults: tuple[FaultConfig, ...] = ()
    """Injected into the run, for tests of it; refused without DISTROBUST_FAULTS=allow in the environment."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """For `distrobust k8s render`; without effect on a run."""

    @model_validator(mode="after")
    def _one_start(self) -> Config:
        if self.pretrain is not None and self.model.weights is not None:
            raise ValueError("pretrain and model.weights exclude each other; set one of them to null")
        if self.model.reads_text:
            self._check_text()
        return self

    @model_validator(mode="after")
    def _linf_budgets_fit_into_the_box(self) -> Config:
        """An embedding of texts has none."""
        if self.attack is None or self.attack.norm != "linf" or self.model.reads_text:
            return self
        for name, eps in (("attack.eps", self.attack.eps), ("evaluate.eps", self.evaluate.eps)):
            if eps is not None and eps > 1:
                raise ValueError(f"{name} {eps:g} is above 1 for inputs in [0, 1]; did you mean {eps:g}/255?")
        return self

    def _check_text(self) -> None:
        of_images = {
            "data.image_column": self.data.image_column is not None,
            "data.crop": self.data.crop > 0,
            "data.flip": self.data.flip,
            "model.channels_last": self.model.channels_last,
            "attack.norm l1": self.attack is not None and self.attack.norm == "l1",
        }
        given = [name for name, is_given in of_images.items() if is_given]
        if given:
            raise ValueError(f"model.name {self.model.name} reads texts, and {given[0]} is for images; leave it out")

    @model_validator(mode="after")
    def _pending_updates_are_known(self) -> Config:
        if self.compress is not None and self.compress.step_ahead and self.train.optimizer != "sgd":
            raise ValueError(
                f"compress.step_ahead: got train.optimizer {self.train.optimizer}, wanted sgd, whose pending update "
                "alone is its rate times the residual; set compress.step_ahead to false"
            )
        return self

    @model_validator(mode="after")
    def _retries_end_in_time(self) -> Config:
        wait, timeout = self.checkpoint.longest_wait_s, self.cluster.timeout_s
        if wait >= timeout:
            raise ValueError(
                f"checkpoint.retries and backoff_s add up to {wait:g} s, while other ranks wait no longer than "
                f"cluster.timeout_s ({timeout:g} s); lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _batches_can_be_shared(self) -> Config:
        """Found before the first node is lost, not after it."""
        for name, phase in (("pretrain", self.pretrain), ("train", self.train)):
            uneven = [size for size in self.cluster.sizes if phase is not None and phase.batch_size % size]
            if uneven and phase is not None and self.cluster.min_workers is not None:
                raise ValueError(
                    f"{name}.batch_size {phase.batch_size} cannot be shared by {uneven[0]} workers; wanted a multiple "
                    f"of every number from cluster.min_workers {self.cluster.sizes[0]} to {self.cluster.sizes[-1]}"
                )
        return self

    @model_validator(mode="after")
    def _can_go_on_with_fewer(self) -> Config:
        is_elastic = self.cluster.min_workers is not None
        if is_elastic and self.compress is not None and self.compress.exchange == "hierarchical":
            raise ValueError(
                "compress.exchange hierarchical: its residuals belong to the workers of a machine, so a run cannot go "
                "on with fewer; set it to all_gather or sharded, or cluster.min_workers to null"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What a run directory is bound to: everything that changes what a run does, but not how many workers do it."""
        values = self.model_dump(mode="json")
        kept = {key: values[key] for key in ("data", "model", "pretrain", "train", "attack", "compress", "noise")}
        for harmless in ("cache", "memory_limit_bytes"):  # neither changes the order of the rows
            kept["data"].pop(harmless)
        kept["model"]["rates"] = list(kept["model"]["rates"].items())  # whose order counts
        return {"seed": self.run.seed, **kept}
