"""The exporter, scraped over real HTTP and read with the client library's own parser."""

import json
import math
import socket
import threading
import timeit
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from distrobust.errors import ConfigError
from distrobust.metrics.prometheus import Exporter
from distrobust.metrics.table import TABLE

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def step(number: int = 10, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "event": "step", "time": 1e9, "phase": "train", "step": number, "epoch": 0.1, "loss": 1.5, "accuracy": 0.4,
        "lr": 0.1, "eps": 8 / 255, "density": 0.001, "sent_bytes": 10 * number, "dense_bytes": 1000 * number,
        "step_s": 0.2, "attack_s": 0.08, "hook_s": 0.02, "decode_s": 0.01,
        "residual_norm_ratio": 7.0, "nonfinite_steps": 0,
        "layer_lr_ratio": {"stem": 0.9, "head": 1.1}, "layer_noise": {"stem": 2.5, "head": 0.4}, "samples": 64 * number,
    }  # fmt: skip
    return record | changes


RECORDS: list[dict[str, Any]] = [
    {"event": "run", "world_size": 2, "num_parameters": 413_000, "versions": {"torch": "2.13.0"}, "resumed_step": 0},
    {"event": "phase", "phase": "train", "num_steps": 300, "steps_per_epoch": 100, "num_epochs": 3},
    {"event": "activity", "time": 1e9, "phase": "train", "training": 1},
    step(),
    {"event": "epoch", "phase": "train", "step": 100, "clean_accuracy": 0.7, "robust_accuracy": 0.3, "attack": "PGD"},
    {"event": "watch", "phase": "train", "step": 100, "fgsm_accuracy": 0.4, "pgd_accuracy": 0.3, "gap": 0.1},
    {"event": "checkpoint", "time": 1e9, "phase": "train", "step": 100, "seconds": 0.2, "bytes": 3_000_000},
    {"event": "checkpoint_failed", "phase": "train", "step": 200, "failures": 1},
    {"event": "diverged", "phase": "train", "replicas": 1},
    {"event": "evaluation", "model": "fine-tuned", "attack": "PGD", "accuracy": 0.3, "low": 0.2, "high": 0.4,
     "samples": 500},
    {"event": "notice", "text": "not a metric"},
    {"event": "done", "seconds": 3.0},
]  # fmt: skip


RECORDS += [  # as distrobust.federated.served makes them
    {"event": "federated_round", "time": 1e9, "planned_rounds": 100, "finished_rounds": 3, "rounds": 3, "updates": 30,
     "late": 1, "surplus": 2, "lost": 3, "nonfinite": 0, "download_bytes": 900, "upload_bytes": 90,
     "wasted_download_bytes": 60, "wasted_upload_bytes": 6, "download_s": 1.0, "compute_s": 2.0, "upload_s": 3.0,
     "wait_s": 4.0, "clock_s": 7.0, "host_s": 0.1, "loss": 1.2},
    {"event": "federated_held_out", "clean": 0.9, "robust": 0.5, "low_client": 0.8},
]  # fmt: skip


def scrape(exporter: Exporter) -> Values:
    with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(values: Values, name: str, **labels: str) -> float:
    """The one sample of that name whose labels include these."""
    (found,) = [v for (n, own), v in values.items() if n == name and labels.items() <= dict(own).items()]
    return found


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter("digits", 1, port=0)
    yield exporter
    exporter.close()


def test_every_row_of_the_table_is_served_once_its_record_came(exporter: Exporter) -> None:
    for record in RECORDS:
        exporter.write(record)
    served = {name for name, _ in scrape(exporter)}
    for metric in TABLE:
        name = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        assert name in served


def test_a_scrape_shows_the_values_of_the_records_with_their_labels(exporter: Exporter) -> None:
    for record in RECORDS:
        exporter.write(record)
    values = scrape(exporter)
    who = {"run": "digits", "rank": "1"}
    assert value(values, "distrobust_comm_sent_bytes_total", phase="train", **who) == 100
    assert value(values, "distrobust_train_loss", phase="train", **who) == 1.5
    assert value(values, "distrobust_robust_accuracy_ratio", phase="train", attack="PGD", **who) == 0.3
    assert value(values, "distrobust_layer_lr_ratio", group="head", **who) == 1.1
    assert value(values, "distrobust_layer_gradient_noise", phase="train", group="stem", **who) == 2.5
    assert value(values, "distrobust_evaluation_accuracy_low_ratio", model="fine-tuned", **who) == 0.2
    assert value(values, "distrobust_step_seconds_count", **who) == 1
    assert value(values, "distrobust_step_seconds_sum", **who) == 0.2
    assert value(values, "distrobust_build_info", torch="2.13.0", **who) == 1


def test_counters_show_zero_before_they_grow(exporter: Exporter) -> None:
    exporter.write(RECORDS[1])
    values = scrape(exporter)
    assert value(values, "distrobust_samples_total", phase="train") == 0
    assert value(values, "distrobust_checkpoint_failures_total", phase="train") == 0


def test_counters_count_each_phase_by_itself(exporter: Exporter) -> None:
    exporter.write(step(40, phase="pretrain"))
    exporter.write(step(10))
    values = scrape(exporter)
    assert value(values, "distrobust_steps_total", phase="pretrain") == 40
    assert value(values, "distrobust_steps_total", phase="train") == 10


