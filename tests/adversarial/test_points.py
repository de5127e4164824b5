"""Attacks on the embedding of texts: where they move, what they leave alone, and what the weights learn from them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distrobust.adversarial import MART, PGDAT, TRADES, Attack, Threat, TrainingLoss
from distrobust.adversarial.attacks import cross_entropy_sum, input_gradient
from distrobust.adversarial.points import Points
from distrobust.adversarial.threat import OpenThreat, noise, project, random_start
from distrobust.errors import ConfigError
from distrobust.evaluation import count_correct
from distrobust.models import Transformer, build, build_transformer
from tests.harness.ranks import Rank, run_ranks

TOKENS = torch.tensor([[72, 105, 33, 0, 0, 0], [104, 101, 108, 108, 111, 0], [65, 0, 0, 0, 0, 0]], dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2])
PADDED = TOKENS == 0


def net_of() -> Transformer:
    return build_transformer(3, TOKENS.shape[1], 8, 1, 2, seed=1)


def lengths(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "n_fgsm", "pgd"])
def test_no_attack_moves_padding_or_leaves_the_ball(name: Any, norm: Any) -> None:
    net, attack = net_of(), Attack(name, steps=3)
    points = Points.of(net, TOKENS)
    threat = points.ball(OpenThreat(norm, 0.5))
    x_adv = attack(points.seen_by(net), points.x, LABELS, threat, torch.Generator().manual_seed(0))
    delta = x_adv - points.x
    assert not delta[PADDED].any()
    assert (delta[~PADDED] != 0).any(dim=1).all()
    size = lengths(delta) if norm == "l2" else delta.abs().amax(dim=(1, 2))
    assert (size <= attack.reach(threat) * (1 + 1e-5)).all()
    assert (size > 0.4).all()  # padding takes no part of the budget


def test_points_have_no_box() -> None:
    points = Points.of(net_of(), TOKENS)
    assert points.x.min() < -0.5  # else a box would not show
    start = random_start(points.x, points.ball(OpenThreat("linf", 3.0)), torch.Generator().manual_seed(0))
    assert (start - points.x).abs().max() > 2.5
    assert torch.equal(project(start, points.x, OpenThreat("linf", 5.0)), points.x + (start - points.x))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_lies_at_padding_takes_no_part_of_the_budget(norm: Any) -> None:
    """As of the text that was before at this place of the batch, in free training."""
    points = Points.of(net_of(), TOKENS)
    delta = torch.where(PADDED[:, :, None], 9.0, 0.01).expand_as(points.x)
    moved = project(points.x + delta, points.x, points.ball(OpenThreat(norm, 0.5))) - points.x
    assert not moved[PADDED].any()
    torch.testing.assert_close(moved[~PADDED], delta[~PADDED], rtol=0, atol=1e-6)  # float32 of numbers about 1


def test_the_start_is_uniform_in_the_ball_of_what_may_move() -> None:
    """The radius of a uniform point of a ball of d dimensions is eps U^(1/d); 1 - 1/d halves it far less than 1/2."""
    x = torch.zeros(4000, 6, 2)
    where = torch.zeros(4000, 6, 1)
    where[:, 0] = 1.0  # two entries may move
    delta = noise(x, "l2", 2.0, torch.Generator().manual_seed(0), where)
    assert not delta[:, 1:].any()
    # P(radius <= eps / 2) = 1/4; the standard error of 4000 draws is 0.0068
    assert abs(float((lengths(delta) <= 1.0).float().mean()) - 0.25) < 5 * 0.0068


def test_the_gradient_at_padding_is_exactly_zero() -> None:
    net = net_of()
    points = Points.of(net, TOKENS)
    gradient, _ = input_gradient(points.seen_by(net), points.x, LABELS, cross_entropy_sum)
    assert not gradient[PADDED].any()
    assert (gradient[~PADDED] != 0).any(dim=1).all()


def test_a_model_of_images_sees_what_it_is_given() -> None:
    net, x, threat = build("cnn", 3, (1, 8, 8), [0.5], [0.25], seed=1), torch.rand(2, 1, 8, 8), Threat("linf", 0.1)
    points = Points.of(net, x)
    assert points.x is x
    assert points.seen_by(net) is net
    assert points.ball(threat) is threat


@pytest.mark.ranks
@pytest.mark.parametrize("loss", [PGDAT(), TRADES(), MART()], ids=lambda loss: type(loss).__name__)
def test_every_loss_passes_once_through_the_wrapper_and_trains_the_embedding(loss: TrainingLoss) -> None:
    def body(rank: Rank) -> None:
        net = net_of()
        ddp = DistributedDataParallel(net, process_group=rank.group)
        passes: list[int] = []
        ddp.register_forward_pre_hook(lambda _module, inputs: passes.append(len(inputs[0])))
        points = Points.of(net, TOKENS)
        x_adv = loss.examples(
            points.seen_by(net), points.x, LABELS, Attack("pgd", 2), points.ball(OpenThreat("l2", 0.5)), None
        )
        assert not passes
        assert all(parameter.grad is None for parameter in net.parameters())
        output = loss.objective(points.seen_by(ddp), points.x, x_adv, LABELS)
        output.loss.backward()
        assert passes == [len(TOKENS) if isinstance(loss, PGDAT) else 2 * len(TOKENS)]
        assert all(parameter.grad is not None for parameter in net.parameters())
        gradient = net.embedding.weight.grad
        assert gradient is not None
        used = torch.zeros(256, dtype=torch.bool).index_fill_(0, TOKENS.unique().long(), True)
        used[0] = False
        assert torch.equal((gradient != 0).any(dim=1), used)

    run_ranks(1, body)


def test_the_halves_of_a_doubled_batch_are_both_texts_of_the_batch() -> None:
    net = net_of()
    points = Points.of(net, TOKENS)
    x_adv = points.x + 0.3
    doubled = points.seen_by(net)(torch.cat([points.x, x_adv]))
    torch.testing.assert_close(doubled[:3], net(TOKENS))
    torch.testing.assert_close(doubled[3:], net(TOKENS, torch.full_like(x_adv, 0.3)))


def test_accuracy_of_texts_falls_under_attack_and_not_without() -> None:
    net = net_of()
    labels = net(TOKENS).argmax(1)
    counts = [
        count_correct(net, [(TOKENS, labels)], Attack("pgd", 5), OpenThreat("l2", eps), 0).correct
        for eps in (0.0, 50.0)
    ]
    assert counts == [3, 0]
    assert count_correct(net, [(TOKENS, labels)], None, None, 0).correct == 3


def test_l1_is_for_images() -> None:
    with pytest.raises(ConfigError, match=r"'l1' is for images in \[0, 1\]; valid here: linf, l2"):
        OpenThreat("l1", 1.0)
    assert OpenThreat("linf", 2.0).describe() == "Linf 2 of the embedding"
