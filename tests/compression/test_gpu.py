"""The same functions on a CUDA device: same coordinates, same bytes, same sums."""

import pytest
import torch

from distrobust.compression import message
from distrobust.compression.codec import VALUE_CODES, encode
from distrobust.compression.message import Layout, Section
from distrobust.compression.select import SELECTORS, exact_top_k

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(100_003, generator=torch.Generator().manual_seed(0)).pow(3)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("k", [1, 100, 1_000, 50_000])
def test_a_gpu_selects_the_coordinates_a_cpu_selects(values: torch.Tensor, name: str, k: int) -> None:
    assert torch.equal(SELECTORS[name](values.cuda(), k).cpu(), exact_top_k(values, k))


@pytest.mark.parametrize("name", VALUE_CODES)
def test_a_gpu_writes_the_bytes_a_cpu_writes(values: torch.Tensor, name: str) -> None:
    indices = exact_top_k(values, 1_000)
    code = VALUE_CODES[name]
    ours, sent = encode(indices.cuda(), values[indices].cuda(), len(values), code)
    theirs, expected = encode(indices, values[indices], len(values), code)
    assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(sent.cpu(), expected)


def test_a_message_made_on_a_gpu_is_read_on_a_cpu(values: torch.Tensor) -> None:
    indices = exact_top_k(values, 1_000)
    layout = Layout((Section(len(values), 1_000),), VALUE_CODES["fp16"], num_parameters=3, num_side=2)
    payload, sent = encode(indices.cuda(), values[indices].cuda(), len(values), layout.code)
    used = torch.tensor([True, False, True], device="cuda")
    packed = message.pack(layout, used, torch.tensor([0.5, 2.0], device="cuda"), [payload])
    read = message.unpack(layout, packed.cpu())
    assert read is not None
    assert read.used.tolist() == [True, False, True]
    assert torch.equal(read.payloads[0][0], indices)
    assert torch.equal(read.payloads[0][1], sent.cpu())
