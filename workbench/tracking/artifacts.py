"""Small files of a run, read from wherever the store keeps them."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.errors import DataError, StorageError

from .runs import open_client, storage_errors

MIB = 2**20
LIMIT_MIB = 64.0
ADAPTER, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
VALIDATION = "predictions/validation.parquet"
TRACEBACK = "traceback.txt"


class TooLarge(StorageError):
    """A file is larger than what is fetched for a look at it."""


def names(tracking_uri: str, run_id: str, folder: str | None = None) -> dict[str, int]:
    """Path and size in bytes of the files in a folder of a run's artifacts, not of those below it; none, if there is no
    such folder.

    Raises:
        StorageError: the store cannot be read.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        found = client.list_artifacts(run_id, folder)
    return {file.path: int(file.file_size or 0) for file in found if not file.is_dir}


def fetch(tracking_uri: str, run_id: str, path: str, limit_mib: float = LIMIT_MIB) -> bytes | None:
    """A file of a run's artifacts; None, if there is none.

    Raises:
        TooLarge: it has more than `limit_mib` MiB.
        StorageError: the store cannot be read.
    """
    size = names(tracking_uri, run_id, path.rpartition("/")[0] or None).get(path)
    if size is None:
        return None
    if size > limit_mib * MIB:
        raise TooLarge(f"{path} has {size / MIB:,.0f} MiB; only files of at most {limit_mib:g} MiB are fetched.")
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri), TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


def header(safetensors: bytes) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: `dtype` and `shape` of each tensor, by key.

    Raises:
        DataError: it is no such file.
    """
    try:
        (length,) = struct.unpack("<Q", safetensors[:8])
        if length > len(safetensors) - 8:
            raise ValueError("it is cut off")
        found = json.loads(safetensors[8 : 8 + length])
        found.pop("__metadata__", None)
        return {
            str(key): {"dtype": str(tensor["dtype"]), "shape": [int(size) for size in tensor["shape"]]}
            for key, tensor in found.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{ADAPTER} cannot be read: {error}") from error


def parquet(content: bytes) -> pd.DataFrame:
    """A Parquet file as a table.

    Raises:
        DataError: it is no such file.
    """
    try:
        return pq.read_table(io.BytesIO(content)).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{VALIDATION} cannot be read: {str(error).splitlines()[0]}") from error
