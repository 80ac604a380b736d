"""docs/api.md, generated from the service's own OpenAPI description and its socket's messages.

`python -m serve.api.reference_page docs/api.md` writes it; a test holds the page to the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from pydantic import BaseModel

from diagonal.metrics import NullBackend
from diagonal.storage import Folder
from serve.api.routes import create_app
from serve.gateway.gateway import Gateway
from serve.settings import ServeSettings
from serve.wire.messages import SessionPing, SessionPlayback, SessionStart, SessionStop
from serve.wire.schemas import InteractionRequest

_METHODS = ("get", "post", "delete")  # HEAD is GET without a body
_HEAD = """# The API

Generated from the service by `python -m serve.api.reference_page docs/api.md`; the running service describes itself at
`/openapi.json`. What keys, quotas, releases and reconnecting mean is told in [serving.md](serving.md).

Errors are `application/problem+json`: `type`, `title`, `status`, `detail`, `request_id`, and OpenAI's `error` with
`message`, `type`, `param` (the field), `code`. Besides the statuses that a route lists, each may answer 500 and 503.
"""
_SOCKET = """## WS /v1/realtime/video

Text messages that a viewer sends; [serving.md](serving.md) tells what comes back.
"""


def description() -> dict[str, Any]:
    """What `/openapi.json` answers; no store and no replica is needed for it."""
    gateway = SimpleNamespace(settings=ServeSettings())
    return create_app(cast(Gateway, gateway), NullBackend()).openapi()


def page(api: Mapping[str, Any]) -> str:
    """The whole page of an OpenAPI description, as Markdown."""
    schemas = api["components"]["schemas"]
    lines = [_HEAD]
    for path, operations in api["paths"].items():
        for method in _METHODS:
            if method in operations:
                lines += _route(f"{method.upper()} {path}", operations[method])
    lines.append(_SOCKET)
    for kind in (SessionStart, InteractionRequest, SessionPlayback, SessionPing, SessionStop):
        lines += _message(kind)
        schemas = {**kind.model_json_schema().get("$defs", {}), **schemas}
    lines.append("## Bodies\n")
    for name in sorted(schemas):
        if "properties" in schemas[name] and name not in ("HTTPValidationError", "ValidationError"):
            lines += _schema(name, schemas[name], level=3)
    return "\n".join(lines).rstrip() + "\n"


def _route(title: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    yield operation.get("description", operation["summary"]).strip() + "\n"
    parameters = operation.get("parameters", ())
    if parameters:
        yield "| parameter | in | type | |\n|---|---|---|---|"
        for one in parameters:
            needed = "required" if one.get("required") else ""
            parts = [needed, one.get("description", one["schema"].get("description", ""))]
            about = _cell(". ".join(part for part in parts if part))
            yield f"| `{one['name']}` | {one['in']} | {_type(one['schema'])} | {about} |"
        yield ""
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body, `{kind}`: {_type(content['schema'])}.\n"
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            what = ", ".join(
                f"`{kind}` {_type(body.get('schema', {}))}".strip() for kind, body in answer.get("content", {}).items()
            )
            yield f"- **{status}** {what or answer['description']}"
    refused = [status for status in sorted(operation["responses"]) if status[0] in "34"]
    yield f"- also {', '.join(refused)}\n"


def _message(kind: type[BaseModel]) -> Iterator[str]:
    schema = kind.model_json_schema(by_alias=True)
    name = schema["properties"]["type"].get("const", kind.__name__) if "type" in schema["properties"] else kind.__name__
    yield from _schema(f"`{name}`", schema, level=3)


def _schema(title: str, schema: Mapping[str, Any], level: int) -> Iterator[str]:
    yield f"{'#' * level} {title}\n"
    if schema.get("description"):
        yield schema["description"].strip() + "\n"
    yield "| field | type | |\n|---|---|---|"
    required = schema.get("required", ())
    for field, value in schema["properties"].items():
        parts = ["required" if field in required else "", value.get("description", ""), _default(value)]
        yield f"| `{field}` | {_type(value)} | {_cell('. '.join(part for part in parts if part))} |"
    yield ""


def _default(schema: Mapping[str, Any]) -> str:
    value = schema.get("default")
    return "" if value in (None, "", [], {}) else f"Default {value!r}"


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words: its type or name, and its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[several] if one.get("type") != "null"))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    signs = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "maxLength": "characters <="}
    bounds = ", ".join(f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema)
    return f"{schema.get('type', '')}{' ' + bounds if bounds else ''}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: Sequence[str]) -> None:
    target = Path(arguments[0])
    Folder(str(target.parent)).write(target.name, page(description()).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
