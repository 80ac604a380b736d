"""THIRD_PARTY.md names each package that is pinned, at its version, with a licence."""

from __future__ import annotations

from infra.third_party import PINNED, licence, pinned

PAGE = PINNED.parent / "THIRD_PARTY.md"


def test_every_pinned_package_is_on_the_page() -> None:
    rows = {
        tuple(cell.strip() for cell in line.split("|")[1:3])
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    }
    missing = set(pinned(PINNED.read_text()).items()) - rows
    assert not missing, "renew it: python -m infra.third_party THIRD_PARTY.md"


def test_versions_and_markers_are_read() -> None:
    assert pinned("# no\na==1.0\nb-c===2 ; sys_platform == 'linux'\n") == {"a": "1.0", "b-c": "2"}


def test_a_licence_is_what_the_package_says() -> None:
    assert licence("av") == "BSD-3-Clause" and licence("numpy").startswith("BSD-3-Clause")
