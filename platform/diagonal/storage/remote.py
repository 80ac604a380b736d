"""What every storage speaks of: the scheme of remote URIs, and the failure of a storage. It imports no S3 library."""

from __future__ import annotations

REMOTE = "s3://"


class StorageError(RuntimeError):
    """A storage that does not answer, or refuses: what was tried, where, for how long, and the newest cause."""


class ConditionsRefused(StorageError):  # noqa: N818  # what was refused is the point
    """A storage that knows no conditional writes."""


class VersionChanged(Exception):  # noqa: N818  # the answer to a condition, not a fault
    """A file has another version than the one that a write was to replace."""
