"""What files and settings cannot do: run code, open a port to the network, carry a secret to where it is read."""

import ast
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distrobust.config import MetricsConfig
from distrobust.errors import CheckpointError, ConfigError
from distrobust.metrics.prometheus import Exporter
from tests.harness.jobs import records_of, run_job
from tests.train.conftest import MakeConfig, make_config, stripes  # noqa: F401  fixtures

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "distrobust").rglob("*.py"))
SECRETS = {
    "RAY_AUTH_TOKEN": "f00dfeed" * 8,
    "AWS_SECRET_ACCESS_KEY": "aws-sentinel-5d1f",
    "WANDB_API_KEY": "wandb-sentinel-77ac",
    "HF_TOKEN": "hf-sentinel-0b3e",
}
RUNS_CODE = re.compile(
    r"(builtins\.)?(eval|exec)|os\.(system|popen)|(pickle|marshal|shelve|dill|cloudpickle|joblib)\.\w+"
    r"|yaml(\.\w+)*\.\w*(load|Loader)\w*|torch\.load|torch\.(\w+\.)+load\w*"
)
RUNS_NONE = {"pickle.UnpicklingError", "yaml.safe_load", "yaml.safe_load_all", "yaml.SafeLoader"}


def _can_run_code(source: str) -> list[str]:
    """What in it may run what is read, by its full name, however that was imported."""
    nodes = list(ast.walk(ast.parse(source)))
    full: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            room = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            full |= {alias.asname or alias.name: room + alias.name for alias in node.names}

    def name(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return full.get(first, first) + dot + rest

    calls = [node for node in nodes if isinstance(node, ast.Call)]
    given = [(call, keyword.arg, ast.unparse(keyword.value)) for call in calls for keyword in call.keywords]
    safe = [call.func for call, key, value in given if (key, value) == ("weights_only", "True")]
    used = [name(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute) and node not in safe]
    found = [one for one in used if RUNS_CODE.fullmatch(one) and one not in RUNS_NONE]
    asked = [f"{key}={value}" for _, key, value in given if key in ("allow_pickle", "shell") and value != "False"]
    return found + asked


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    assert _can_run_code(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "import os; os.system(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "import pickle; pickle.loads(data)",
        "import pickle as p; p.Unpickler(file).load()",
        "from pickle import loads; loads(data)",
        "import yaml; yaml.load(text, yaml.Loader)",
        "import yaml; yaml.unsafe_load(text)",
        "import yaml; yaml.full_load_all(text)",
        "from yaml import load as safe_load; safe_load(text)",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; read = torch.load",
        "from torch import load; load(path)",
        "import torch; torch.jit.load(path)",
        "from torch import jit; jit.load(path)",
        "import numpy as np; np.load(path, allow_pickle=True)",
    ],
)
def test_what_could_run_code_is_found(source: str) -> None:
    assert _can_run_code(source)


def test_a_hostile_checkpoint_with_a_digest_that_fits_runs_no_code(
    make_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    config = make_config("pretrain=null", "checkpoint.keep=3")
    run_job(config)
    checkpoints = sorted((config.run.dir / "checkpoints").glob("[0-9]-*"))
    for place in checkpoints[-2:]:
        torch.save({"parameters": Hostile()}, place / "shared.pt")
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["sha256"]["shared.pt"] = hashlib.sha256((place / "shared.pt").read_bytes()).hexdigest()
        (place / "manifest.json").write_text(json.dumps(manifest))
    run_job(config)
    assert not (tmp_path / "owned").exists()
    assert records_of(config, "run")[-1]["resumed_step"] == int(checkpoints[-3].name.rpartition("-")[2])
    said = [r["text"] for r in records_of(config, "notice") if "is damaged" in r["text"]]
    assert len(said) == 2
    for place in (config.run.dir / "checkpoints").glob("[0-9]-*"):
        (place / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is whole; delete them to start afresh"):
        run_job(config)


def test_the_exporter_listens_on_loopback_unless_it_is_told_otherwise() -> None:
    assert MetricsConfig().host == "127.0.0.1"
    exporter = Exporter("run", 0, host=MetricsConfig().host, port=0)
    try:
        assert _listening(exporter.port) == {"127.0.0.1"}
    finally:
        exporter.close()


def _listening(port: int) -> set[str]:
    """Addresses of this machine on which something listens at a port, by the kernel's table (state 0A)."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {socket.inet_ntoa(bytes.fromhex(host)[::-1]) for host, hexadecimal in local if int(hexadecimal, 16) == port}


def test_no_secret_of_the_environment_reaches_the_run_directory_or_the_output(
    make_config: MakeConfig,  # noqa: F811
) -> None:
    config = make_config("pretrain=null")
    file = config.run.dir.parent / "job.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "distrobust", "train", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SECRETS}, timeout=100)
    assert ran.returncode == 0, ran.stderr
    written = b"".join(path.read_bytes() for path in config.run.dir.rglob("*") if path.is_file())
    assert len(written) > 10_000
    for name, secret in SECRETS.items():
        assert secret.encode() not in written, name
        assert secret not in ran.stdout + ran.stderr, name


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "db_password"])
def test_secrets_among_the_workers_variables_are_refused(make_config: MakeConfig, name: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=f"environment holds {name}, which looks like a secret") as caught:
        make_config(f"cluster.environment={{{name}: sentinel-value}}")
    assert "sentinel-value" not in str(caught.value)


def test_variables_that_are_no_secrets_are_the_workers(make_config: MakeConfig) -> None:  # noqa: F811
    assert make_config("cluster.environment={MONKEY: '1', KEYBOARD: us}").cluster.environment["MONKEY"] == "1"
