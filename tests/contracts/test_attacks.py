"""The laws every attack obeys, in both norms. A new attack is one row of ATTACKS."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, HashStore
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distrobust.adversarial.attacks import Attack, fgsm, n_fgsm, pgd
from distrobust.adversarial.threat import Threat
from distrobust.models import build

torch.set_num_threads(1)
ATTACKS = {
    "none": Attack("none"),
    "fgsm": Attack("fgsm"),
    "n_fgsm": Attack("n_fgsm"),
    "pgd": Attack("pgd", steps=4),
    "pgd_from_x": Attack("pgd", steps=4, random_start=False),
    "rs_fgsm": Attack("pgd", steps=1),
}
THREATS = {"linf": Threat("linf", 0.06), "l2": Threat("l2", 0.6), "l1": Threat("l1", 6.0)}

each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
each_threat = pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS.keys())
Problem = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A small network after 40 steps on noisy class prototypes, and one batch: model, x, y."""
    g = torch.Generator().manual_seed(0)
    prototypes = torch.rand(4, 3, 8, 8, generator=g)

    def batch(num: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (num,), generator=g)
        return (prototypes[y] + 0.3 * torch.randn(num, 3, 8, 8, generator=g)).clamp(0, 1), y

    model = build("cnn", 4, (3, 8, 8), (0.5,) * 3, (0.25,) * 3, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        x, y = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, *batch(24)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_at(model: nn.Module, x: Tensor, y: Tensor) -> float:
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        value = F.cross_entropy(model(x), y).item()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return value


@each_attack
@each_threat
def test_stays_within_its_reach_and_in_the_unit_interval(problem: Problem, attack: Attack, threat: Threat) -> None:
    model, x, y = problem
    x_adv = attack(model, x, y, threat, seeded())
    delta = (x_adv - x).flatten(1).double()
    distance = delta.norm(p={"linf": math.inf, "l2": 2, "l1": 1}[threat.norm], dim=1)
    # x + delta rounds by 2^-24 per pixel; 192 pixels make sqrt(192) of it in L2, 192 in L1; a few such operations
    assert distance.max() <= attack.reach(threat) + 4 * (192 if threat.norm == "l1" else 14) * 2**-24
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@each_threat
def test_all_but_n_fgsm_reach_no_further_than_the_ball(threat: Threat) -> None:
    far = {name for name, attack in ATTACKS.items() if attack.reach(threat) > threat.eps}
    assert far == {"n_fgsm"}
    assert ATTACKS["n_fgsm"].reach(threat) == pytest.approx(3 * threat.eps)


@each_attack
@each_threat
def test_same_seed_same_result(problem: Problem, attack: Attack, threat: Threat) -> None:
    model, x, y = problem
    first, second = (attack(model, x, y, threat, seeded()) for _ in range(2))
    assert torch.equal(first, second)


@each_threat
@pytest.mark.parametrize("name", ["n_fgsm", "pgd", "rs_fgsm"])
def test_another_seed_another_result(problem: Problem, name: str, threat: Threat) -> None:
    model, x, y = problem
    first, second = (ATTACKS[name](model, x, y, threat, seeded(seed)) for seed in (1, 2))
    assert not torch.equal(first, second)


@each_attack
@each_threat
def test_leaves_no_trace(problem: Problem, attack: Attack, threat: Threat) -> None:
    model, x, y = problem
    model.train()
    model.get_submodule("layer1.norm").eval()  # a frozen batch norm in a model that trains
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x_before, rng = x.clone(), torch.get_rng_state()
    x_adv = attack(model, x, y, threat, seeded())
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(x, x_before)
    assert not x.requires_grad
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None


@each_attack
@each_threat
def test_runs_in_evaluation_mode_and_counts_its_passes(problem: Problem, attack: Attack, threat: Threat) -> None:
    model, x, y = problem
    model.train()
    modes: list[bool] = []
    handle = model.register_forward_hook(lambda *_: modes.append(any(m.training for m in model.modules())))
    attack(model, x, y, threat, seeded())
    handle.remove()
    assert modes == [False] * attack.num_gradients


@each_attack
@each_threat
def test_training_flags_come_back_after_an_exception(problem: Problem, attack: Attack, threat: Threat) -> None:
    model, x, y = problem
    model.train()
    model.get_submodule("layer1.norm").eval()
    flags = [module.training for module in model.modules()]

    def broken(logits: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("broken loss")

    if attack.num_gradients:
        with pytest.raises(RuntimeError, match="broken loss"):
            attack(model, x, y, threat, seeded(), loss=broken)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("attack", [a for a in ATTACKS.values() if a.num_gradients])
@each_threat
def test_raises_the_loss(problem: Problem, attack: Attack, threat: Threat) -> None:
    model, x, y = problem
    assert loss_at(model, attack(model, x, y, threat, seeded()), y) > 1.5 * loss_at(model, x, y)


@each_threat
def test_more_steps_raise_the_loss_more_than_one(problem: Problem, threat: Threat) -> None:
    model, x, y = problem
    one, ten = (Attack("pgd", steps=k)(model, x, y, threat, seeded()) for k in (1, 10))
    assert loss_at(model, ten, y) > loss_at(model, one, y)


@each_attack
@pytest.mark.parametrize("norm", THREATS)
def test_radius_zero_returns_x(problem: Problem, attack: Attack, norm: str) -> None:
    model, x, y = problem
    assert torch.equal(attack(model, x, y, Threat(norm, 0.0), seeded()), x)  # type: ignore[arg-type]


@each_attack
@each_threat
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_keeps_dtype_and_memory_format_also_under_autocast(
    problem: Problem, attack: Attack, threat: Threat, bf16: bool, last: bool
) -> None:
    model, x, y = problem
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        x_adv = attack(model, x, y, threat, seeded())
    assert x_adv.dtype == torch.float32
    assert x_adv.stride() == x.stride()
    if attack.num_gradients:
        assert loss_at(model, x_adv, y) > 1.2 * loss_at(model, x, y)


@each_attack
@each_threat
def test_gradients_taken_after_an_attack_in_the_same_autocast_region_are_complete(
    problem: Problem, attack: Attack, threat: Threat
) -> None:
    # Autocast caches bf16 casts of the weights: one made without a graph would cut the training gradient off.
    model, x, y = problem
    model.eval()
    results = []
    for attacked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if attacked:
                attack(model, x, y, threat, seeded())
            loss = F.cross_entropy(model(x).float(), y)
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_attack
@each_threat
def test_works_where_the_caller_has_gradients_off(problem: Problem, attack: Attack, threat: Threat) -> None:
    model, x, y = problem
    with torch.no_grad():
        off = attack(model, x, y, threat, seeded())
    assert torch.equal(off, attack(model, x, y, threat, seeded()))


@pytest.mark.parametrize("name", ["fgsm", "pgd_from_x"])
@each_threat
def test_an_image_is_attacked_alike_in_any_batch(problem: Problem, name: str, threat: Threat) -> None:
    # In double, so that another batch size does not round a gradient's sign differently.
    model, x, y = problem
    model.double()
    try:
        whole, alone = (ATTACKS[name](model, x[:n].double(), y[:n], threat, None)[:2] for n in (24, 2))
    finally:
        model.float()
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-9)


@each_threat
def test_the_dataclass_calls_the_function_of_its_name(problem: Problem, threat: Threat) -> None:
    model, x, y = problem
    pairs: list[tuple[Callable[..., Tensor], Attack, dict[str, object]]] = [
        (fgsm, Attack("fgsm", step_size=0.02), {"step_size": 0.02}),
        (n_fgsm, Attack("n_fgsm", step_size=0.02), {"step_size": 0.02}),
        (pgd, Attack("pgd", 3, 0.02, False), {"steps": 3, "step_size": 0.02, "random_start": False}),
    ]
    for function, attack, settings in pairs:
        direct = function(model, x, y, threat, generator=seeded(), **settings)
        assert torch.equal(direct, attack(model, x, y, threat, seeded()))


@pytest.fixture
def gloo_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo_of_one")
@each_threat
def test_no_communication_hook_fires(problem: Problem, threat: Threat) -> None:
    model, x, y = problem
    calls: list[int] = []

    def counting(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        calls.append(bucket.index())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, counting)
    try:
        for attack in ATTACKS.values():
            attack(ddp.module, x, y, threat, seeded())
        assert calls == []
        F.cross_entropy(ddp(x), y).backward()
        assert calls, "the hook counts what a training step does"
    finally:
        model.zero_grad(set_to_none=True)
