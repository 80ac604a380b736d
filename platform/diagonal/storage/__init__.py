"""Folders of runs and releases on local disk or S3, behind one interface; a write appears whole or not at all."""

from diagonal.storage.folder import Folder
from diagonal.storage.remote import StorageError

__all__ = ["Folder", "StorageError"]
