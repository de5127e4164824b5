"""The optimizer of a phase: torch's own where the exchange is dense, the same on every rank where it is not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distrobust.comm.transport import Transport
from distrobust.config import CompressConfig, NoiseConfig, PhaseConfig
from distrobust.optim.lanton import Lanton
from distrobust.optim.schedules import Schedule
from distrobust.train.checkpoint import Position
from distrobust.train.state import TrainState, make_state
from distrobust.train.step import Recipe, train_step
from tests.harness.jobs import Crash, assert_equal, records_of, run_job, weights_of
from tests.harness.ranks import Rank, run_ranks
from tests.train.conftest import MakeConfig
from tests.train.test_transfer import net_of

PEAK = 0.0078125
DENSE, SPARSE = CompressConfig(density=1.0), CompressConfig(density=0.05, warmup=0.0)


def phase_of(optimizer: str) -> PhaseConfig:
    schedule = {"name": "constant", "peak": PEAK}
    return PhaseConfig.model_validate({"optimizer": optimizer, "schedule": schedule, "weight_decay": 0.01})


def batch(number: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * number + rank)
    return torch.randint(0, 256, (8, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(8) % 4


def trained(
    rank: Rank,
    optimizer: str,
    compress: CompressConfig,
    noise: NoiseConfig | None = None,
    rates: dict[str, float] | None = None,
) -> TrainState:
    """After three steps without an attack."""
    phase, place = phase_of(optimizer), Transport(rank.group)
    recipe = Recipe(phase, None, Schedule("constant", PEAK), 3, 0, False, 0, False)
    position = Position(1, "train", 0)
    state = make_state(net_of(), position, phase, compress, noise, 3, place, torch.device("cpu"), rates=rates)
    for number in range(3):
        train_step(state, *batch(number, rank.rank), recipe, rank.rank)
    return state


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["sgd", "adamw", "lanton"])
def test_a_dense_phase_of_one_rank_is_the_optimizer_alone(name: str) -> None:
    (state,) = run_ranks(1, lambda rank: trained(rank, name, DENSE))
    net = net_of()
    optimizer = {
        "sgd": lambda: torch.optim.SGD(net.parameters(), lr=PEAK, momentum=0.9, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW(net.parameters(), lr=PEAK, betas=(0.9, 0.999), weight_decay=0.01),
        "lanton": lambda: Lanton(net, lr=PEAK, momentum=0.9, weight_decay=0.01, noise="none"),
    }[name]()
    for number in range(3):
        images, labels = batch(number, 0)
        optimizer.zero_grad()
        functional.cross_entropy(net(images.float() / 255), labels).backward()
        optimizer.step()
    for (name, got), wanted in zip(state.net.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["adamw", "lanton"])
def test_ranks_stay_alike_under_compression_and_rates_follow_the_noise(name: str) -> None:
    one, other = run_ranks(2, lambda rank: trained(rank, name, SPARSE, NoiseConfig(alpha=0.01, beta2=0.5)))
    assert_equal(dict(one.net.named_parameters()), dict(other.net.named_parameters()))  # type: ignore[arg-type]
    assert one.ratios() == other.ratios()
    assert one.noise is not None
    is_every_fourth = name == "lanton"  # its norms are measured in one of four steps
    assert all(math.isnan(h) for h in one.noise.h.tolist()) == is_every_fourth
    assert (min(one.ratios().values()) < 0.9) != is_every_fourth


@pytest.mark.ranks
def test_a_layers_multiplier_cuts_the_groups_of_lanton() -> None:
    (state,) = run_ranks(1, lambda rank: trained(rank, "lanton", DENSE, rates={"stem.*": 0.0, "layer2.*": 0.25}))
    before = dict(net_of().named_parameters())
    groups = [(group["norm"], group["rate_multiplier"], group["lr"]) for group in state.optimizer.param_groups]
    assert sorted(groups) == [
        ("rms", 0.25, 0.25 * PEAK),
        ("rms", 1.0, PEAK),
        ("sign", 1.0, PEAK),
        ("spectral", 0.25, 0.25 * PEAK),
        ("spectral", 1.0, PEAK),
    ]
    for name, parameter in state.net.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("stem."), name


@pytest.mark.parametrize("name", ["adamw", "lanton"])
def test_an_interrupted_run_ends_bit_identical(
    make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = (f"train.optimizer={name}", "train.schedule.peak=0.01", "pretrain=null", "noise={alpha: 0.01}")
    whole = make_config(*options, f"run.dir={make_config().run.dir}-whole")
    run_job(whole)
    config = make_config(*options)
    crash_at("train", 5)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    assert run_job(config).status == "done"
    assert_equal(weights_of(config), weights_of(whole))
    last = [records_of(c, "step")[-1] for c in (config, whole)]
    assert last[0]["layer_lr_ratio"] == last[1]["layer_lr_ratio"]
    assert last[0]["layer_noise"] == last[1]["layer_noise"] != {}
    assert min(last[0]["layer_lr_ratio"].values()) < 0.9
