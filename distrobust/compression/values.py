"""k float32 values <-> bytes, block by block: the coordinates of one tensor (or of all small tensors) are a block.

Every block is coded by itself, so that the values do not depend on how tensors fall into messages. fp32, bf16: as they
are. fp16: with one power-of-two exponent a block, because accumulated gradients of 1e-8 would otherwise vanish below
its smallest number and those of 1e5 become infinite.

int8, 4bit, 2bit, sign: relative to a scale of the block (bf16). int8 is uniform up to the largest magnitude. 4bit and
2bit are a sign and one of 8 or 2 levels in units of the block's mean magnitude, fitted to the block (Lloyd 1982, Max
1960) if it has at least 512 values, otherwise those of a typical block; sign is sign x mean magnitude. Selected values
sit just above the threshold with a long tail, where fitted levels have less than half the error of a uniform grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrobust.compression import bits, native

FITTED_FROM = 512  # values in a block: a table of 8 levels costs 16 bytes, a sixteenth of the block's values
SAMPLE = 512  # magnitudes of a block that its levels are fitted to
ROUNDS = 10  # of fitting
FP16_TOP = 14  # the largest magnitude is scaled into [2^13, 2^14]: a factor of 4 below overflow
LARGEST = torch.finfo(torch.float32).max

# Lloyd's levels for a threshold at half the mean and an exponential tail above it
TYPICAL = {
    1: (1.0,),
    2: (0.797, 1.798),
    8: (0.588, 0.787, 1.016, 1.287, 1.617, 2.042, 2.641, 3.649),
}


@dataclass(frozen=True)
class Leveled:
    """What is particular to a code of a sign and 2^(width - 1) levels.

    fit(values, sizes, planned): the blocks' scales (blocks,) bfloat16, the tables (fitted blocks, levels) float16 of
    those that have one, and all levels (blocks, levels) float32, in units of a block's scale.
    """

    width: int
    typical: Tensor  # (levels,) float32, of blocks without a table
    fitted: Callable[[Sequence[int]], list[int]]  # the blocks that have a table
    fit: Callable[[Tensor, Sequence[int], Sequence[int]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class ValueCode:
    """A code for k float32 values in blocks.

    num_bytes(planned): length for blocks of these sizes. encode(values (k,), sizes, planned) and decode(coded, sizes,
    planned): `sizes` are those of the blocks in `values`, at most the planned ones. decode returns what every receiver
    has.
    """

    name: str
    num_bytes: Callable[[Sequence[int]], int]
    encode: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
    decode: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
    leveled: Leveled | None = None


def _cast(name: str, dtype: torch.dtype) -> ValueCode:
    def encode(values: Tensor, *_: Sequence[int]) -> Tensor:
        return values.to(dtype).view(torch.uint8)

    def decode(coded: Tensor, sizes: Sequence[int], _: Sequence[int]) -> Tensor:
        return _aligned(coded[: sum(sizes) * dtype.itemsize], dtype).to(torch.float32).clamp(-LARGEST, LARGEST)

    return ValueCode(name, lambda planned: sum(planned) * dtype.itemsize, encode, decode)


def _aligned(coded: Tensor, dtype: torch.dtype) -> Tensor:
    """A piece of a message as another type; a copy, since it need not begin at a multiple of the type's size."""
    return coded.clone().view(dtype)


def _spread(per_block: Tensor, sizes: Sequence[int]) -> Tensor:
    """(blocks,) -> (k,): each value's."""
    lengths = torch.tensor(sizes, device=per_block.device)
    return torch.repeat_interleave(per_block, lengths, output_size=sum(sizes))


def _maxima(magnitudes: Tensor, sizes: Sequence[int]) -> Tensor:
    """(k,) -> (blocks,) float32; 0 for an empty block."""
    lengths = torch.tensor(sizes, device=magnitudes.device)
    return torch.segment_reduce(magnitudes, "max", lengths=lengths, initial=0.0)


def _means(magnitudes: Tensor, sizes: Sequence[int]) -> Tensor:
    """(k,) -> (blocks,) float32; 0 for an empty block. Summed in float64, where float32 values cannot overflow.

    Not from one running sum over all blocks: small magnitudes would vanish behind a block of large ones.
    """
    lengths = torch.tensor(sizes, device=magnitudes.device)
    sums = torch.segment_reduce(magnitudes.double(), "sum", lengths=lengths, initial=0.0)
    return (sums / lengths.clamp(min=1)).to(torch.float32)


