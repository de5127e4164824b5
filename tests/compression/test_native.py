"""The compiled pass equals the numpy one to the bit, whatever instructions it was compiled for."""

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.payloads import block_lists, joined, kinds, values_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distrobust.comm.bucket import Mean
from distrobust.compression import accumulate, bits, codec, message, native, select
from distrobust.compression.accumulate import Piece
from distrobust.compression.codec import Code, Space
from distrobust.compression.memory import Residual, Rule, remove_sent
from distrobust.compression.message import Layout
from distrobust.compression.native import build
from distrobust.compression.values import LARGEST, VALUE_CODES
from distrobust.errors import CodecError

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text() if CPUINFO.exists() else ""
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


@functools.cache
def compiled(flags: str) -> ctypes.CDLL:
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "native.so"
        build.compile_to(made, COMPILER, [*flags.split(), "-Wall", "-Wextra", "-Werror"])
        return build.load(made)


@pytest.fixture(params=["-march=native", "-mavx512f", "-mavx2 -mfma", ""])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """native with a library compiled for these instructions: fused multiply-adds among them, which it must not use."""
    for flag in request.param.split():
        if flag.startswith("-mavx") and flag.removeprefix("-m") not in FLAGS:
            pytest.skip(f"this processor has no {flag.removeprefix('-m')}")
    loaded = compiled(request.param)
    monkeypatch.setattr(native, "library", lambda: loaded)


def filled(n: int, rule: Rule, seed: int) -> tuple[Residual, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    residual = Residual(n, rule, torch.device("cpu"))
    v, u, g, w = torch.from_numpy(rng.standard_normal((4, n)).astype(np.float32))
    residual.v.copy_(v)
    residual.u.copy_(u[: residual.u.numel()])
    return residual, g.clone(), w.clone()


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
        assert native.takes_pass(residual, g, w)
        found = one_pass(residual, g, w, factor, threshold, max(64, n // 3))
        results.append((residual.next_u, residual.next_v, found))
    (u, v, found), (expected_u, expected_v, expected) = results
    assert torch.equal(u, expected_u)
    assert torch.equal(v, expected_v)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert torch.equal(found[0].long(), expected[0])
        assert torch.equal(found[1], expected[1])


@needs_compiler
def test_a_tensor_of_another_type_never_reaches_c(library: None) -> None:
    v, places, sent = torch.zeros(8), torch.arange(3), torch.ones(3)
    for wrong in ((v.double(), places, sent), (v, places.int(), sent), (v, places, sent.half())):
        with pytest.raises(TypeError, match=r"native.remove: got torch\.\w+, wanted torch\.\w+"):
            native.remove(wrong[0], None, wrong[1], 0, wrong[2])


@needs_compiler
@pytest.mark.parametrize("name", VALUE_CODES)
def test_the_default_type_of_new_tensors_does_not_matter(library: None, name: str) -> None:
    values, sizes = torch.randn(700, generator=torch.Generator().manual_seed(0)), [600, 100]
    code = VALUE_CODES[name]

    def results() -> list[Tensor]:
        residual, g, w = filled(300, Rule(0.9), seed=0)
        residual.threshold = 0.5
        found = accumulate.accumulate_and_select(residual, g.float(), w.float(), 1.0, [Piece(0, 300, 20)], "sampled")
        assert found is not None
        coded = code.encode(values, sizes, sizes)
        return [residual.next_v, found[0].indices, found[0].values, coded, code.decode(coded, sizes, sizes)]

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        with_another_default = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(with_another_default, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


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
    assert native.takes_pass(residual, g, w)
    assert not native.takes_pass(residual, g.to(torch.bfloat16), w)
    assert not native.takes_pass(residual, torch.randn(200)[::2], w)
    residual.next_v = torch.zeros(101)[1:]
    assert not native.takes_pass(residual, g, w)


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)
each_library = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def both(function: Callable[[], Any]) -> tuple[Any, Any]:
    """What `function` returns with the library and without it."""
    compiled_result = function()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return compiled_result, function()


@needs_compiler
@each_library
@given(st.integers(1, 300), SEEDS, st.sampled_from(["normal", "ties", "zero", "tiny"]), st.data())
def test_the_largest_are_those_that_the_exact_selector_takes(
    library: None, count: int, seed: int, kind: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.standard_normal(count) * 10.0 ** rng.integers(-30, 30, count),
        "ties": lambda: rng.integers(-3, 4, count),
        "zero": lambda: np.where(rng.random(count) < 0.5, 0.0, -0.0),
        "tiny": lambda: rng.standard_normal(count) * 1e-42,  # subnormal
    }[kind]()
    values = torch.from_numpy(values.astype(np.float32))
    places = torch.arange(count, dtype=torch.int32) * 7 + 3
    k = data.draw(st.integers(1, count))
    chosen, chosen_values, least = native.select(places, values, k)
    expected = torch.from_numpy(select.exact(values.abs().numpy(), k))
    assert torch.equal(chosen, places[expected].long())
    assert torch.equal(chosen_values, values[expected])
    assert least == float(values[expected].abs().min())


@needs_compiler
@each_library
@given(st.integers(0, 100), st.integers(0, 56), SEEDS)
def test_numbers_are_packed_and_unpacked_as_by_torch(library: None, k: int, width: int, seed: int) -> None:
    """Bits above `width` are dropped by both."""
    numbers = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**62, k))
    packed, expected = both(lambda: bits.pack(numbers, width))
    assert torch.equal(packed, expected)
    unpacked, expected = both(lambda: bits.unpack(packed, k, width))
    assert torch.equal(unpacked, expected)
    assert torch.equal(unpacked, numbers & ((1 << width) - 1))


@needs_compiler
@each_library
@given(st.sets(st.integers(0, 299)), st.integers(0, 400))
def test_bits_are_marked_and_found_as_by_numpy(library: None, places: set[int], room: int) -> None:
    chosen = torch.tensor(sorted(places), dtype=torch.int64)
    packed, expected = both(lambda: bits.mark(chosen, 300))
    assert torch.equal(packed, expected)
    found, expected = both(lambda: bits.marked(packed, room))
    assert torch.equal(found, expected)
    assert torch.equal(found, chosen[:room])


@needs_compiler
@each_library
@given(SIZES, SEEDS, st.sampled_from(["4bit", "2bit", "sign"]))
def test_values_are_coded_and_decoded_as_by_torch(library: None, sizes: list[int], seed: int, name: str) -> None:
    """Some blocks long enough to have levels fitted to them, some all zero."""
    sizes = [size if size % 3 else 16 * size for size in sizes]
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.standard_normal(s) * np.exp(rng.normal()) * (s != 7) for s in [*sizes, 1]])
    values = torch.from_numpy(values.astype(np.float32))
    sizes.append(1)
    code = VALUE_CODES[name]
    coded, expected = both(lambda: code.encode(values, sizes, sizes))
    assert torch.equal(coded, expected)
    decoded, expected = both(lambda: code.decode(coded, sizes, sizes))
    assert torch.equal(decoded, expected)


