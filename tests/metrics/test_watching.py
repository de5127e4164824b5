"""Alerts and dashboard speak of metrics that exist; where promtool is there, they also do what they say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from distrobust.metrics.alerts import ALERTS, Alert, groups
from distrobust.metrics.dashboard import ROWS, dashboard, metrics_in
from distrobust.metrics.table import TABLE

RULE_TESTS = Path(__file__).parent / "alerts.test.yaml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
EXPRESSIONS = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
every_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def test_a_metric_that_is_not_in_the_table_is_noticed() -> None:
    with pytest.raises(KeyError, match="distrobust_los"):
        metrics_in("max(distrobust_los)")
    assert metrics_in("rate(distrobust_step_seconds_sum[5m]) / distrobust_workers") == [
        "distrobust_step_seconds",
        "distrobust_workers",
    ]


@every_alert
def test_every_alert_speaks_of_metrics_and_labels_that_exist_and_says_what_to_do(alert: Alert) -> None:
    names = metrics_in(alert.expr)
    assert names or alert.expr.startswith("up{")
    assert alert.summary.endswith(".")
    assert alert.runbook.endswith(".")
    labels = {label for metric in TABLE if metric.name in names for label in metric.labels} | {"instance"}
    assert set(re.findall(r"\$labels\.(\w+)", alert.summary)) <= labels
    mentioned = re.findall(r"\bdistrobust_[a-z_]+", alert.runbook)
    assert set(mentioned) <= {metric.name for metric in TABLE}


def test_settings_in_runbooks_exist() -> None:
    from distrobust.config import Config, PhaseConfig

    for alert in ALERTS:
        for section, key in re.findall(r"\b(cluster|compress|evaluate|metrics|run|schedule)\.([a-z_]+)", alert.runbook):
            fields = {**Config.model_fields, **PhaseConfig.model_fields}[section].annotation
            models = [fields, *getattr(fields, "__args__", ())]
            assert any(key in getattr(model, "model_fields", {}) for model in models), f"{section}.{key}"


def test_every_metric_is_on_the_dashboard_or_left_out_on_purpose() -> None:
    shown = {name for expression in EXPRESSIONS for name in metrics_in(expression)}
    left_out = {  # text in the table of targets, bounds of a number that is shown, and the alerts' own
        "distrobust_build_info", "distrobust_parameters", "distrobust_training",
        "distrobust_training_change_timestamp_seconds",
        "distrobust_checkpoint_seconds", "distrobust_checkpoint_bytes", "distrobust_evaluation_accuracy_low_ratio",
        "distrobust_evaluation_accuracy_high_ratio", "distrobust_evaluation_samples",
    }  # fmt: skip
    assert shown | left_out == {metric.name for metric in TABLE}
    assert not shown & left_out


def test_every_expression_groups_by_labels_its_metrics_have() -> None:
    known = {metric.name: set(metric.labels) for metric in TABLE}
    for expression in [*EXPRESSIONS, *(alert.expr for alert in ALERTS)]:
        names = metrics_in(expression)
        for labels in re.findall(r"by \(([a-z, ]+)\)", expression):
            for name in names:
                assert {label.strip() for label in labels.split(",")} <= known[name] | {"le"}, expression


def test_every_panel_is_selected_by_run_and_none_lies_on_another() -> None:
    assert all(expression.count('{run=~"$run"}') == len(metrics_in(expression)) for expression in EXPRESSIONS)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        xs, ys = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in xs for y in ys}
        assert not cells & taken, panel["title"]
        assert max(xs) < 24
        taken |= cells
    assert [title for title, _ in ROWS] == [
        *("Progress", "Speed", "Network", "Health", "Layers", "Federated simulation")
    ]


@needs_promtool
def test_every_panels_expression_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{index}", "expr": expression.replace("$run", ".*")}
        for index, expression in enumerate(EXPRESSIONS)
    ]
    _promtool(tmp_path, "check", "rules", groups=[{"name": "panels", "rules": rules}])


@needs_promtool
def test_the_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    _promtool(tmp_path, "check", "rules", groups=groups())
    shutil.copy(RULE_TESTS, tmp_path)
    bare = groups()
    for rule in bare[0]["rules"]:
        del rule["annotations"]  # or every case would have to repeat their text
    _promtool(tmp_path, "test", "rules", groups=bare)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent() -> None:
    cases = [case for test in yaml.safe_load(RULE_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {alert.name for alert in ALERTS}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def _promtool(directory: Path, verb: str, what: str, groups: object) -> None:
    assert PROMTOOL is not None
    (directory / "rules.yaml").write_text(json.dumps({"groups": groups}))
    file = "rules.yaml" if verb == "check" else RULE_TESTS.name
    ran = subprocess.run([PROMTOOL, verb, what, file], cwd=directory, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
