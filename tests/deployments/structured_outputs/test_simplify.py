"""What a schema says to the grammar: annotations nothing, other dialects the same (A1)."""

import re
from typing import Any

import pytest

from deployments.structured_outputs.json_schema import supported_schema
from deployments.structured_outputs.simplify import without_no_ops

INT64 = {"minimum": -(10**18), "maximum": 10**18}


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    "keywords",
    [
        {"title": None, "description": "d", "example": 1, "examples": [{"not": 1}], "default": {"if": 1}},
        {"$id": "https://example.com/a", "id": "A", "$schema": "http://json-schema.org/draft-07/schema#"},
        {"x-ui": {"w": 3}, "x-guidance": {"lenient": True}, "propertyOrdering": ["a"], "discriminator": {}},
        {"uniqueItems": False, "minProperties": 0, "propertyNames": {"type": "string", "title": "Key"}},
        {"patternProperties": {}, "dependentRequired": {}, "unevaluatedProperties": True, "unevaluatedItems": {}},
        {"if": {"type": "null"}, "not": False, "required": [], "allOf": [], "additionalItems": False, "minContains": 0},
        {"nullable": False, "exclusiveMinimum": False, "pattern": None, "enum": None, "format": None},
        *({"format": name} for name in ("base64", "password", "currency-code", "int64", "uri-reference", "binary")),
    ],
)
def test_what_constrains_nothing_is_left_out_at_every_depth(keywords: dict[str, Any]) -> None:
    assert without_no_ops({"type": "string"} | keywords) == {"type": "string"}
    inside: dict[str, Any] = {"$defs": {"a": {"type": "null"} | keywords}, "items": {"anyOf": [keywords]}}
    assert without_no_ops(inside) == {"$defs": {"a": {"type": "null"}}, "items": {"anyOf": [{}]}}


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    ("schema", "equal"),
    [
        ({"items": [{}, True], "additionalItems": False}, {"prefixItems": [{}, True], "items": False}),
        ({"minimum": 1, "exclusiveMinimum": True, "maximum": 2}, {"exclusiveMinimum": 1, "maximum": 2}),
        ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
        ({"enum": ["a"], "nullable": True}, {"enum": ["a", None]}),
        ({"minProperties": 1, "required": ["a"]}, {"required": ["a"]}),
        ({"properties": {"a": {}}, "maxProperties": 1}, {"properties": {"a": {}}}),
        ({"unevaluatedProperties": False, "type": "object"}, {"type": "object", "additionalProperties": False}),
        ({"const": None}, {"const": None}),
        ({"pattern": r"^(?!^[-+.]*$)[+-]?\d*$"}, {"pattern": r"^[+-]?\d*$", "allOf": [{"pattern": "[^-+.]"}]}),
        ({"anyOf": [{"type": "number"}, {"pattern": "(?=a)"}]}, {"anyOf": [{"type": "number"}]}),
    ],
)  # fmt: skip
def test_other_dialects_are_written_as_2020_12(schema: dict[str, Any], equal: dict[str, Any]) -> None:
    assert without_no_ops(schema) == equal


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    "schema",
    [
        {"maxProperties": 1, "properties": {"a": {}, "b": {}}},
        {"maxProperties": 1, "properties": {"a": {}}, "additionalProperties": True},
        {"minProperties": 2, "required": ["a", "a"]},
        {"uniqueItems": True},
        {"propertyNames": {"maxLength": 3}},
        {"if": {}, "then": {"type": "null"}},
        {"contains": {"type": "null"}},
        {"unevaluatedProperties": False, "allOf": [{}]},
    ],
)
def test_what_constrains_stays(schema: dict[str, Any]) -> None:
    assert without_no_ops(schema) == schema


