from pathlib import Path

import pytest
import yaml

from tests.train.conftest import write_stripes


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """Two workers: 16 steps of fine-tuning, a checkpoint after every second one."""
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "cluster": {"workers": 2, "timeout_s": 30},
        "data": {"path": str(write_stripes(tmp_path / "data", num_train=320)), "held_out": 0.2},
        "model": {"name": "cnn"},
        "train": {"epochs": 2, "batch_size": 32, "gradient_noise": 1e-6},
        "attack": {"name": "pgd", "steps": 2, "eps": 0.05, "ramp": 0.5},
        "compress": {"density": 0.02, "warmup": 0.1},
        "noise": {},
        "checkpoint": {"every": 2},
        "metrics": {"every": 1, "port": 0},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
