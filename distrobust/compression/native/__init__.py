"""What takes most of a step's time on a CPU, as compiled C, where this machine has a compiler.

Worth its toolchain: the local part takes about half the time (benchmarks/results/local_part.json). Every function here
has a version in numpy or torch beside the code that calls it, equal to the bit, which runs elsewhere: on a GPU, without
a compiler, and where building fails.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distrobust.compression.native.build import SIGNATURES, library

if TYPE_CHECKING:
    from distrobust.compression.memory import Residual

_ALIGNMENT = 64
_DTYPES = {"f": torch.float32, "d": torch.float64, "l": torch.int64, "i": torch.int32, "b": torch.uint8}
_LARGEST = 2**31 - 1  # places of candidates are int32


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


def takes(*tensors: Tensor) -> bool:
    """Whether the functions below can be called on these: there is a library, they are in memory, in order."""
    return all(t.device.type == "cpu" and t.is_contiguous() for t in tensors) and library() is not None


def _call(name: str, *arguments: Any) -> int:
    loaded = library()
    assert loaded is not None
    passed = []
    for letter, argument in zip(SIGNATURES[name], arguments, strict=True):
        if isinstance(argument, Tensor):
            if argument.dtype is not _DTYPES[letter]:
                raise TypeError(f"native.{name}: got {argument.dtype}, wanted {_DTYPES[letter]}")
            argument = argument.data_ptr()
        passed.append(argument)
    result: int = getattr(loaded, f"distrobust_{name}")(*passed)
    return result


def _new(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Not of the default type, nor on the default device."""
    return torch.empty(size, dtype=dtype, device="cpu")


def takes_pass(residual: Residual, gradient: Tensor, weight: Tensor) -> bool:
    """Whether `accumulate` can be called on these."""
    floats = gradient.dtype == torch.float32 and weight.dtype == torch.float32
    aligned = all(t.data_ptr() % _ALIGNMENT == 0 for t in (residual.next_u, residual.next_v))
    return floats and aligned and residual.v.numel() <= _LARGEST and takes(gradient, weight)


def accumulate(
    residual: Residual, gradient: Tensor, weight: Tensor, factor: float, threshold: float, room: int
) -> tuple[Tensor, Tensor] | None:
    """`accumulate.blocked_pass`, with places in int32. Call it only if `takes_pass`."""
    rule = residual.rule
    tensors = (residual.u, residual.v, gradient, weight, residual.next_u, residual.next_v)
    flags = (rule.momentum != 0.0, rule.weight_decay != 0.0, rule.nesterov)

    def run(least: float, places: Tensor, sums: Tensor) -> int:
        passed = ctypes.byref(_Rule(rule.momentum, factor, rule.weight_decay, least, *flags))
        return _call("accumulate", *tensors, residual.v.numel(), passed, places, sums, places.numel())

    nothing = _new(0, torch.int32), _new(0)
    if threshold <= 0.0:
        run(math.inf, *nothing)
        return None
    places, sums = _new(room + 16, torch.int32), _new(room + 16)
    count = run(threshold, places, sums)
    if count < 0:  # written in part only: once more, without a list
        run(math.inf, *nothing)
    return (places[:count], sums[:count]) if 0 <= count < room else None


def select(places: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """Of `places` (m,) int32 and `values` (m,), m >= k, without NaN, those of the k largest magnitudes.

    Which ones, `select.exact` says. Returns places (k,) int64, values (k,) and the smallest magnitude.
    """
    chosen, chosen_values = _new(k, torch.int64), _new(k)
    least = ctypes.c_float()
    _call("select", places, values, places.numel(), k, chosen, chosen_values, ctypes.byref(least))
    return chosen, chosen_values, least.value


def scatter(out: Tensor, payloads: list[tuple[Tensor, Tensor]]) -> None:
    """Writes the sum of sparse vectors, places (k,) int64 and values (k,) float32 each, in their order, into `out`."""
    _call("clear", out, out.numel())
    for places, values in payloads:
        _call("add", out, places, values, places.numel())


def remove(v: Tensor, u: Tensor | None, places: Tensor, first: int, sent: Tensor) -> None:
    """v[places - first] -= sent; u is zero there. Places are distinct."""
    _call("remove", v, u, places, first, sent, places.numel())


def pack(numbers: Tensor, width: int, out: Tensor) -> None:
    """`bits.pack` into `out`."""
    _call("pack", numbers, numbers.numel(), width, out)


def unpack(packed: Tensor, width: int, out: Tensor) -> None:
    """`bits.unpack` into `out`."""
    _call("unpack", packed, out.numel(), width, out)


def mark(places: Tensor, out: Tensor) -> None:
    """`bits.mark` into `out`, which is zero."""
    _call("mark", places, places.numel(), out)


def marked(packed: Tensor, room: int) -> Tensor:
    """`bits.marked`, at most `room` of them."""
    out = _new(room, torch.int64)
    return out[: _call("marked", packed, packed.numel(), room, out)]


def numbers(values: Tensor, sizes: Tensor, scales: Tensor, middles: Tensor) -> Tensor:
    """`values._numbers`"""
    out = _new(values.numel(), torch.int64)
    _call("numbers", values, sizes, sizes.numel(), scales, middles, middles.shape[1], out)
    return out


def look_up(numbers: Tensor, sizes: Tensor, tables: Tensor) -> Tensor:
    """`values._looked_up`"""
    out = _new(numbers.numel())
    _call("look_up", numbers, sizes, sizes.numel(), tables, tables.shape[1], out)
    return out


def encode(
    indices: Tensor, values: Tensor, low: int, unary: int, sizes: Tensor, width: int, fitted: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """codec.encode for Elias-Fano and leveled values. fitted: (scales float32, levels, heads and tables as bytes)."""
    k = indices.numel()
    scales, levels, heads, tables = fitted
    size = unary + (k + 7) // 8 * (low + width) + heads.numel() + tables.numel()
    out, sent = _new(size, torch.uint8), _new(k)
    blocks, num_levels = levels.shape
    head = (heads, heads.numel(), tables, tables.numel())
    _call("encode", indices, k, low, unary, values, sizes, blocks, scales, levels, num_levels, width, *head, out, sent)
    return out, sent


def decode(
    payload: Tensor,
    n: int,
    k: int,
    low: int,
    unary: int,
    blocks: tuple[Tensor, Tensor],
    width: int,
    fitted_from: int,
    typical: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """codec.decode for Elias-Fano and leveled values; blocks: (starts, planned). None if something is wrong."""
    indices, values = _new(k + 1, torch.int64), _new(k)
    starts, planned = blocks
    layout = (n, k, low, unary, starts, planned, planned.numel(), width, fitted_from, typical)
    return None if _call("decode", payload, *layout, indices, values) else (indices[:k], values)


def seal(message: Tensor, seed: int) -> None:
    """Writes the checksum of all other bytes into the first four."""
    _call("seal", message, message.numel(), seed)


def verify(message: Tensor, seed: int) -> bool:
    """Whether the first four bytes are the checksum of all others."""
    return bool(_call("verify", message, message.numel(), seed))


def lloyd(ordered: Tensor, sums: Tensor, levels: Tensor, rounds: int) -> Tensor:
    """`values._lloyd`"""
    levels = levels.contiguous().clone()
    _call("lloyd", ordered, sums, *ordered.shape, levels, levels.shape[1], rounds)
    return levels
