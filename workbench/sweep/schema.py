"""The JSON schema of study files, for editors that complete and check them (YAML language servers)."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from workbench.training.config import Positive

from .baselines import CHOICES
from .domains import RANGES
from .fields import Field, fields
from .spec import StudyFile

Schema = dict[str, Any]


def json_schema() -> Schema:
    """The schema (draft 2020-12). It cannot see what spans several keys; `load_study` checks everything."""
    schema = StudyFile.model_json_schema()
    schema["$schema"] = GenerateJsonSchema.schema_dialect
    schema["$defs"] |= {"range": _range(), "tokens": _tokens()} | {f"method_{name}": _method(name) for name in CHOICES}
    schema["properties"]["methods"] |= {
        # an entry labelled with a method's name is of that method, unless it says otherwise
        "properties": {
            name: {"if": _names_method(), "then": _any(), "else": _ref(f"method_{name}")} for name in CHOICES
        },
        "additionalProperties": {"allOf": [_names_method(), _any()]},
    }
    return schema


def _names_method() -> Schema:
    return {"type": "object", "required": ["method"]}


def _any() -> Schema:
    """The method that the key `method` names."""
    cases = [{"if": {"properties": {"method": {"const": name}}}, "then": _ref(f"method_{name}")} for name in CHOICES]
    return {"properties": {"method": {"enum": list(CHOICES)}}, "allOf": cases}


def _method(name: str) -> Schema:
    known = fields(name)
    return {
        "title": CHOICES[name].title,
        "type": ["object", "null"] if not any(field.required for field in known.values()) else "object",
        "properties": {"method": {"const": name}} | {field.name: _field(field) for field in known.values()},
        "required": [field.name for field in known.values() if field.required],
        "additionalProperties": False,
    }


def _field(field: Field) -> Schema:
    if field.tokens:
        value: Schema = _ref("tokens") if field.required else {"anyOf": [_ref("tokens"), {"type": "null"}]}
    else:
        value = TypeAdapter(field.type).json_schema()
        value.pop("default", None)
    return {"description": field.description, "anyOf": _domain(value, number=_takes_numbers(field))}


def _takes_numbers(field: Field) -> bool:
    kinds = {"integer", "number"}
    value = TypeAdapter(field.type).json_schema()
    return not field.tokens and any(part.get("type") in kinds for part in (value, *value.get("anyOf", ())))


def _domain(value: Schema, *, number: bool) -> list[Schema]:
    """A plain value, or the forms that stand for several."""
    forms = [
        value,
        _object({"value": value, "distribution": {"const": "constant"}}, required=["value"]),
        _object(
            {"values": {"type": "array", "items": value, "minItems": 1}, "distribution": {"const": "categorical"}},
            required=["values"],
        ),
    ]
    return [*forms, _ref("range")] if number else forms


def _range() -> Schema:
    number = {"type": "number"}
    return _object(
        {
            "min": number,
            "max": number,
            "distribution": {"enum": list(RANGES)},
            "q": {"type": "number", "exclusiveMinimum": 0, "description": "Only min, min + q, min + 2q ... up to max."},
        },
        required=["min", "max"],
    )


def _tokens() -> Schema:
    text = {"type": "string", "minLength": 1}
    count = {"anyOf": _domain(TypeAdapter(Positive).json_schema(), number=True)}
    return {
        "anyOf": [
            _list({"anyOf": [{"type": "integer", "minimum": 0}, text]}),
            _object({"new_tokens": _list(text)}, required=["new_tokens"]),
            *(_object({key: count}, required=[key]) for key in ("most_frequent", "most_informative")),
        ]
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "uniqueItems": True}


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}
