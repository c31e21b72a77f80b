"""What the address (URL) of a page says: the study, filters, what is selected. A copied address opens the same view.

Each page's part of it is kept for the session, so that whoever comes back to a page finds it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import streamlit as st

STUDY = "study"
# keys of the session: the page and the study, what the address was on each page, and the last two values of each key
_PAGE, _STUDY, _KEPT, _KNOWN = "address-page", "address-study", "address-kept", "address-known"


def enter(page: str) -> None:
    """Called before a page is drawn: an address without a study gets back the study of the page before, and what this
    page had for it."""
    state = st.session_state
    if state.get(_PAGE) == page:
        return
    state[_PAGE] = page
    for key in state.get(_KNOWN, {}):
        if key in state:
            del state[key]  # what was held on the page before: now the address counts
    state[_KNOWN] = {}
    study = state.get(_STUDY)
    if study is None or STUDY in st.query_params:
        return
    own = state.get(_KEPT, {}).get(page, {})
    for key, values in (own if own.get(STUDY) == [study] else {STUDY: [study]}).items():
        if values:
            st.query_params[key] = values


def get(key: str, default: str = "") -> str:
    """The value of a key, or the default."""
    return st.query_params.get(key, default)


def get_all(key: str) -> list[str]:
    """All values of a key."""
    return st.query_params.get_all(key)


def put(key: str, value: str | Sequence[str] | None) -> None:
    """Set a key; None, "" or no values remove it."""
    values = [value] if isinstance(value, str) else list(value or [])
    values = [each for each in values if each]
    if values != get_all(key):
        if values:
            st.query_params[key] = values
        else:
            del st.query_params[key]
    state = st.session_state
    state.setdefault(_KEPT, {})[state.get(_PAGE)] = {name: get_all(name) for name in st.query_params}
    if key == STUDY and values:
        state[_STUDY] = values[0]
    known = state.setdefault(_KNOWN, {})
    known[key] = (known.get(key, ((), ()))[1], tuple(values))


def forget() -> None:
    """Remove everything but the study, of the address and of the widgets that are not yet drawn."""
    for key in {*st.query_params, *st.session_state.get(_KNOWN, {})} - {STUDY}:
        put(key, None)
        if key in st.session_state:
            del st.session_state[key]


def hold(
    key: str, options: Iterable[Any] | None, default: Any, many: bool = False, kind: Callable[[str], Any] = str
) -> None:
    """Give the widget that is drawn next, which has this `key` and no default of its own, the value of the address;
    after it `put` its value.

    What the user sets counts until the address changes otherwise (a link, the browser's "back").

    Args:
        options: the values that may be; None: any that `kind` takes. Others give a warning and the default.
        default: of an address without the key.
        many: whether the value is a list.
        kind: makes a value of text where there are no options; ValueError: there is none.
    """
    asked = tuple(get_all(key))
    known = st.session_state.setdefault(_KNOWN, {})
    names = None if options is None else {str(option): option for option in options}
    if key in st.session_state and asked in known.get(key, ()):
        known[key] = (asked, known[key][1])
        current = st.session_state[key]
        if names is None or all(str(value) in names for value in (current if many else [current])):
            return
    found, unknown = [], []
    for text in asked:
        try:
            found.append(kind(text) if names is None else names[text])
        except (KeyError, ValueError):
            unknown.append(repr(text))
    if unknown:
        st.warning(f"The address asks for {key} = {', '.join(unknown)}, which is not there.")
    st.session_state[key] = (found or list(default or [])) if many else (found[0] if found else default)
    known[key] = (asked, asked)


def link(page: str, **state: Any) -> str:
    """A relative address of another page, such as `trial?study=x&trial=3`; keys without a value are left out."""
    known: Mapping[str, Any] = {key: value for key, value in state.items() if value not in (None, "", [])}
    path = "./" if page == "studies" else page  # Streamlit serves the first page at the root, and only there
    return f"{path}?{urlencode(known, doseq=True)}" if known else path
