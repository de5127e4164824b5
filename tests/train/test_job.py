"""The whole job in one process: what it leaves behind, and that stopping it changes nothing."""

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distrobust import data
from distrobust.comm.transport import Transport
from distrobust.errors import ConfigError, DataError, DivergedError, ModelError
from distrobust.train import launch, loop, outputs, scoring
from distrobust.train.rundir import Outcome, RunDirectory
from distrobust.train.state import TrainState
from distrobust.train.step import Recipe, StepResult, train_step
from tests.harness.jobs import Silent, assert_equal, records_of, run_job, weights_of
from tests.train.conftest import MakeConfig


def test_a_run_leaves_models_records_and_both_evaluations(make_config: MakeConfig) -> None:
    config = make_config()
    assert run_job(config).status == "done"
    evaluations = {(r["model"], r["attack"]) for r in records_of(config, "evaluation")}
    attack = "PGD-20 Linf 0.05"
    assert evaluations == {(m, a) for m in ("pre-trained", "fine-tuned") for a in ("clean", attack)}
    assert all(r["samples"] == 40 and r["low"] <= r["accuracy"] <= r["high"] for r in records_of(config, "evaluation"))
    assert {r["phase"] for r in records_of(config, "step")} == {"pretrain", "train"}
    assert (config.run.dir / "models/pre-trained.pt").exists()


def test_the_same_configuration_and_seed_give_the_same_bits(make_config: MakeConfig) -> None:
    first, second = make_config(), make_config("run.dir=" + str(make_config().run.dir) + "-again")
    run_job(first)
    run_job(second)
    assert_equal(weights_of(first), weights_of(second))


def test_another_seed_gives_other_weights(make_config: MakeConfig) -> None:
    first, second = make_config(), make_config("run.dir=" + str(make_config().run.dir) + "-again", "run.seed=1")
    run_job(first)
    run_job(second)
    assert not torch.equal(weights_of(first)["head.weight"], weights_of(second)["head.weight"])


def test_non_finite_gradients_skip_the_step_and_training_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    before: list[dict[str, Tensor]] = []

    def poisoned(state: TrainState, images: Tensor, labels: Tensor, recipe: Recipe, rank: int) -> StepResult:
        if (state.position.phase, state.position.step) != ("train", 4):
            return train_step(state, images, labels, recipe, rank)
        handle = state.net.head.register_forward_hook(lambda _m, _i, out: out * float("nan"))
        before.append({name: tensor.clone() for name, tensor in state.net.state_dict().items()})
        residuals = {name: r.v.clone() for name, r in state.compression.residuals.items()}
        result = train_step(state, images, labels, recipe, rank)
        handle.remove()
        assert_equal(dict(state.net.state_dict()), before[0])  # batch-norm statistics included
        assert_equal({name: r.v for name, r in state.compression.residuals.items()}, residuals)
        return result

    monkeypatch.setattr(loop, "train_step", poisoned)
    assert run_job(config).status == "done"
    assert before
    assert records_of(config, "step")[-1]["nonfinite_steps"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(config).values())


def test_too_many_non_finite_steps_in_a_row_end_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("train.max_skipped_steps=3")

    def poisoned(state: TrainState, images: Tensor, *rest: Any) -> StepResult:
        if state.position.phase == "train":
            state.net.head.bias.data.fill_(float("inf"))
        return train_step(state, images, *rest)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(
        DivergedError, match=r"train, step 3: non-finite gradients 3 steps in a row; lower train.schedule"
    ):
        run_job(config)


def test_noise_changes_the_step_sizes(make_config: MakeConfig) -> None:
    on, off = (
        make_config("noise.alpha=0.01"),
        make_config("noise=null", "run.dir=" + str(make_config().run.dir) + "-off"),
    )
    run_job(on)
    run_job(off)
    last = records_of(on, "step")[-1]
    ratios, noise = last["layer_lr_ratio"], last["layer_noise"]
    assert ratios.keys() == noise.keys() == {"stem", "layer1", "layer2", "head"}
    assert all(value > 0 for value in noise.values())
    assert records_of(off, "step")[-1]["layer_noise"] == {}
    assert all(0 < ratio <= 1 for ratio in ratios.values())
    assert min(ratios.values()) < 0.9
    assert not torch.equal(weights_of(on)["head.weight"], weights_of(off)["head.weight"])