@needs_compiler
@each_library
@pytest.mark.parametrize("name", ["4bit", "2bit", "sign", "fp16"])
@given(st.lists(block_lists(), min_size=1, max_size=3), kinds)
def test_payloads_are_made_and_read_as_by_torch(
    library: None, name: str, cases: list[tuple[list[tuple[int, Tensor]], int]], kind: str
) -> None:
    """Several at once, whatever the values: subnormal, huge, zero. And what is not a payload is refused by both."""
    code = Code(VALUE_CODES[name])
    parts = []
    for blocks, seed in cases:
        space, chosen = joined(blocks)
        parts.append((chosen, values_of(kind, space.k, seed), space))
    ours, theirs = both(lambda: codec.encode_all(parts, code))
    for (payload, places, sent), (expected, _, expected_sent), (_, _, space) in zip(ours, theirs, parts, strict=True):
        assert torch.equal(payload, expected)
        assert torch.equal(sent, expected_sent)
        read, expected_read = both(lambda p=payload, s=space: codec.decode(p, s, code))
        assert torch.equal(read[0], places)
        assert torch.equal(read[0], expected_read[0])
        assert torch.equal(read[1], expected_read[1])


@needs_compiler
def test_a_level_beyond_what_float32_holds_is_its_largest_number(library: None) -> None:
    """Mean 1.7e38, level 2.04 of it."""
    part = (torch.arange(2), torch.tensor([-3.4e38, 1e30]), Space(2, (2,)))
    ours, theirs = both(lambda: codec.encode(*part, Code(VALUE_CODES["4bit"])))
    assert torch.equal(ours[2], theirs[2])
    assert float(ours[2][0]) == -LARGEST
    assert torch.equal(codec.decode(ours[0], part[2], Code(VALUE_CODES["4bit"]))[1], ours[2])


