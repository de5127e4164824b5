"""Laws of counting robust images, and our PGD held against foolbox's."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.errors import ConfigError, DataError
from distrobust.evaluation.accuracy import Counts
from distrobust.evaluation.counting import batch_seed, count_correct, foolbox_pgd

torch.set_num_threads(1)
# foolbox 3.3.4 imports gaussian_filter from a module scipy has deprecated; nothing of ours can change that.
needs_foolbox = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")
Batch = tuple[Tensor, Tensor]
LINF = Threat("linf", 0.06)
PGD = Attack("pgd", steps=5)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Batch]]:
    """A small network after 60 steps on noisy class prototypes; four batches of 100 of other images."""
    g = torch.Generator().manual_seed(0)
    prototypes = torch.rand(4, 1, 8, 8, generator=g)

    def batch(num: int) -> Batch:
        y = torch.randint(4, (num,), generator=g)
        return (prototypes[y] + 0.4 * torch.randn(num, 1, 8, 8, generator=g)).clamp(0, 1), y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        x, y = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), [batch(100) for _ in range(4)]


def same(a: Counts, b: Counts) -> bool:
    return (a.class_correct, a.class_samples) == (b.class_correct, b.class_samples)


def test_clean_counts_are_per_class(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    counts = count_correct(model, batches, None, None, seed=0)
    y = torch.cat([label for _, label in batches])
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == label for x, label in batches])
    assert counts.class_samples == tuple((y == c).sum().item() for c in range(4))
    assert counts.class_correct == tuple(((y == c) & right).sum().item() for c in range(4))
    assert counts.samples == 400
    assert same(counts, count_correct(model, batches, Attack("none"), LINF, seed=0))


def test_robust_accuracy_falls_with_the_radius(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    clean, *robust = (count_correct(model, batches[:2], PGD, Threat("linf", eps), 0).correct for eps in (0, 0.06, 0.2))
    assert clean == count_correct(model, batches[:2], None, None, 0).correct
    assert clean > robust[0] > robust[1]


class Shift(Attack):
    """Adds 0.25 to every pixel."""

    def __call__(self, model: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x + 0.25


def test_an_image_that_only_the_attack_makes_right_is_not_robust() -> None:
    # class 1 from grey 0.5 up; images at 0.4 become 0.65
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model.get_parameter("2.weight").copy_(torch.tensor([[-1.0], [1.0]]))
        model.get_parameter("2.bias").copy_(torch.tensor([0.5, -0.5]))
    x = torch.tensor([0.4, 0.4, 0.6, 0.6, 0.1]).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    y = torch.tensor(
        [0, 1, 0, 1, 0]
    )  # clean: right, wrong, wrong, right, right; shifted: wrong, right, wrong, right, right
    counts = count_correct(model, [(x, y)], Shift(), LINF, seed=0)
    assert counts.class_correct == (1, 1)
    assert counts.class_samples == (3, 2)


def test_shards_with_their_global_indices_add_up_to_the_whole(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    whole = count_correct(model, batches, PGD, LINF, seed=5)
    shards = [count_correct(model, batches[r::2], PGD, LINF, 5, indices=itertools.count(r, 2)) for r in (0, 1)]
    assert same(whole, shards[0] + shards[1])
    with pytest.raises(ValueError, match="fewer indices"):
        count_correct(model, batches, None, None, 5, indices=[0])


def test_neither_the_process_generator_nor_its_state_matters(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    torch.manual_seed(1)
    first = count_correct(model, batches[:2], PGD, LINF, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, count_correct(model, batches[:2], PGD, LINF, seed=5))
    assert torch.equal(state, torch.get_rng_state())


class Draws(Attack):
    """Returns x; its generator's first draw goes into `seen`."""

    seen: ClassVar[list[float]] = []

    def __call__(  # type: ignore[override]
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, generator: torch.Generator
    ) -> Tensor:
        self.seen.append(torch.rand((), generator=generator).item())
        return x


def test_random_numbers_are_a_function_of_seed_and_batch_index(
    trained: tuple[nn.Module, list[Batch]],
) -> None:
    def draws(seed: int, indices: list[int]) -> list[float]:
        Draws.seen.clear()
        count_correct(trained[0], trained[1][: len(indices)], Draws(), LINF, seed, indices=indices)
        return list(Draws.seen)

    assert draws(1, [0, 1, 2]) == draws(1, [0, 1, 2])
    assert draws(1, [2, 0]) == [draws(1, [0, 1, 2])[i] for i in (2, 0)]
    assert len({*draws(1, [0, 1, 2]), *draws(2, [0, 1, 2])}) == 6


def test_batch_seeds_differ() -> None:
    seeds = {batch_seed(seed, index) for seed in range(-3, 30) for index in range(300)}
    assert len(seeds) == 33 * 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_uint8_and_channels_last_images_count_alike(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    as_bytes = [((x * 255).round().to(torch.uint8), y.to(torch.int32)) for x, y in batches[:2]]
    as_floats = [((x / 255.0).to(memory_format=torch.channels_last), y) for x, y in as_bytes]
    assert same(*(count_correct(model, b, PGD, LINF, seed=0) for b in (as_bytes, as_floats)))


def recorded(run: Callable[[nn.Module], object]) -> list[Tensor]:
    """The images that a model sees during `run`."""
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), list[Tensor]()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    run(model)
    return seen