def test_gradient_noise_is_added_and_repeats_with_the_seed(make_config: MakeConfig) -> None:
    weights = []
    for number, eta in enumerate(("1e-4", "1e-4", "null")):
        config = make_config(f"train.gradient_noise={eta}", f"run.dir={make_config().run.dir}-{number}")
        run_job(config)
        weights.append(weights_of(config)["head.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_a_peak_tuned_for_another_batch_size_is_scaled_and_the_factor_said(
    make_config: MakeConfig, scaling: str, factor: float
) -> None:
    config = make_config(
        "train.schedule={name: constant, peak: 0.01, tuned_for: 8, scaling: " + scaling + "}", "pretrain=null"
    )
    run_job(config)
    assert {record["lr"] for record in records_of(config, "step")} == {0.01 * factor}
    [notice] = records_of(config, "notice")
    wanted = f"train: learning rate times {factor:g}, peak {0.01 * factor:g}: batch size 32, 8 when it was tuned"
    assert notice["text"].startswith(wanted)


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [
        (("pretrain=null", "compress={step_ahead: true}"), True),
        (("pretrain=null", "compress={step_ahead: true, warmup: 0.2}"), False),
        (("pretrain=null",), False),
        (("compress={step_ahead: true}",), False),
    ],
)
def test_step_ahead_from_random_weights_without_a_warm_up_is_said(
    make_config: MakeConfig, changes: tuple[str, ...], is_said: bool
) -> None:
    config = make_config(*changes, "train.epochs=1", "evaluate.test=false")
    run_job(config)
    texts = [r["text"] for r in records_of(config, "notice")]
    assert any("step-ahead from random weights" in text for text in texts) == is_said


def test_the_rate_falls_when_robust_accuracy_no_longer_rises(make_config: MakeConfig) -> None:
    """A threshold no rise can reach: cut after every epoch but the first."""
    config = make_config(
        "train.schedule={name: constant, peak: 0.01}",
        "train.accuracy_gradient={window: 1, patience: 1, threshold: 0.99, factor: 0.5}",
        "train.epochs=4",
    )
    run_job(config)
    epochs = [r["step"] for r in records_of(config, "epoch") if r["phase"] == "train"]
    by_epoch = [
        {r["lr"] for r in records_of(config, "step") if r["phase"] == "train" and first < r["step"] <= last}
        for first, last in itertools.pairwise([0, *epochs])
    ]
    assert by_epoch == [{0.01}, {0.01}, {0.005}, {0.0025}]
    texts = [r["text"] for r in records_of(config, "notice")]
    assert len(texts) == 3
    assert all("robust accuracy no longer rises: learning rate times 0.5" in text for text in texts)


def test_one_rank_sends_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    run_job(config)
    assert records_of(config, "step")[-1]["sent_bytes"] == 0


def test_fine_tuning_from_weights_evaluates_both(make_config: MakeConfig, tmp_path: Path) -> None:
    natural = make_config()
    run_job(natural)
    weights = natural.run.dir / "models/pre-trained.pt"
    config = make_config("pretrain=null", f"model.weights={weights}", f"run.dir={tmp_path / 'tuned'}")
    run_job(config)
    assert {r["model"] for r in records_of(config, "evaluation")} == {"pre-trained", "fine-tuned"}
    assert_equal(weights_of(config), weights_of(natural))  # the same start, data order and seeds


def test_weights_of_another_model_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"model": "cnn", "classes": ["a"], "shape": [1, 8, 8], "state": {"head.weight": torch.zeros(2)}}, path)
    with pytest.raises(ModelError, match="weights do not fit the model"):
        run_job(make_config("pretrain=null", f"model.weights={path}"))


def test_a_hostile_weights_file_runs_no_code(make_config: MakeConfig, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "hostile.pt"
    torch.save({"model": Hostile()}, path)
    with pytest.raises(ModelError, match="not a model file"):
        run_job(make_config("pretrain=null", f"model.weights={path}"))
    assert not (tmp_path / "owned").exists()


def test_missing_data_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path / "nowhere")):
        run_job(make_config(f"data.path={tmp_path / 'nowhere'}"))


def test_a_batch_larger_than_the_data_is_refused(make_config: MakeConfig) -> None:
    config = make_config("train.batch_size=512")
    with pytest.raises(ConfigError, match=r"train\.batch_size: global batch size is 512"):
        run_job(config)
    assert not records_of(config, "step")  # found before pre-training, not after it


def test_ranks_that_differ_end_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Transport.gather_rows

    def with_a_stranger(transport: Transport, row: Tensor) -> Tensor:
        rows = gather(transport, row)
        if row.dtype != torch.int64:
            return rows
        other = rows.clone()
        other[0, 4] ^= 1
        return torch.cat([rows, other])

    monkeypatch.setattr(Transport, "gather_rows", with_a_stranger)
    config = make_config()
    with pytest.raises(DivergedError, match=r"pretrain, step 2: parameters of ranks \[1\] differ from rank 0"):
        run_job(config)
    assert [(r["phase"], r["replicas"]) for r in records_of(config, "diverged")] == [("pretrain", 1)]


