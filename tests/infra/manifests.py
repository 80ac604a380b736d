"""What Kubernetes' own servers would say of a manifest: its schema, and every key refused that it does not know."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kuberay"
CRDS_VARIABLE = "DIAGONAL_KUBERAY_CRDS"  # folder with KubeRay 1.7's ray.io_*.yaml
RAY_GROUP = "ray.io/v1"
KUBERNETES = "1.37"
Document = dict[str, Any]


class _Strict(yaml.CSafeLoader):
    """YAML as kubectl reads it: a key that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"{node.start_mark}: {twice} twice")
        return super().construct_mapping(node, deep)


def load(text: str) -> list[Document]:
    """The documents of a YAML file; `ValueError` where a key comes twice."""
    return list(yaml.load_all(text, _Strict))


def manifests() -> dict[str, Document]:
    """Every document of infra/kuberay but the kustomization, by kind/name."""
    found: dict[str, Document] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in load(path.read_text()):
            about = document.get("metadata", {})
            found[f"{document['kind']}/{about.get('name') or about.get('generateName', '')}"] = document
    found.pop("Kustomization/")
    return found


def crds() -> Path:
    """The folder with KubeRay's definitions; skips where nobody gave one."""
    folder = os.environ.get(CRDS_VARIABLE, "")
    if not folder:
        pytest.skip(f"{CRDS_VARIABLE} names no folder with KubeRay's definitions, which are no part of the project")
    return Path(folder)


@cache
def ray_validator(kind: str, folder: Path) -> Draft202012Validator:
    """A validator of RayCluster, RayJob or RayService that knows no key but the definition's."""
    definition = yaml.load((folder / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    assert definition["spec"]["names"]["kind"] == kind
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    return Draft202012Validator(schema)


def closed(schema: Any) -> Any:
    """A structural schema as JSON Schema in which an object has no other keys than those named."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if key not in ("properties", "default", "format")}
    if "properties" in schema:
        found["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    return found


def faults(document: Document) -> list[str]:
    """What is wrong with one document, as paths and reasons: its own schema, and each pod in it as a pod."""
    if document["apiVersion"] == RAY_GROUP:
        found = ray_validator(document["kind"], crds()).iter_errors(document)
        return [f"{error.json_path}: {error.message}" for error in found] + pod_faults(document)
    return core_faults(document)


def pod_faults(document: Document) -> list[str]:
    """What Kubernetes would refuse in the pods of a document, and in its name and labels."""
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates(document).values()]
    top = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}  # the same metadata as any kind
    return [fault for one in (*pods, top) for fault in core_faults(one)]


def core_faults(document: Document) -> list[str]:
    """What Kubernetes' own schema refuses."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def templates(document: Document) -> dict[str, Document]:
    """The pod templates of a document by role: head, each group of workers, submitter."""
    spec = document["spec"]
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
    found: dict[str, Document] = {}
    if "headGroupSpec" in cluster:
        found["head"] = cluster["headGroupSpec"]["template"]
        found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in spec:
        found["submitter"] = spec["submitterPodTemplate"]
    return found


def every_pod() -> Iterator[tuple[str, str, Document]]:
    """(document, role, template) of all Ray documents."""
    for name, document in manifests().items():
        if document["apiVersion"] == RAY_GROUP:
            for role, template in templates(document).items():
                yield name, role, template
