"""The pass of accumulate.py as compiled C, where this machine has a compiler; it is built once, on first use.

Worth its toolchain: the pass takes about half the time (benchmarks/results/local_part.json). Without a compiler, and
on machines where building fails, the numpy version does the same to the bit.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distrobust.compression.memory import Residual

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")
_ALIGNMENT = 64
_LARGEST = 2**31 - 1  # places are int32


class _Rule(ctypes.Structure):
    _fields_ = (
        ("momentum", ctypes.c_float),
        ("factor", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("threshold", ctypes.c_float),
        ("has_momentum", ctypes.c_int32),
        ("has_decay", ctypes.c_int32),
        ("nesterov", ctypes.c_int32),
    )


def accumulate(
    residual: Residual, gradient: Tensor, weight: Tensor, factor: float, threshold: float, room: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
    """What `accumulate.blocked_pass` does and returns. Call it only if `fits`."""
    rule = residual.rule
    tensors = (residual.u, residual.v, gradient, weight, residual.next_u, residual.next_v)
    pointers = [t.data_ptr() for t in tensors]
    library = _library()
    assert library is not None

    def run(least: float, places: Tensor, sums: Tensor) -> int:
        flags = (rule.momentum != 0.0, rule.weight_decay != 0.0, rule.nesterov)
        passed = _Rule(rule.momentum, factor, rule.weight_decay, least, *flags)
        lists = (places.data_ptr(), sums.data_ptr(), len(places))
        return int(library.distrobust_accumulate(*pointers, residual.v.numel(), ctypes.byref(passed), *lists))

    nothing = torch.empty(0, dtype=torch.int32), torch.empty(0)
    if threshold <= 0.0:
        run(math.inf, *nothing)
        return None
    places, sums = torch.empty(room + 16, dtype=torch.int32), torch.empty(room + 16)
    count = run(threshold, places, sums)
    if count < 0:  # written in part only: once more, without a list
        run(math.inf, *nothing)
    if not 0 <= count < room:
        return None
    return places[:count].numpy().astype(np.int64), sums[:count].numpy()


def fits(residual: Residual, gradient: Tensor, weight: Tensor) -> bool:
    """Whether there is a compiled version and it can take these tensors."""
    floats = all(t.dtype == torch.float32 and t.is_contiguous() for t in (gradient, weight))
    aligned = all(t.data_ptr() % _ALIGNMENT == 0 for t in (residual.next_u, residual.next_v))
    return floats and aligned and residual.v.numel() <= _LARGEST and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Compiled for this very processor, kept in the user's cache; None, with a line in the log, if that fails."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _log.info("compress: no C compiler here, the local pass runs in numpy")
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("compress: the local pass runs in numpy, since building its C version failed: %s", error)
        return None
    pointers = [ctypes.c_void_p] * 6
    function = library.distrobust_accumulate
    function.argtypes = [*pointers, ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_int64]
    function.restype = ctypes.c_int64
    return library


def _built(compiler: str) -> Path:
    cpuinfo = Path("/proc/cpuinfo")
    processor = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    key = "\0".join([_SOURCE.read_text(), version, processor, *_FLAGS])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrobust"
    path = cache / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / "native.so"
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, timeout=60, check=True)
            os.replace(made, path)  # several processes may build at once: the last one wins, all are the same
    return path
