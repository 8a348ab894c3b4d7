"""Which JSON schemas answers can be held to: a check before anything is compiled, which names what it refuses.

`grammars.py` calls it. It keeps away from the grammar library what that would read otherwise than JSON Schema 2020-12
does, and what would cost it more than a moment, whatever its own limits.
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from deployments.errors import ResponseFormatRefused

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 64  # of brackets, the schema's own among them
MAX_PROPERTIES = 1000
MAX_PATTERN_LENGTH = 1000
MAX_PATTERN_SIZE = 5000  # characters and classes, each as often as its repetitions ask for
MAX_MULTIPLE = 10_000
MAX_INTEGER = 2**53  # from here on not every integer is a double

_ONE_SCHEMA = {"items", "additionalProperties"}
_SCHEMA_LISTS = {"anyOf", "allOf", "oneOf", "prefixItems"}
_NAMED_SCHEMAS = {"properties", "$defs", "definitions"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_SIZES = {"minItems", "maxItems", "minLength", "maxLength"}
_OTHERS = {"type", "enum", "const", "required", "pattern", "format", "$ref"}
_SUPPORTED = _ONE_SCHEMA | _SCHEMA_LISTS | _NAMED_SCHEMAS | _BOUNDS | _SIZES | _OTHERS
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$comment"),
    "discriminator",  # OpenAPI's, in what pydantic makes of a tagged union
}


@dataclass(frozen=True, slots=True)
class _Part:
    """A schema inside the schema, or itself, and the path to it."""

    path: str
    content: Any

    def refuse(self, message: str, keyword: str | None = None) -> ResponseFormatRefused:
        path = f"{self.path}.{keyword}" if keyword else self.path
        return ResponseFormatRefused(f"{path}: {message}", path)


def check_schema(schema: dict[str, Any], path: str, *, strict: bool = False) -> None:
    """Refuse what is not supported or too large.

    Args:
        path: where the schema is in the request.
        strict: every object must say `additionalProperties: false`, as OpenAI's strict mode has it.

    Raises:
        ResponseFormatRefused: with the keyword and the path to it.
    """
    whole = _Part(path, schema)
    if _depth(schema) > MAX_DEPTH:
        raise whole.refuse(f"it is nested deeper than {MAX_DEPTH} levels: flatten it")
    try:
        num_bytes = len(json.dumps(schema, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise whole.refuse("it holds half a UTF-16 surrogate pair: give valid Unicode text") from None
    if num_bytes > MAX_SCHEMA_BYTES:
        raise whole.refuse(f"it is {num_bytes} bytes long: give at most {MAX_SCHEMA_BYTES}")
    num_properties = 0
    multiples: list[Decimal] = []
    for part in _parts(whole):
        _check_keywords(part, strict)
        num_properties += len(part.content.get("properties", ()))
        if num_properties > MAX_PROPERTIES:
            raise part.refuse(f"it has more than {MAX_PROPERTIES} properties in all: give fewer", "properties")
        if "multipleOf" in part.content:
            multiples.append(Decimal(str(part.content["multipleOf"])))
            if _common_multiple(multiples) > MAX_MULTIPLE:
                raise part.refuse(
                    f"the least common multiple of all multipleOf has more than {MAX_MULTIPLE} steps of their last "
                    "digit: use smaller or fewer numbers",
                    "multipleOf",
                )


def _parts(whole: _Part) -> Iterator[_Part]:
    """Every schema that is not just `true` or `false`, each before those inside it."""
    pending = [whole]
    while pending:
        part = pending.pop()
        if isinstance(part.content, bool):
            continue
        if not isinstance(part.content, dict):
            raise part.refuse("a schema is an object, true or false")
        yield part
        for keyword, value in part.content.items():
            path = f"{part.path}.{keyword}"
            if keyword in _ONE_SCHEMA:
                pending.append(_Part(path, value))
            elif keyword in _SCHEMA_LISTS:
                if not isinstance(value, list):
                    raise part.refuse("it must be a list of schemas", keyword)
                pending += [_Part(f"{path}.{i}", inner) for i, inner in enumerate(value)]
            elif keyword in _NAMED_SCHEMAS:
                if not isinstance(value, dict):
                    raise part.refuse("it must be an object of named schemas", keyword)
                pending += [_Part(f"{path}.{name[:50]}", inner) for name, inner in value.items()]


def _check_keywords(part: _Part, strict: bool) -> None:
    schema = part.content
    for keyword, value in schema.items():
        if keyword not in _SUPPORTED | _ANNOTATIONS:
            near = difflib.get_close_matches(keyword[:50], _SUPPORTED, n=1, cutoff=0.8)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"leave it out; supported are {', '.join(sorted(_SUPPORTED))}"
            )
            raise part.refuse(f"the keyword {keyword[:50]!r} is not supported: {hint}", keyword[:50])
        if keyword in _BOUNDS and not (_is_number(value) and abs(value) <= MAX_INTEGER):
            raise part.refuse("it must be a number from -2^53 to 2^53", keyword)
        if keyword in _SIZES and not (_is_number(value) and value == int(value) >= 0):
            raise part.refuse("it must be an integer from 0 on", keyword)
        if keyword in ("enum", "const") and not _is_exact(value):
            raise part.refuse("its numbers must be from -2^53 to 2^53", keyword)
        if keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise part.refuse("it must point into this schema, like '#/$defs/name': nothing is fetched", keyword)
    if schema.get("multipleOf", 1) <= 0:
        raise part.refuse("it must be greater than 0", "multipleOf")
    if "pattern" in schema:
        _check_pattern(part, schema["pattern"])
    is_object = schema.get("type") == "object" or "properties" in schema
    if strict and is_object and schema.get("additionalProperties") is not False:
        raise part.refuse("strict needs additionalProperties: false in every object: add it, or leave strict out")


def _check_pattern(part: _Part, pattern: Any) -> None:
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_LENGTH:
        raise part.refuse(f"it must be a regular expression of at most {MAX_PATTERN_LENGTH} characters", "pattern")
    if pattern_size(pattern) > MAX_PATTERN_SIZE:
        raise part.refuse(
            f"its repetitions make it longer than {MAX_PATTERN_SIZE} characters: ask for fewer, or use maxLength",
            "pattern",
        )


def pattern_size(pattern: str) -> int:
    """Characters and classes of a regular expression with each `{n,m}` written out; nothing of it is run."""
    groups = [0]  # size so far of the open groups, the innermost last
    last = 0  # size of what a repetition would repeat
    at = 0
    while at < len(pattern):
        char = pattern[at]
        end = at + 1
        if char == "(":
            groups.append(0)
            last = 0
        elif char == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif char == "{" and (closing := pattern.find("}", at)) > 0 and _counts(pattern[at + 1 : closing]):
            end = closing + 1
            size = last * max(1, *_counts(pattern[at + 1 : closing]))
            groups[-1] += size - last
            last = size
        elif char not in "*+?|":
            end = _atom_end(pattern, at)
            last = 1
            groups[-1] += 1
        at = end
    return sum(groups)


def _counts(inside: str) -> list[int]:
    """The numbers of a repetition like `2,5`, none if it is no repetition."""
    bounds = [bound.strip() for bound in inside.split(",")]
    if len(bounds) > 2 or not bounds[0].isdecimal() or not all(bound.isdecimal() or not bound for bound in bounds):
        return []
    return [min(int(bound[:9]), 10**9) for bound in bounds if bound]


def _atom_end(pattern: str, at: int) -> int:
    """Where the character, escape or class that begins at `at` ends."""
    if pattern[at] == "\\":
        braced = pattern[at + 1 : at + 3] in ("p{", "P{", "u{", "x{")
        return pattern.find("}", at) + 1 or len(pattern) if braced else at + 2
    if pattern[at] != "[":
        return at + 1
    end = at + 1
    while end < len(pattern) and (pattern[end] != "]" or end == at + 1):
        end += 2 if pattern[end] == "\\" else 1
    return end + 1


def _depth(value: Any) -> int:
    """How deep brackets are nested."""
    depth = 0
    level = [value]
    while level:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        depth += bool(inner)
        level = [v for values in inner for v in values]
    return depth


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_exact(value: Any) -> bool:
    """Whether all numbers in a value can be written as they are."""
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict | list):
            pending += inner.values() if isinstance(inner, dict) else inner
        elif isinstance(inner, int | float) and not abs(inner) <= MAX_INTEGER:
            return False
    return True


def _common_multiple(numbers: list[Decimal]) -> int:
    """The least common multiple, in units of the last decimal place that any of them has."""
    places = max(-int(number.as_tuple().exponent) for number in numbers)
    return math.lcm(*(int(number.scaleb(places)) for number in numbers))
