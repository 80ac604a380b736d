"""Folders of runs and releases on local disk or S3, behind one interface; a write appears whole or not at all."""

from diagonal.storage.folder import Folder
from diagonal.storage.remote import ConditionsRefused, StorageError, VersionChanged

__all__ = ["ConditionsRefused", "Folder", "StorageError", "VersionChanged"]