def _fp16_encode(values: Tensor, sizes: Sequence[int], _: Sequence[int]) -> Tensor:
    exponents = torch.frexp(_maxima(values.abs(), sizes)).exponent.clamp(-112, 127)
    top = torch.tensor(FP16_TOP, device=values.device)
    scaled = torch.ldexp(torch.ldexp(values, -_spread(exponents, sizes)), top)
    return torch.cat([exponents.to(torch.int8).view(torch.uint8), scaled.to(torch.float16).view(torch.uint8)])


def _fp16_decode(coded: Tensor, sizes: Sequence[int], _: Sequence[int]) -> Tensor:
    split, k = len(sizes), sum(sizes)
    exponents = coded[:split].view(torch.int8).to(torch.int32) - FP16_TOP
    scaled = _aligned(coded[split : split + 2 * k], torch.float16).to(torch.float32)
    return torch.ldexp(scaled, _spread(exponents, sizes)).clamp(-LARGEST, LARGEST)  # 2^128 after rounding up


def _scales(wanted: Tensor) -> Tensor:
    """(blocks,) float32 -> bf16 of at most 2^127 and not below the wanted ones."""
    rounded = wanted.to(torch.bfloat16)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded < wanted, up, rounded).clamp(max=2.0**127)


def _relative(magnitudes: Tensor, scales: Tensor, sizes: Sequence[int]) -> Tensor:
    spread = _spread(scales, sizes).to(torch.float32)
    return torch.where(spread > 0, magnitudes / spread, torch.zeros_like(magnitudes))


def _int8_encode(values: Tensor, sizes: Sequence[int], _: Sequence[int]) -> Tensor:
    scales = _scales(_maxima(values.abs(), sizes))
    steps = (_relative(values.abs(), scales, sizes) * 127).round().clamp(max=127)
    return torch.cat([scales.view(torch.uint8), torch.copysign(steps, values).to(torch.int8).view(torch.uint8)])


def _int8_decode(coded: Tensor, sizes: Sequence[int], _: Sequence[int]) -> Tensor:
    split, k = 2 * len(sizes), sum(sizes)
    scales = _spread(_aligned(coded[:split], torch.bfloat16).to(torch.float32), sizes)
    steps = coded[split : split + k].view(torch.int8).to(torch.float32)
    return (steps / 127 * scales).clamp(-LARGEST, LARGEST)


def fit_levels(sample: Tensor, num_levels: int) -> Tensor:
    """(rows, m) magnitudes -> (rows, num_levels) float32, ascending: least squares for each row, by Lloyd's rounds.

    The first levels stand at equal ratios between a row's smallest and largest magnitude, so that the tail has some.
    """
    ordered = sample.sort(dim=1).values.contiguous()
    low, high = ordered[:, :1].clamp(min=1e-3), ordered[:, -1:].clamp(min=1e-3)
    share = (torch.arange(num_levels, dtype=torch.float32, device=sample.device) + 0.5) / num_levels
    levels = low * (high / low) ** share
    sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    return _lloyd(ordered, sums, levels).sort(dim=1).values


def _lloyd(ordered: Tensor, sums: Tensor, levels: Tensor) -> Tensor:
    """Rounds of moving every level to the mean of the magnitudes nearest to it, from running sums (rows, m + 1)."""
    if native.takes(ordered, sums):
        return native.lloyd(ordered, sums, levels, ROUNDS)
    rows, m = ordered.shape
    first = torch.zeros((rows, 1), dtype=torch.int64, device=ordered.device)
    for _ in range(ROUNDS):
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        ends = torch.cat([first, torch.searchsorted(ordered, middles), first + m], dim=1)
        counts = ends.diff(dim=1)
        means = (sums.gather(1, ends).diff(dim=1) / counts.clamp(min=1)).to(torch.float32)
        levels = torch.where(counts > 0, means, levels)
    return levels


def _tables(values: Tensor, scales: Tensor, sizes: Sequence[int], fitted: list[int], num_levels: int) -> Tensor:
    """(len(fitted), num_levels) float16, for the blocks named in `fitted`, in units of their scales."""
    ends = list(itertools.accumulate(sizes, initial=0))
    blocks = torch.tensor(fitted, device=values.device)
    begin = torch.tensor([ends[i] for i in fitted], device=values.device)[:, None]
    stride = torch.tensor([sizes[i] / SAMPLE for i in fitted], dtype=torch.float64, device=values.device)[:, None]
    steps = torch.arange(SAMPLE, device=values.device)
    places = (begin + (steps * stride).to(torch.int64)).clamp(max=values.numel() - 1)  # a block may have lost all
    unit = scales[blocks].to(torch.float32)[:, None]
    relative = torch.where(unit > 0, values[places].abs() / unit, torch.zeros_like(unit))
    # a level of infinity would be used by no value, and one that dwarfs its block would never leave the residual
    return fit_levels(relative, num_levels).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)


