"""What is wrong with a configuration of Serve: Ray's schema, keys that it overlooks, the app's own arguments."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

Document = dict[str, Any]


def check(document: Document) -> ServeDeploySchema:
    """The configuration as Serve understands it; `ValueError` for whatever it, or the app, would not take as meant."""
    schema = ServeDeploySchema.model_validate(document)
    unknown = list(_unknown(document, schema.model_dump(exclude_unset=True, by_alias=False)))
    if unknown:
        raise ValueError(f"keys that Serve does not know, and would overlook: {unknown}")
    for application in document["applications"]:
        _check_application(application)
    return schema


def _check_application(document: Document) -> None:
    module, _, function = document["import_path"].partition(":")
    build = getattr(importlib.import_module(module), function, None)
    if build is None:
        raise ValueError(f"import_path {document['import_path']}: no such function")
    built = {one.name for one in build_app(build(document.get("args", {})), name=document["name"]).deployments}
    named = {one["name"] for one in document.get("deployments", [])}
    if named - built:
        raise ValueError(f"deployments {sorted(named - built)}: the application has {sorted(built)}")


def _unknown(told: Any, understood: Any, path: str = "") -> Iterator[str]:
    """The paths in `told` that are not in `understood`, at any depth."""
    if isinstance(told, dict) and isinstance(understood, dict):
        for key, value in told.items():
            here = f"{path}.{key}" if path else str(key)
            if key in understood:
                yield from _unknown(value, understood[key], here)
            else:
                yield here
    elif isinstance(told, list) and isinstance(understood, list):
        for number, (one, other) in enumerate(zip(told, understood, strict=True)):
            yield from _unknown(one, other, f"{path}[{number}]")
