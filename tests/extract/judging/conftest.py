"""Storages, as the store's own tests have them."""

from tests.store.conftest import s3, s3_server, storage

__all__ = ["s3", "s3_server", "storage"]
