"""docs/api.md is what the code says of itself: no route, field or bound of it is told otherwise."""

from __future__ import annotations

from pathlib import Path

from serve.api.reference_page import description, page

PAGE = Path(__file__).parents[3] / "docs" / "api.md"


def test_the_page_in_the_repository_is_the_one_that_the_service_gives() -> None:
    found = page(description())
    assert PAGE.read_text() == found, "renew it: python -m serve.api.reference_page docs/api.md"


def test_every_route_and_every_field_of_every_body_is_on_the_page() -> None:
    api, text = description(), PAGE.read_text()
    for path, operations in api["paths"].items():
        for method in operations.keys() - {"head"}:
            assert f"\n## {method.upper()} {path}\n" in text
    schemas = api["components"]["schemas"]
    for name in ("VideoRequest", "VideoAnswer", "InteractionRequest", "ProblemAnswer"):
        section = text.split(f"\n### {name}\n")[1].split("\n### ")[0]
        for field in schemas[name]["properties"]:
            assert f"\n| `{field}` |" in section


def test_bounds_and_links_are_shown() -> None:
    text = PAGE.read_text()
    assert "| `seed` | integer >= 0, <= 4294967295 |" in text
    names = {line[4:].lower() for line in text.splitlines() if line.startswith("### ")}
    links = {part.split(")")[0] for part in text.split("](#")[1:]}
    assert links and links <= names
