"""Default groups for any model."""

import logging

import pytest
import torch
from torch import nn

from distrobust.errors import ConfigError
from distrobust.models import build
from distrobust.optim.groups import describe, log, norms_of


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.position = nn.Embedding(5, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)


def test_a_transformers_groups() -> None:
    norms = norms_of(Transformer())
    assert {n for n, norm in norms.items() if norm == "sign"} == {"token.weight", "position.weight", "head.weight"}
    assert {n for n, norm in norms.items() if norm == "spectral"} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert norms["cls"] == norms["norm.weight"] == norms["head.bias"] == "rms"


def test_a_tied_head_is_with_its_embedding() -> None:
    model = Transformer()
    model.head.weight = model.token.weight
    norms = norms_of(model)
    assert norms["token.weight"] == "sign"
    assert "head.weight" not in norms


def test_a_convolutional_networks_groups() -> None:
    norms = norms_of(build("resnet9", 10, (3, 32, 32), [0.5] * 3, [0.25] * 3))
    assert {name for name, norm in norms.items() if norm == "sign"} == {"head.weight"}
    assert all(
        norm == ("spectral" if "conv" in name else "rms") for name, norm in norms.items() if "head.w" not in name
    )


def test_frozen_parameters_are_in_no_group() -> None:
    model = Transformer()
    model.attention.requires_grad_(False)
    assert not any(name.startswith("attention") for name in norms_of(model))


def test_patterns_override() -> None:
    norms = norms_of(Transformer(), {"head.weight": "spectral", "*.bias": "frobenius"})
    assert norms["head.weight"] == "spectral"
    assert norms["norm.bias"] == norms["head.bias"] == "frobenius"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"haed.weight": "rms"}, "norms: 'haed.weight' matches no parameter that is trained; closest: 'head.weight'"),
        ({"head.weight": "nuclear"}, "norm of 'head.weight': got 'nuclear', wanted one of spectral, sign, rms"),
    ],
)
def test_wrong_overrides_are_refused(overrides: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        norms_of(Transformer(), overrides)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (
            torch.zeros(()),
            "parameter 'odd' of shape () has no dimension, so no norm and no direction; give it the shape",
        ),
        (torch.zeros(0, 3), "parameter 'odd' of shape (0, 3) is empty; leave it out of the optimizer"),
        (torch.zeros(2, dtype=torch.complex64), "parameter 'odd' of shape (2,) is complex, wanted real numbers"),
    ],
)
def test_what_no_norm_can_serve_is_refused(tensor: torch.Tensor, text: str) -> None:
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(tensor)
    with pytest.raises(ConfigError) as error:
        norms_of(model)
    assert text in str(error.value)


def test_groups_are_described_in_a_line_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Transformer()
    text = describe(norms_of(model), dict(model.named_parameters()))
    assert "sign: 3 parameters, 216 numbers (token.weight .. head.weight)" in text
    with caplog.at_level(logging.INFO):
        log(f"a sentence of {__name__}")
        log(f"a sentence of {__name__}")
    assert caplog.messages == [f"a sentence of {__name__}"]
