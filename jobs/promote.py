"""Promotion: a release's manifest says that it may be served, and by what judgement; or that it may not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jobs.runs.artefacts import promote
from jobs.runs.run import main, say


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="a release folder or s3:// URI")
    parser.add_argument("--reason", action="append", required=True, help="what was found; may be repeated")
    parser.add_argument("--refuse", action="store_true", help="say that it may not be served")
    return parser.parse_args(argv)


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    manifest = promote(options.release, options.reason, not options.refuse)
    say(f"release {manifest['name']} in {options.release} is {'not ' if options.refuse else ''}promoted")


if __name__ == "__main__":
    main("jobs.promote")