def test_a_run_says_when_it_takes_steps_and_when_it_no_longer_does(make_config: MakeConfig) -> None:
    config = make_config()
    run_job(config)
    told = [(r["phase"], r["training"]) for r in records_of(config, "activity")]
    assert told == [("pretrain", 1), ("pretrain", 0), ("train", 1), ("train", 0)]
    ended = records_of(config, "activity")[-1]["time"]
    assert max(r["time"] for r in records_of(config, "step")) <= ended
    assert min(r["time"] for r in records_of(config, "evaluation")) >= ended


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_limited_evaluation_takes_the_same_rows_whatever_the_number_of_ranks(stripes: Path, num_ranks: int) -> None:
    source = data.describe(stripes, "train")
    shards = [data.Shard(source, rank, num_ranks, seed=0) for rank in range(num_ranks)]
    parts = [list(scoring.spaced_rows(shard, 37, 8)) for shard in shards]
    images = torch.cat([images for part in parts for images, _ in part])
    everything = torch.cat([x for x, _ in data.Shard(source, 0, 1, seed=0).in_order(50)])
    expected = everything[torch.linspace(0, len(everything) - 1, 37).round().long()]
    assert sorted(images.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())
    assert all(len(labels) for part in parts for _, labels in part)  # no empty batch
    sizes = [sum(len(labels) for _, labels in part) for part in parts]
    assert max(sizes) - min(sizes) <= 2


def test_an_error_a_restart_cannot_mend_is_not_tried_again(make_config: MakeConfig) -> None:
    config = make_config()
    RunDirectory(config.run.dir).open(config)
    RunDirectory(config.run.dir).write_outcome(Outcome("failed", "DataError", "row 3 is broken"))
    assert launch.run_here(config, Silent()) == Outcome("failed", "DataError", "row 3 is broken")


def test_the_local_launcher_is_one_rank(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"cluster.workers: got 2, wanted 1"):
        launch.run_here(make_config("cluster.workers=2"), Silent())


def test_a_flipped_bit_changes_the_parameter_digest(make_config: MakeConfig) -> None:
    class State:
        net = torch.nn.Linear(4, 3)

    state: Any = State()
    before = loop.parameter_digest(state)
    bits = state.net.weight.data.view(torch.int32)
    for position in (0, 7, 31):
        bits[1, 2] ^= -(2**31) if position == 31 else 1 << position
        assert loop.parameter_digest(state) != before
        bits[1, 2] ^= -(2**31) if position == 31 else 1 << position
    assert loop.parameter_digest(state) == before


def test_streaming_and_memory_give_the_same_run(make_config: MakeConfig) -> None:
    memory, stream = (
        make_config(),
        make_config("data.cache=stream", "run.dir=" + str(make_config().run.dir) + "-stream"),
    )
    run_job(memory)
    run_job(stream)
    assert_equal(weights_of(memory), weights_of(stream))


def test_the_outcome_is_on_disk(make_config: MakeConfig) -> None:
    config = make_config()
    run_job(config)
    assert json.loads((config.run.dir / "outcome.json").read_text())["status"] == "done"


def test_coding_and_decoding_are_parts_of_a_step(make_config: MakeConfig) -> None:
    config = make_config("pretrain=null")
    run_job(config)
    records = records_of(config, "step")
    assert all(record["hook_s"] > 0 and record["decode_s"] > 0 for record in records)
    assert all(record["hook_s"] + record["decode_s"] < record["step_s"] for record in records)


def test_what_is_not_installed_leaves_no_exporter_behind(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("metrics.tensorboard: not here")

    monkeypatch.setattr(outputs.tensorboard, "require", missing)
    config = make_config("metrics={port: 0, tensorboard: true}")
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="not here"):
        run_job(config)
    assert set(threading.enumerate()) == before
    assert not list((config.run.dir / "prometheus").glob("*"))


def test_prometheus_is_not_sent_to_ranks_that_a_run_no_longer_has(make_config: MakeConfig) -> None:
    config = make_config("pretrain=null", "metrics.port=0")
    targets = config.run.dir / "prometheus"
    targets.mkdir(parents=True)
    for name in ("rank-3.json", "other.json"):
        (targets / name).write_text("[]")
    run_job(config)
    assert [path.name for path in targets.iterdir()] == ["other.json"]