def named(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def closed(**properties: Any) -> dict[str, Any]:
    return named(**properties) | {"additionalProperties": False}


TEXT = {"type": "string"}
A, B = named(a=TEXT), named(b=TEXT)


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (named(a=A), closed(a=closed(a=TEXT))),
        (A | {"additionalProperties": True}, A | {"additionalProperties": True}),
        (A | {"additionalProperties": TEXT}, A | {"additionalProperties": TEXT}),
        ({"type": "object"}, {"type": "object"}),
        ({"anyOf": [A, B]}, {"anyOf": [closed(a=TEXT), closed(b=TEXT)]}),
        ({"allOf": [A]}, closed(a=TEXT) | {"required": []}),
        ({"allOf": [A | {"required": ["a"]}, B]}, closed(a=TEXT, b=TEXT) | {"required": ["a"]}),
        (named(a=TEXT) | {"anyOf": [{"required": ["a"]}]}, closed(a=TEXT) | {"anyOf": [{"required": ["a"]}]}),
        (A | {"anyOf": [B]}, A | {"anyOf": [B]}),  # closed, no object could be both
        ({"allOf": [A, named(a={"minLength": 1})]}, {"allOf": [A, named(a={"minLength": 1})]}),
        (
            {"$defs": {"a": A, "b": B}, "properties": {"x": A | {"$ref": "#/$defs/b"}, "y": {"$ref": "#/$defs/a"}}},
            {
                "$defs": {"a": closed(a=TEXT), "b": B},
                "properties": {"x": A | {"$ref": "#/$defs/b"}, "y": {"$ref": "#/$defs/a"}},
                "additionalProperties": False,
            },
        ),
    ],
)
def test_objects_that_name_properties_are_closed_where_they_stand_alone(
    schema: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert supported_schema(schema, "schema") == expected


@pytest.mark.promise("A1")
def test_references_in_a_circle_end() -> None:
    circle = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "allOf": [{"$ref": "#/$defs/a"}]}
    assert supported_schema(circle, "schema")["allOf"] == [{"$ref": "#/$defs/a"}]
    links = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"minLength": 1}]} for i in range(900)}
    assert supported_schema({"$defs": links, "$ref": "#/$defs/a0"}, "schema")


@pytest.mark.promise("B9")
@pytest.mark.parametrize(
    "value", [{"allOf": 5}, {"anyOf": 3}, {"properties": 5}, {"properties": {}, "required": 7}, {"$ref": 1}, [1]]
)
def test_a_reference_to_what_is_no_schema_is_left_to_the_library(value: Any) -> None:
    """It stands in a `const`, where anything may."""
    for reference in ("#/const", "#/$defs/a/const"):
        schema = {"$defs": {"a": {"const": value}}, "const": value, "allOf": [{"$ref": reference}, {}]}
        assert supported_schema(schema, "schema")["allOf"] == schema["allOf"]
        beside = {"const": value, "properties": {"a": {}}, "$ref": reference}
        assert supported_schema(beside, "schema") == beside


@pytest.mark.promise("A1")
def test_references_find_names_with_slashes_and_tildes() -> None:
    schema = {"$defs": {"a/b~c": B}, "allOf": [A, {"$ref": "#/$defs/a~1b~0c"}]}
    assert supported_schema(schema, "schema")["properties"] == {"a": TEXT, "b": TEXT}


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    ("schema", "bounds"),
    [
        ({"type": "integer"}, INT64),
        ({"type": ["integer", "null"], "minimum": 3}, {"minimum": 3, "maximum": 10**18}),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, INT64),
        ({"type": "integer", "exclusiveMaximum": 2**63}, INT64),
        ({"type": "number", "minimum": -3.4e38, "maximum": 3.4e38}, {"minimum": -(2**53), "maximum": 2**53}),
        ({"type": "number", "minimum": 0}, {"minimum": 0}),
        ({"type": "integer", "multipleOf": 5}, {"multipleOf": 5}),
    ],
)
def test_integers_are_bounded_and_wide_bounds_are_brought_nearer(
    schema: dict[str, Any], bounds: dict[str, Any]
) -> None:
    assert supported_schema(dict(schema), "schema") == {"type": schema["type"]} | bounds


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("date", ["2024-02-29", "1999-12-31", "0001-01-01"], ["2023-02-29", "1900-02-29", "0000-01-01", "2020-04-31"]),
        ("time", ["23:59:59Z", "00:00:00.123456789+05:30"], ["24:00:00Z", "10:00:00", "10:00:00.1234567890Z"]),
        ("date-time", ["2024-02-29T10:00:00Z"], ["2024-02-30T10:00:00Z", "2024-02-29"]),
        ("duration", ["P1Y2M3DT4H5M6S", "PT5M", "P3W", "P10D"], ["P", "PT", "P1", "P1Y2W", f"P{'1' * 10}D"]),
    ],
)
def test_dates_and_times_are_rfc_3339_of_bounded_length(name: str, valid: list[str], invalid: list[str]) -> None:
    pattern = supported_schema({"format": name}, "schema")["pattern"]
    assert [text for text in valid + invalid if re.search(pattern, text)] == valid
