"""One message: its length, and that nothing but the message itself is accepted for it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression import codec, message
from distrobust.compression.codec import VALUE_CODES
from distrobust.compression.message import Layout, Section
from distrobust.errors import CodecError

sections = st.lists(
    st.integers(1, 400).flatmap(lambda n: st.builds(Section, st.just(n), st.integers(1, n))), max_size=3
)
layouts = st.builds(
    Layout,
    sections.map(tuple),
    st.sampled_from(list(VALUE_CODES.values())),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
seeds = st.integers(0, 2**32 - 1)


def make(layout: Layout, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """(message, used, side, what each section decodes to)."""
    g = torch.Generator().manual_seed(seed)
    used = torch.rand(layout.num_parameters, generator=g) < 0.5
    side = torch.randn(layout.num_side, generator=g)
    payloads, contents = [], []
    for section in layout.sections:
        indices = torch.randperm(section.n, generator=g)[: section.k].sort().values
        payload, sent = codec.encode(indices, torch.randn(section.k, generator=g), section.n, layout.code)
        payloads.append(payload)
        contents.append((indices, sent))
    return message.pack(layout, used, side, payloads), used, side, contents


@given(layouts, seeds)
def test_unpack_returns_what_was_packed(layout: Layout, seed: int) -> None:
    packed, used, side, contents = make(layout, seed)
    unpacked = message.unpack(layout, packed)
    assert unpacked is not None
    assert torch.equal(unpacked.used, used)
    assert torch.equal(unpacked.side, side)
    for (indices, values), (indices_, values_) in zip(contents, unpacked.payloads, strict=True):
        assert torch.equal(indices, indices_)
        assert torch.equal(values, values_)


@given(layouts, seeds)
def test_length_depends_on_the_layout_alone(layout: Layout, seed: int) -> None:
    assert len(make(layout, seed)[0]) == layout.num_bytes
    assert len(message.pack_non_finite(layout, torch.device("cpu"))) == layout.num_bytes


@given(layouts)
def test_non_finite_is_told_apart_from_a_damaged_message(layout: Layout) -> None:
    packed = message.pack_non_finite(layout, torch.device("cpu"))
    assert message.unpack(layout, packed) is None
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


def test_every_flipped_bit_of_one_message_is_refused() -> None:
    layout = Layout((Section(90, 7), Section(33, 2)), VALUE_CODES["fp16"], 5, 1, 12)
    packed = make(layout)[0]
    for bit in range(8 * len(packed)):
        damaged = packed.clone()
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CodecError, match="checksum"):
            message.unpack(layout, damaged)


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


@given(layouts, st.integers(1, 1000))
def test_a_message_of_another_step_is_refused(layout: Layout, later: int) -> None:
    packed = make(layout)[0]
    with pytest.raises(CodecError, match="another step or layout"):
        message.unpack(replace(layout, step=layout.step + later), packed)


def test_a_message_of_another_layout_of_equal_length_is_refused() -> None:
    """bf16 and fp32 differ in length; two sections exchanged do not."""
    layout = Layout((Section(90, 7), Section(33, 2)), VALUE_CODES["fp32"], 5)
    other = replace(layout, sections=layout.sections[::-1])
    assert other.num_bytes == layout.num_bytes
    with pytest.raises(CodecError, match="another step or layout"):
        message.unpack(other, make(layout)[0])


def test_side_values_may_be_nan() -> None:
    """The first step has no noise estimate: NaN travels as it is and does not damage the message."""
    layout = Layout((), VALUE_CODES["fp16"], 2, 2)
    packed = message.pack(layout, torch.ones(2, dtype=torch.bool), torch.tensor([math.nan, 1.0]), [])
    unpacked = message.unpack(layout, packed)
    assert unpacked is not None
    assert math.isnan(unpacked.side[0])
    assert unpacked.side[1] == 1.0


@given(layouts)
def test_a_message_may_begin_at_any_byte_of_a_buffer(layout: Layout) -> None:
    packed = make(layout)[0]
    for shift in range(4):
        buffer = torch.zeros(len(packed) + shift, dtype=torch.uint8)
        buffer[shift:] = packed
        assert message.unpack(layout, buffer[shift:]) is not None