def _numbers(values: Tensor, sizes: Sequence[int], scales: Tensor, middles: Tensor) -> Tensor:
    """(k,) int64: twice the number of a block's `middles` (blocks, m) below |value| / scale, plus one if negative."""
    if native.takes(values, scales, middles):
        return native.numbers(values, torch.tensor(sizes, device=values.device), scales, middles)
    pieces = zip(_relative(values.abs(), scales, sizes).split(list(sizes)), middles.unbind(), strict=True)
    return 2 * torch.cat([torch.bucketize(piece, middle) for piece, middle in pieces]) + (values < 0)


def _looked_up(numbers: Tensor, sizes: Sequence[int], tables: Tensor) -> Tensor:
    """(k,) float32: entries of each block's row of `tables` (blocks, m), for numbers (k,) int64 below m."""
    if native.takes(numbers, tables):
        return native.look_up(numbers, torch.tensor(sizes, device=numbers.device), tables)
    bases = torch.arange(len(sizes), device=numbers.device) * tables.shape[1]
    return tables.reshape(-1)[numbers + _spread(bases, sizes)]


def _leveled(name: str, width: int) -> ValueCode:
    """A sign and one of 2^(width - 1) levels: `width` bits a value, 2 bytes a level of a fitted block."""
    num_levels: int = 2 ** (width - 1)

    def fitted(planned: Sequence[int]) -> list[int]:
        return [i for i, k in enumerate(planned) if k >= FITTED_FROM] if num_levels > 1 else []

    def num_bytes(planned: Sequence[int]) -> int:
        tables = 2 * num_levels * len(fitted(planned))
        return 2 * len(planned) + tables + bits.packed_bytes(sum(planned), width)

    def all_levels(tables: Tensor, chosen: list[int], num_blocks: int) -> Tensor:
        levels = torch.tensor(TYPICAL[num_levels], dtype=torch.float32, device=tables.device).repeat(num_blocks, 1)
        if chosen:
            levels[torch.tensor(chosen, device=tables.device)] = tables.to(torch.float32).view(-1, num_levels)
        return levels

    def fit(values: Tensor, sizes: Sequence[int], planned: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        scales = _scales(_means(values.abs(), sizes))
        chosen = fitted(planned)
        tables = torch.zeros((0, num_levels), dtype=torch.float16, device=values.device)
        if chosen:
            tables = _tables(values, scales, sizes, chosen, num_levels)
        return scales, tables, all_levels(tables, chosen, len(sizes))

    def encode(values: Tensor, sizes: Sequence[int], planned: Sequence[int]) -> Tensor:
        scales, tables, levels = fit(values, sizes, planned)
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        head = [scales.view(torch.uint8), tables.view(-1).view(torch.uint8)]
        return torch.cat([*head, bits.pack(_numbers(values, sizes, scales.to(torch.float32), middles), width)])

    def decode(coded: Tensor, sizes: Sequence[int], planned: Sequence[int]) -> Tensor:
        chosen = fitted(planned)
        split = 2 * len(sizes)
        end = split + 2 * num_levels * len(chosen)
        scales = _aligned(coded[:split], torch.bfloat16).to(torch.float32)
        k = sum(sizes)
        numbers = bits.unpack(coded[end : end + bits.packed_bytes(k, width)], k, width)
        levels = all_levels(_aligned(coded[split:end], torch.float16), chosen, len(sizes))
        levels = levels * scales[:, None]
        signed = torch.stack([levels, -levels], dim=2).clamp(-LARGEST, LARGEST)  # the lowest bit is the sign
        return _looked_up(numbers, sizes, signed.view(len(sizes), 2 * num_levels))

    return ValueCode(
        name,
        num_bytes,
        encode,
        decode,
        Leveled(width, torch.tensor(TYPICAL[num_levels], dtype=torch.float32, device="cpu"), fitted, fit),
    )


VALUE_CODES: dict[str, ValueCode] = {
    code.name: code
    for code in (
        _cast("fp32", torch.float32),
        ValueCode("fp16", lambda planned: len(planned) + 2 * sum(planned), _fp16_encode, _fp16_decode),
        _cast("bf16", torch.bfloat16),
        ValueCode("int8", lambda planned: 2 * len(planned) + sum(planned), _int8_encode, _int8_decode),
        _leveled("4bit", 4),
        _leveled("2bit", 2),
        _leveled("sign", 1),
    )
}
