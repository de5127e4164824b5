"""Every way to make examples, every loss and every option of a phase, as whole small jobs."""

from typing import Any

import pytest
import torch

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.config import Config
from distrobust.errors import ConfigError, DivergedError
from distrobust.train import loop
from distrobust.train import step as stepping
from distrobust.train.loop import has_collapsed
from tests.harness.jobs import Crash, assert_equal, records_of, run_job, weights_of
from tests.train.conftest import MakeConfig

FREE = ["attack.name=free", "attack.replays=2", "attack.steps=10"]
AWP = ["attack.loss=mart", "attack.awp=0.01", "train.accumulate=2"]
RAMP = ["attack.norm=l1", "attack.eps=1.0", "attack.steps=3", "attack.first_steps=1", "attack.watch_every=3"]
METHODS = {
    "free": FREE,
    "trades, average, patience": ["attack.loss=trades", "attack.beta=3", "train.average=0.5", "train.patience=2"],
    "mart, awp, micro-batches, bf16, channels last": [*AWP, "train.precision=bf16", "model.channels_last=true"],
    "l1, ever more steps, watched": RAMP,
}


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS.keys())
def test_every_method_trains_and_an_interruption_changes_nothing(
    make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    whole = make_config(*overrides, "run.dir=" + str(make_config().run.dir) + "-whole")
    run_job(whole)
    config = make_config(*overrides)
    crash_at("train", 5)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    assert run_job(config).status == "done"
    assert_equal(weights_of(config), weights_of(whole))
    scores = {(r["model"], r["attack"].split("-")[0]): r["accuracy"] for r in records_of(config, "evaluation")}
    assert scores["fine-tuned", "PGD"] > 0.5  # four classes
    assert scores["fine-tuned", "PGD"] >= scores["pre-trained", "PGD"]


def spied_attacks(monkeypatch: pytest.MonkeyPatch) -> list[Attack]:
    """What makes the examples of each step of the `train` phase."""
    seen: list[Attack] = []
    plain = stepping.Recipe.attack_at

    def spy(recipe: stepping.Recipe, step: int, collapsed: bool) -> Attack:
        chosen = plain(recipe, step, collapsed)
        if recipe.attack is not None:
            seen.append(chosen)
        return chosen

    monkeypatch.setattr(stepping.Recipe, "attack_at", spy)
    return seen


def test_free_training_takes_every_batch_as_often_as_it_says(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*FREE, "pretrain=null", "train.epochs=1", "data.crop=2")
    batches: list[torch.Tensor] = []
    plain = stepping.crop_and_flip

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        batches.append(plain(*arguments, **options))
        return batches[-1]

    monkeypatch.setattr(stepping, "crop_and_flip", spy)
    run_job(config)
    assert len(batches) == 8  # 4 batches
    assert all(torch.equal(batches[i], batches[i + 1]) == (i % 2 == 0) for i in range(7))


def test_the_radius_rises_over_its_share_of_the_phase(make_config: MakeConfig) -> None:
    config = make_config("pretrain=null", "attack.eps=0.08", "attack.ramp=0.5", "metrics.every=1")
    run_job(config)
    of_steps = [0.08 * min(1.0, step / 8 / 0.5) for step in range(8)]
    assert [r["eps"] for r in records_of(config, "step")] == pytest.approx(of_steps)


@pytest.mark.parametrize(("every", "steps"), [("null", [4, 8]), ("3", [3, 4, 6, 8])])
def test_overfitting_is_looked_for_at_the_end_of_every_epoch(
    make_config: MakeConfig, every: str, steps: list[int]
) -> None:
    config = make_config("pretrain=null", f"attack.watch_every={every}", "attack.eps=0.08", "attack.ramp=0.5")
    run_job(config)
    looks = records_of(config, "watch")
    assert [r["step"] for r in looks] == steps
    assert [r["eps"] for r in looks] == pytest.approx([0.08 * min(1.0, (step - 1) / 4) for step in steps])


def test_steps_of_pgd_rise_over_the_phase(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied_attacks(monkeypatch)
    run_job(make_config("pretrain=null", "attack.steps=5", "attack.first_steps=1"))
    assert [attack.steps for attack in seen] == [1, 2, 2, 2, 3, 4, 4, 4]  # round(1 + 4 step / 8)


def test_more_micro_batches_than_images_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.accumulate: 33, wanted at most a rank's 32 images"):
        run_job(make_config("train.accumulate=33"))


def test_the_model_left_is_the_average_over_steps(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, torch.Tensor]] = []
    plain = loop.train_step

    def spy(state: Any, *arguments: Any) -> Any:
        result = plain(state, *arguments)
        if state.position.phase == "train":
            steps.append({name: p.detach().clone() for name, p in state.net.named_parameters()})
        return result

    monkeypatch.setattr(loop, "train_step", spy)
    config = make_config("train.average=0.75")
    run_job(config)
    expected = steps[0]
    for weights in steps[1:]:
        expected = {name: 0.75 * old + 0.25 * weights[name] for name, old in expected.items()}
    left = weights_of(config)
    for name, average in expected.items():
        torch.testing.assert_close(left[name], average, rtol=1e-5, atol=1e-7)


def test_a_phase_stops_when_robust_accuracy_no_longer_rises_and_keeps_the_best(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    robust = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    plain = loop._held_out_score

    def planted(state: Any, phase: Any, net: Any, attack: Attack, threat: Threat | None, limit: int) -> Any:
        score = plain(state, phase, net, attack, threat, limit)
        if attack == loop.EPOCH_ATTACK and limit != loop.WATCH_IMAGES:
            return type(score)(**{**vars(score), "accuracy": next(robust)})
        return score

    config = make_config("pretrain=null", "train.epochs=5", "train.patience=2")
    monkeypatch.setattr(loop, "_held_out_score", planted)
    run_job(config)
    epochs = records_of(config, "epoch")
    assert [r["robust_accuracy"] for r in epochs] == [0.5, 0.7, 0.6, 0.7]
    notices = [r["text"] for r in records_of(config, "notice")]
    assert any("train, epoch 4: robust accuracy was best after epoch 2, 70.0%" in text for text in notices)
    assert {r["model"] for r in records_of(config, "evaluation")} == {"fine-tuned", "fine-tuned-best"}
    best, last = weights_of(config, "fine-tuned-best"), weights_of(config)
    assert not torch.equal(best["head.weight"], last["head.weight"])
    monkeypatch.undo()
    assert run_job(config).status == "done"  # started again it has nothing left to do
    assert len(records_of(config, "epoch")) == 4
    assert_equal(weights_of(config), last)


@pytest.mark.parametrize(
    ("fgsm", "pgd", "expected"),
    [
        (0.4, 0.33, False),
        (0.9, 0.0, True),
        (0.1, 0.02, False),
        (0.3, 0.12, True),
        (0.3, 0.19, False),
        (0.0, 0.0, False),
    ],
)
def test_a_collapse_is_half_of_what_withstands_one_step(fgsm: float, pgd: float, expected: bool) -> None:
    assert has_collapsed(fgsm, pgd) == expected


@pytest.fixture
def collapsed(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """collapsed(answer): a run by FGSM that is seen to collapse after its third step."""

    def make(answer: str) -> Config:
        looks = iter([False, True])
        monkeypatch.setattr(loop, "has_collapsed", lambda *_: next(looks, True))
        return make_config("pretrain=null", "attack.name=fgsm", "attack.watch_every=2", f"attack.on_collapse={answer}")

    return make


def test_a_collapse_is_reported_once(collapsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = collapsed("report"), spied_attacks(monkeypatch)
    run_job(config)
    notices = [r["text"] for r in records_of(config, "notice")]
    assert [text for text in notices if "train, step 4: catastrophic overfitting: " in text] == notices
    assert {attack.name for attack in seen} == {"fgsm"}
    looks = records_of(config, "watch")
    assert [r["step"] for r in looks] == [2, 4, 6, 8]
    assert all(r["gap"] == pytest.approx(r["fgsm_accuracy"] - r["pgd_accuracy"]) for r in looks)


def test_a_collapse_can_end_the_run(collapsed: Any) -> None:
    with pytest.raises(DivergedError, match=r"train, step 4: catastrophic overfitting: .* try attack\.name=pgd"):
        run_job(collapsed("stop"))


def test_a_collapse_can_turn_to_pgd_also_over_a_restart(
    collapsed: Any, crash_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = collapsed("pgd")
    seen = spied_attacks(monkeypatch)
    crash_at("train", 6)
    with pytest.raises(Crash):
        run_job(config)
    assert [attack.name for attack in seen] == ["fgsm"] * 4 + ["pgd"] * 2
    monkeypatch.undo()
    seen = spied_attacks(monkeypatch)
    run_job(config)
    assert [(attack.name, attack.steps) for attack in seen] == [("pgd", 2)] * 2


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["attack.name=free", "attack.loss=trades"], "free takes its examples from the training step itself"),
        (["attack.name=n_fgsm", "attack.first_steps=1"], "first_steps goes with name pgd"),
        (["attack.steps=2", "attack.first_steps=3"], r"at most steps \(2\)"),
        (["attack.beta=6"], "beta goes with loss trades or mart"),
        (["train.average=1.0"], r"train\.average"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make_config: MakeConfig, overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_config(*overrides)
