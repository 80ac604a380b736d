"""Promotion: a release's manifest says that it may be served, and by what judgement; or that it may not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from diagonal.model.manifest import MANIFEST
from diagonal.model.release import Release
from diagonal.storage import Folder
from jobs.runs.run import main, say


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="a release folder or s3:// URI")
    parser.add_argument("--reason", action="append", required=True, help="what was found; may be repeated")
    parser.add_argument("--refuse", action="store_true", help="say that it may not be served")
    return parser.parse_args(argv)


def promote(
    uri: str, reasons: Sequence[str], promoted: bool = True, scores: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the judgement into the manifest of a whole release, and return it; nothing else changes but its scores,
    where new ones are given."""
    Release.load(uri)
    folder = Folder(uri)
    manifest = {**folder.read_json(MANIFEST), "promoted": promoted, "promotion_reasons": list(reasons)}
    manifest = {**manifest, "scores": dict(scores)} if scores else manifest
    folder.write_json(MANIFEST, manifest)
    return manifest


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    manifest = promote(options.release, options.reason, not options.refuse)
    say(f"release {manifest['name']} in {options.release} is {'not ' if options.refuse else ''}promoted")


if __name__ == "__main__":
    main("jobs.promote")
