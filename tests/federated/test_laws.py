"""Laws of a simulation: what it reduces to, what it does not depend on, and what is never lost."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from federated.conftest import Simulate, made_up, module
from torch import Tensor
from torch.nn import functional as F

from distrobust.errors import ModelError
from distrobust.federated import batches, local, network
from distrobust.federated.projected import Projected, projected
from distrobust.federated.settings import LocalConfig
from distrobust.federated.simulate import Simulation
from distrobust.federated.timeline import ARRIVED
from distrobust.federated.work import Answer

EVERYBODY: dict[str, Any] = {"registered": 8, "per_round": 8}
SOME: dict[str, Any] = {"registered": 12, "per_round": 5, "partition": "dirichlet", "rows": 20}
ROUGH: dict[str, Any] = {"links": {"drop_out": 0.3}, "rounds": {"over_selection": 0.4, "deadline_s": 2.0}}
CODED: dict[str, Any] = {"upload": {"density": 0.05, "fuse_below": 20}, "download": {"density": 0.1, "values": "sign"}}


def central_gradient(name: str, vector: Tensor) -> Tensor:
    """Of the cross-entropy over all rows, by torch alone."""
    data, net = made_up(), network.load_(module(name), vector)
    loss = F.cross_entropy(net(data.train.images.float() / 255), data.train.labels)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn_gn"])
@pytest.mark.parametrize(
    "clients", [{"registered": 1, "per_round": 1}, EVERYBODY, {**EVERYBODY, "partition": "shards"}]
)
def test_one_full_batch_step_of_all_clients_is_central_sgd(
    simulate: Simulate, clients: dict[str, Any], name: str
) -> None:
    """Weights by sample count make the mean of the clients' gradients that of all rows, whatever their sizes."""
    simulation = simulate(model=name, clients=clients, local={"batch_size": None, "rate": 0.2})
    expected = simulation.shared.clone()
    for _ in range(3):
        expected = expected - 0.2 * central_gradient(name, expected)
        simulation.step()
    # float32 sums of 240 rows in another order, through at most 7 layers: 7 sqrt(240) 2^-24 of a gradient near 1
    torch.testing.assert_close(simulation.shared, expected, rtol=0, atol=3 * 1e-5)


def test_clients_are_weighted_by_their_rows(simulate: Simulate) -> None:
    uneven = {**EVERYBODY, "partition": "dirichlet", "alpha": 2.0}
    by_rows, alike = (
        simulate(clients=uneven, local={"batch_size": None, "rate": 0.5}, server={"weights": weights})
        for weights in ("samples", "uniform")
    )
    expected = by_rows.shared - 0.5 * central_gradient("linear", by_rows.shared)
    by_rows.step()
    alike.step()
    torch.testing.assert_close(by_rows.shared, expected, rtol=0, atol=1e-5)
    assert float((alike.shared - expected).abs().max()) > 1e-3


def everything(simulation: Simulation) -> list[Tensor]:
    clients = range(simulation.partition.num_clients)
    vectors = (simulation.residuals, simulation.velocities, simulation.controls)
    return [simulation.shared, simulation.server.x, *(one.read(clients) for one in vectors)]


