"""Which schemas are refused before they are compiled, and where the refusal points (A1, B9)."""

from typing import Any

import pytest
from pydantic import BaseModel as PydanticModel
from pydantic import Field

from deployments.errors import ResponseFormatRefused
from deployments.structured_outputs.json_schema import pattern_size, supported_schema


class Horse(PydanticModel):
    name: str = Field(max_length=20, description="what it is called")
    age: int = Field(ge=0, le=40)
    kind: str | None = None
    foals: "list[Horse]" = []


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def refusal(schema: Any, *, strict: bool = False) -> ResponseFormatRefused:
    with pytest.raises(ResponseFormatRefused) as exc_info:
        supported_schema(schema, "schema", strict=strict)
    assert str(exc_info.value).startswith(f"{exc_info.value.param}: ")
    return exc_info.value


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    "schema",
    [
        Horse.model_json_schema(),
        {"type": "object", "properties": {"maxlength": True, "not": {"const": {"if": 1}}}},  # names, no keywords
        {"anyOf": [{"type": "null"}, {"enum": ["a", 1, 2.5, None]}], "default": {"not": 1}, "examples": [{"if": 2}]},
        {"type": "string", "pattern": r"^[0-9]{4}-(0[1-9]|1[0-2])$", "minLength": 7.0},
        {"type": "number", "multipleOf": 0.01, "minimum": -(2**53)},
        nested(15),
    ],
)
def test_usual_schemas_are_accepted(schema: dict[str, Any]) -> None:
    supported_schema(schema, "schema")


@pytest.mark.promise("B9")
@pytest.mark.parametrize(
    ("schema", "param", "words"),
    [
        ({"not": {}}, "schema.not", "'not' is not supported"),
        ({"properties": {"a": {"maxLenght": 3}}}, "schema.properties.a.maxLenght", "did you mean 'maxLength'?"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, "schema.anyOf.1.uniqueItems", "supported keywords"),
        ({"$defs": {"x": {"if": {}, "then": {"type": "null"}}}}, "schema.$defs.x.if", "'if'"),
        ({"items": [{}, 3]}, "schema.prefixItems.1", "a schema must be an object"),
        ({"minProperties": 1}, "schema.minProperties", "not supported"),
        ({"propertyNames": {"pattern": "^a"}}, "schema.propertyNames", "not supported"),
        ({"pattern": "^(?=a)b"}, "schema.pattern", "looks around"),
        ({"anyOf": {}}, "schema.anyOf", "list of schemas"),
        ({"properties": []}, "schema.properties", "named schemas"),
        ({"$ref": "http://127.0.0.1:1/a.json"}, "schema.$ref", "no other schema is fetched"),
        ({"minimum": 10**300}, "schema.minimum", "2^53"),
        ({"maximum": True}, "schema.maximum", "number"),
        ({"enum": [{"a": [2**53 + 1]}]}, "schema.enum", "2^53"),
        ({"minLength": -1}, "schema.minLength", "at least 0"),
        ({"maxItems": "2"}, "schema.maxItems", "at least 0"),
        ({"multipleOf": 0}, "schema.multipleOf", "greater than 0"),
        ({"type": "cat"}, "schema.type", "'cat' is no type"),
        ({"type": ["string", "text"]}, "schema.type", "'text' is no type"),
        ({"type": 5}, "schema.type", "5 is no type"),
        ({"multipleOf": 99_999_937}, "schema.multipleOf", "10000"),
        ({"pattern": "a" * 1001}, "schema.pattern", "1000"),
        ({"pattern": "((((a{100}){100}){100}){100})"}, "schema.pattern", "5000"),
        ({"pattern": 3}, "schema.pattern", "regular expression"),
        ({"properties": {"\ud800": {"not": {}}}}, "schema", "surrogate"),
        ({"properties": {"x" * 9000: {"not": {}}}}, f"schema.properties.{'x' * 50}.not", "'not'"),
        ({"enum": [float("nan")]}, "schema.enum", "2^53"),
        ({"maximum": float("inf")}, "schema.maximum", "2^53"),
        (nested(33), "schema", "64 levels"),
        ({"const": nested(400)}, "schema", "64 levels"),
        ({"enum": [f"value {i}" for i in range(100_000)]}, "schema", "65536"),
        ({"properties": {f"p{i}": {} for i in range(1001)}}, "schema.properties", "1000 properties"),
    ],
)
def test_a_refusal_names_the_place_and_the_reason(schema: dict[str, Any], param: str, words: str) -> None:
    error = refusal(schema)
    assert error.param == param
    assert words in str(error)


@pytest.mark.promise("B9")
def test_multiples_are_counted_together() -> None:
    """Two schemas that both apply need the common multiple: primes would make it their product."""
    assert refusal({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}).param == "schema.allOf.0.multipleOf"
    assert "multipleOf" in str(refusal({"properties": {"a": {"multipleOf": 1e-9}, "b": {"multipleOf": 1}}}))
    supported_schema(
        {"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 0.05}, "c": {"multipleOf": 5}}}, "s"
    )


@pytest.mark.promise("A1")
def test_strict_wants_closed_objects() -> None:
    closed = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
    supported_schema(closed, "schema", strict=True)
    open_inside = closed | {"properties": {"a": {"type": "object"}}}
    supported_schema(open_inside, "schema")
    error = refusal(open_inside, strict=True)
    assert error.param == "schema.properties.a"
    assert "additionalProperties: false" in str(error)


@pytest.mark.promise("B9")
@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("abc", 3),
        ("^a{3}b?$", 6),
        ("(ab){10}c", 21),
        ("((a{100}){100}){100}", 1_000_000),
        ("a{3,}", 3),
        ("a{2,70}", 70),
        (r"[a-z\]{9}]{4}", 4),
        ("[]a]{4}", 4),
        (r"\{9}", 3),
        (r"\p{L}{30}", 30),
        ("a{x}", 4),
        ("a{999999999999999}", 999_999_999),
        (")(((", 1),
        ("[", 1),
        ("\\", 1),
        ("", 0),
    ],
)
def test_the_size_of_a_pattern_is_with_its_repetitions_written_out(pattern: str, size: int) -> None:
    assert pattern_size(pattern) == size
