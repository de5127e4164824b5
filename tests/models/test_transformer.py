"""Laws of the transformer of bytes."""

import pytest
import torch
from torch import Tensor

from distrobust.errors import ModelError
from distrobust.models import Transformer, build_transformer


def net_of(seed: int = 1) -> Transformer:
    return build_transformer(3, 8, 12, 2, 3, seed=seed).eval()


def tokens_of(*texts: str) -> Tensor:
    return torch.stack([torch.tensor(list(text.encode().ljust(8, b"\0")), dtype=torch.uint8) for text in texts])


def test_initial_weights_follow_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    same, other = net_of().state_dict(), net_of(2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, same[name]) for name, tensor in net_of().state_dict().items())
    assert not torch.equal(same["layer1.attention.weight"], other["layer1.attention.weight"])


def test_every_entry_of_a_bytes_point_has_variance_one_whatever_its_weights() -> None:
    net, tokens = net_of(), tokens_of("ab")
    x = net.embed(tokens)
    torch.testing.assert_close(x[0, :2].var(dim=1, unbiased=False), torch.ones(2), rtol=1e-3, atol=0)
    with torch.no_grad():
        net.embedding.weight.mul_(100)
    torch.testing.assert_close(net.embed(tokens), x, rtol=1e-3, atol=1e-4)  # the eps of the variance, 1e-5
    assert not x[0, 2:].any()


def test_padding_changes_nothing() -> None:
    """A text is what it is, however long the row; and nothing that happens at padding reaches it."""
    net, tokens = net_of(), tokens_of("abc")
    torch.testing.assert_close(net(tokens), net(tokens[:, :3]))
    delta = torch.zeros(1, 8, 12)
    delta[:, 3:] = 7.0
    assert torch.equal(net(tokens, delta), net(tokens))
    delta[:, 2] = 1.0
    assert not torch.equal(net(tokens, delta), net(tokens))


def test_the_order_of_bytes_matters() -> None:
    assert not torch.allclose(net_of()(tokens_of("abc")), net_of()(tokens_of("cba")), atol=1e-3)


def test_no_text_depends_on_its_neighbours() -> None:
    net = net_of()
    together = net(tokens_of("abc", "hello"))
    torch.testing.assert_close(together[1:], net(tokens_of("hello")))


def test_nothing_but_padding_has_finite_logits() -> None:
    assert net_of()(torch.zeros(1, 8, dtype=torch.uint8)).isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "text"), [((1, 8, 12, 2, 3), "num_classes is 1"), ((3, 8, 12, 2, 5), "width a multiple of heads")]
)
def test_impossible_sizes_are_refused(sizes: tuple[int, ...], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        build_transformer(*sizes)