@needs_compiler
@each_library
@given(block_lists(), SEEDS, st.sampled_from(["4bit", "sign"]))
def test_noise_is_read_or_refused_as_by_torch(
    library: None, case: tuple[list[tuple[int, Tensor]], int], seed: int, name: str
) -> None:
    """Mostly noise with few bits set, or a payload with some flipped, so that many come close to being one."""
    space, chosen = joined(case[0])
    code = Code(VALUE_CODES[name])
    payload = codec.encode(chosen, torch.ones(space.k), space, code)[0]
    rng = np.random.default_rng(seed)
    flips = rng.integers(0, 256, len(payload)) * (rng.random(len(payload)) < rng.choice([0.02, 0.3]))
    noise = payload ^ torch.from_numpy(flips.astype(np.uint8))

    def read() -> tuple[list[int], list[float]] | str:
        try:
            indices, values = codec.decode(noise, space, code)
        except CodecError as error:
            return str(error)
        return indices.tolist(), values.view(torch.int32).tolist()  # NaN compares by its bits

    ours, theirs = both(read)
    assert ours == theirs


@needs_compiler
@each_library
@given(st.integers(0, 40), SEEDS)
def test_messages_are_sealed_and_verified_as_by_torch(library: None, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = Space(k, ()) if not k else Space(4 * k, (k,))
    layout = Layout(space, Code(VALUE_CODES["fp32"]), int(rng.integers(0, 30)), int(rng.integers(0, 5)), step=seed)
    used = torch.from_numpy(rng.random(layout.num_parameters) < 0.5)
    side = torch.tensor(rng.standard_normal(layout.num_side).tolist(), dtype=torch.float32)
    payload = codec.encode(torch.arange(k), torch.ones(k), space, layout.code)[0] if k else None
    ours, theirs = both(lambda: message.pack(layout, message.header(used, side), payload))
    assert torch.equal(ours, theirs)
    both(lambda: message.check(layout, ours))
    damaged = ours.clone()
    damaged[int(rng.integers(len(ours)))] ^= 1 << int(rng.integers(8))

    def is_refused() -> bool:
        try:
            message.check(layout, damaged)
        except CodecError:
            return True
        return False

    assert both(is_refused) == (True, True)


@needs_compiler
@each_library
@given(st.integers(1, 200), SEEDS, st.booleans(), st.integers(0, 50))
def test_what_was_sent_leaves_as_with_torch(library: None, n: int, seed: int, masking: bool, first: int) -> None:
    rng = np.random.default_rng(seed)
    places = torch.from_numpy(np.flatnonzero(rng.random(n) < 0.4))
    sent = torch.from_numpy(rng.standard_normal(len(places)).astype(np.float32))

    def removed() -> tuple[Tensor, Tensor]:
        residual, _, _ = filled(n, Rule(0.9, masking=masking), seed)
        residual.next_v.copy_(residual.v)
        residual.next_u.copy_(residual.u)
        remove_sent(residual, places + first, sent, first)
        return residual.next_v, residual.next_u

    ours, theirs = both(removed)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@needs_compiler
@each_library
@given(st.integers(1, 200), st.integers(0, 20), SEEDS, st.sampled_from([1.0, 1024.0]))
def test_payloads_are_added_up_as_by_torch(library: None, n: int, offset: int, seed: int, scale: float) -> None:
    """Whatever was there before, and wherever the bucket begins."""
    rng = np.random.default_rng(seed)
    payloads = []
    for _ in range(3):
        places = torch.from_numpy(np.flatnonzero(rng.random(n) < 0.3))
        payloads.append((places, torch.from_numpy(rng.standard_normal(len(places)).astype(np.float32))))

    def written() -> Tensor:
        around = torch.full((offset + n + 40,), torch.nan)
        Mean(payloads=payloads).write(around[offset : offset + n], scale)
        return around

    ours, theirs = both(written)
    assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))


@pytest.mark.parametrize("step", ["looked for", "asked for the processor", "compiling", "finding a home"])
def test_a_compiler_that_is_missing_or_fails_is_not_an_error(
    step: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no home directory")

    if step == "looked for":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    elif step == "asked for the processor":
        monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    elif step == "compiling":
        monkeypatch.setattr(build, "FLAGS", ("-no-such-option",))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", fails)
    build.library.cache_clear()
    residual, g, w = filled(100, Rule(0.9), seed=0)
    try:
        assert not native.takes_pass(residual, g, w)
    finally:
        build.library.cache_clear()


@needs_compiler
def test_a_large_vector_is_cleared_around_the_cache(library: None) -> None:
    for start, stop in ((0, 1 << 20), (3, 5 + (1 << 20))):
        around = torch.full((8 + (1 << 20),), torch.nan)
        native.scatter(around[start:stop], [])
        assert not around[start:stop].any()
        assert around[:start].isnan().all()
        assert around[stop:].isnan().all()
