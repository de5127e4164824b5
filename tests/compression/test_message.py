"""One message: its length, and that nothing but the message itself is accepted for it."""

import math
from dataclasses import replace

import pytest
import torch
from harness.payloads import seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression import codec, message
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code, Space
from distrobust.compression.message import DAMAGED, NON_FINITE, Layout
from distrobust.errors import CodecError

CPU = torch.device("cpu")


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Up to three blocks with gaps between them, or nothing to send at all."""
    sizes = draw(st.lists(st.integers(1, 300), max_size=3))
    starts, at = [], 0
    for size in sizes:
        at += draw(st.sampled_from([0, 0, 7]))
        starts.append(at)
        at += size
    counts = tuple(draw(st.integers(1, size)) for size in sizes)
    return Space(at + draw(st.sampled_from([0, 5])), counts, tuple(starts))


codes = st.builds(Code, st.sampled_from(list(VALUE_CODES.values())), st.sampled_from(list(INDEX_CODES.values())))
layouts = st.builds(
    Layout, spaces(), codes, st.integers(1, 20), st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 2)
)


def make(layout: Layout, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(message, used, side, the indices and the values it decodes to)."""
    g = torch.Generator().manual_seed(seed)
    used = torch.rand(layout.num_parameters, generator=g) < 0.5
    side = torch.randn(layout.num_side, generator=g)
    space = layout.space
    if not space.k:
        nothing = torch.zeros(0, dtype=torch.int64)
        return message.pack(layout, message.header(used, side), None), used, side, nothing, nothing.float()
    ends = [*space.starts[1:], space.n]
    pieces = [
        torch.randperm(end - start, generator=g)[:k].sort().values + start
        for start, end, k in zip(space.starts, ends, space.counts, strict=True)
    ]
    payload, indices, sent = codec.encode(torch.cat(pieces), torch.randn(space.k, generator=g), space, layout.code)
    return message.pack(layout, message.header(used, side), payload), used, side, indices, sent


@given(layouts, seeds)
def test_unpack_returns_what_was_packed(layout: Layout, seed: int) -> None:
    packed, used, side, indices, values = make(layout, seed)
    unpacked = message.unpack(layout, packed)
    assert unpacked.status == 0
    assert torch.equal(unpacked.used, used)
    assert torch.equal(unpacked.side, side)
    assert torch.equal(unpacked.indices, indices)
    assert torch.equal(unpacked.values, values)


@given(layouts, seeds)
def test_length_depends_on_the_layout_alone(layout: Layout, seed: int) -> None:
    assert len(make(layout, seed)[0]) == layout.num_bytes
    assert len(message.pack_status(layout, NON_FINITE, CPU)) == layout.num_bytes


@given(layouts)
def test_a_message_with_nothing_to_send_is_its_header(layout: Layout) -> None:
    """4 bytes of checksum, 1 of status, a bit a parameter, 4 bytes a side value."""
    header = 5 + -(-layout.num_parameters // 8) + 4 * layout.num_side
    assert replace(layout, space=Space(layout.space.n, ())).num_bytes == header
    assert layout.num_bytes >= header + (2 * layout.space.k) // 8


@given(layouts, st.sampled_from([NON_FINITE, DAMAGED]))
def test_a_status_is_told_apart_from_a_damaged_message(layout: Layout, status: int) -> None:
    packed = message.pack_status(layout, status, CPU)
    unpacked = message.unpack(layout, packed)
    assert unpacked.status == status
    assert unpacked.indices.numel() == unpacked.values.numel() == 0
    packed[-1] ^= 1
    with pytest.raises(CodecError, match="checksum"):
        message.unpack(layout, packed)


@given(layouts, seeds, st.data())
def test_any_flipped_bit_is_refused(layout: Layout, seed: int, data: st.DataObject) -> None:
    packed = make(layout, seed)[0]
    bit = data.draw(st.integers(0, 8 * len(packed) - 1))
    packed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(CodecError, match="checksum"):
        message.unpack(layout, packed)


@pytest.mark.parametrize("values", ["fp16", "4bit"])
@pytest.mark.parametrize("indices", INDEX_CODES)
def test_every_flipped_bit_of_one_message_is_refused(values: str, indices: str) -> None:
    code = Code(VALUE_CODES[values], INDEX_CODES[indices])
    layout = Layout(Space(123, (7, 2), (0, 90)), code, 5, 1, 12)
    packed = make(layout)[0]
    for bit in range(8 * len(packed)):
        damaged = packed.clone()
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CodecError, match="checksum"):
            message.unpack(layout, damaged)


