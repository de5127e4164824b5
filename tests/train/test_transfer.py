"""Partial transfer: rates per layer, and frozen layers that are neither moved nor sent."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrobust.adversarial.attacks import evaluation_mode
from distrobust.comm.transport import Transport
from distrobust.config import CompressConfig, NoiseConfig, PhaseConfig
from distrobust.errors import ConfigError
from distrobust.models import build
from distrobust.optim.schedules import Schedule
from distrobust.train import loop, transfer
from distrobust.train.checkpoint import Position
from distrobust.train.rundir import RunDirectory
from distrobust.train.state import TrainState, make_state
from distrobust.train.step import Recipe, StepResult, train_step
from tests.harness.jobs import Crash, assert_equal, records_of, run_job, weights_of
from tests.harness.ranks import Rank, run_ranks
from tests.train.conftest import MakeConfig

PEAK = 0.125
PHASE = PhaseConfig.model_validate({"schedule": {"name": "constant", "peak": PEAK}, "momentum": 0.5})
RECIPE = Recipe(PHASE, None, Schedule("constant", PEAK), 8, 0, False, 0, False)
FROZEN_STEM = {"stem.*": 0.0, "head.*": 0.5}


_NET = build("cnn", 4, (1, 8, 8), [0.5], [0.25], seed=1)


def net_of(seed: int = 1) -> nn.Module:
    if seed == 1:  # ranks as threads share the generator that would make it
        return copy.deepcopy(_NET)
    return build("cnn", 4, (1, 8, 8), [0.5], [0.25], seed=seed)


def state_of(rank: Rank, rates: Mapping[str, float] | None, **options: Any) -> TrainState:
    noise = options.pop("noise", None)
    compress = CompressConfig.model_validate({"density": 1.0, **options})
    place = Transport(rank.group)
    return make_state(
        net_of(), Position(1, "train", 0), PHASE, compress, noise, 8, place, torch.device("cpu"), rates=rates
    )


def step(state: TrainState, number: int, rank: int) -> StepResult:
    generator = torch.Generator().manual_seed(10 * number + rank)
    images = torch.randint(0, 256, (8, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return train_step(state, images, torch.arange(8) % 4, RECIPE, rank)


def values(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.net.state_dict().items()}


@pytest.mark.ranks
@pytest.mark.parametrize("density", [1.0, 0.05])
def test_a_frozen_layer_stays_to_the_bit_and_sends_nothing(density: float) -> None:
    def body(rank: Rank) -> tuple[dict[str, Tensor], TrainState]:
        state = state_of(rank, FROZEN_STEM, density=density, warmup=0.0)
        before = values(state)
        for number in range(3):
            step(state, number, rank.rank)
        return before, state

    (before, state), (_, other) = run_ranks(2, body)
    assert_equal(dict(state.net.named_parameters()), dict(other.net.named_parameters()))  # type: ignore[arg-type]
    after = values(state)
    for name, value in before.items():
        frozen = name.startswith(("stem.", "normalise."))
        if frozen or density == 1.0 or value.numel() > 2048:  # of the small ones some wait in the residual
            assert torch.equal(after[name], value) == frozen, name
    trained = sum(p.numel() for name, p in state.net.named_parameters() if not name.startswith("stem."))
    # a ring of two sends as many bytes as there are numbers, times four, in each of three steps
    assert state.compression.dense_bytes == 3 * 4 * trained
    assert not any(name.startswith("stem.") for name in state.compression.residuals)
    if density == 1.0:
        whole = run_ranks(2, lambda rank: _sent(rank, None))[0]
        partial = run_ranks(2, lambda rank: _sent(rank, FROZEN_STEM))[0]
        assert whole - partial == 4 * (net_size() - trained)


def _sent(rank: Rank, rates: Mapping[str, float] | None) -> int:
    state = state_of(rank, rates)
    step(state, 0, rank.rank)
    return state.compression.sent_bytes


def net_size() -> int:
    return sum(p.numel() for p in net_of().parameters())


@pytest.mark.ranks
def test_statistics_of_a_frozen_batch_norm_stay_and_are_what_it_normalises_by() -> None:
    """In training it must give what it gives in evaluation; the norms that train go on following the images."""
    seen: list[bool] = []

    def body(rank: Rank) -> TrainState:
        state = state_of(rank, FROZEN_STEM)
        state.net.stem.norm.register_forward_hook(lambda module, *_: seen.append(module.training))
        state.net.layer1.norm.register_forward_hook(lambda module, *_: seen.append(not module.training))
        step(state, 0, rank.rank)
        return state

    [state] = run_ranks(1, body)
    assert seen
    assert not any(seen)
    assert int(state.net.stem.norm.num_batches_tracked) == 0  # type: ignore[operator, arg-type, union-attr]
    assert int(state.net.layer1.norm.num_batches_tracked) == 1  # type: ignore[operator, arg-type, union-attr]


@pytest.mark.ranks
def test_a_batch_norm_with_a_part_that_trains_follows_the_images() -> None:
    [state] = run_ranks(1, lambda rank: state_of(rank, {"stem.*": 0.0, "stem.norm.bias": 1.0}))
    assert state.frozen_norms == []


@pytest.mark.ranks
def test_a_multiplier_scales_the_step_of_its_layer_and_of_no_other() -> None:
    """At density 1 the first step is rate x gradient: half the rate, half the step."""

    def body(rank: Rank) -> list[dict[str, Tensor]]:
        moved = []
        for rates in (None, {"layer2.*": 0.5}):
            state = state_of(rank, rates)
            for parameter in state.net.parameters():
                parameter.data.zero_()  # so that the new value is the step itself
            state.net.head.bias.data.fill_(1.0)
            state.net.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
            for norm in (state.net.stem.norm, state.net.layer1.norm, state.net.layer2.norm):
                norm.bias.data.fill_(1.0)
            before = {name: p.detach().clone() for name, p in state.net.named_parameters()}
            step(state, 0, 0)
            moved.append({name: p.detach() - before[name] for name, p in state.net.named_parameters()})
        return moved

    [[whole, half]] = run_ranks(1, body)
    assert whole["layer2.norm.bias"].abs().max() > 0
    assert whole["head.weight"].abs().max() > 0
    for name in whole:
        factor = 0.5 if name.startswith("layer2.") else 1.0
        # the difference of two float32 of order 1: half a unit in the last place each
        torch.testing.assert_close(half[name], factor * whole[name], rtol=0, atol=2**-23)


@pytest.mark.ranks
def test_the_multiplier_outlives_the_schedule_and_multiplies_with_the_noise() -> None:
    def body(rank: Rank) -> tuple[list[float], StepResult, dict[str, float]]:
        state = state_of(rank, FROZEN_STEM, noise=NoiseConfig(alpha=0.01, beta2=0.0))
        for number in range(3):
            result = step(state, number, rank.rank)
        assert state.adaptive is not None
        return [group["lr"] for group in state.optimizer.param_groups], result, state.adaptive.ratios

    rates, result, measured = run_ranks(2, body)[0]
    assert rates == [PEAK, 0.5 * PEAK]
    assert result.rate == PEAK
    assert not any(name.startswith("stem.") for name in measured)
    assert min(measured.values()) < 0.9
    assert result.ratios["stem.conv.weight"] == 0.0
    assert result.ratios["head.bias"] == 0.5 * measured["head.bias"]
    assert result.ratios["layer1.conv.weight"] == measured["layer1.conv.weight"]


@pytest.mark.ranks
def test_step_ahead_goes_as_far_as_the_layers_own_rate() -> None:
    """After one sparse step w is moved by - rate x multiplier x v, layer by layer, and back to the bit."""

    def body(rank: Rank) -> TrainState:
        state = state_of(rank, {"layer2.*": 0.25}, density=0.05, step_ahead=True, values="fp32", warmup=0.0)
        step(state, 0, rank.rank)
        return state

    state = run_ranks(2, body)[0]
    before = {name: p.detach().clone() for name, p in state.net.named_parameters()}
    state.compression.step_ahead()
    for name, parameter in state.net.named_parameters():
        rate = PEAK * (0.25 if name.startswith("layer2.") else 1.0)
        v = state.compression.residuals[name].v
        assert v.abs().max() > 0
        torch.testing.assert_close(parameter.detach().view(-1), before[name].view(-1) - rate * v)
    state.compression.step_back()
    assert_equal({name: p.detach() for name, p in state.net.named_parameters()}, before)


def test_later_patterns_win_and_the_rest_is_one() -> None:
    found = transfer.multipliers(net_of(), {"*": 0.0, "layer?.*": 0.1, "layer2.norm.*": 3.0, "head.*": 1.0})
    assert found["stem.conv.weight"] == 0.0
    assert found["layer1.norm.bias"] == 0.1
    assert found["layer2.norm.bias"] == 3.0
    assert found["layer2.conv.weight"] == 0.1
    assert transfer.multipliers(net_of(), {"stem.*": 0.0})["head.bias"] == 1.0


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        ({"layer3.conv.*": 0.5}, r"model\.rates: 'layer3\.conv\.\*' matches no parameter .* closest: 'layer\d\.conv"),
        ({"*": 0.0}, r"model\.rates: '\*' freeze all 11 parameters of the model; leave one above 0"),
    ],
)
def test_patterns_that_make_no_sense_are_one_line(rates: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        transfer.multipliers(net_of(), rates)


def test_an_impossible_multiplier_names_its_pattern(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.rates\.head\.\*: wanted greater than or equal to 0, got -1"):
        make_config("model.rates={'head.*': -1}")


def test_only_the_train_phase_is_partial_and_the_run_says_so(make_config: MakeConfig) -> None:
    config = make_config("model.rates={'stem.*': 0, 'layer1.*': 0.25}", "noise=null", "compress=null")
    run_job(config)
    before = torch.load(config.run.dir / "models/pre-trained.pt", weights_only=True)["state"]
    initial = net_of(config.run.seed).state_dict()
    assert not torch.equal(before["stem.conv.weight"], initial["stem.conv.weight"])  # moved by pre-training
    for name, value in weights_of(config).items():
        assert torch.equal(value, before[name]) == name.startswith(("stem.", "normalise.")), name
    texts = [record["text"] for record in records_of(config, "notice")]
    assert any(text.startswith("train: 3 of 11 parameters are frozen (0.5% of") for text in texts), texts
    last = records_of(config, "step")[-1]
    assert last["layer_lr_ratio"] == {"stem": 0.0, "layer1": 0.25, "layer2": 1.0, "head": 1.0}


def test_a_wrong_pattern_is_found_before_pre_training(make_config: MakeConfig) -> None:
    config = make_config("model.rates={'stam.*': 0}")
    with pytest.raises(ConfigError, match="'stam"):
        run_job(config)
    assert not records_of(config, "step")


def test_an_interrupted_partial_run_ends_bit_identical(
    make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = "model.rates={'stem.*': 0, 'layer1.*': 0.1}"
    whole = make_config(rates, "run.dir=" + str(make_config().run.dir) + "-whole")
    run_job(whole)
    config = make_config(rates)
    crash_at("train", 5)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    run_job(config)
    assert_equal(weights_of(config), weights_of(whole))


def test_the_order_of_patterns_is_part_of_a_run(make_config: MakeConfig) -> None:
    config = make_config("model.rates={'stem.*': 0, 'stem.conv.*': 1}")
    RunDirectory(config.run.dir).open(config)
    RunDirectory(config.run.dir).checkpoints.mkdir()
    with pytest.raises(ConfigError, match=r"belongs to another configuration \(model\.rates"):
        RunDirectory(config.run.dir).open(make_config("model.rates={'stem.conv.*': 1, 'stem.*': 0}"))


def test_frozen_layers_do_not_change_what_attacks_see(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers may be frozen: the images' gradients still go through them, as through a model that is not."""
    config = make_config("model.rates={'stem.*': 0, 'layer1.*': 0}", "noise=null", "pretrain=null")
    found: list[tuple[Tensor, Tensor]] = []

    def gradient(net: nn.Module, images: Tensor) -> Tensor:
        x = (images.float() / 255).requires_grad_()
        with evaluation_mode(net):
            net(x)[:, 0].sum().backward(inputs=[x])
        assert x.grad is not None
        return x.grad

    def watching(state: TrainState, images: Tensor, labels: Tensor, recipe: Recipe, rank: int) -> StepResult:
        alike = build("cnn", 4, (1, 8, 8), [0.5], [0.25], seed=0)
        alike.load_state_dict(state.net.state_dict())
        attacked = state.attacked(images.float() / 255)
        assert attacked is not state.net
        found.append((gradient(attacked, images), gradient(alike, images)))
        return train_step(state, images, labels, recipe, rank)

    monkeypatch.setattr(loop, "train_step", watching)
    run_job(config)
    assert len(found) == 8
    for seen, wanted in found:
        assert wanted.abs().max() > 0
        torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
