"""Study files and checkpoints with something wrong in them, as hypothesis draws them."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from ruamel.yaml import YAML

CANARY = "touch canary"  # what a file would do if it could

NUMBERS = (0, 1, 2, 3, -1, 7, 10**3, 10**6, 10**9, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30))
FRACTIONS = (0.0, 0.5, 1.0, -0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
NAMES = (
    *("..", ".", "/", "../..", "../outside", "/etc/passwd", "~/x", "a/../../b", "..\\..\\x", "C:\\x", "nul\0byte"),
    *(
        "x" * 300,
        "",
        " ",
        "\n",
        "${HOME}",
        "$(touch canary)",
        "`touch canary`",
        "; touch canary;",
        "a b",
        "-rf",
        "--help",
    ),
    *(
        "file:///etc/passwd",
        "https://user:secret@127.0.0.1:9/x",
        "https://token@127.0.0.1:9/x",
        "\u202e",
        "\ud800",
        "é",
    ),
    *("\x07bell", "true", "null", "12", "1e3", "lora", "all-linear", ".*", "(a+)+$", "[", "query", "value", "default"),
)
WORDS = (
    *("!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system", "!!python/module:subprocess"),
    *(
        "!!binary aGVsbG8=",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!timestamp 2001-01-01",
        "!local x",
        "!!int abc",
        "!!str 5",
    ),
    *(
        "&a [1, 2]",
        "*a",
        "&r [*r]",
        "<<: *a",
        "{<<: {a: 1}}",
        "? [a, b]",
        "|\n  text",
        ">-\n  text",
        "%YAML 1.1",
        "---",
    ),
    *(
        "...",
        "0x" + "f" * 40,
        "9" * 5000,
        "0o17",
        "1_000",
        ".nan",
        ".inf",
        "-.inf",
        "~",
        "yes",
        "off",
        "{",
        "}",
        "[",
        "]",
    ),
    *('"', "'", ":", "- ", "#", "\t", "@", "`", '"\\ud800"', '"\\0"', '"\\x07"', "trust_remote_code: true"),
)


# -------------------------------------------------------------------- plain values


def values() -> st.SearchStrategy[Any]:
    """Anything that may stand in the place of a value."""
    leaves = st.one_of(
        st.sampled_from(NUMBERS),
        st.sampled_from(FRACTIONS),
        st.sampled_from(NAMES),
        st.none(),
        st.booleans(),
        st.integers(-5, 40),
        st.floats(0, 1),
    )
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES[-14:]), inner, max_size=3),
        max_leaves=5,
    )


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything within."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


@st.composite
def tuned(draw: st.DrawFn, data: Any) -> Any:
    """Plain values with a few numbers and choices that are others, as people change them."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 4))):
        *way, last = draw(
            st.sampled_from([path for path in places(data) if path[0] in ("training", "methods", "search")])
        )
        owner = data
        for key in way:
            owner = owner[key]
        if isinstance(owner[last], (bool, int, float, list)):
            owner[last] = near(draw, owner[last])
        elif isinstance(owner, dict) and len(owner) > 1 and way[:1] == ["methods"]:
            del owner[last]
    return data


@st.composite
def changed(draw: st.DrawFn, data: Any) -> Any:
    """Plain values with one thing changed: a key or value deleted, doubled, renamed, nested, replaced, or turned into
    what is near it."""
    data = copy.deepcopy(data)
    known = places(data)
    if not known:
        return draw(values())
    *way, last = draw(st.sampled_from(known))
    owner = data
    for key in way:
        owner = owner[key]
    how = draw(st.sampled_from(["near", "near", "near", "near", "delete", "replace", "rename", "nest", "add", "deep"]))
    value = owner[last]
    if how == "near":
        owner[last] = near(draw, value)
    elif how == "delete":
        del owner[last]
    elif how == "replace":
        owner[last] = draw(values())
    elif how == "rename" and isinstance(owner, dict):
        owner[draw(st.sampled_from(NAMES))] = owner.pop(last)
    elif how == "nest":
        owner[last] = draw(st.sampled_from([[value], {"value": value}, {"values": [value]}, {"min": value}]))
    elif how == "deep":
        for _ in range(draw(st.sampled_from([3, 60, 400]))):
            value = [value]
        owner[last] = value
    elif isinstance(owner, dict):
        owner[draw(st.sampled_from([*NAMES, "trust_remote_code", "overrides", "seed", "per_method"]))] = draw(values())
    else:
        owner.append(value)
    return data


