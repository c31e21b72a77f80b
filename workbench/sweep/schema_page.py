"""docs/reference.md: every key of a study file, from its JSON schema and the methods' configurations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter

from workbench.training.config import PER_METHOD

from .baselines import BASELINES, CHOICES
from .fields import Field, fields
from .schema import Schema, json_schema

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
HEAD = """# Reference of the study file

Written by `workbench schema --format markdown`; a test compares the two. [study.md](study.md) explains what is only
listed here. A key that is not listed is refused, with the nearest one that there is. The schema for editors is
[study.schema.json](../studies/study.schema.json), or what `workbench schema` prints.
"""
METHODS = """## `methods`

{about}

An entry whose label is a method's name is of that method; under any other label `method` names it. A field takes a
value, or one of the forms that are searched:

| form | |
|---|---|
| `{{value: V}}` | the same as `V`; `distribution: constant` |
| `{{values: [V, ...]}}` | one of them; `distribution: categorical` |
| `{{min: A, max: B}}` | a number between them, ends included; `distribution`: {distributions} |
| `{{min: A, max: B, q: S}}` | only A, A + S, A + 2S ... up to B |

`token_indices` and `trainable_token_indices` take tokens: a list of ids or words, `{{new_tokens: [...]}}`,
`{{most_frequent: N}}`, `{{most_informative: N}}`, where N may be searched ([study.md](study.md#tokens)).

### Settings of every method

Those of `training` that an entry may set or search for itself; where it does not, `training` says. `zero_shot` has
none.

{settings}"""


def page() -> str:
    """The page, in Markdown."""
    schema = json_schema()
    names = [name for name in schema["properties"] if name != "study"]
    rows = [("`study`", "required", schema["properties"]["study"]["description"])]
    for name in names:
        value = schema["properties"][name]
        about = value.get("description") or _section(schema, value)["description"]
        rows.append((f"[`{name}`](#{name})", _required(schema, name), about))
    parts = [HEAD, _table(("section", "", ""), rows)]
    parts += [part for name in names for part in (_methods(schema) if name == "methods" else _keys(schema, name))]
    return "\n".join(parts).rstrip()


def _keys(schema: Schema, name: str) -> Iterator[str]:
    """A section and those within it."""
    found = _section(schema, schema["properties"][name])
    yield _part("##", name, found)
    for key, value in found["properties"].items():
        if nested := _section(schema, value):
            yield _part("###", f"{name}.{key}", nested)


def _part(level: str, name: str, found: Schema) -> str:
    rows = [
        (f"`{key}`", _kind(value), _required(found, key) or _shown(value.get("default")), value.get("description", ""))
        for key, value in found["properties"].items()
    ]
    table = _table(("key", "type", "default", ""), rows)
    return f"{level} `{name}`\n\n{found['description']}\n\n{table}"


def _methods(schema: Schema) -> Iterator[str]:
    training = schema["$defs"]["TrainingSection"]["properties"]
    rows = [(f"`{name}`", _kind(training[name]), training[name]["description"]) for name in PER_METHOD]
    distributions = schema["$defs"]["range"]["properties"]["distribution"]["enum"]
    yield METHODS.format(
        about=schema["properties"]["methods"]["description"],
        distributions=", ".join(f"`{name}`" for name in distributions),
        settings=_table(("field", "type", ""), rows),
    )
    for name, choice in CHOICES.items():
        about = "baselines" if name in BASELINES else name
        yield f"### `{name}`\n\n{choice.title}: [methods/{about}.md](methods/{about}.md).\n"
        own = [field for field in fields(name).values() if not field.training]
        if own:
            defaults = {field.name: _default(field) for field in dataclasses.fields(choice.config)}
            yield _table(
                ("field", "type", "default", ""),
                [_field(field, defaults[field.name]) for field in own],
            )


def _field(field: Field, default: Any) -> tuple[str, str, str, str]:
    kind = "tokens" if field.tokens else _kind(TypeAdapter(field.type).json_schema())
    return f"`{field.name}`", kind, "required" if field.required else _shown(default), field.description


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _section(schema: Schema, value: Schema) -> Schema:
    """The section that a key holds; nothing if it holds something else."""
    for part in (value, *value.get("anyOf", ())):
        if "$ref" in part:
            return schema["$defs"][part["$ref"].rpartition("/")[2]]
    return {}


def _required(section: Schema, key: str) -> str:
    return "required" if key in section.get("required", ()) else ""


def _kind(value: Schema, known: Schema | None = None) -> str:
    """The type of a value, in words."""
    known = known or value.get("$defs", {})
    if "anyOf" in value:
        kinds = [_kind(part, known) for part in value["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in value:
        found = known.get(value["$ref"].rpartition("/")[2])
        return f"mapping of {', '.join(f'`{key}`' for key in found['properties'])}" if found else "section, below"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if value["type"] == "array":
        one = value.get("items")
        return f"list of {_kind(one, known)}{'' if 'enum' in one else 's'}" if one else "list"
    if value["type"] == "object":
        return "mapping"
    limits = [f"{sign} {value[key]}" for key, sign in BOUNDS.items() if key in value]
    return ", ".join([TYPES[value["type"]], *limits])


def _shown(value: Any) -> str:
    """A default as a study file has it; "" for none."""
    return "" if value is None or value in ([], {}) else f"`{json.dumps(value)}`".replace('"', "")


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
