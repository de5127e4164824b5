"""The same functions on a CUDA device: same coordinates, same bytes, same sums."""

import pytest
import torch

from distrobust.compression import message
from distrobust.compression.accumulate import Piece, accumulate_and_select
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code, Space, decode, encode
from distrobust.compression.memory import Residual, Rule
from distrobust.compression.message import Layout
from distrobust.compression.select import SELECTORS, exact_top_k

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N = 100_003
SPACE = Space(N, (700, 300), (0, 60_000))


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0)).pow(3)


def chosen(values: torch.Tensor) -> torch.Tensor:
    first, second = values.split([60_000, N - 60_000])
    return torch.cat([exact_top_k(first, 700), exact_top_k(second, 300) + 60_000])


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("k", [1, 100, 1_000, 50_000])
def test_a_gpu_selects_the_coordinates_a_cpu_selects(values: torch.Tensor, name: str, k: int) -> None:
    assert torch.equal(SELECTORS[name](values.cuda(), k).cpu(), exact_top_k(values, k))


@pytest.mark.parametrize("name", SELECTORS)
def test_a_gpu_accumulates_and_selects_what_a_cpu_does(values: torch.Tensor, name: str) -> None:
    """Momentum and decay are powers of two, so that both sides round alike."""
    rule = Rule(0.5, nesterov=True, weight_decay=2.0**-6)
    pieces = [Piece(0, 60_000, 700), Piece(60_000, N, 300)]
    found = {}
    for device in ("cpu", "cuda"):
        residual = Residual(N, rule, torch.device(device))
        for step in range(3):
            gradient = values.roll(step * 1000).to(device)
            selected = accumulate_and_select(residual, gradient, values.to(device), 1.0, pieces, name)
            residual.commit(settled=False)
        assert selected is not None
        found[device] = (torch.cat([s.indices for s in selected]).cpu(), residual.u.cpu(), residual.v.cpu())
        poisoned = gradient.clone()
        poisoned[-1] = torch.nan
        assert accumulate_and_select(residual, poisoned, values.to(device), 1.0, pieces, name) is None
    assert all(torch.equal(a, b) for a, b in zip(found["cpu"], found["cuda"], strict=True))


@pytest.mark.parametrize("indices", INDEX_CODES)
@pytest.mark.parametrize("name", VALUE_CODES)
def test_a_gpu_writes_the_bytes_a_cpu_writes(values: torch.Tensor, name: str, indices: str) -> None:
    """Sums of a block are taken in float64 in another order, which moves a bf16 scale once in millions."""
    where, code = chosen(values), Code(VALUE_CODES[name], INDEX_CODES[indices])
    ours, kept, sent = encode(where.cuda(), values[where].cuda(), SPACE, code)
    theirs, expected_kept, expected = encode(where, values[where], SPACE, code)
    assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(kept.cpu(), expected_kept)
    assert torch.equal(sent.cpu(), expected)
    assert torch.equal(decode(ours, SPACE, code)[1], sent)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("name", VALUE_CODES)
def test_a_gpu_codes_tiny_and_huge_values_as_a_cpu_does(values: torch.Tensor, name: str, scale: float) -> None:
    where, code = chosen(values), Code(VALUE_CODES[name])
    scaled = (values.double() * scale).float()
    _, _, sent = encode(where.cuda(), scaled[where].cuda(), SPACE, code)
    _, _, expected = encode(where, scaled[where], SPACE, code)
    assert torch.equal(sent.cpu(), expected)


@pytest.mark.parametrize("indices", INDEX_CODES)
def test_clustered_indices_are_kept_alike(values: torch.Tensor, indices: str) -> None:
    where, code = torch.arange(1_000) * 101, Code(VALUE_CODES["4bit"], INDEX_CODES[indices])
    where = where[where < N]
    space = Space(N, (len(where),))
    _, kept, sent = encode(where.cuda(), values[where].cuda(), space, code)
    _, expected_kept, expected = encode(where, values[where], space, code)
    assert torch.equal(kept.cpu(), expected_kept)
    assert torch.equal(sent.cpu(), expected)


def test_a_message_made_on_a_gpu_is_read_on_a_cpu(values: torch.Tensor) -> None:
    where = chosen(values)
    layout = Layout(SPACE, Code(VALUE_CODES["fp16"], INDEX_CODES["rice"]), num_parameters=3, num_side=2)
    payload, kept, sent = encode(where.cuda(), values[where].cuda(), SPACE, layout.code)
    used = torch.tensor([True, False, True], device="cuda")
    packed = message.pack(layout, message.header(used, torch.tensor([0.5, 2.0], device="cuda")), payload)
    read = message.unpack(layout, packed.cpu())
    assert read.used.tolist() == [True, False, True]
    assert read.side.tolist() == [0.5, 2.0]
    assert torch.equal(read.indices, kept.cpu())
    assert torch.equal(read.values, sent.cpu())
    again = message.unpack(layout, packed)
    assert torch.equal(again.values, sent)