def test_uint8_images_become_shares_of_255() -> None:
    x = torch.tensor([0, 51, 128, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    (seen,) = recorded(lambda model: count_correct(model, [(x, torch.tensor([0]))], None, None, 0))
    assert torch.equal(seen, x.float() / 255)


def test_evaluates_in_float32_contiguous_and_evaluation_mode() -> None:
    seen: set[tuple[torch.dtype, torch.dtype, bool, bool]] = set()

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            seen.add((x.dtype, out.dtype, x.is_contiguous(), self.training))
            return torch.as_tensor(out.mean((2, 3)))

    model = Probe().train()
    x = torch.rand(4, 2, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        counts = count_correct(model, [(x.double(), torch.tensor([0, 1, 2, 0]))], PGD, LINF, seed=0)
    assert seen == {(torch.float32, torch.float32, True, False)}
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert counts.training_mode == 1


class Rounding(nn.Module):
    """Hides its gradient: rounds the image to black and white."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x.round()))


class Root(nn.Module):
    """sqrt has an infinite derivative at 0, which the zero-weighted branch turns into NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)), 0 * x.sqrt().mean((1, 2, 3))], 1)


def test_images_with_zero_or_non_finite_gradients_are_counted(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    plain, hidden = (count_correct(m, batches[:1], PGD, LINF, 0) for m in (model, Rounding(model).eval()))
    assert (plain.zero_gradients, plain.nonfinite_gradients, plain.training_mode) == (0, 0, 0)
    assert hidden.zero_gradients == 100
    x = torch.full((3, 1, 2, 2), 0.5)
    x[0] = 0.0
    assert count_correct(Root(), [(x, torch.zeros(3, dtype=torch.int64))], PGD, LINF, 0).nonfinite_gradients == 1


class Half(nn.Module):
    """Ignores the lower half of the image: its gradient there is zero, and that is no reason for distrust."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0, :]


def test_a_gradient_that_is_zero_in_places_is_not_counted() -> None:
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    assert count_correct(Half(), [(x, y)], PGD, LINF, 0).zero_gradients == 0


def test_without_batches_nothing_is_counted(trained: tuple[nn.Module, list[Batch]]) -> None:
    counts = count_correct(trained[0], [], PGD, LINF, seed=0)
    assert (counts.samples, counts.correct, counts.class_samples) == (0, 0, ())


def test_impossible_evaluations_are_refused(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    with pytest.raises(ConfigError, match="needs a threat"):
        count_correct(model, batches, PGD, None, seed=0)
    with pytest.raises(ConfigError, match="leaves the ball"):
        count_correct(model, batches, Attack("n_fgsm"), LINF, seed=0)
    for bad in (torch.full((1, 1, 8, 8), 200.0), torch.full((1, 1, 8, 8), math.nan)):
        with pytest.raises(DataError, match=r"batch 0: float images are in \["):
            count_correct(model, [(bad, torch.tensor([0]))], None, None, seed=0)


@needs_foolbox
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_our_pgd_20_agrees_with_foolbox(trained: tuple[nn.Module, list[Batch]], norm: str) -> None:
    model, batches = trained
    threat = Threat(norm, {"linf": 0.08, "l2": 0.5}[norm])  # type: ignore[arg-type]
    attack = Attack("pgd", steps=20, step_size=threat.eps / 4)
    flips = num_flips(model, batches, attack, threat)
    ours = count_correct(model, batches, attack, threat, seed=0)
    theirs = foolbox_pgd(model, batches, threat.eps, 20, norm=threat.norm, seed=0)
    assert ours.class_samples == theirs.class_samples
    # Chance comes from the random start alone. If f of the images change sides between two of our own starts,
    # the difference between two correct implementations has a variance of about f: 3 standard deviations, and
    # one image for rounding.
    assert abs(ours.correct - theirs.correct) <= 3 * math.sqrt(flips) + 1
    assert flips < 0.05 * ours.samples, "the bound is worth something"
    assert 0.1 < ours.correct / ours.samples < 0.9, "neither trivial nor hopeless"


def num_flips(model: nn.Module, batches: list[Batch], attack: Attack, threat: Threat) -> int:
    def robust(seed: int) -> Iterator[Tensor]:
        g = torch.Generator().manual_seed(seed)
        for x, y in batches:
            with torch.no_grad():
                yield model(attack(model, x, y, threat, g)).argmax(1) == y

    return int((torch.cat(list(robust(1))) != torch.cat(list(robust(2)))).sum())


@needs_foolbox
def test_our_default_pgd_20_is_at_least_as_strong_as_foolbox(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    threat = Threat("linf", 0.08)
    ours = count_correct(model, batches, Attack("pgd", steps=20), threat, seed=0)
    flips = num_flips(model, batches, Attack("pgd", steps=20), threat)
    assert ours.correct <= foolbox_pgd(model, batches, 0.08, 20).correct + 3 * math.sqrt(flips) + 1


@needs_foolbox
def test_foolbox_leaves_no_trace_and_repeats(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, batches = trained
    model.train()
    try:
        torch.manual_seed(1)
        first = foolbox_pgd(model, batches[:1], 0.06, 3, seed=4)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert same(first, foolbox_pgd(model, batches[:1], 0.06, 3, seed=4))
        assert torch.equal(state, torch.get_rng_state())
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert first.training_mode == 1
    finally:
        model.eval()


@needs_foolbox
def test_foolbox_starts_differ_between_seeds_and_batches() -> None:
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)

    def starts(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        seen = recorded(lambda model: foolbox_pgd(model, [(x, y), (x, y)], 0.1, 1, seed=seed))
        return [seen[0], seen[3]]  # per batch: the start, and two predictions

    all_starts = [*starts(1), *starts(2)]
    assert not any(torch.equal(a, x) for a in all_starts)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(all_starts, 2))


def test_missing_foolbox_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ConfigError, match=r"pip install 'distrobust\[evaluation\]'"):
        foolbox_pgd(nn.Identity(), [], 0.1, 20)
