"""The manifests for KubeRay: Kubernetes and KubeRay take them, a typo in any key fails, and they fit each other."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from diagonal.config import Config
from jobs.runs.arguments import run_options
from serve.settings import ServeSettings
from tests.infra.manifests import (
    FOLDER,
    RAY_GROUP,
    Document,
    core_faults,
    crds,
    every_pod,
    faults,
    load,
    manifests,
    pod_faults,
    ray_validator,
    templates,
)

DOCUMENTS = manifests()
RAY = [name for name, document in DOCUMENTS.items() if document["apiVersion"] == RAY_GROUP]
CORE = [name for name in DOCUMENTS if name not in RAY]
PODS = list(every_pod())
FREE = {
    "labels",
    "annotations",
    "matchLabels",
    "rayStartParams",
    "nodeSelector",
    "requests",
    "limits",
    "clusterSelector",
}
JOBS, SERVICE, JOB = "RayCluster/diagonal-jobs", "RayService/diagonal", "RayJob/distill-"


def cluster_of(name: str) -> Document:
    spec: Document = DOCUMENTS[name]["spec"]
    return spec.get("rayClusterConfig", spec)


def containers() -> Iterator[tuple[str, Document, Document]]:
    """(where, pod, container) of every container that we describe."""
    for name, role, template in PODS:
        for container in template["spec"]["containers"]:
            yield f"{name} {role}", template["spec"], container


@pytest.mark.parametrize("name", CORE)
def test_kubernetes_takes_it(name: str) -> None:
    assert core_faults(DOCUMENTS[name]) == []


@pytest.mark.parametrize("name", RAY)
def test_kubernetes_takes_the_pods_of(name: str) -> None:
    assert pod_faults(DOCUMENTS[name]) == []


@pytest.mark.parametrize("name", RAY)
def test_kuberay_takes_it(name: str) -> None:
    assert faults(DOCUMENTS[name]) == []


def mappings(value: Any) -> Iterator[Document]:
    """Every mapping whose keys the schemas name, the outermost first."""
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            if key not in FREE:
                yield from mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from mappings(inner)


@pytest.mark.slow
def test_a_typo_in_any_key_of_a_core_resource_fails() -> None:
    for name in CORE:
        for number, mapping in enumerate(mappings(DOCUMENTS[name])):
            for key in mapping:
                spoiled = copy.deepcopy(DOCUMENTS[name])
                place = list(mappings(spoiled))[number]
                place[f"{key}x"] = place.pop(key)
                assert _refused(spoiled), f"{name}: {key}"


def _refused(document: Document) -> bool:
    try:
        return bool(core_faults(document))
    except (KeyError, AttributeError, kubernetes_validate.InvalidSchemaError, kubernetes_validate.SchemaNotFoundError):
        return True  # without a kind or a version it is nothing that Kubernetes knows


@pytest.mark.parametrize("name", RAY)
def test_a_typo_in_any_key_fails_for_kuberay(name: str) -> None:
    """Every eleventh key, counted through the document: a share of each part of it."""
    places = [(number, key) for number, mapping in enumerate(mappings(DOCUMENTS[name])) for key in mapping]
    for number, key in places[::11]:
        spoiled = copy.deepcopy(DOCUMENTS[name])
        place = list(mappings(spoiled))[number]
        place[f"{key}x"] = place.pop(key)
        assert _refused_by_kuberay(spoiled), key


def _refused_by_kuberay(document: Document) -> bool:
    return not ray_validator(str(document.get("kind", "RayJob")), crds()).is_valid(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscaling"), "yes"),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "eight"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "securityContext", "runAsUser"), "nobody"),
        (("spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "resources", "limits", "memory"), "1 TB"),
    ],
)
def test_a_wrong_type_or_value_fails_for_kuberay(path: tuple[Any, ...], value: object) -> None:
    spoiled = copy.deepcopy(DOCUMENTS[JOBS])
    place: Any = spoiled
    for step in path[:-1]:
        place = place[step]
    assert path[-1] in place if isinstance(place, dict) else True
    place[path[-1]] = value
    assert faults(spoiled)


def test_a_key_that_comes_twice_fails() -> None:
    with pytest.raises(ValueError, match="twice"):
        load("spec: {minReplicas: 1, minReplicas: 2}")


def test_the_kustomization_names_what_exists_and_only_that() -> None:
    (document,) = load((FOLDER / "kustomization.yaml").read_text())
    assert set(document) == {"apiVersion", "kind", "namespace", "resources"}
    apart = {"kustomization.yaml", "rayjob.yaml", "rayservice.yaml"}
    assert set(document["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - apart
    named = {one["metadata"].get("namespace", document["namespace"]) for one in DOCUMENTS.values()}
    assert named == {document["namespace"]} == {DOCUMENTS["Namespace/diagonal"]["metadata"]["name"]}


def test_pods_are_what_the_namespace_enforces() -> None:
    """Kubernetes' `restricted` profile: nobody is root, becomes it, or keeps a capability; the root is read-only."""
    labels = DOCUMENTS["Namespace/diagonal"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for where, pod, container in containers():
        assert container["securityContext"] == confined, where
        about = pod["securityContext"]
        assert about["runAsNonRoot"] and about["runAsUser"] == 1000, where
        assert about["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), where
        assert all(set(volume) <= {"name", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"]), where
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts["/tmp"] == "tmp" and mounts["/home/diagonal"] == "home", "the root cannot be written"
    for name in (JOBS, SERVICE):
        assert cluster_of(name)["autoscalerOptions"]["securityContext"] == confined


def test_every_container_has_bounds_and_those_that_stay_have_probes() -> None:
    for where, _, container in containers():
        bounds = container["resources"]
        assert {"cpu", "memory"} <= set(bounds["requests"]) and set(bounds["requests"]) <= set(bounds["limits"]), where
        gpus = bounds["limits"].get("nvidia.com/gpu")
        assert gpus == bounds["requests"].get("nvidia.com/gpu"), where
        if "submitter" not in where:
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container), where


def test_jobs_and_service_run_the_image_of_this_version(repository: Path) -> None:
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    images = {container["image"] for _, _, container in containers()}
    assert len(images) == 1 and images.pop().rpartition(":")[2] == f"{version}-gpu"
    (ray,) = re.findall(r"^ray==(\S+)$", (repository / "constraints.txt").read_text(), re.MULTILINE)
    assert {cluster_of(name)["rayVersion"] for name in (JOBS, SERVICE)} == {ray}


def test_ray_asks_everybody_for_a_token_that_a_secret_holds() -> None:
    for name in (JOBS, SERVICE):
        assert cluster_of(name)["authOptions"] == {"mode": "token", "secretName": "diagonal-ray-token"}
    for where, _, container in containers():
        names = {one["name"] for one in container.get("env", [])}
        assert not {one for one in names if one.startswith("RAY_AUTH")}, f"{where}: KubeRay sets them"
        assert not any("value" in one for one in container.get("env", [])), f"{where}: secrets come from secrets"


def test_whatever_is_named_exists(repository: Path) -> None:
    """Service accounts, priorities, claims, volumes; secrets are those that docs/cluster.md has one make."""
    made = set(re.findall(r"create secret generic (\S+)", (repository / "docs" / "cluster.md").read_text()))
    secrets = {cluster_of(name)["authOptions"]["secretName"] for name in (JOBS, SERVICE)}
    for where, pod, container in containers():
        assert f"ServiceAccount/{pod['serviceAccountName']}" in DOCUMENTS, where
        assert f"PriorityClass/{pod['priorityClassName']}" in DOCUMENTS, where
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes), where
        claims = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
        assert all(f"PersistentVolumeClaim/{claim['claimName']}" in DOCUMENTS for claim in claims), where
        secrets |= {one["secretRef"]["name"] for one in container.get("envFrom", [])}
        secrets |= {one["valueFrom"]["secretKeyRef"]["name"] for one in container.get("env", [])}
    assert secrets == made
    for name in (JOBS, SERVICE):
        mounted = {mount["name"] for mount in cluster_of(name)["autoscalerOptions"]["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in templates(DOCUMENTS[name])["head"]["spec"]["volumes"]}


def test_only_heads_hold_a_token_of_kubernetes() -> None:
    for name, role, template in PODS:
        account = DOCUMENTS[f"ServiceAccount/{template['spec']['serviceAccountName']}"]
        assert account["automountServiceAccountToken"] == (role == "head"), f"{name} {role}"


def matches(selector: Document, labels: Document) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def test_heads_come_before_viewers_and_viewers_before_jobs() -> None:
    value = {
        name: DOCUMENTS[f"PriorityClass/{name}"]["value"]
        for name in ("diagonal-head", "diagonal-service", "diagonal-jobs")
    }
    assert value["diagonal-head"] > value["diagonal-service"] > value["diagonal-jobs"]
    for name, role, template in PODS:
        kind = "diagonal-head" if role == "head" else "diagonal-service" if name == SERVICE else "diagonal-jobs"
        assert template["spec"]["priorityClassName"] == kind, f"{name} {role}"


def test_every_disruption_budget_keeps_one_role_and_lets_nodes_drain() -> None:
    budgets = [one for one in DOCUMENTS.values() if one["kind"] == "PodDisruptionBudget"]
    kept = set()
    for budget in budgets:
        assert isinstance(budget["spec"]["minAvailable"], int), "nothing else counts for pods of a RayCluster"
        ((name, role),) = [
            (name, role)
            for name, role, template in PODS
            if matches(budget["spec"]["selector"], template["metadata"]["labels"])
        ]
        kept.add((name, role))
        for group in cluster_of(name)["workerGroupSpecs"]:
            assert group["groupName"] != role or group["minReplicas"] > budget["spec"]["minAvailable"]
    assert kept == {(JOBS, "head"), (SERVICE, "head"), (SERVICE, "cpu"), (SERVICE, "gpu-serve")}


def policies() -> dict[str, Document]:
    return {name: one["spec"] for name, one in DOCUMENTS.items() if one["kind"] == "NetworkPolicy"}


def test_every_pod_is_under_the_policy_of_its_part_and_nobody_else_gets_in() -> None:
    everybody = policies()["NetworkPolicy/diagonal-nobody"]
    assert everybody == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, role, template in PODS:
        part = "service" if name == SERVICE else "jobs"
        over = [one for one, spec in policies().items() if matches(spec["podSelector"], template["metadata"]["labels"])]
        assert sorted(over) == sorted(["NetworkPolicy/diagonal-nobody", f"NetworkPolicy/diagonal-{part}"]), role


@pytest.mark.parametrize(
    ("part", "reached"),
    [
        ("jobs", {"kuberay-operator": [8265], "diagonal/monitoring": [8080]}),
        ("service", {"kuberay-operator": [8265, 8000], "diagonal/front": [8000], "diagonal/monitoring": [8080]}),
    ],
)
def test_rays_own_ports_are_reached_from_the_same_cluster_alone(part: str, reached: dict[str, list[int]]) -> None:
    own = {"podSelector": {"matchLabels": {"diagonal/part": part}}}
    spec, found = policies()[f"NetworkPolicy/diagonal-{part}"], {}
    assert {"podSelector": spec["podSelector"]} == own and spec["policyTypes"] == ["Ingress"]
    for rule in spec["ingress"]:
        (who,) = rule["from"]
        assert all(selector["matchLabels"] for selector in who.values()), "an empty selector would be everybody"
        if "ports" not in rule:
            assert who == own
            continue
        assert "namespaceSelector" in who, "other pods of this namespace are nobody"
        labels = {**who["namespaceSelector"]["matchLabels"], **who.get("podSelector", {}).get("matchLabels", {})}
        found[labels.get("app.kubernetes.io/name") or next(iter(labels))] = [port["port"] for port in rule["ports"]]
    assert found == reached


def test_ports_agree() -> None:
    """What probes, policies and the front ask for is what containers open and Serve is told."""
    (serve,) = load(DOCUMENTS[SERVICE]["spec"]["serveConfigV2"])
    for where, _, container in containers():
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        if ports:
            assert ports["metrics"] == 8080 and ports.get("serve", 8000) == serve["http_options"]["port"] == 8000, where
            assert ("serve" in ports) == where.startswith(SERVICE), where
            probe = container["livenessProbe"]["httpGet"]
            assert (probe["path"], probe["port"]) == ("/api/healthz", 52365), "asked without a token"
    (port,) = DOCUMENTS[SERVICE]["spec"]["serveService"]["spec"]["ports"]
    assert port["port"] == port["targetPort"] == 8000


def pools(name: str) -> dict[str, Document]:
    """The worker groups of a cluster by the label that jobs and service ask for."""
    groups = {group["labels"]["pool"]: group for group in cluster_of(name)["workerGroupSpecs"]}
    assert all(group["groupName"] == pool for pool, group in groups.items())
    return groups


def room(group: Document) -> tuple[float, int, int]:
    """CPUs and GPUs of a node, and how many nodes there may be."""
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    return float(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0)), group["maxReplicas"]


def test_the_service_fits_in_its_pools() -> None:
    (serve,) = load(DOCUMENTS[SERVICE]["spec"]["serveConfigV2"])
    told = ServeSettings.from_arguments(serve["applications"][0]["args"])
    cpus, gpus, nodes = room(pools(SERVICE)[told.replica_pool])
    each = min(gpus // told.replica_gpus, cpus // told.replica_cpus)
    assert nodes * each >= told.max_replicas >= told.replicas >= 2
    cpus, _, nodes = room(pools(SERVICE)[told.gateway_pool])
    assert nodes * cpus >= told.max_gateways * told.gateway_cpus + told.store_cpus
    assert told.database.startswith("postgresql://") and ":" not in told.database.partition("//")[2].partition("@")[0]


@pytest.mark.parametrize("pool", ["cpu", "gpu-serve"])
def test_the_services_files_are_on_mounted_volumes(pool: str) -> None:
    (serve,) = load(DOCUMENTS[SERVICE]["spec"]["serveConfigV2"])
    told = ServeSettings.from_arguments(serve["applications"][0]["args"])
    (container,) = pools(SERVICE)[pool]["template"]["spec"]["containers"]
    writable = {mount["mountPath"]: not mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert any(told.release.startswith(f"{path}/") and not own for path, own in writable.items())
    assert (writable.get(told.data) is True) == (pool == told.gateway_pool), "the store's node alone writes there"


def test_a_replica_keeps_what_it_compiled_where_it_may_write() -> None:
    (serve,) = load(DOCUMENTS[SERVICE]["spec"]["serveConfigV2"])
    settings = ServeSettings.from_arguments(serve["applications"][0]["args"])
    cache = Config.from_preset("wan-1.3b", settings.release_settings).serve.compile_cache
    (container,) = pools(SERVICE)[settings.replica_pool]["template"]["spec"]["containers"]
    mounts = [mount for mount in container["volumeMounts"] if cache.startswith(f"{mount['mountPath']}/")]
    assert len(mounts) == 1 and not mounts[0].get("readOnly", False)


def test_the_job_runs_a_file_that_exists_with_settings_that_exist_on_nodes_that_exist(repository: Path) -> None:
    spec = DOCUMENTS[JOB]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": DOCUMENTS[JOBS]["metadata"]["name"]}
    program, file, *arguments = shlex.split(spec["entrypoint"])
    assert program == "python" and (repository / file).is_file()
    told = run_options(arguments, "")
    config = Config.from_preset(told.preset, told.settings)
    group = pools(JOBS)[config.train.pool]
    cpus, gpus, nodes = room(group)
    a_node = min(gpus // config.train.gpus_per_worker, cpus // config.train.cpus_per_worker)
    assert nodes * a_node >= config.train.workers >= 1
    paths = [config.model.path, config.pairs.prompts, config.train.storage]
    for template in (templates(DOCUMENTS[JOBS])["head"], group["template"]):
        (container,) = template["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert all(any(f"{path}/".startswith(f"{mount}/") for mount in mounts) for path in paths)
