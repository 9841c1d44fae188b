"""The store behind a url."""

from __future__ import annotations

from pathlib import Path

from ringworld_workers.store.base import Store, StoreError
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.store.retry import Patience


def open_store(url: str, patience: Patience | None = None) -> Store:
    """The store behind a url; nothing is read or written yet.

    Args:
        url: ``file:///absolute/folder``, or relative to the working directory; or
            ``s3://BUCKET/PREFIX``, whose endpoint, region and credentials come from where AWS's
            tools take them.
        patience: how long a call may take; default: the store's own.

    Raises:
        StoreError: unknown scheme, or no path.
    """
    scheme, separator, path = url.partition("://")
    if not separator:
        raise StoreError("open", url, "not a store url; write file:// and the folder's path")
    if scheme not in ("file", "s3"):
        raise StoreError("open", url, f"no store for {scheme}://; there are file:// and s3://")
    if scheme == "s3":
        # Here, because boto3 takes a third of a second to import.
        from ringworld_workers.store.s3_store import S3Store

        return S3Store(url, patience=patience)
    if not path:
        raise StoreError("open", url, "no folder is named; write file:///path/to/folder")
    return FileStore(Path(path), patience=patience)
