"""Promotion: a release's manifest says that it may be served, and by what judgement; or that it may not."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

from collections.abc import Sequence

from jobs.runs import arguments
from jobs.runs.artefacts import promote
from jobs.runs.run import say


def work(argv: Sequence[str]) -> None:
    options = arguments.promote(argv, __doc__ or "")
    manifest = promote(options.release, options.reason, not options.refuse)
    say(f"release {manifest['name']} in {options.release} is {'not ' if options.refuse else ''}promoted")
