"""The page of registered models: their versions, what changed from one to another, and which one an alias points at."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pandas as pd
import streamlit as st

from workbench.errors import StorageError
from workbench.tracking import registry
from workbench.tracking.compare_formats import number
from workbench.tracking.leaderboard import brief
from workbench.tracking.registry import Version
from workbench.tracking.runs import public_url

from . import address, commands, shell

MODEL, VERSION, AGAINST = "model", "version", "against"  # keys of the address
ALIAS = "registry-alias"  # keys of the session: which alias is about to be moved,
ASKED = "registry-asked"  # to which version, as long as that is not confirmed,
MOVED = "registry-moved"  # and what was done
CHAMPION = "champion"
FACTS = {
    "study": "study",
    "trial": "trial",
    "label": "label",
    "method": "method",
    "base": "base model",
    "base_revision": "its revision",
    "base_fingerprint": "hash of its weights",
    "data": "data",
    "data_fingerprint": "hash of the data",
    "labels": "labels",
    "seeds": "seeds",
    "trainable_params": "trainable parameters",
    "adapter_bytes": "bytes of the adapter",
}


def page() -> None:
    """Draw the page."""
    uri = shell.store()
    heading, choice = st.columns([3, 2], vertical_alignment="bottom")
    heading.header("Registry", anchor=False)
    try:
        models = registry.versions(uri)
        if not models:
            st.info("No model has been registered yet.", icon=":material/inventory_2:")
            _first_step(uri)
            return
        address.hold(MODEL, models, next(iter(models)))
        name = choice.selectbox("Registered model", list(models), key=MODEL)
        if address.get(MODEL) not in ("", name):
            for key in (VERSION, AGAINST):
                address.put(key, None)
                st.session_state.pop(key, None)
        address.put(MODEL, name)
        versions = models[name]
    except StorageError as error:
        st.error(str(error), icon=":material/database_off:")
        _first_step(uri)
        return
    if done := st.session_state.pop(MOVED, ""):
        st.success(done, icon=":material/check:")
    version, before = _choose(versions, _table(registry.table(versions)))
    left, right = st.columns([3, 2], gap="large")
    with left:
        _changes(before, version)
    with right:
        _aliases(uri, versions, version)
        _commands(uri, version)
    with st.expander("Model card", icon=":material/description:"):
        st.markdown(version.description or "It has none.")


def _first_step(uri: str) -> None:
    command = shlex.join(["register", "STUDY", "--name", "NAME", "--alias", CHAMPION, *commands.store_options(uri)])
    st.markdown(
        "A trial becomes a version of a registered model by this command, or at the end of a sweep whose study file "
        f"has a section `register`:\n\n```shell\n{commands.COMMAND} {command}\n```"
    )


def _table(table: pd.DataFrame) -> pd.DataFrame:
    """Draw a row a version, newest first; what was drawn."""
    text, count = st.column_config.TextColumn, st.column_config.NumberColumn
    metrics = ", ".join(dict.fromkeys(table["metric"]))
    interval = [
        "" if pd.isna(low) else f"{number(low)} to {number(high)}"
        for low, high in zip(table["low"], table["high"], strict=True)
    ]
    columns = {
        "version": count("version", pinned=True),
        "aliases": st.column_config.ListColumn("aliases"),
        "label": text("method"),
        "value": count(metrics or "metric", format="%.4f"),
        "interval": text("95 % interval", help="Of the noise of the examples, not of other seeds"),
        "split": text("split"),
        "trainable_params": count("trainable", format="localized"),
        "adapter_bytes": count("adapter file", format="bytes"),
        "study": text("study"),
        "trial": text("trial"),
        "base": text("base model"),
        "created": st.column_config.DatetimeColumn("registered", format="distance"),
    }
    shown = table.assign(interval=interval)
    st.dataframe(shown, hide_index=True, column_order=list(columns), column_config=columns, placeholder="")
    return shown[list(columns)]


def _choose(versions: list[Version], table: pd.DataFrame) -> tuple[Version, Version | None]:
    """Let the user choose the version that the rest of the page is about, and the one to compare it with."""
    by_number = {version.number: version for version in versions}
    first, second, download = st.columns([1, 1, 4], vertical_alignment="bottom")
    with first:
        address.hold(VERSION, by_number, versions[0].number)
        number = st.selectbox("Version", list(by_number), key=VERSION, format_func=lambda n: _words(by_number[n]))
        address.put(VERSION, number)
    others = [other for other in by_number if other != number]
    if others:
        before = next((other for other in others if int(other) < int(number)), others[0])
        champion = next((other for other in others if CHAMPION in by_number[other].aliases), before)
        if number in (address.get(AGAINST), st.session_state.get(AGAINST)):
            st.session_state.pop(AGAINST, None)
            address.put(AGAINST, None)
        with second:
            address.hold(AGAINST, others, champion)
            against = st.selectbox("Against", others, key=AGAINST, format_func=lambda n: _words(by_number[n]))
            address.put(AGAINST, against)
    csv = table.to_csv(index=False)
    download.download_button("CSV", csv, f"{versions[0].name}.csv", "text/csv", icon=":material/download:")
    return by_number[number], by_number[against] if others else None


def _words(version: Version) -> str:
    return " @".join([version.number, *version.aliases])


# -------------------------------------------------------------------- what changed


def _changes(before: Version | None, version: Version) -> None:
    st.subheader("What changed", anchor=False)
    if before is None:
        st.caption("This is the only version.")
        return
    names = [f"version {before.number}", f"version {version.number}"]
    measured = pd.DataFrame(metrics(before, version), columns=["metric", *names, "change"])
    precise = dict.fromkeys(names, st.column_config.NumberColumn(format="%.4f"))
    st.dataframe(
        measured,
        hide_index=True,
        placeholder="",
        column_config=precise | {"change": st.column_config.NumberColumn(format="%+.4f")},
    )
    if contest := version.facts.get("contest"):
        st.caption(f"When it was registered: {contest}.")
    told = pd.DataFrame(settings(before, version), columns=["setting", *names])
    if told.empty:
        st.caption("Both are of the same trial, or of trials with the same settings.")
    else:
        st.dataframe(told, hide_index=True, placeholder="")


def metrics(before: Version, now: Version) -> list[tuple[str, float, float, float]]:
    """The metrics of two versions: name, both values, and how far the second is above the first."""
    rows = []
    for split in ("test", "validation"):
        old, new = (version.metrics.get(split, {}) for version in (before, now))
        for metric in {**old, **new}:
            a, b = (known.get(metric, [float("nan")])[0] for known in (old, new))
            rows.append((f"{split} {metric}", a, b, b - a))
    return rows


def settings(before: Version, now: Version) -> list[tuple[str, str, str]]:
    """What two versions differ in beside their metrics: name, and both values."""
    told: list[tuple[str, Any, Any]] = [
        (words, before.facts.get(key, ""), now.facts.get(key, "")) for key, words in FACTS.items()
    ]
    old, new = before.hyperparameters, now.hyperparameters
    told += [(name, old.get(name, ""), new.get(name, "")) for name in {**old, **new}]
    return [(words, brief(first), brief(second)) for words, first, second in told if first != second]


# -------------------------------------------------------------------- aliases


def _aliases(uri: str, versions: list[Version], version: Version) -> None:
    st.subheader("Promote", anchor=False)
    holders = {alias: found.number for found in versions for alias in found.aliases}
    for alias, holder in sorted(holders.items()):
        st.markdown(f"`models:/{version.name}@{alias}` is version **{holder}**.")
    st.session_state.setdefault(ALIAS, CHAMPION)
    alias = st.selectbox(
        "Alias",
        sorted({CHAMPION, *holders, st.session_state[ALIAS] or CHAMPION}),
        key=ALIAS,
        accept_new_options=True,
        width=240,
        help="Choose one, or type a new one",
    )
    if not alias:
        return
    if holders.get(alias) == version.number:
        st.caption(f"`@{alias}` points at version {version.number} already.")
        return
    if st.session_state.get(ASKED) != (version.uri, alias):
        if st.button(f"Let @{alias} point at version {version.number} ...", icon=":material/north:"):
            st.session_state[ASKED] = (version.uri, alias)
            st.rerun()
        return
    now = f"It points at version {holders[alias]} now" if alias in holders else "It points at none yet"
    st.warning(
        f"`models:/{version.name}@{alias}` will be version {version.number}. {now}. Whoever loads the model by this "
        "alias gets the other version from then on; servers that run keep theirs until they are started again.",
        icon=":material/warning:",
    )
    yes, no, _ = st.columns([2, 1, 2])
    if yes.button("Yes, promote it", type="primary"):
        del st.session_state[ASKED]
        try:
            registry.set_alias(uri, version.name, alias, version.number)
        except StorageError as error:
            st.error(str(error), icon=":material/error:")
            return
        st.session_state[MOVED] = f"models:/{version.name}@{alias} is version {version.number} now."
        st.rerun()
    if no.button("Cancel"):
        del st.session_state[ASKED]
        st.rerun()


def _commands(uri: str, version: Version) -> None:
    st.subheader("Use it", anchor=False)
    name = f"models:/{version.name}@{version.aliases[0]}" if version.aliases else version.uri
    predict = ["predict", name, "--input", "rows.csv", *commands.store_options(uri)]
    serve = ["mlflow", "models", "serve", "-m", name, "--env-manager", "local"]
    where = f"MLFLOW_TRACKING_URI={shlex.quote(public_url(uri))}"
    st.code(f"{commands.COMMAND} {shlex.join(predict)}", language="shell", wrap_lines=True)
    st.code(f"{where} {shlex.join(serve)}", language="shell", wrap_lines=True)
    facts = version.facts
    if facts.get("study"):
        shell.page_link(
            "trial", f"Trial {facts['trial']} of {facts['study']}", study=facts["study"], trial=facts["trial"]
        )
    if facts.get("parity"):
        st.caption(f"{facts['parity']}.")
    if facts.get("labels", "[]") != "[]":
        st.caption(f"Labels: {', '.join(json.loads(facts['labels']))}.")