def test_counters_never_decrease_after_a_restart(exporter: Exporter) -> None:
    seen = []
    for number in (10, 40, 30, 50):  # 30: training went back to a checkpoint
        exporter.write(step(number))
        seen.append(value(scrape(exporter), "distrobust_comm_sent_bytes_total"))
    assert seen == [100, 400, 400, 600]


def test_a_resumed_process_does_not_count_what_an_earlier_one_did(exporter: Exporter) -> None:
    exporter.write(RECORDS[0] | {"resumed_step": 300})
    for number in (310, 320):
        exporter.write(step(number))
    exporter.write(step(10, phase="next"))
    values = scrape(exporter)
    assert value(values, "distrobust_steps_total", phase="train") == 10
    assert value(values, "distrobust_finished_steps", phase="train") == 320
    assert value(values, "distrobust_steps_total", phase="next") == 10
    assert value(values, "distrobust_worker_restarts_total") == 1


def test_values_that_are_missing_or_not_finite_spoil_no_sum(exporter: Exporter) -> None:
    exporter.write(step(10))
    exporter.write(step(20, loss=math.nan, step_s=math.nan, sent_bytes=math.nan, residual_norm_ratio=None))
    exporter.write({"event": "step", "phase": "train"})
    values = scrape(exporter)
    assert value(values, "distrobust_step_seconds_sum") == 0.2
    assert value(values, "distrobust_comm_sent_bytes_total") == 100
    assert value(values, "distrobust_comm_residual_norm_ratio") == 7.0
    assert math.isnan(value(values, "distrobust_train_loss"))


def test_without_noise_no_group_is_served(exporter: Exporter) -> None:
    exporter.write(step(layer_lr_ratio={}, layer_noise={}))
    names = {name for name, _ in scrape(exporter)}
    assert "distrobust_train_loss" in names
    assert not {"distrobust_layer_lr_ratio", "distrobust_layer_gradient_noise"} & names


def test_unknown_events_and_fields_are_ignored(exporter: Exporter) -> None:
    exporter.write({"event": "surprise", "phase": "train"})
    exporter.write(step(10, surprise=1.0))
    assert value(scrape(exporter), "distrobust_steps_total") == 10


def test_two_exporters_on_one_port_both_serve() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = Exporter("digits", 0, port=port), Exporter("digits", 1, port=port, local_rank=0)
    try:
        assert first.port == port
        assert first.notice is None
        assert second.port != port
        assert second.notice is not None
        assert str(port) in second.notice
        for exporter in (first, second):
            exporter.write(step())
            assert value(scrape(exporter), "distrobust_steps_total") == 10
    finally:
        first.close()
        second.close()


def test_each_local_rank_has_its_own_port_and_one_past_the_last_falls_back() -> None:
    exporter = Exporter("digits", 7, port=65535, local_rank=1)
    try:
        assert exporter.notice is not None
        assert "65536" in exporter.notice
        assert scrape(exporter) is not None
    finally:
        exporter.close()


def test_a_host_of_another_machine_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on host '192\.0\.2\.1'.*127\.0\.0\.1"):
        Exporter("digits", 0, host="192.0.2.1", port=0)


def test_the_discovery_file_names_the_real_address_and_goes_with_the_exporter(tmp_path: Path) -> None:
    exporter = Exporter("digits", 3, port=0, file_sd=tmp_path / "prometheus")
    (path,) = (tmp_path / "prometheus").iterdir()
    (group,) = json.loads(path.read_text())
    assert path.name == "rank-3.json"
    assert group["targets"] == [f"127.0.0.1:{exporter.port}"]
    assert not {"run", "rank"} & set(group["labels"])  # would rename the metrics' own labels
    exporter.close()
    assert list((tmp_path / "prometheus").iterdir()) == []


@pytest.mark.parametrize("asked_before", [False, True])
def test_an_exporter_stays_for_the_last_scrape_until_somebody_asks_it_to_go(tmp_path: Path, asked_before: bool) -> None:
    """A stop that had been asked for before, which ended the run, does not take the last values away."""
    stop, linger_s = tmp_path / "stop", 1.0
    if asked_before:
        stop.touch()
    exporter = Exporter("r", 0, port=0, linger_s=linger_s, is_asked=stop.exists)
    asking = threading.Timer(0.1, stop.touch)
    asking.start()
    seconds = timeit.timeit(exporter.close, number=1)
    asking.join()
    assert (seconds >= linger_s) == asked_before


def test_a_wildcard_host_is_announced_by_an_address_others_can_use(tmp_path: Path) -> None:
    exporter = Exporter("digits", 0, host="0.0.0.0", port=0, file_sd=tmp_path)
    try:
        assert not exporter.address.startswith("0.0.0.0")
    finally:
        exporter.close()


def test_close_ends_the_thread_frees_the_port_and_may_be_called_twice() -> None:
    before = threading.active_count()
    exporter = Exporter("digits", 0, port=0)
    port = exporter.port
    exporter.close()
    exporter.close()
    assert threading.active_count() == before
    again = Exporter("digits", 0, port=port)
    again.close()
    assert again.port == port


def test_a_step_record_costs_well_below_a_millisecond(exporter: Exporter) -> None:
    record = step()
    exporter.write(record)
    best = min(timeit.repeat(lambda: exporter.write(record), number=200, repeat=5)) / 200
    assert best < 500e-6  # seconds; 13 to 17 us measured, the bound leaves room for a busy machine
