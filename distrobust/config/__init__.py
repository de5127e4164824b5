"""The whole configuration: frozen, documented, valid by construction; one section per room.

A YAML file gives the values, `--set a.b=c` overrides them, in that order. Unknown keys name the closest valid one,
impossible values say their path, what they were and what was wanted. Nothing in a file is ever executed.
"""

from distrobust.config.attack import AttackConfig
from distrobust.config.cluster import ClusterConfig
from distrobust.config.compress import CompressConfig
from distrobust.config.data import DataConfig
from distrobust.config.faults import FaultConfig
from distrobust.config.files import absolute, dump, first_difference, load, override, parse, parse_as, read
from distrobust.config.kubernetes import KubernetesConfig
from distrobust.config.model import ModelConfig, TransformerConfig
from distrobust.config.phase import AccuracyGradientConfig, NoiseConfig, PhaseConfig, ScheduleConfig
from distrobust.config.run import CheckpointConfig, EvaluateConfig, MetricsConfig, RunConfig
from distrobust.config.whole import Config

__all__ = [
    "AccuracyGradientConfig",
    "AttackConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CompressConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "FaultConfig",
    "KubernetesConfig",
    "MetricsConfig",
    "ModelConfig",
    "NoiseConfig",
    "PhaseConfig",
    "RunConfig",
    "ScheduleConfig",
    "TransformerConfig",
    "absolute",
    "dump",
    "first_difference",
    "load",
    "override",
    "parse",
    "parse_as",
    "read",
]