SETTINGS: list[dict[str, Any]] = [
    {"model": "mlp"},
    {"model": "cnn_gn"},
    {"local": {"momentum": 0.9, "weight_decay": 1e-3, "epochs": 2}},
    {"local": {"optimizer": "adamw", "rate": 0.01, "steps": 7}, "server": {"optimizer": "momentum", "nesterov": True}},
    {"local": {"proximal": 0.5}, "server": {"optimizer": "adam", "rate": 0.01}},
    {"local": {"control_variates": True}, "upload": CODED["upload"]},
    CODED,
    {**CODED, "upload": {**CODED["upload"], "momentum": 0.9}},
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_neither_the_executor_nor_the_cohort_changes_the_result(simulate: Simulate, chosen: dict[str, Any]) -> None:
    made = [
        simulate(clients={**SOME, "rows": None, "alpha": 2.0}, **ROUGH, **chosen, execute=execute)
        for execute in ({"cohort": 5}, {"cohort": 2}, {"executor": "serial"}, {"executor": "serial", "cohort": 1})
    ]
    for _ in range(6):
        records = [simulation.step() for simulation in made]
        assert len({(r["clock_s"], r["updates"], r["upload_bytes"], r["download_bytes"]) for r in records}) == 1
    for other in made[1:]:
        for ours, theirs in zip(everything(made[0]), everything(other), strict=True):
            # batched products may add in another order; a coordinate at the threshold may then wait for a round
            close = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5)
            assert float((~close).double().mean()) <= (0.01 if "upload" in chosen else 0.0)


def test_the_same_cohorts_give_the_same_bits(simulate: Simulate) -> None:
    first, second = (simulate(clients=SOME, **ROUGH, **CODED) for _ in range(2))
    for _ in range(4):
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(first), everything(second), strict=True))


def test_a_network_without_a_hand_written_form_is_trained_one_by_one(simulate: Simulate) -> None:
    """To the bit as the serial executor, whose speed it should have."""
    made = [simulate(model="cnn_gn", clients=SOME, execute={"executor": one}) for one in ("batched", "serial")]
    assert made[0].network.fallback
    for simulation in made:
        simulation.step()
    assert torch.equal(made[0].shared, made[1].shared)


