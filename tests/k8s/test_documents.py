"""Names and references between documents agree, with each other and with the program, whatever is rendered."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from distrobust import config
from distrobust.cli import commands
from distrobust.k8s import Document, inside, monitoring, pods, run
from distrobust.metrics import alerts, dashboard
from distrobust.metrics.table import TABLE
from tests.k8s.rendered import (
    CASES,
    EXAMPLE,
    K8S,
    LAUNCH_FILES,
    NAMES,
    ROOT,
    all_documents,
    groups,
    job_file,
    of_kind,
    run_documents,
    templates,
    the,
)

each_case = pytest.mark.parametrize(("file", "overlay"), CASES, ids=NAMES)


@each_case
def test_what_pods_refer_to_exists(file: Path, overlay: str | None) -> None:
    documents = all_documents(file, overlay)
    names = {kind: {d["metadata"]["name"] for d in of_kind(documents, kind)} for kind in {d["kind"] for d in documents}}
    for template in templates(documents):
        pod = template["spec"]
        assert pod["serviceAccountName"] in names["ServiceAccount"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == volumes
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            elif "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
            else:
                assert "emptyDir" in volume


@each_case
def test_pods_are_unprivileged_and_ask_for_what_they_need(file: Path, overlay: str | None) -> None:
    for template in templates(all_documents(file, overlay)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in security
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            assert container["env"] == [{"name": "HOME", "value": "/tmp"}]


@each_case
def test_no_document_holds_a_secret(file: Path, overlay: str | None) -> None:
    documents = all_documents(file, overlay)
    assert not of_kind(documents, "Secret")
    assert "secretKeyRef" not in yaml.safe_dump(documents)


@each_case
def test_the_entrypoint_is_a_command_of_ours_on_a_file_that_is_mounted(file: Path, overlay: str | None) -> None:
    documents = run_documents(file, overlay)
    job = the(documents, "RayJob")
    program, command, path = job["spec"]["entrypoint"].split()
    assert f'{program} = "distrobust.cli:main"' in (ROOT / "pyproject.toml").read_text()
    assert command in commands.commands
    configured = the(documents, "ConfigMap")
    for group in groups(job):
        [container] = group["template"]["spec"]["containers"]
        [volume] = [v for v in group["template"]["spec"]["volumes"] if "configMap" in v]
        [mount] = [m for m in container["volumeMounts"] if m["name"] == volume["name"]]
        assert Path(mount["mountPath"]) == Path(path).parent
        assert volume["configMap"]["name"] == configured["metadata"]["name"]
    assert list(configured["data"]) == [Path(path).name]


@each_case
def test_the_program_accepts_its_configuration_and_finds_everything_on_the_claim(
    file: Path, overlay: str | None
) -> None:
    documents = run_documents(file, overlay)
    loaded = config.parse(job_file(documents), "job.yaml")
    [container] = groups(the(documents, "RayJob"))[1]["template"]["spec"]["containers"]
    shared = Path(next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "shared"))
    assert loaded.run.dir.is_relative_to(shared)
    assert loaded.data.path.is_relative_to(shared)
    assert config.absolute(loaded) == loaded
    assert loaded.cluster.launcher == "ray"
    assert loaded.cluster.address == "auto"
    assert loaded.metrics.host == "0.0.0.0"
    assert loaded.metrics.linger_s >= 2 * alerts.SCRAPE_S
    original = config.load(file)
    kept = {"pretrain", "train", "attack", "compress", "noise"}
    assert loaded.model_dump(include=kept) == original.model_dump(include=kept)


@each_case
def test_each_pod_holds_exactly_one_rank(file: Path, overlay: str | None) -> None:
    documents = run_documents(file, overlay)
    loaded = config.parse(job_file(documents), "job.yaml")
    head, workers = groups(the(documents, "RayJob"))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["replicas"] == loaded.cluster.workers
    assert workers["rayStartParams"]["num-cpus"] == str(loaded.cluster.threads)
    [container] = workers["template"]["spec"]["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert int(resources["limits"]["cpu"]) > loaded.cluster.threads
    assert resources["limits"].get("nvidia.com/gpu") == ("1" if loaded.cluster.gpu else None)
    assert ("tolerations" in workers["template"]["spec"]) == loaded.cluster.gpu
    [memory] = [v["emptyDir"] for v in workers["template"]["spec"]["volumes"] if v["name"] == "shm"]
    assert memory["medium"] == "Memory"
    assert int(workers["rayStartParams"]["object-store-memory"]) <= 1024**3 == _bytes(memory["sizeLimit"])


@each_case
def test_ports_agree_between_program_pods_policy_and_monitor(file: Path, overlay: str | None) -> None:
    documents = all_documents(file, overlay)
    loaded = config.parse(job_file(documents), "job.yaml")
    head, workers = groups(the(documents, "RayJob"))
    served = _ports(workers)
    assert served == {pods.EXPORTER: loaded.metrics.port}
    assert _ports(head) == {"gcs-server": 6379, "dashboard": run.DASHBOARD}
    for name in [*served, *_ports(head)]:
        assert re.fullmatch(r"[a-z](-?[a-z0-9]){0,14}", name)
    added = {"metrics": run.RAY_METRICS_PORT}  # by the operator, on every Ray pod
    endpoints = the(documents, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert {e["port"] for e in endpoints} <= {*served, *added}
    policy = _policy(documents, workers)
    let_in = {
        rule["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]: {p["port"] for p in rule["ports"]}
        for rule in policy["spec"]["ingress"]
        if "ports" in rule
    }
    assert let_in == {
        "kuberay-operator": {run.DASHBOARD},
        "prometheus": {*(({**served, **added})[e["port"]] for e in endpoints)},
    }


@each_case
def test_selectors_meet_the_pods_they_are_meant_for(file: Path, overlay: str | None) -> None:
    documents = all_documents(file, overlay)
    head, workers = groups(the(documents, "RayJob"))
    submitter = the(documents, "RayJob")["spec"]["submitterPodTemplate"]
    budget = the(documents, "PodDisruptionBudget")["spec"]
    policy = _policy(documents, workers)["spec"]["podSelector"]
    monitor = the(documents, "PodMonitor")["spec"]["selector"]
    files = the(documents, "Deployment")["spec"]
    spread = workers["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"]
    met = {
        name: [_meets(selector, template) for template in (head["template"], workers["template"], submitter)]
        for name, selector in {
            "budget": budget["selector"], "policy": policy, "monitor": monitor, "spread": spread,
            "files": files["selector"],
        }.items()
    }  # fmt: skip
    assert met == {
        "budget": [True, True, False],
        "policy": [True, True, True],
        "monitor": [True, True, False],
        "spread": [False, True, False],
        "files": [False, False, False],
    }
    assert _meets(files["selector"], files["template"])
    assert budget["minAvailable"] == 1 + workers["replicas"]


def test_the_rules_and_panels_of_the_manifest_are_those_of_the_program() -> None:
    documents = monitoring.documents()
    assert the(documents, "PrometheusRule")["spec"]["groups"] == alerts.groups()
    assert yaml.safe_load((K8S / "monitoring/rules.yaml").read_text()) == {"groups": alerts.groups()}
    [board] = the(documents, "ConfigMap")["data"].values()
    assert board == dashboard.text() == (K8S / "monitoring/dashboard.json").read_text()
    jobs = {r["replacement"] for e in the(documents, "PodMonitor")["spec"]["podMetricsEndpoints"]
            for r in e["relabelings"]}  # fmt: skip
    assert alerts.JOB in jobs


def test_plain_prometheus_scrapes_the_same_job_from_where_runs_leave_their_addresses() -> None:
    settings = yaml.safe_load((K8S / "monitoring/prometheus.yaml").read_text())
    [job] = settings["scrape_configs"]
    assert job["job_name"] == alerts.JOB
    assert settings["global"]["scrape_interval"] == f"{alerts.SCRAPE_S}s"
    assert all((K8S / "monitoring" / name).exists() for name in settings["rule_files"])
    [discovery] = job["file_sd_configs"]
    assert discovery["refresh_interval"] == settings["global"]["scrape_interval"]
    [pattern] = discovery["files"]
    loaded = config.parse(job_file(run_documents(EXAMPLE, None)), "job.yaml")
    assert (loaded.run.dir / "prometheus/rank-0.json").match(pattern)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_plain_prometheus_takes_its_configuration() -> None:
    ran = subprocess.run(
        ["promtool", "check", "config", "prometheus.yaml"],
        cwd=K8S / "monitoring",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_queue_of_the_overlay_is_the_one_of_the_example() -> None:
    documents = list(yaml.safe_load_all((K8S / "examples/queues.yaml").read_text()))
    queue = the(documents, "LocalQueue")
    assert (
        the(run_documents(EXAMPLE, "kueue"), "RayJob")["metadata"]["labels"][run.QUEUE_LABEL]
        == (queue["metadata"]["name"])
    )
    cluster_queue = the(documents, "ClusterQueue")
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    [group] = cluster_queue["spec"]["resourceGroups"]
    flavours = {d["metadata"]["name"] for d in of_kind(documents, "ResourceFlavor")}
    for flavour in group["flavors"]:
        assert flavour["name"] in flavours
        assert [r["name"] for r in flavour["resources"]] == group["coveredResources"]


def test_the_quota_of_the_example_holds_three_runs_as_it_says() -> None:
    hard = yaml.safe_load((K8S / "examples/quota.yaml").read_text())["spec"]["hard"]
    documents = all_documents(EXAMPLE, "cpu")
    needed = {"requests": [0.0, 0.0], "limits": [0.0, 0.0]}
    job, deployment = the(documents, "RayJob"), the(documents, "Deployment")
    cluster = groups(job)
    once = [(deployment["spec"]["template"], 1)]
    each = [(job["spec"]["submitterPodTemplate"], 1), (cluster[0]["template"], 1)]
    each += [(cluster[1]["template"], cluster[1]["replicas"])]
    for template, count in [*once, *((template, 3 * count) for template, count in each)]:
        for kind, total in needed.items():
            amounts = template["spec"]["containers"][0]["resources"][kind]
            total[0] += count * _cores(amounts["cpu"])
            total[1] += count * _bytes(amounts["memory"])
    for kind, (cores, size) in needed.items():
        assert cores <= _cores(hard[f"{kind}.cpu"])
        assert size <= _bytes(hard[f"{kind}.memory"])


def test_ray_in_the_manifest_is_ray_in_the_image() -> None:
    assert f"ray=={run.RAY_VERSION}\n" in (ROOT / "constraints.txt").read_text()


def test_metrics_named_in_files_by_hand_exist() -> None:
    known = {metric.name for metric in TABLE}
    for path in (K8S / "README.md", K8S / "monitoring/prometheus.yaml"):
        assert set(re.findall(r"\bdistrobust_[a-z_]+", path.read_text())) <= known


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir=runs/My_Run"], "run.dir ends in 'My_Run', wanted at most 47"),
        (["run.dir=runs/" + "a" * 48], "pass --set kubernetes.name=..."),
        (["kubernetes.name=1st"], "kubernetes.name: "),
        (["kubernetes.memory=8GB"], "kubernetes.memory: "),
        (["data.path=/data/cifar10"], "data.path: got /data/cifar10, wanted a relative path, or one below /shared"),
        (["run.dir=../elsewhere"], "run.dir: got ../elsewhere"),
        (["pretrain=null", "model.weights=/tmp/x.pt"], "model.weights: got /tmp/x.pt"),
        (["metrics.port=null"], "metrics.port: got None, wanted a number above 0"),
        (["metrics.port=0"], "metrics.port: got 0"),
        (["--overlay", "tpu"], "--overlay: got 'tpu', wanted one of cpu, gpu, kueue"),
    ],
)
def test_what_no_cluster_can_run_is_one_clear_line(overrides: list[str], message: str) -> None:
    arguments = overrides if overrides[0].startswith("--") else [a for o in overrides for a in ("--set", o)]
    result = CliRunner().invoke(commands, ["k8s", "render", str(EXAMPLE), *arguments])
    assert result.exception is not None
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.output == ""


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_render_prints_the_documents(file: Path) -> None:
    result = CliRunner().invoke(commands, ["k8s", "render", str(file), "--overlay", "gpu"])
    assert list(yaml.safe_load_all(result.output)) == run_documents(file, "gpu")


def test_set_comes_after_the_overlay_and_reaches_the_pods() -> None:
    documents = run_documents(
        EXAMPLE, "gpu", "cluster.workers=8", "kubernetes.memory=32Gi", "kubernetes.image=registry/mine:1",
        "kubernetes.bandwidth=100M", "run.dir=/shared/runs/other", "kubernetes.name=mine", "cluster.interface=net1",
    )  # fmt: skip
    job = the(documents, "RayJob")
    [container] = groups(job)[1]["template"]["spec"]["containers"]
    assert job["metadata"]["name"] == "mine"
    assert container["resources"]["limits"]["memory"] == "32Gi"
    assert {c["image"] for t in templates(documents) for c in t["spec"]["containers"]} == {"registry/mine:1"}
    annotations = groups(job)[1]["template"]["metadata"]["annotations"]
    assert set(annotations.values()) == {"100M"}
    assert {inside.SHARED / "runs/other"} == {Path(job_file(documents)["run"]["dir"])}
    assert job_file(documents)["cluster"]["interface"] == "net1"
    assert the(documents, "PodDisruptionBudget")["spec"]["minAvailable"] == 9


def _ports(group: Document) -> dict[str, int]:
    [container] = group["template"]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def _policy(documents: list[Document], workers: Document) -> Document:
    [policy] = [
        document
        for document in of_kind(documents, "NetworkPolicy")
        if _meets(document["spec"]["podSelector"], workers["template"])
    ]
    return policy


def _meets(selector: dict[str, Any], template: Document) -> bool:
    labels = template["metadata"]["labels"]
    wanted = selector.get("matchLabels", {}).items()
    among = selector.get("matchExpressions", ())
    assert all(expression["operator"] == "In" for expression in among)
    return wanted <= labels.items() and all(labels.get(e["key"]) in e["values"] for e in among)


def _cores(amount: str) -> float:
    return float(amount[:-1]) / 1000 if amount.endswith("m") else float(amount)


def _bytes(amount: str) -> int:
    number, power = re.fullmatch(r"(\d+)([MG])i", amount).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** {"M": 2, "G": 3}[power]
