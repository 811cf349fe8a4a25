"""The base of report.json's sections: typed entries, their names in the file, and numbers that JSON cannot hold.

A figure that is not finite is NaN or infinite in memory and null in the file. `Measured` reads null as NaN, `to_json` writes
NaN and infinity as null; nothing else converts the two.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, WithJsonSchema

from mla_convert.core.words import plain

# A JSON object whose entries are not known: as it is read from a file, or as it goes into one.
JsonObject: TypeAlias = dict[str, Any]

LARGEST = 1e18  # a larger figure is no measurement
OLD_NAMES = {"beyond": "probes"}  # entries of schema 1, by their names today
# Names that pydantic adds to the path of an error where an entry has two forms.
FORMS = ("evaluated", "skipped")
# Messages of pydantic that name Python's types, in JSON's words.
WORDS = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be an object"),
    "list_type": "should be a list",
    "string_type": "should be a string",
    "none_required": "should be null",
}


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("should be a number")
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError("should be a finite number")
    return value


def _amount(value: object) -> float:
    if (number := _number(value)) < 0:
        raise ValueError("should be no less than 0")
    return number


def _count(value: object) -> int:
    number = _amount(value)
    if not isinstance(number, int):
        raise ValueError("should be a whole number")
    return number


def _measured(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("should be a number or null")
    if abs(value) > LARGEST:
        return math.copysign(math.inf, value)
    return value


# Whole numbers stay whole, so that a file that is read and written again holds the same characters.
Number = Annotated[float, PlainValidator(_number), WithJsonSchema({"type": "number"})]
Amount = Annotated[float, PlainValidator(_amount), WithJsonSchema({"type": "number", "minimum": 0})]
Count = Annotated[int, PlainValidator(_count), WithJsonSchema({"type": "integer", "minimum": 0})]
# In sections its default is NaN: an entry that a report lacks reads as one that was not measured, and stays absent when
# the report is written again.
Measured = Annotated[
    float,
    PlainValidator(_measured),
    WithJsonSchema({"type": ["number", "null"], "description": "null: not finite, or not measured"}),
]


class Section(BaseModel):
    """An object in report.json. Entries that it does not name are kept, and written again.

    Entries are attributes; `section["name"]`, `in` and `get` take them by their names in the file.
    """

    model_config = ConfigDict(extra="allow", populate_by_name=True, validate_assignment=True, protected_namespaces=())

    def entries(self) -> JsonObject:
        """The given entries by name in report.json, in the order of the fields; entries without a field come last."""
        fields = type(self).model_fields
        given = {
            field.serialization_alias or name: getattr(self, name)
            for name, field in fields.items()
            if name in self.model_fields_set
        }
        return {**given, **(self.model_extra or {})}

    def as_dict(self) -> JsonObject:
        """As in report.json."""
        return {name: to_json(value) for name, value in self.entries().items()}

    def __getitem__(self, name: str) -> Any:
        return self.entries()[OLD_NAMES.get(name, name)]

    def __contains__(self, name: str) -> bool:
        return OLD_NAMES.get(name, name) in self.entries()

    def get(self, name: str, default: Any = None) -> Any:
        """The entry of that name in report.json, or `default` where it was not given."""
        return self.entries().get(OLD_NAMES.get(name, name), default)


def to_json(value: Any) -> Any:
    """Data as JSON holds it: sections as objects, tuples as lists, NaN and infinity as None."""
    if isinstance(value, Section):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_problem(error: ValidationError) -> str:
    """The first entry that is wrong, and what it should be, in one line."""
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part not in (*FORMS, "[key]"):
            where += f".{part}"
    where = plain(where.removeprefix(".")) or "it"
    if problem["type"] == "missing":
        return f"it has no {where}"
    message = WORDS.get(problem["type"]) or problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    shown = repr(problem["input"])
    return f"{where} {message[0].lower()}{message[1:]}, and is {shown[:60]}{'…' * (len(shown) > 60)}"
