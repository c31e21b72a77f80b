"""Versions in MLflow's model registry: written, found, compared, given an alias."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.errors import StorageError

from .runs import open_client, public_url, storage_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]*")
VERSION = "artifacts/version"  # the folder of a version that is no framework's: recipe, adapter, tokenizer
COLUMNS = ["name", "version", "aliases", "study", "trial", "label", "method", "base", "value", "low", "high", "split"]
COLUMNS += ["metric", "trainable_params", "adapter_bytes", "created", "run_id"]
PREFIX = "workbench."


@dataclass(frozen=True)
class Version:
    """A registered version.

    Attributes:
        name, number: of the registered model, and which version of it; numbers are text, as MLflow has them.
        aliases: that point at it.
        facts: what `workbench register` noted: study, trial, run_id, label, method, base, hyperparameters, ...
        description: its model card.
        created: milliseconds since the epoch.
    """

    name: str
    number: str
    aliases: tuple[str, ...]
    facts: dict[str, str]
    description: str
    created: int

    @property
    def uri(self) -> str:
        """`models:/NAME/NUMBER`."""
        return f"models:/{self.name}/{self.number}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """By field."""
        return json.loads(self.facts.get("hyperparameters", "{}"))

    @property
    def metrics(self) -> dict[str, dict[str, list[float]]]:
        """Value and ends of the interval, by split and metric."""
        return json.loads(self.facts.get("metrics", "{}"))


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a registered model.

    Raises:
        StorageError: it holds other characters than those of files.
    """
    if not NAME.fullmatch(name):
        raise StorageError(f"{name!r} is no name for a registered model: use letters, digits, blanks and . _ - only.")


def publish(
    client: MlflowClient, run_id: str, name: str, folder: Path, facts: Mapping[str, str], description: str
) -> Version:
    """Register a folder that MLflow's `save_model` wrote as the next version of a model.

    Args:
        run_id: of the trial that it is from.
        facts: become tags `workbench.<key>` of the version.
        description: Markdown.

    Raises:
        StorageError: the store refuses.
    """
    check_name(name)
    from mlflow.exceptions import MlflowException

    with storage_errors(client.tracking_uri):
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_run(run_id).info.experiment_id
        logged = client.create_logged_model(experiment, name.replace(".", "_"), source_run_id=run_id)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        made = client.create_model_version(
            name,
            logged.artifact_location,
            run_id=run_id,
            tags={f"{PREFIX}{key}": value for key, value in facts.items()},
            description=description,
            model_id=logged.model_id,
            await_creation_for=0,
        )
        return _version(made, ())


def set_alias(tracking_uri: str, name: str, alias: str, version: str) -> None:
    """Let an alias of a model point at this version, and no longer at another one.

    Raises:
        StorageError: the store refuses the alias, or holds no such version.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        client.set_registered_model_alias(name, alias, version)


def find(tracking_uri: str, uri: str) -> Version:
    """The version of a URI `models:/NAME@ALIAS` or `models:/NAME/NUMBER`.

    Raises:
        StorageError: the URI has another form, the store cannot be read, or there is no such version.
    """
    asked = URI.fullmatch(uri)
    if asked is None:
        raise StorageError(f"{uri!r} is no version: write models:/NAME@ALIAS or models:/NAME/NUMBER.")
    known = versions_of(tracking_uri, asked["name"])
    if not known:
        raise StorageError(
            f"{public_url(tracking_uri)} has no registered model {asked['name']!r}: workbench register STUDY --name "
            f"{asked['name']} makes it."
        )
    for version in known:
        if version.number == asked["version"] or (asked["alias"] and asked["alias"] in version.aliases):
            return version
    there = ", ".join("@".join([found.number, *found.aliases]) for found in known)
    raise StorageError(f"The registered model {asked['name']!r} has no {uri.removeprefix('models:/')}; it has {there}.")


def versions_of(tracking_uri: str, name: str) -> list[Version]:
    """All versions of a model, newest first; none if there is no such model.

    Raises:
        StorageError: the store cannot be read.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        return list(_versions(client, name))


def versions(tracking_uri: str) -> dict[str, list[Version]]:
    """The versions of all models, by name; of each the newest first.

    Raises:
        StorageError: the store cannot be read.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        names = sorted(model.name for model in _pages(client.search_registered_models))
        return {name: found for name in names if (found := list(_versions(client, name)))}


def table(found: list[Version]) -> pd.DataFrame:
    """One row a version, in this order.

    Columns: `COLUMNS`, where aliases is a list; value, low and high are the metric of its study with its interval, on
    the split named; created is UTC. What was not recorded is "" or NaN.
    """
    frame = pd.DataFrame([_row(version) for version in found], columns=COLUMNS)
    return frame.assign(created=pd.to_datetime(frame["created"], unit="ms", utc=True))


def fetch(tracking_uri: str, version: Version, folder: Path) -> Path:
    """Copy what a version holds into a folder; where its recipe, adapter and tokenizer then lie.

    None of its code comes along: whoever opens it does so with the workbench at hand.

    Raises:
        StorageError: the store cannot be read, or the version is not one of `workbench register`.
    """
    from mlflow.artifacts import download_artifacts

    with storage_errors(tracking_uri):
        source = open_client(tracking_uri).get_model_version(version.name, version.number).source
        try:
            return Path(download_artifacts(f"{source}/{VERSION}", dst_path=str(folder), tracking_uri=tracking_uri))
        except FileNotFoundError as error:
            raise StorageError(f"{version.uri} holds no {VERSION}: `workbench register` did not write it.") from error


def _versions(client: MlflowClient, name: str) -> Iterator[Version]:
    """All versions, newest first, with their aliases, which a search leaves out."""
    from mlflow.exceptions import MlflowException

    if not NAME.fullmatch(name):
        return
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return
        raise
    found = _pages(client.search_model_versions, filter_string=f"name = '{name}'")
    for version in sorted(found, key=lambda version: -int(version.version)):
        own = (alias for alias, number in aliases.items() if str(number) == str(version.version))
        yield _version(version, tuple(sorted(own)))


def _pages(search: Any, **query: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _version(found: ModelVersion, aliases: tuple[str, ...]) -> Version:
    facts = {key.removeprefix(PREFIX): value for key, value in found.tags.items() if key.startswith(PREFIX)}
    number, created = str(found.version), int(found.creation_timestamp or 0)
    return Version(found.name, number, aliases, facts, found.description or "", created)


def _row(version: Version) -> dict[str, Any]:
    facts, metric = version.facts, version.facts.get("metric", "")
    split = next((split for split in ("test", "validation") if metric in version.metrics.get(split, {})), "")
    value, low, high = version.metrics[split][metric] if split else [float("nan")] * 3
    shown = {name: facts.get(name, "") for name in ("study", "trial", "label", "method", "base", "metric", "run_id")}
    counts = {name: float(facts.get(name, "nan")) for name in ("trainable_params", "adapter_bytes")}
    return {
        "name": version.name,
        "version": int(version.number),
        "aliases": list(version.aliases),
        "split": split,
        "value": value,
        "low": low,
        "high": high,
        "created": version.created,
        **shown,
        **counts,
    }
