"""What the run of a study holds."""

from __future__ import annotations

from dataclasses import dataclass

from .runs import open_client, storage_errors


@dataclass(frozen=True)
class Facts:
    """Of the run of a study: `params` such as `training.steps`, `metrics` such as `seconds/load`."""

    params: dict[str, str]
    metrics: dict[str, float]


def facts(tracking_uri: str, run_id: str) -> Facts:
    """Read them.

    Raises:
        StorageError: the store cannot be read, or holds no such run.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        found = client.get_run(run_id).data
    return Facts(dict(found.params), dict(found.metrics))
