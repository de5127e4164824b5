"""Personal models (FTFA, RTFA) and local adversarial training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from federated.conftest import Simulate, made_up, module
from torch.nn import functional as F

from distrobust.adversarial import Attack, Threat
from distrobust.errors import ConfigError
from distrobust.federated import network, personal, settings
from distrobust.federated.attacked import Adversary
from distrobust.federated.dataset import Dataset, Rows
from distrobust.federated.settings import LocalAttackConfig

ALONE: dict[str, Any] = {"registered": 8, "per_round": 4}


def contradicting() -> Dataset:
    """Groups of rows that give the same images different labels: no global model can be right for all."""
    data = made_up(320)
    assert data.groups is not None
    labels = (data.train.labels + torch.from_numpy(data.groups)) % 4
    return Dataset(data.source, Rows(data.train.images, labels), data.held_out, data.groups)


def test_rows_set_apart_are_never_trained_on(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(clients=ALONE, personal={"test": 0.3})
    parts = [simulation.parts_of(client) for client in range(8)]
    for client, (train, test) in enumerate(parts):
        assert sorted([*train, *test]) == sorted(simulation.partition.rows_of(client))
        assert len(test) == round(0.3 * 30)
    tests = set(np.concatenate([test for _, test in parts]).tolist())
    seen: set[int] = set()
    index_select = torch.Tensor.index_select

    def listening(images: torch.Tensor, dim: int, rows: torch.Tensor) -> torch.Tensor:
        seen.update(rows.tolist() if images is simulation.images else [])
        return index_select(images, dim, rows)

    monkeypatch.setattr(torch.Tensor, "index_select", listening)
    for _ in range(6):
        simulation.step()
    assert len(seen) > 100
    assert not seen & tests


def test_personal_models_are_right_where_clients_contradict_each_other(simulate: Simulate) -> None:
    simulation = simulate(
        contradicting(),
        clients={**ALONE, "partition": "group", "column": "site"},
        personal={"epochs": 20, "rate": 0.05},
    )
    for _ in range(10):
        simulation.step()
    found = simulation.personal()
    assert found is not None
    assert found.clients == 8
    assert found.rows == sum(len(simulation.parts_of(client)[1]) for client in range(8))
    assert found.accuracies["global"] < 0.6
    assert min(found.accuracies["ftfa"], found.accuracies["rtfa"]) > found.accuracies["global"] + 0.2


def test_a_large_penalty_keeps_personal_models_at_the_global_one(simulate: Simulate) -> None:
    """With lambda 50 and rate 0.005 half of the way back is gone at every step: 2 x 50 x 0.005."""
    simulation = simulate(
        contradicting(),
        clients={**ALONE, "partition": "group", "column": "site"},
        personal={"epochs": 20, "rate": 0.005, "penalty": 50.0},
    )
    found = simulation.personal()
    assert found is not None
    assert found.accuracies["ftfa"] > found.accuracies["rtfa"] + 0.1


def test_neither_the_cohort_nor_the_rounds_since_change_personal_models(simulate: Simulate) -> None:
    """They follow from the global model alone, not from what clients kept of the rounds."""
    one, other = (
        simulate(
            clients=ALONE,
            local={"batch_size": 2, "control_variates": True},
            personal={"rate": 0.02},
            execute={"cohort": cohort},
        )
        for cohort in (3, 8)
    )
    for _ in range(3):
        other.step()
    one.shared = other.shared
    assert one.personal() == other.personal()


def test_a_client_with_one_row_trains_on_it() -> None:
    train, test = personal.set_apart(np.array([7]), 0, 0.5, 0)
    assert (train.tolist(), test.tolist()) == ([7], [])
    train, test = personal.set_apart(np.array([7, 8]), 0, 0.01, 0)
    assert (len(train), len(test)) == (1, 1)


def test_shared_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no other client trains on: set clients\.rows to null"):
        settings.parse({"data": {"path": "x"}, "clients": {"rows": 5}, "personal": {}}, "test")


@pytest.mark.parametrize("name", ["mlp", "cnn_gn"])
def test_a_cohorts_adversarial_examples_are_each_clients_own(name: str) -> None:
    """FGSM of a cohort against the attack on every client's model by itself."""
    net = module(name)
    ours = network.network(net)
    torch.manual_seed(0)
    vectors = network.flat(net) + 0.05 * torch.randn(3, ours.spec.n)
    x, y = torch.rand(3, 5, 1, 8, 8), torch.randint(0, 4, (3, 5))
    config = LocalAttackConfig(name="fgsm", eps=0.1)
    together = Adversary(ours, config, 0, 0, np.arange(3))(ours.spec.stacked(vectors), x, y, 0)
    for i in range(3):
        alone = Attack("fgsm")(network.load_(net, vectors[i]).eval(), x[i], y[i], Threat("linf", 0.1))
        # signs may differ where a gradient is as good as 0
        assert float((together[i] != alone).double().mean()) < 0.02


def test_random_starts_are_the_clients_own_and_stay_in_the_ball() -> None:
    net = network.network(module("mlp"))
    parameters = net.spec.stacked(network.flat(module("mlp")).expand(3, -1).contiguous())
    x, y = torch.rand(1, 5, 1, 8, 8).expand(3, -1, -1, -1, -1), torch.zeros(3, 5, dtype=torch.int64)
    adversary = Adversary(net, LocalAttackConfig(name="pgd", eps=0.1, steps=2), 0, 7, np.array([4, 9, 11]))
    made = adversary(parameters, x, y, 3)
    assert float((made - x).abs().max()) <= 0.1 + 1e-6
    assert 0.0 <= float(made.min()) <= float(made.max()) <= 1.0
    assert not torch.equal(made[0], made[1])
    alone = adversary.of(1)([one[1:2] for one in parameters], x[1:2], y[1:2], 3)
    torch.testing.assert_close(alone[0], made[1], rtol=0, atol=1e-5)
    assert not torch.equal(adversary(parameters, x, y, 4), made)


def test_local_adversarial_training_buys_robust_accuracy(simulate: Simulate) -> None:
    robust = []
    data = made_up()
    for steps in (None, 5):
        attack = {"eps": 0.1, "steps": steps} if steps is not None else None
        simulation = simulate(data, model="mlp", clients=ALONE, attack=attack)
        for _ in range(25):
            simulation.step()
        simulation.config = simulation.config.model_copy(update={"attack": LocalAttackConfig(eps=0.1)})
        found = simulation.accuracies(data.held_out)
        assert found["robust"].attack == "PGD-20 Linf 0.1"
        assert found["robust"].accuracy <= found["clean"].accuracy
        robust.append(found["robust"].accuracy)
    assert robust[1] > robust[0] + 0.1


def test_serial_and_batched_clients_meet_the_same_adversary(simulate: Simulate) -> None:
    one, other = (
        simulate(clients=ALONE, model="mlp", attack={"eps": 0.05, "steps": 2}, execute={"executor": executor})
        for executor in ("batched", "serial")
    )
    for _ in range(3):
        one.step()
        other.step()
    # a sign of a gradient near 0 may differ, and moves one pixel of one image by 2 x 0.05
    torch.testing.assert_close(one.shared, other.shared, rtol=0, atol=2e-3)


def test_the_loss_of_mean_gradients_is_unchanged_by_attacks_of_no_size(simulate: Simulate) -> None:
    natural, attacked = (simulate(clients=ALONE, attack=attack) for attack in (None, {"eps": 0.0}))
    natural.step()
    attacked.step()
    assert torch.equal(natural.shared, attacked.shared)
    assert F.mse_loss(natural.shared, attacked.shared) == 0
