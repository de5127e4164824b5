"""A fused convolution and relu is the two of them, in value and in the gradient of its input."""

import pytest
import torch
from torch import nn

from distrobust.adversarial.conv_relu import ConvReLU, can_be_fused, is_available

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not is_available(), reason="this build of torch has no oneDNN")
KINDS = {
    "plain": {"padding": 1},
    "strided, dilated, grouped": {"padding": 2, "stride": 2, "dilation": 2, "groups": 4},
    "without bias": {"bias": False},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_it_is_both(options: dict[str, int], bf16: bool, last: bool) -> None:
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, **options).requires_grad_(False)  # type: ignore[arg-type]
    x = torch.randn(6, 8, 11, 9, generator=g)
    if last:
        conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    found = []
    for layer in (nn.Sequential(conv, nn.ReLU()), ConvReLU(conv)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = layer(leaf)
        assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        (gradient,) = torch.autograd.grad(y, leaf, weights)
        found.append((y.detach(), gradient))
    (y, gradient), (ours, our_gradient) = found
    assert (y == 0).float().mean() > 0.2
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-5, atol=1e-5)


def test_what_onednn_cannot_pad_is_left_alone() -> None:
    assert can_be_fused(nn.Conv2d(3, 4, 3, padding=1))
    assert not can_be_fused(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    assert not can_be_fused(nn.Conv2d(3, 4, 3, padding="same"))