def test_the_order_of_the_clients_does_not_matter(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered, shuffled = (simulate(clients=SOME, **ROUGH, **CODED) for _ in range(2))
    select = shuffled.availability.select
    monkeypatch.setattr(shuffled.availability, "select", lambda *arguments: select(*arguments)[::-1].copy())
    for _ in range(4):
        a, b = ordered.step(), shuffled.step()
        assert a["clock_s"] == b["clock_s"]
    assert all(torch.equal(a, b) for a, b in zip(everything(ordered), everything(shuffled), strict=True))


def test_what_a_client_does_depends_on_seed_round_and_client_alone() -> None:
    """Not on who else is in its cohort, nor where."""
    rows = [np.arange(i, i + size) for i, size in ((0, 20), (30, 7), (60, 33))]
    numbers = np.array([4, 9, 700])
    settings = LocalConfig(batch_size=8, epochs=2)
    together = batches.make(rows, numbers, settings, 1, 5)
    for i, (own, number) in enumerate(zip(rows, numbers, strict=True)):
        alone = batches.make([own], np.array([number]), settings, 1, 5)
        steps = int(together.steps[i])
        assert steps == batches.num_steps(len(own), settings) == int(alone.steps[0])
        real = together.weights[i, :steps] > 0
        assert torch.equal(real, alone.weights[0] > 0)
        assert torch.equal(together.rows[i, :steps][real], alone.rows[0][real])
        assert not together.weights[i, steps:].any()
        assert int(real.sum()) == batches.num_examples(len(own), settings) == 2 * len(own)
        epochs = zip(together.rows[i, :steps].split(steps // 2), real.split(steps // 2), strict=True)
        assert [sorted(chosen[mask].tolist()) for chosen, mask in epochs] == [own.tolist(), own.tolist()]
    other = batches.make(rows, numbers, settings, 1, 6)
    assert not torch.equal(other.rows, together.rows)


@pytest.mark.parametrize("steps", [1, 3, 11])
def test_a_number_of_local_steps_is_a_number_of_local_steps(steps: int) -> None:
    rows = [np.arange(5), np.arange(40)]
    settings = LocalConfig(batch_size=8, steps=steps)
    made = batches.make(rows, np.arange(2), settings, 0, 0)
    assert made.steps.tolist() == [steps, steps] == [batches.num_steps(len(own), settings) for own in rows]
    examples = (made.weights > 0).sum(dim=(1, 2)).tolist()
    assert examples == [batches.num_examples(len(own), settings) for own in rows]


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn_gn"])
def test_gradients_of_a_cohort_are_each_clients_own(name: str) -> None:
    net = module(name)
    ours = network.network(net)
    assert (ours.fallback == "") == (name != "cnn_gn")
    torch.manual_seed(0)
    vectors = network.flat(net) + 0.05 * torch.randn(3, ours.spec.n)
    x, y = torch.rand(3, 6, 1, 8, 8), torch.randint(0, 4, (3, 6))
    weights = torch.rand(3, 6) * (torch.rand(3, 6) < 0.7)
    gradients, losses = ours.gradients(ours.spec.stacked(vectors), x, y, weights)
    logits = ours.logits(ours.spec.stacked(vectors), x)
    for i in range(3):
        network.load_(net, vectors[i])
        expected = (F.cross_entropy(net(x[i]), y[i], reduction="none") * weights[i]).sum()
        found = torch.autograd.grad(expected, list(net.parameters()))
        torch.testing.assert_close(logits[i], net(x[i]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses[i], expected.detach(), rtol=1e-5, atol=1e-6)
        for one, other in zip(gradients, found, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-4, atol=1e-6)


def listen(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, sums: dict[int, Tensor], sent: dict[int, Tensor]
) -> None:
    """Adds up every client's updates, and what the server reads in its messages, in float64."""
    train, receive = local.EXECUTORS["batched"], simulation._receive
    assert simulation.upload is not None
    upload, trained = simulation.upload, []
    monkeypatch.setitem(local.EXECUTORS, "batched", lambda *given: trained.append(train(*given)) or trained[-1])

    def listening(clients: list[int], answer: Answer, *rest: Any) -> Tensor:
        assert answer.messages is not None
        for i, message in zip(answer.counts.nonzero().view(-1).tolist(), answer.messages, strict=True):
            places, values = upload.decode(message, simulation.round)
            client, n = clients[i], upload.n
            sums[client] = sums.get(client, torch.zeros(n)) + trained[-1].updates[i].double()
            sent[client] = sent.get(client, torch.zeros(n)).double().index_add(0, places, values.double())
        return receive(clients, answer, *rest)

    monkeypatch.setattr(simulation, "_receive", listening)


@pytest.mark.parametrize("values", ["fp32", "4bit", "sign"])
def test_sent_plus_kept_is_accumulated_for_every_client(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    """Over any sequence of taking part, staying away and being lost in an upload."""
    simulation = simulate(
        clients=SOME, **ROUGH, upload={"density": 0.05, "values": values}, availability={"name": "bernoulli"}
    )
    sums: dict[int, Tensor] = {}
    sent: dict[int, Tensor] = {}
    listen(simulation, monkeypatch, sums, sent)
    for _ in range(25):
        simulation.step()
    assert simulation.totals.lost > 5
    assert len(sums) > 5
    for client, total in sums.items():
        kept = simulation.residuals.read([client])[0].double()
        # two float32 roundings a round of sums below `total`'s scale
        scale = float(total.abs().max() + kept.abs().max())
        torch.testing.assert_close(sent[client] + kept, total, rtol=0, atol=50 * 2.0**-24 * scale)
        assert float(kept.abs().max()) > 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_lost_upload_leaves_no_trace_in_the_client(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, momentum: float
) -> None:
    simulation = simulate(clients=EVERYBODY, upload={"density": 0.05, "momentum": momentum}, links={"drop_out": 0.4})
    courses: list[Any] = []
    run_clock = simulation._run_clock
    monkeypatch.setattr(simulation, "_run_clock", lambda *given: courses.append(run_clock(*given)) or courses[-1])
    for _ in range(3):
        before = everything(simulation)
        simulation.step()
        lost = torch.from_numpy(courses[-1].fate != ARRIVED)
        assert lost.any()
        assert (~lost).any()
        after = everything(simulation)
        for old, new in zip(before[2:], after[2:], strict=True):
            assert torch.equal(old[lost], new[lost])
        assert not torch.equal(before[2][~lost], after[2][~lost])
    assert simulation.totals.wasted_upload_bytes > 0


def test_residuals_survive_being_offline(simulate: Simulate) -> None:
    simulation = simulate(clients={"registered": 12, "per_round": 2}, upload={"density": 0.05})
    simulation.step()
    first = sorted(simulation.last_seen)
    kept = simulation.residuals.read(first)
    while not set(first).isdisjoint(simulation.availability.select(2, simulation.round, 0.0).tolist()):
        simulation.step()
        kept = simulation.residuals.read(first)
    simulation.step()
    assert torch.equal(simulation.residuals.read(first), kept)
    assert kept.any()


def test_the_server_keeps_what_its_messages_left_out(simulate: Simulate) -> None:
    simulation = simulate(clients=EVERYBODY, download={"density": 0.05, "values": "sign", "indices": "rice"})
    for _ in range(10):
        simulation.step()
    # x = shared - kept, up to two float32 roundings a round
    torch.testing.assert_close(
        simulation.server.x, simulation.shared - simulation.server_residual[0], rtol=0, atol=1e-5
    )
    assert simulation.server_residual.any()


def test_clients_download_the_messages_they_missed_or_the_whole_model(simulate: Simulate) -> None:
    simulation = simulate(clients={"registered": 30, "per_round": 3}, download={"density": 0.1})
    assert simulation.download is not None
    whole, one = simulation.dense_bytes, simulation.download.num_bytes
    assert simulation.download_length(0) == whole
    for _ in range(30):
        simulation.step()
        for client, seen in simulation.last_seen.items():
            assert simulation.download_length(client) == min(whole, (simulation.round - seen) * one)
    assert {simulation.download_length(c) for c in simulation.last_seen} >= {one, whole}


def test_bytes_are_the_lengths_of_the_messages(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(clients=SOME, upload={"density": 0.05, "values": "sign", "indices": "rice"})
    assert simulation.upload is not None
    lengths: list[int] = []
    decode = simulation.upload.decode
    monkeypatch.setattr(simulation.upload, "decode", lambda m, r: (lengths.append(m.numel()), decode(m, r))[1])
    total = sum(simulation.step()["upload_bytes"] for _ in range(4))
    assert total == sum(lengths) == simulation.totals.upload_bytes
    assert total < 0.1 * 4 * simulation.network.spec.n * len(lengths)


def test_scaffold_control_variates_average_to_the_servers(simulate: Simulate) -> None:
    """c = mean of c_i over all clients, after any rounds; and each c_i is its mean gradient on the way."""
    simulation = simulate(
        clients=SOME, local={"control_variates": True, "steps": 4, "rate": 0.05}, links={"drop_out": 0.2}
    )
    for _ in range(8):
        simulation.step()
    own = simulation.controls.read(range(12))
    assert own.any()
    torch.testing.assert_close(simulation.control, own.mean(0), rtol=1e-4, atol=1e-6)


def test_scaffold_removes_the_drift_of_clients_that_differ(simulate: Simulate) -> None:
    """All clients, full batches: FedAvg with many local steps stops short of the central optimum, SCAFFOLD does not."""
    norms = []
    for control_variates in (False, True):
        simulation = simulate(
            clients={**EVERYBODY, "partition": "shards", "shards": 1},
            local={"batch_size": None, "steps": 20, "rate": 0.2, "control_variates": control_variates},
        )
        for _ in range(40):
            simulation.step()
        norms.append(float(central_gradient("linear", simulation.shared).norm()))
    assert norms[1] < 0.3 * norms[0]


def test_the_proximal_term_keeps_clients_near_the_rounds_model() -> None:
    """With full batches and a strong term the client settles where gradient + mu (y - x) = 0."""
    data, net = made_up(), network.network(module("linear"))
    settings = LocalConfig(batch_size=None, steps=1500, rate=0.01, proximal=3.0)
    plan = batches.make([np.arange(40)], np.array([0]), settings, 0, 0)
    start = network.flat(module("linear"))
    update = local.train(net, start, plan, data.train.images, data.train.labels, settings).updates[0]
    y = network.load_(module("linear"), start - update)
    loss = F.cross_entropy(y(data.train.images[:40].float() / 255), data.train.labels[:40])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(y.parameters()))])
    torch.testing.assert_close(gradient, 3.0 * update, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "rate": 0.05},
        {"optimizer": "adamw", "weight_decay": 0.1, "rate": 0.01},
    ],
)
def test_local_optimizers_are_torchs(settings: dict[str, Any]) -> None:
    data, net = made_up(), module("mlp")
    config = LocalConfig(batch_size=None, steps=6, **settings)
    plan = batches.make([np.arange(30)], np.array([0]), config, 0, 0)
    start = network.flat(net)
    ours = (
        start - local.train(network.network(net), start, plan, data.train.images, data.train.labels, config).updates[0]
    )
    options = {key: value for key, value in settings.items() if key not in ("optimizer", "rate")}
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optimizer = kinds[settings["optimizer"]](net.parameters(), lr=settings["rate"], **options)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(net(data.train.images[:30].float() / 255), data.train.labels[:30]).backward()
        optimizer.step()
    torch.testing.assert_close(ours, network.flat(net), rtol=1e-4, atol=1e-5)


def test_target_projection_is_the_papers_update_one_image_at_a_time() -> None:
    net = module("mlp")
    layered = network.network(net)
    ours = projected(net, layered, 5)
    assert isinstance(ours, Projected)
    vectors = network.flat(net)[None] + 0.05 * torch.randn(
        2, layered.spec.n, generator=torch.Generator().manual_seed(0)
    )
    x, y = torch.rand(2, 3, 1, 8, 8), torch.randint(0, 4, (2, 3))
    W1, b1, W2, b2 = ours.spec.stacked(vectors)
    found, _ = ours.gradients([W1, b1, W2, b2], x, y, torch.full((2, 3), 1 / 3))
    for client in range(2):
        expected = [torch.zeros_like(one[client]) for one in found]
        for i in range(3):
            x1 = (x[client, i].flatten() - 0.5) / 0.25
            z1 = W1[client] @ x1 + b1[client]
            y1 = z1.clamp(min=0)
            delta = (ours._P[0][y[client, i]] - y1) * (z1 > 0)
            last = F.one_hot(y[client, i], 4) - torch.softmax(W2[client] @ y1 + b2[client], 0)
            for one, step in zip(expected, (delta.outer(x1), delta, last.outer(y1), last), strict=True):
                one -= step / 3
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[client], other, rtol=1e-4, atol=1e-5)


def test_target_projection_learns_and_is_for_chains_of_linear_layers_only(simulate: Simulate) -> None:
    simulation = simulate(
        model="mlp", clients=EVERYBODY, local={"gradients": "target_projection", "rate": 0.02, "epochs": 3}
    )
    for _ in range(20):
        simulation.step()
    assert simulation.accuracies(made_up().held_out)["clean"].accuracy > 0.6  # chance is 0.25
    with pytest.raises(ModelError, match="target_projection is for mlp and linear: no hand-written batched form"):
        simulate(model="cnn_gn", local={"gradients": "target_projection"})


def test_training_leaves_the_start_as_it_was(simulate: Simulate) -> None:
    simulation = simulate(clients=EVERYBODY, model="mlp")
    before = simulation.shared
    copied = copy.deepcopy(before)
    simulation.step()
    assert torch.equal(before, copied)
