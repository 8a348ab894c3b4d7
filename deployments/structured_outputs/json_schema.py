"""Checks that answers can be constrained to a JSON schema, before anything is compiled.

Rejects schemas that the grammar library would read differently from JSON Schema 2020-12, and those that would take it
long to compile despite its own limits. Knows nothing of that library. Annotations and keywords that constrain nothing
are no reason to refuse.
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from deployments.errors import ResponseFormatRefused
from deployments.structured_outputs.simplify import (
    MAX_EXACT,
    NAMED_SCHEMAS,
    ONE_SCHEMA,
    SCHEMA_LISTS,
    bounded,
    looks_around,
    without_no_ops,
)

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 64  # of nested brackets, including the schema's own
MAX_PROPERTIES = 1000
MAX_PATTERN_LENGTH = 1000
MAX_PATTERN_SIZE = 5000  # characters and classes, with repetitions written out
MAX_MULTIPLE = 10_000

_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_SIZES = {"minItems", "maxItems", "minLength", "maxLength"}
_OTHERS = {"type", "enum", "const", "required", "pattern", "format", "$ref"}
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_SUPPORTED = ONE_SCHEMA | SCHEMA_LISTS | NAMED_SCHEMAS | _BOUNDS | _SIZES | _OTHERS


@dataclass(frozen=True, slots=True)
class _Part:
    """The schema or one of its subschemas, and the path to it."""

    path: str
    content: Any

    def refusal(self, message: str, keyword: str | None = None) -> ResponseFormatRefused:
        path = f"{self.path}.{keyword}" if keyword else self.path
        return ResponseFormatRefused(f"{path}: {message}", path)


def supported_schema(schema: dict[str, Any], path: str, *, strict: bool = False) -> dict[str, Any]:
    """The schema as the grammar library reads it: in supported keywords only, with bounded numbers, dates and times,
    and with objects closed that name properties and do not say `additionalProperties`.

    Args:
        path: path of the schema in the request.
        strict: whether every object must set `additionalProperties: false`, as in OpenAI's strict mode.

    Raises:
        ResponseFormatRefused: the message names the keyword and its path.
    """
    root = _Part(path, schema)
    if _depth(schema) > MAX_DEPTH:
        raise root.refusal(f"it is nested deeper than {MAX_DEPTH} levels: flatten it")
    try:
        num_bytes = len(json.dumps(schema, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise root.refusal("it contains half a UTF-16 surrogate pair: give valid Unicode text") from None
    if num_bytes > MAX_SCHEMA_BYTES:
        raise root.refusal(f"it is {num_bytes} bytes long, the limit is {MAX_SCHEMA_BYTES}: make it smaller")
    root = _Part(path, without_no_ops(schema))
    num_properties = 0
    multiples: list[Decimal] = []
    for part in _parts(root):
        _check_keywords(part, strict)
        num_properties += len(part.content.get("properties", ()))
        if num_properties > MAX_PROPERTIES:
            raise part.refusal(f"it has more than {MAX_PROPERTIES} properties in total: use fewer", "properties")
        if "multipleOf" in part.content:
            multiples.append(Decimal(str(part.content["multipleOf"])))
            if _common_multiple(multiples) > MAX_MULTIPLE:
                raise part.refusal(
                    f"the least common multiple of all multipleOf values exceeds {MAX_MULTIPLE} units of their last "
                    "decimal place: use smaller or fewer numbers",
                    "multipleOf",
                )
    return bounded(root.content)


def _parts(root: _Part) -> Iterator[_Part]:
    """The schema and all of its subschemas except `true` and `false`, each before those inside it."""
    pending = [root]
    while pending:
        part = pending.pop()
        if isinstance(part.content, bool):
            continue
        if not isinstance(part.content, dict):
            raise part.refusal("a schema must be an object, true or false")
        yield part
        for keyword, value in part.content.items():
            path = f"{part.path}.{keyword}"
            if keyword in ONE_SCHEMA:
                pending.append(_Part(path, value))
            elif keyword in SCHEMA_LISTS:
                if not isinstance(value, list):
                    raise part.refusal("it must be a list of schemas", keyword)
                pending += [_Part(f"{path}.{i}", inner) for i, inner in enumerate(value)]
            elif keyword in NAMED_SCHEMAS:
                if not isinstance(value, dict):
                    raise part.refusal("it must be an object of named schemas", keyword)
                pending += [_Part(f"{path}.{name[:50]}", inner) for name, inner in value.items()]


def _check_keywords(part: _Part, strict: bool) -> None:
    schema = part.content
    for keyword, value in schema.items():
        if keyword not in _SUPPORTED:
            suggestions = difflib.get_close_matches(keyword[:50], _SUPPORTED, n=1, cutoff=0.8)
            hint = (
                f"did you mean {suggestions[0]!r}?"
                if suggestions
                else f"leave it out; supported keywords: {', '.join(sorted(_SUPPORTED))}"
            )
            raise part.refusal(f"the keyword {keyword[:50]!r} is not supported: {hint}", keyword[:50])
        if keyword in _BOUNDS and not (_is_number(value) and _can_be_kept(keyword, value)):
            raise part.refusal("it must be a number from -2^53 to 2^53", keyword)
        if keyword in _SIZES and not (_is_number(value) and value == int(value) >= 0):
            raise part.refusal("it must be an integer of at least 0", keyword)
        if keyword in ("enum", "const") and not _is_exact(value):
            raise part.refusal("its numbers must be from -2^53 to 2^53", keyword)
        if keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise part.refusal(
                "it must point into this schema, such as '#/$defs/name': no other schema is fetched", keyword
            )
    types = schema.get("type", [])
    unknown = [name for name in (types if isinstance(types, list) else [types]) if name not in _TYPES]
    if unknown:
        raise part.refusal(f"{unknown[0]!r:.40} is no type: use some of {', '.join(_TYPES)}", "type")
    if schema.get("multipleOf", 1) <= 0:
        raise part.refusal("it must be greater than 0", "multipleOf")
    if "pattern" in schema:
        _check_pattern(part, schema["pattern"])
    is_object = schema.get("type") == "object" or "properties" in schema
    if strict and is_object and schema.get("additionalProperties") is not False:
        raise part.refusal("strict requires additionalProperties: false in every object: add it, or leave strict out")


def _check_pattern(part: _Part, pattern: Any) -> None:
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_LENGTH:
        raise part.refusal(f"it must be a regular expression of at most {MAX_PATTERN_LENGTH} characters", "pattern")
    if looks_around(pattern):
        raise part.refusal("it looks around ((?=, (?!, (?<=, (?<!), which no grammar can: write it without", "pattern")
    if pattern_size(pattern) > MAX_PATTERN_SIZE:
        raise part.refusal(
            f"its repetitions expand to more than {MAX_PATTERN_SIZE} characters: use fewer, or maxLength",
            "pattern",
        )


def pattern_size(pattern: str) -> int:
    """Number of characters and classes in a regular expression with each `{n,m}` written out, without running it."""
    groups = [0]  # sizes of the open groups, innermost last
    last = 0  # size of the item that a repetition would repeat
    index = 0
    while index < len(pattern):
        char = pattern[index]
        end = index + 1
        if char == "(":
            groups.append(0)
            last = 0
        elif char == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif char == "{" and (closing := pattern.find("}", index)) > 0 and _counts(pattern[index + 1 : closing]):
            end = closing + 1
            size = last * max(1, *_counts(pattern[index + 1 : closing]))
            groups[-1] += size - last
            last = size
        elif char not in "*+?|":
            end = _atom_end(pattern, index)
            last = 1
            groups[-1] += 1
        index = end
    return sum(groups)


def _counts(inside: str) -> list[int]:
    """The numbers of a repetition such as `2,5`; none if it is not a repetition."""
    bounds = [bound.strip() for bound in inside.split(",")]
    if len(bounds) > 2 or not bounds[0].isdecimal() or not all(bound.isdecimal() or not bound for bound in bounds):
        return []
    return [min(int(bound[:9]), 10**9) for bound in bounds if bound]


def _atom_end(pattern: str, start: int) -> int:
    """End of the character, escape or class that begins at `start`."""
    if pattern[start] == "\\":
        braced = pattern[start + 1 : start + 3] in ("p{", "P{", "u{", "x{")
        return pattern.find("}", start) + 1 or len(pattern) if braced else start + 2
    if pattern[start] != "[":
        return start + 1
    end = start + 1
    while end < len(pattern) and (pattern[end] != "]" or end == start + 1):
        end += 2 if pattern[end] == "\\" else 1
    return end + 1


def _depth(value: Any) -> int:
    """Nesting depth of lists and objects."""
    depth = 0
    level = [value]
    while level:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        depth += bool(inner)
        level = [v for values in inner for v in values]
    return depth


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _can_be_kept(bound: str, value: float) -> bool:
    """Whether a bound is exact, or so wide that a nearer one keeps it."""
    return value <= MAX_EXACT if "inimum" in bound else value >= -MAX_EXACT if "aximum" in bound else value <= MAX_EXACT


def _is_exact(value: Any) -> bool:
    """Whether all numbers in a value can be represented exactly."""
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict | list):
            pending += inner.values() if isinstance(inner, dict) else inner
        elif isinstance(inner, int | float) and not abs(inner) <= MAX_EXACT:
            return False
    return True


def _common_multiple(numbers: list[Decimal]) -> int:
    """The least common multiple, in units of the smallest decimal place of any of them."""
    places = max(-int(number.as_tuple().exponent) for number in numbers)
    return math.lcm(*(int(number.scaleb(places)) for number in numbers))