@given(layouts, seeds)
def test_two_words_exchanged_are_refused(layout: Layout, seed: int) -> None:
    """A sum of the words alone would not see it."""
    packed = make(layout, seed)[0]
    words = packed[4 : 4 + (len(packed) - 4) // 4 * 4].view(-1, 4)
    for i in range(1, len(words)):
        if not torch.equal(words[0], words[i]):
            exchanged = packed.clone()
            exchanged[4:8], exchanged[4 + 4 * i : 8 + 4 * i] = words[i], words[0]
            with pytest.raises(CodecError, match="checksum"):
                message.unpack(layout, exchanged)


@given(layouts, st.data())
def test_a_message_of_another_length_is_refused(layout: Layout, data: st.DataObject) -> None:
    packed = make(layout)[0]
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(CodecError, match=f"message of {cut} bytes, expected {len(packed)}"):
        message.unpack(layout, packed[:cut])
    with pytest.raises(CodecError, match=f"message of {len(packed) + 1} bytes"):
        message.unpack(layout, torch.cat([packed, packed[:1]]))


@given(layouts, seeds)
def test_a_buffer_nobody_filled_is_refused(layout: Layout, seed: int) -> None:
    """Zeros always, noise but for one in 2^32: none of the seeds hypothesis draws is that one."""
    noise = torch.randint(256, (layout.num_bytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    for buffer in (torch.zeros(layout.num_bytes, dtype=torch.uint8), noise):
        with pytest.raises(CodecError, match="checksum"):
            message.unpack(layout, buffer)


@given(layouts, st.integers(1, 1000), st.sampled_from(["step", "hop"]))
def test_a_message_of_another_step_or_hop_is_refused(layout: Layout, later: int, field: str) -> None:
    packed = make(layout)[0]
    with pytest.raises(CodecError, match="another step or layout"):
        message.unpack(replace(layout, **{field: getattr(layout, field) + later}), packed)


def test_a_message_of_another_layout_of_equal_length_is_refused() -> None:
    """Of other blocks of the same number, or of another code of the same length."""
    fp16, bf16 = (Code(VALUE_CODES[name]) for name in ("fp16", "bf16"))
    layout = Layout(Space(123, (7, 2), (0, 90)), fp16, 6)
    blocks = replace(layout, space=Space(123, (2, 7), (0, 33)))
    starts = replace(layout, space=Space(123, (7, 2), (0, 89)))
    shifted = Layout(Space(123, (9,)), fp16, 6, 0)
    one_less, one_more = Layout(Space(9, (1,)), bf16, 9), Layout(Space(9, (1,)), fp16, 8)  # a flag byte, an exponent
    assert one_less.num_bytes == one_more.num_bytes
    assert layout.num_bytes == blocks.num_bytes == starts.num_bytes == shifted.num_bytes + 1
    for made, read in ((layout, blocks), (layout, starts), (one_less, one_more), (one_more, one_less)):
        with pytest.raises(CodecError, match="another step or layout"):
            message.unpack(read, make(made)[0])


def test_side_values_may_be_nan() -> None:
    """The first step has no noise estimate: NaN travels as it is and does not damage the message."""
    layout = Layout(Space(10, ()), Code(VALUE_CODES["fp16"]), 2, 2)
    packed = message.pack(layout, message.header(torch.ones(2, dtype=torch.bool), torch.tensor([math.nan, 1.0])), None)
    unpacked = message.unpack(layout, packed)
    assert math.isnan(unpacked.side[0])
    assert unpacked.side[1] == 1.0


@given(layouts)
def test_a_message_may_begin_at_any_byte_of_a_buffer(layout: Layout) -> None:
    packed, _, _, indices, values = make(layout)
    for shift in range(4):
        buffer = torch.zeros(len(packed) + shift, dtype=torch.uint8)
        buffer[shift:] = packed
        unpacked = message.unpack(layout, buffer[shift:])
        assert torch.equal(unpacked.indices, indices)
        assert torch.equal(unpacked.values, values)
