"""Laws of the training losses."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, HashStore
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.losses import MART, PGDAT, TRADES, TRADES_ATTACK, Natural, TrainingLoss
from distrobust.adversarial.threat import Threat
from distrobust.errors import ConfigError
from distrobust.models import build

torch.set_num_threads(1)
LINF = Threat("linf", 0.031)


def plain_model() -> nn.Module:
    """Without batch norm: an image's logits do not depend on the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 8 * 8, 4))


def norm_model() -> nn.Module:
    return build("cnn", 4, (3, 8, 8), (0.5,) * 3, (0.25,) * 3, seed=0)


def batch(num: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(num, 3, 8, 8, generator=g), torch.randint(4, (num,), generator=g)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Counting(nn.Module):
    """A stand-in for the DDP wrapper: counts its forward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module, self.shapes = model, list[torch.Size]()

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return torch.as_tensor(self.module(x))


def trades_transcribed(
    model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, eps: float, step: float, steps: int, beta: float
) -> tuple[Tensor, Tensor]:
    """The TRADES authors' loop (trades.py), line by line, for a model without batch norm. -> loss, x'"""
    kl = nn.KLDivLoss(reduction="sum")
    x_adv = x.detach() + 0.001 * noise
    for _ in range(steps):
        x_adv.requires_grad_()
        loss_kl = kl(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1))
        grad = torch.autograd.grad(loss_kl, [x_adv])[0]
        x_adv = x_adv.detach() + step * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    logits = model(x)
    loss_natural = F.cross_entropy(logits, y)
    loss_robust = (1.0 / x.shape[0]) * kl(F.log_softmax(model(x_adv.detach()), dim=1), F.softmax(model(x), dim=1))
    return loss_natural + beta * loss_robust, x_adv.detach()


def test_trades_equals_the_authors_loop() -> None:
    model, (x, y) = plain_model(), batch()
    out = TRADES()(model, model, x, y, TRADES_ATTACK, LINF, seeded())
    noise = torch.empty(x.shape).normal_(generator=seeded())
    loss, x_adv = trades_transcribed(model, x, y, noise, eps=0.031, step=0.007, steps=10, beta=6.0)
    assert out.x_adv is not None
    # x' moves by whole signed steps: a pixel or two, with a gradient at rounding, may take another path
    assert ((out.x_adv - x_adv).abs() > 1e-6).float().mean() < 0.005
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


def test_trades_attack_raises_the_kl_and_not_the_cross_entropy_of_the_label() -> None:
    model, (x, y) = plain_model(), batch()
    a = TRADES()(model, model, x, y, TRADES_ATTACK, LINF, seeded())
    b = TRADES()(model, model, x, (y + 1) % 4, TRADES_ATTACK, LINF, seeded())
    assert a.x_adv is not None
    assert b.x_adv is not None
    assert torch.equal(a.x_adv, b.x_adv)  # labels play no part
    noise = x + 0.031 * torch.sign(torch.randn(x.shape, generator=seeded()))
    assert kl(model, x, a.x_adv) > 3 * kl(model, x, noise)


@torch.no_grad()
def kl(model: nn.Module, x: Tensor, x_adv: Tensor) -> float:
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    return float((p * (p / q).log()).sum())


def test_trades_with_beta_zero_equals_natural() -> None:
    model, (x, y) = plain_model(), batch()
    for smoothing in (0.0, 0.1):
        out = TRADES(smoothing, beta=0.0)(model, model, x, y, TRADES_ATTACK, LINF, seeded())
        torch.testing.assert_close(out.loss, Natural(smoothing)(model, model, x, y).loss)


def test_trades_at_radius_zero_has_no_robust_term() -> None:
    model, (x, y) = plain_model(), batch()
    out = TRADES()(model, model, x, y, TRADES_ATTACK, Threat("linf", 0.0), seeded())
    torch.testing.assert_close(out.loss, Natural()(model, model, x, y).loss)


def test_natural_is_the_mean_cross_entropy() -> None:
    model, (x, y) = plain_model(), batch()
    out = Natural()(model, model, x, y)
    torch.testing.assert_close(out.loss, F.cross_entropy(model(x), y))
    torch.testing.assert_close(out.logits, model(x).detach())
    assert out.adversarial_logits is None


def test_pgd_at_is_the_cross_entropy_on_the_attacks_images() -> None:
    model, (x, y) = plain_model(), batch()
    attack = Attack("pgd", steps=3)
    x_adv = attack(model, x, y, LINF, seeded())
    out = PGDAT(0.1)(model, model, x, y, attack, LINF, seeded())
    assert out.x_adv is not None
    assert torch.equal(out.x_adv, x_adv)
    torch.testing.assert_close(out.loss, F.cross_entropy(model(x_adv), y, label_smoothing=0.1))
    assert out.clean_logits is None


@pytest.mark.parametrize("loss", [Natural(), PGDAT(), TRADES(), MART()], ids=lambda loss: type(loss).__name__)
def test_one_forward_pass_through_the_wrapper_and_one_update_of_the_statistics(loss: TrainingLoss) -> None:
    model, (x, y) = norm_model(), batch()
    wrapper = Counting(model)
    out = loss(wrapper, model, x, y, Attack("pgd", steps=3), LINF, seeded())
    assert wrapper.shapes == [torch.Size([12 if isinstance(loss, TRADES | MART) else 6, 3, 8, 8])]
    assert model.get_buffer("stem.norm.num_batches_tracked").item() == 1
    assert out.logits.shape == (6, 4)
    assert not out.logits.requires_grad
    assert out.loss.requires_grad


def test_trades_attack_runs_in_evaluation_mode_and_leaves_no_parameter_gradient() -> None:
    model, (x, y) = norm_model().train(), batch()
    modes: list[bool] = []
    model.register_forward_hook(lambda *_: modes.append(any(m.training for m in model.modules())))
    TRADES()(model, model, x, y, Attack("pgd", steps=3), LINF, seeded())
    assert modes == [False] * 4 + [True]  # f(x), three steps, the training pass
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("loss", [Natural(), PGDAT(), TRADES(), MART()], ids=lambda loss: type(loss).__name__)
def test_under_autocast_the_loss_is_float32_and_its_gradient_reaches_every_parameter(loss: TrainingLoss) -> None:
    model, (x, y) = norm_model(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(model, model, x, y, Attack("pgd", steps=2), LINF, seeded())
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_trades_works_with_the_other_attacks() -> None:
    model, (x, y) = plain_model(), batch()
    losses = {
        name: TRADES()(model, model, x, y, Attack(name), LINF, seeded()).loss.item()
        for name in ("none", "fgsm", "n_fgsm", "pgd")
    }
    assert losses["none"] < min(losses["fgsm"], losses["n_fgsm"], losses["pgd"])


def mart_transcribed(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """The MART authors' loss (mart.py), line by line, for a model without batch norm."""
    kl = nn.KLDivLoss(reduction="none")
    logits, logits_adv = model(x), model(x_adv)
    adv_probs = F.softmax(logits_adv, dim=1)
    tmp1 = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(tmp1[:, -1] == y, tmp1[:, -2], tmp1[:, -1])
    loss_adv = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
    nat_probs = F.softmax(logits, dim=1)
    true_probs = torch.gather(nat_probs, 1, (y.unsqueeze(1)).long()).squeeze()
    loss_robust = (1.0 / len(x)) * torch.sum(
        torch.sum(kl(torch.log(adv_probs + 1e-12), nat_probs), dim=1) * (1.0000001 - true_probs)
    )
    return loss_adv + float(beta) * loss_robust


def test_mart_equals_the_authors_loss() -> None:
    model, (x, y) = plain_model(), batch()
    out = MART(beta=6.0)(model, model, x, y, Attack("pgd", steps=3), LINF, seeded())
    assert out.x_adv is not None
    theirs = mart_transcribed(model, x, out.x_adv, y, 6.0)
    torch.testing.assert_close(out.loss, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(one, list(model.parameters())) for one in (out.loss, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [TRADES, MART])
def test_impossible_beta_is_refused(loss: type[TRADES] | type[MART], beta: float) -> None:
    with pytest.raises(ConfigError, match=f"{loss.__name__.lower()} beta: {beta}"):
        loss(beta=beta)


@pytest.fixture
def gloo_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo_of_one")
def test_trades_gives_a_ddp_wrapper_one_backward_with_each_bucket_once() -> None:
    model, (x, y) = norm_model(), batch()
    buckets: list[int] = []

    def counting(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.index())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, counting)
    out = TRADES()(ddp, ddp.module, x, y, Attack("pgd", steps=3), LINF, seeded())
    assert buckets == []
    out.loss.backward()
    assert buckets
    assert len(buckets) == len(set(buckets))
