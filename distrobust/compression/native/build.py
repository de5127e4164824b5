"""The C sources beside this file as a library for this very processor, built once, on first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)
SOURCES = sorted(Path(__file__).parent.glob("*.c"))
FLAGS = ("-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "accumulate": ([*[_POINTER] * 6, _INT, *[_POINTER] * 3, _INT], _INT),
    "select": ([_POINTER, _POINTER, _INT, _INT, *[_POINTER] * 3], None),
    "clear": ([_POINTER, _INT], None),
    "add": ([_POINTER, _POINTER, _POINTER, _INT], None),
    "remove": ([*[_POINTER] * 3, _INT, _POINTER, _INT], None),
    "pack": ([_POINTER, _INT, _INT, _POINTER], None),
    "unpack": ([_POINTER, _INT, _INT, _POINTER], None),
    "mark": ([_POINTER, _INT, _POINTER], None),
    "marked": ([_POINTER, _INT, _INT, _POINTER], _INT),
    "numbers": ([_POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER], None),
    "look_up": ([_POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER], None),
    "lloyd": ([_POINTER, _POINTER, _INT, _INT, _POINTER, _INT, _INT], None),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Kept in the user's cache; None, with a line in the log, where there is no compiler or building fails."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.byteorder != "little":
        _log.info("compress: no C compiler here, the local part runs in numpy and torch")
        return None
    try:
        return load(_built(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("compress: the local part runs in numpy and torch, since building its C version failed: %s", error)
        return None


def load(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions declared."""
    loaded = ctypes.CDLL(str(path))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, f"distrobust_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded


def compile_to(path: Path, compiler: str, flags: list[str]) -> None:
    """Raises OSError or subprocess.SubprocessError."""
    command = [compiler, *FLAGS, *flags, *map(str, SOURCES), "-o", str(path), "-lm"]
    subprocess.run(command, capture_output=True, timeout=60, check=True)


def _built(compiler: str) -> Path:
    cpuinfo = Path("/proc/cpuinfo")
    processor = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    key = "\0".join([*(source.read_text() for source in SOURCES), version, processor, *FLAGS])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrobust"
    path = cache / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / "native.so"
            compile_to(made, compiler, ["-march=native"])
            os.replace(made, path)  # several processes may build at once: the last one wins, all are the same
    return path
