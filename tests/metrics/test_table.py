"""Laws every row of the metric table obeys."""

import re

import pytest

from distrobust.metrics.table import BUILD, TABLE, WHO, Metric

LABELS = {"run", "rank", "phase", "attack", "group", "model"}  # of few values each
EVENTS = {
    *("run", "phase", "activity", "step", "epoch", "watch", "diverged", "checkpoint", "checkpoint_failed"),
    *("evaluation", "federated_round", "federated_held_out"),
}
OPERATIONS = {  # what dashboards have been promised
    "distrobust_comm_sent_bytes_total",
    "distrobust_comm_dense_bytes_total",
    "distrobust_comm_hook_seconds",
    "distrobust_comm_residual_norm_ratio",
    "distrobust_step_seconds",
    "distrobust_attack_seconds",
    "distrobust_samples_total",
    "distrobust_train_loss",
    "distrobust_clean_accuracy_ratio",
    "distrobust_robust_accuracy_ratio",
    "distrobust_layer_lr_ratio",
    "distrobust_layer_gradient_noise",
    "distrobust_checkpoint_seconds",
    "distrobust_worker_restarts_total",
    "distrobust_last_step_timestamp_seconds",
    "distrobust_build_info",
}

every_metric = pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)


def test_names_are_unique_and_the_promised_ones_are_there() -> None:
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)
    assert set(names) >= OPERATIONS


@every_metric
def test_every_table_name_follows_the_unit_rules(metric: Metric) -> None:
    assert re.fullmatch(r"distrobust(_[a-z]+)+", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    stem = metric.name.removesuffix("_total")
    if metric.unit:
        assert stem.endswith(f"_{metric.unit}")
    else:
        assert not re.search(r"_(seconds|bytes|ratio|ms|milliseconds|mb|percent)$", stem)


@every_metric
def test_every_metric_is_labelled_by_run_and_rank_and_only_by_bounded_labels(metric: Metric) -> None:
    assert metric.labels[: len(WHO)] == WHO
    assert set(metric.labels) <= LABELS or (metric.labels is BUILD and metric.name.endswith("_info"))


@every_metric
def test_every_metric_is_explained_and_fed(metric: Metric) -> None:
    assert metric.help.endswith(".")
    assert metric.event in EVENTS
    assert metric.field


@every_metric
def test_histograms_alone_have_buckets_and_they_ascend(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