def near(draw: st.DrawFn, value: Any) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([1, 2, 3, 5, 8, value + 1, max(1, value // 2)]))
    if isinstance(value, float):
        return value * draw(st.sampled_from([0.5, 0.9, 1.0, 2.0]))
    if isinstance(value, str):
        return draw(st.sampled_from([value, value + "x", value.upper(), f"../{value}", f"{value}/.."]))
    if isinstance(value, list):
        return draw(st.sampled_from([value[::-1], value[:1], value + value[:1], []]))
    return dict(reversed(value.items())) if isinstance(value, dict) else 1


# -------------------------------------------------------------------- study files


def written(data: Any) -> str:
    """As YAML, or as JSON, which is YAML, where that cannot be written."""
    stream = io.StringIO()
    try:
        YAML(typ="safe", pure=True).dump(data, stream)
    except Exception:
        return json.dumps(data, default=str)
    return stream.getvalue()


def bomb(text: str) -> str:
    """Aliases of aliases: billions of values in a few lines."""
    lines = ["bomb0: &b0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"bomb{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 10)]
    return text + "\n" + "\n".join(lines) + "\n"


def merged(text: str) -> str:
    """With an anchor and a merge."""
    return "base: &base {r: 2}\n" + text + "\nmore: {<<: *base}\n"


ENCODED: tuple[Callable[[str], bytes], ...] = (
    *(lambda text: text.encode("utf-16", "replace"), lambda text: text.encode("utf-32", "replace")),
    *(lambda text: b"\xef\xbb\xbf" + text.encode("utf-8", "replace"), lambda text: text.encode("latin-1", "replace")),
    *(lambda text: text.encode("utf-7", "replace"), lambda text: text.replace("\n", "\r").encode("utf-8", "replace")),
)


@st.composite
def study_files(draw: st.DrawFn, studies: list[str]) -> bytes:
    """A study file with one to three changes: of its structure, its words, its bytes or its encoding."""
    text = draw(st.sampled_from(studies))
    data = YAML(typ="safe", pure=True).load(text)
    kind = draw(st.sampled_from(["tuned", "tuned", "tuned", "values", "values", "words", "bytes", "whole"]))
    if kind == "tuned":
        return written(draw(tuned(data))).encode()
    if kind == "values":
        for _ in range(draw(st.integers(1, 3))):
            data = draw(changed(data))
        return written(data).encode("utf-8", "surrogatepass")
    if kind == "words":
        words = text.split(" ")
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(words) - 1))
            new = draw(st.one_of(st.sampled_from(WORDS), st.sampled_from(NAMES), st.sampled_from(words)))
            words[place] = new
        return " ".join(words).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        return draw(damaged(text.encode()))
    whole = draw(st.sampled_from([bomb, merged, *ENCODED]))(text)
    return whole if isinstance(whole, bytes) else whole.encode()


# -------------------------------------------------------------------- bytes and safetensors


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are flipped, cut out, cut off, doubled or added."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), start + draw(st.sampled_from([1, 2, 8, 64, 10**9])))
        how = draw(st.sampled_from(["flip", "flip", "delete", "double", "insert"]))
        if how == "flip" and content:
            content = content[:start] + bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 :]
        elif how == "delete":
            content = content[:start] + content[end:]
        elif how == "double":
            content = content[:end] + content[start:]
        else:
            content = content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
    return content


class Exploit:
    """Pickled, it runs a program when it is read."""

    def __reduce__(self) -> Any:
        import os

        return os.system, (CANARY,)


TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "X9", "")


@st.composite
def safetensors_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with something wrong in its bytes, its header or its length; or a pickle."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = draw(
        st.sampled_from(["bytes", "numbers", "numbers", "tensor", "tensor", "about", "json", "length", "other"])
    )
    if kind == "numbers":
        place = draw(st.integers(0, len(body) - 4))
        return content[: 8 + size] + body[:place] + draw(st.binary(min_size=4, max_size=4)) + body[place + 4 :]
    if kind == "bytes":
        return draw(damaged(content))
    if kind == "length":
        claimed = draw(st.sampled_from([0, 1, size - 1, size + 1, size + 8, 2**20, 2**32, 2**40, 2**63, 2**64 - 1]))
        return struct.pack("<Q", claimed) + content[8:]
    if kind == "other":
        zeros = bytes(draw(st.sampled_from([0, 1, 7, 8, 9, 100])))
        return draw(st.sampled_from([b"", zeros, pickle.dumps(Exploit()), b"PK\x03\x04" + content, content + zeros]))
    if kind == "tensor":
        names = sorted(name for name in header if name != "__metadata__")
        name = draw(st.sampled_from(names))
        about = header[name]
        how = draw(st.sampled_from(["type", "shape", "flat", "name", "swap", "delete", "offsets", "huge"]))
        if how == "type":
            about["dtype"] = draw(st.sampled_from(TYPES))
        elif how == "shape":
            about["shape"] = about["shape"][::-1]
        elif how == "flat":
            product = 1
            for length in about["shape"]:
                product *= length
            about["shape"] = draw(st.sampled_from([[product], [1, product], [product, 1], [0], []]))
        elif how == "name":
            header[draw(st.sampled_from([*NAMES, name + "x", "memory.0.x", "optimizer.steps"]))] = header.pop(name)
        elif how == "swap":
            other = draw(st.sampled_from(names))
            header[name], header[other] = header[other], header[name]
        elif how == "delete":
            del header[name]
        elif how == "offsets":
            about["data_offsets"] = draw(st.lists(st.sampled_from(NUMBERS), max_size=3))
        else:
            about["shape"], about["data_offsets"] = [2**40], [0, 2**42]
    elif kind == "about":
        header["__metadata__"] = draw(
            st.one_of(
                st.dictionaries(st.sampled_from(["step", "config", "format", "x"]), st.sampled_from(ABOUT), max_size=4),
                st.fixed_dictionaries(
                    {"step": st.sampled_from(ABOUT), "config": st.just(header["__metadata__"].get("config", ""))}
                ),
                values(),
            )
        )
    else:
        header = draw(changed(header))
    text = json.dumps(header, allow_nan=True, ensure_ascii=True).encode()
    return struct.pack("<Q", len(text)) + text + body


ABOUT = (
    *(
        "0",
        "1",
        "2",
        "3",
        "-1",
        "1_0",
        "٣",
        "1e3",
        "nan",
        "inf",
        "9" * 30,
        "",
        " 2",
        "2.0",
        "0x2",
        "True",
        "null",
        "{}",
    ),
    *("[]", "x" * 1000),
)


@st.composite
def json_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON file with something wrong in its values or its bytes."""
    if draw(st.booleans()):
        data = json.loads(content)
        for _ in range(draw(st.integers(1, 2))):
            data = draw(changed(data))
        return json.dumps(data).encode()
    return draw(st.one_of(damaged(content), st.sampled_from([b"", b"[" * 10**5, b"{" * 10**5, b"\xff\xfe", b"null"])))


def read_bytes(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
