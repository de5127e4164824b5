"""Who may import whom. The table is the architecture; a new arrow is a decision, made here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distrobust"
ANYONE = {"errors"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "models": set(),
    "compression": set(),
    "adversarial": set(),
    "data": set(),
    "metrics": set(),
    "optim": set(),
    "comm": {"compression"},
    "evaluation": {"adversarial"},
    "report": {"metrics"},
    "federated": {"adversarial", "compression", "config", "data", "evaluation", "metrics", "models", "optim"},
    "train": {"adversarial", "comm", "compression", "config", "data", "evaluation", "metrics", "models", "optim"},
    "lab": set(),
    "cluster": {"config", "federated", "lab", "metrics", "train"},
    "k8s": {"config", "metrics"},
    "bench": {"comm", "compression", "config", "lab", "models"},
    "cli": {
        "adversarial",
        "bench",
        "cluster",
        "config",
        "data",
        "evaluation",
        "federated",
        "k8s",
        "metrics",
        "report",
        "train",
    },
    "__main__": {"cli"},
    "__init__": {"comm", "optim"},  # lazily, in its functions
}
LIBRARIES = {  # the only rooms that may import them, at any depth of the code
    "ray": {"cluster"},
    "prometheus_client": {"metrics"},
    "matplotlib": {"bench", "report"},
    "sklearn": {"data"},
    "foolbox": {"evaluation"},
    "pyautoattack": {"evaluation"},
    "click": {"cli"},
    "pyarrow": {"data"},
    "transformers": {"models"},
    "timm": {"models"},
    "tensorboard": {"metrics"},
    "wandb": {"metrics"},
    "safetensors": {"models"},
}
ONE_FILE = {"transformers": "huggingface.py", "timm": "timm.py", "wandb": "weights_and_biases.py"}  # and in it only
FILES = sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_table_allows(path: Path) -> None:
    room = _room(path)
    allowed = MAY_IMPORT[room] | ANYONE | {room, "__version__"}
    rooms = {name.split(".")[1] for name in _imported(path) if name.startswith("distrobust.")}
    assert rooms <= allowed, f"{room} imports {sorted(rooms - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    found = {name.split(".")[0] for name in _imported(path)}
    strangers = {library for library in found & LIBRARIES.keys() if _room(path) not in LIBRARIES[library]}
    assert not strangers


@pytest.mark.parametrize("library", ONE_FILE)
def test_a_library_with_one_file_is_imported_nowhere_else(library: str) -> None:
    importing = [p.name for p in FILES if any(name.split(".")[0] == library for name in _imported(p))]
    assert importing == [ONE_FILE[library]]


def test_compression_knows_no_distributed_torch() -> None:
    for path in (PACKAGE / "compression").glob("*.py"):
        assert not any(name.startswith("torch.distributed") for name in _imported(path)), path


def test_only_the_hook_knows_grad_bucket() -> None:
    assert [p.name for p in FILES if "GradBucket" in p.read_text()] == ["hook.py"]


def test_every_room_of_the_table_exists() -> None:
    assert set(MAY_IMPORT) == {_room(path) for path in FILES}
