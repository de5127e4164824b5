"""The compiled pass equals the numpy one to the bit, whatever instructions it was compiled for."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distrobust.compression import accumulate, native
from distrobust.compression.memory import Residual, Rule

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text() if CPUINFO.exists() else ""
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


@functools.cache
def compiled(instructions: str) -> ctypes.CDLL:
    flags = [flag for flag in native._FLAGS if not flag.startswith("-march")]
    chosen = [f"-m{instructions}"] if instructions else []
    pointer = ctypes.c_void_p
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/native.so"
        command = [COMPILER, *flags, *chosen, "-Wall", "-Werror", str(native._SOURCE), "-o", made, "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(made)
    loaded.distrobust_accumulate.argtypes = [*[pointer] * 6, ctypes.c_int64, *[pointer] * 3, ctypes.c_int64]
    loaded.distrobust_accumulate.restype = ctypes.c_int64
    return loaded


@pytest.fixture(params=["avx512f", "avx2", ""], ids=["AVX-512", "AVX2", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """native.py with a library compiled for these instructions."""
    if request.param and request.param not in FLAGS:
        pytest.skip(f"this processor has no {request.param}")
    loaded = compiled(request.param)
    monkeypatch.setattr(native, "_library", lambda: loaded)


def filled(n: int, rule: Rule, seed: int) -> tuple[Residual, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    residual = Residual(n, rule, torch.device("cpu"))
    residual.v.copy_(torch.randn(n, generator=g))
    residual.u.copy_(torch.randn(residual.u.shape, generator=g))
    return residual, torch.randn(n, generator=g), torch.randn(n, generator=g)


RULES = [
    Rule(0.9),
    Rule(0.9, nesterov=True, weight_decay=5e-4),
    Rule(0.0, weight_decay=5e-4),
    Rule(0.0),
    Rule(0.99, weight_decay=0.1),
]


@needs_compiler
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 200_003])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 2.5])
def test_it_equals_numpy_to_the_bit(library: None, rule: Rule, n: int, factor: float, threshold: float) -> None:
    results = []
    for one_pass in (native.accumulate, accumulate.blocked_pass):
        residual, g, w = filled(n, rule, seed=n)
        assert native.fits(residual, g, w)
        found = one_pass(residual, g, w, factor, threshold, max(64, n // 3))
        results.append((residual.next_u, residual.next_v, found))
    (u, v, found), (expected_u, expected_v, expected) = results
    assert torch.equal(u, expected_u)
    assert torch.equal(v, expected_v)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 21, 999])
def test_what_is_not_finite_is_listed(library: None, bad: float, place: int) -> None:
    residual, g, w = filled(1000, Rule(0.9), seed=0)
    g[place] = bad
    found = native.accumulate(residual, g, w, 1.0, 100.0, 64)
    assert found is not None
    assert found[0].tolist() == [place]


@needs_compiler
def test_what_it_cannot_take_goes_to_numpy(library: None) -> None:
    residual, g, w = filled(100, Rule(0.9), seed=0)
    assert native.fits(residual, g, w)
    assert not native.fits(residual, g.to(torch.bfloat16), w)
    assert not native.fits(residual, torch.randn(200)[::2], w)
    residual.next_v = torch.zeros(101)[1:]
    assert not native.fits(residual, g, w)


def test_without_a_compiler_the_numpy_version_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    native._library.cache_clear()
    residual, g, w = filled(100, Rule(0.9), seed=0)
    try:
        assert not native.fits(residual, g, w)
    finally:
        native._library.cache_clear()


def test_a_compiler_that_fails_is_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    residual, g, w = filled(100, Rule(0.9), seed=0)
    try:
        assert not native.fits(residual, g, w)
    finally:
        native._library.cache_clear()
