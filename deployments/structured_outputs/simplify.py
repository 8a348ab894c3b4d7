"""A JSON schema in the few keywords that the grammar library reads, with the same valid texts or fewer.

`without_no_ops` leaves out what constrains nothing and writes other dialects (draft 4 and 7, OpenAPI) as 2020-12; paths
in the schema stay what they were. `bounded` then closes objects that name their properties, and gives integers bounds.
Neither knows the library.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

ONE_SCHEMA = {"items", "additionalProperties"}
SCHEMA_LISTS = {"anyOf", "allOf", "oneOf", "prefixItems"}
NAMED_SCHEMAS = {"properties", "$defs", "definitions"}
MAX_EXACT = 2**53  # beyond it not every integer is a double
_INTEGER_BOUND = 10**18  # within int64, and a double

_ANNOTATIONS = {
    *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("$schema", "$id", "id", "$anchor", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema"),
    *("discriminator", "externalDocs", "xml"),  # OpenAPI's; pydantic writes the first for tagged unions
    *("propertyOrdering", "markdownDescription", "enumDescriptions", "enumNames", "errorMessage"),
}

_DAY = (
    r"(?:(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
    r"|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_N = r"\d{1,9}"
_HOURS = rf"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_DAYS = rf"(?:{_N}D|{_N}M(?:{_N}D)?|{_N}Y(?:{_N}M(?:{_N}D)?)?)"
_FORMAT_PATTERNS = {  # RFC 3339, section 5.6 and appendix A, with numbers of bounded length
    "date": rf"^{_DAY}$",
    "time": rf"^{_CLOCK}$",
    "date-time": rf"^{_DAY}T{_CLOCK}$",
    "duration": rf"^P(?:{_DAYS}(?:{_HOURS})?|{_HOURS}|{_N}W)$",
}
_LIBRARY_FORMATS = {"email", "hostname", "ipv4", "ipv6", "uuid", "uri"}

# What a pattern begins with that must not consist of some characters only; pydantic writes it for Decimal.
_NOT_ONLY = re.compile(r"\^\(\?!\^(\[[^\]\\^][^\]\\]*\])\*\$\)")
_LOOK_AROUND = re.compile(r"\(\?<?[=!]")


def without_no_ops(schema: Any) -> Any:
    """The schema without annotations, keywords that allow everything, and null for "not given".

    Keywords of other dialects are replaced by their equals. What is malformed stays as it is.
    """
    if not isinstance(schema, dict):
        return schema
    result: Schema = {}
    for keyword, value in schema.items():
        if value is None and keyword != "const":
            continue
        if keyword in _ANNOTATIONS or keyword.startswith("x-") or _constrains_nothing(keyword, value, schema):
            continue
        if keyword in ONE_SCHEMA and not isinstance(value, list):
            value = without_no_ops(value)
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            value = [without_no_ops(inner) for inner in value]
        elif keyword in NAMED_SCHEMAS and isinstance(value, dict):
            value = {name: without_no_ops(inner) for name, inner in value.items()}
        result[keyword] = value
    for rewrite in (_tuple_items, _boolean_bounds, _nullable, _format, _not_only, _dead_options, _unevaluated):
        rewrite(result)
    return result


def bounded(schema: Schema) -> Schema:
    """The schema with objects that name properties closed, unless `additionalProperties` says otherwise, and with
    bounds for integers. What is joined by `allOf`, or with `$ref` or options beside properties, is merged where all
    of it is plain, and else stays open.

    Args:
        schema: from `without_no_ops`; it is changed.
    """
    targets = dict(_subschemas(schema))
    for part in targets.values():
        _merge_all_of(part, targets)
    targets = dict(_subschemas(schema))
    left_open: set[int] = set()
    for part in targets.values():
        if _is_joined(part):
            left_open.add(id(part))
            for member in _members(part, targets):
                _leave_open(member, targets, left_open)
    for part in targets.values():
        if part.get("properties") and "additionalProperties" not in part and id(part) not in left_open:
            part["additionalProperties"] = False
        _bound_numbers(part)
    return schema


def moved_to(schema: Schema, pointer: str) -> Schema:
    """The schema, changed in place, with references that hold where it stands at `pointer` of another one."""
    for _, part in _subschemas(schema):
        if isinstance(part.get("$ref"), str):
            part["$ref"] = pointer + part["$ref"].removeprefix("#")
    return schema


def _subschemas(schema: Any, pointer: str = "#") -> Iterator[tuple[str, Schema]]:
    """A schema and all schemas inside it that are objects, each with the `$ref` that points to it."""
    if not isinstance(schema, dict):
        return
    yield pointer, schema
    for keyword, value in schema.items():
        path = f"{pointer}/{keyword}"
        if keyword in ONE_SCHEMA:
            yield from _subschemas(value, path)
        elif keyword in SCHEMA_LISTS:
            for i, inner in enumerate(value):
                yield from _subschemas(inner, f"{path}/{i}")
        elif keyword in NAMED_SCHEMAS:
            for name, inner in value.items():
                yield from _subschemas(inner, f"{path}/{name.replace('~', '~0').replace('/', '~1')}")


def _is_any(schema: Any) -> bool:
    return schema is True or schema == {}


def _allows_no_less(count: Any, schema: Schema) -> bool:
    properties = schema.get("properties")
    return (
        isinstance(properties, dict)
        and bool(properties)
        and schema.get("additionalProperties") in (None, False)
        and count >= len(properties)
    )


_NO_OPS: dict[str, Callable[[Any, Schema], bool]] = {
    "uniqueItems": lambda value, _: value is False,
    "minProperties": lambda value, schema: value == 0 or _required_by(schema) >= value,
    "maxProperties": _allows_no_less,
    "minContains": lambda value, schema: "contains" not in schema or value == 0,
    "maxContains": lambda _, schema: "contains" not in schema,
    "contains": lambda _, schema: schema.get("minContains") == 0 and "maxContains" not in schema,
    "propertyNames": lambda value, _: _is_any(without_no_ops(value)) or without_no_ops(value) == {"type": "string"},
    "patternProperties": lambda value, _: value == {},
    "dependentRequired": lambda value, _: value == {},
    "dependentSchemas": lambda value, _: value == {},
    "dependencies": lambda value, _: value == {},
    "required": lambda value, _: value == [],
    "allOf": lambda value, _: value == [],
    "not": lambda value, _: value is False,
    "if": lambda _, schema: "then" not in schema and "else" not in schema,
    "then": lambda value, schema: "if" not in schema or _is_any(value),
    "else": lambda value, schema: "if" not in schema or _is_any(value),
    "additionalItems": lambda value, schema: not isinstance(schema.get("items"), list) or value is True,
    "unevaluatedProperties": lambda value, _: _is_any(value),
    "unevaluatedItems": lambda value, _: _is_any(value),
}


def _constrains_nothing(keyword: str, value: Any, schema: Schema) -> bool:
    is_no_op = _NO_OPS.get(keyword)
    try:
        return is_no_op is not None and is_no_op(value, schema)
    except TypeError:  # malformed: it is refused later, by its path
        return False


def _required_by(schema: Schema) -> int:
    required = schema.get("required")
    return len(set(required)) if isinstance(required, list) else 0


def _tuple_items(schema: Schema) -> None:
    """Draft 7's list of schemas under `items`."""
    if isinstance(schema.get("items"), list):
        schema["prefixItems"] = [without_no_ops(inner) for inner in schema.pop("items")]
        if "additionalItems" in schema:
            schema["items"] = without_no_ops(schema.pop("additionalItems"))


def _boolean_bounds(schema: Schema) -> None:
    """Draft 4's `exclusiveMinimum: true` beside `minimum`."""
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(exclusive), bool):
            if not schema.pop(exclusive):
                continue
            if bound in schema:
                schema[exclusive] = schema.pop(bound)


def _nullable(schema: Schema) -> None:
    """OpenAPI 3.0's `nullable`."""
    if isinstance(schema.get("nullable"), bool) and schema.pop("nullable"):
        kind = schema.get("type")
        if isinstance(kind, str):
            schema["type"] = [kind, "null"]
        if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
            schema["enum"] = [*schema["enum"], None]


def _format(schema: Schema) -> None:
    """2020-12 takes formats as annotations; those that can be held are held."""
    name = schema.get("format")
    if not isinstance(name, str) or name in _LIBRARY_FORMATS:
        return
    del schema["format"]
    if name in _FORMAT_PATTERNS:
        _also_matches(schema, _FORMAT_PATTERNS[name])


def _not_only(schema: Schema) -> None:
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and (begin := _NOT_ONLY.match(pattern)):
        schema["pattern"] = "^" + pattern[begin.end() :]
        _also_matches(schema, f"[^{begin[1][1:]}")


def _also_matches(schema: Schema, pattern: str) -> None:
    if "pattern" not in schema:
        schema["pattern"] = pattern
    elif isinstance(schema.setdefault("allOf", []), list):
        schema["allOf"] = [*schema["allOf"], {"pattern": pattern}]


def _dead_options(schema: Schema) -> None:
    """Options of `anyOf` whose pattern looks around are left out where others remain: any of them will do."""
    options = schema.get("anyOf")
    if isinstance(options, list):
        schema["anyOf"] = [option for option in options if not _is_dead(option)] or options


def _is_dead(schema: Any) -> bool:
    return isinstance(schema, dict) and isinstance(schema.get("pattern"), str) and looks_around(schema["pattern"])


def looks_around(pattern: str) -> bool:
    """Whether a regular expression has a group that matches nothing itself and asks what stands beside it."""
    return _LOOK_AROUND.search(pattern) is not None


def _unevaluated(schema: Schema) -> None:
    """Without other schemas for the same object, unevaluated properties are the additional ones."""
    if schema.get("unevaluatedProperties") is False and not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref"}:
        del schema["unevaluatedProperties"]
        schema.setdefault("additionalProperties", False)


_PLAIN = {"type", "properties", "required"}


def _merge_all_of(schema: Schema, targets: dict[str, Schema]) -> None:
    """Objects joined by `allOf` become one, where they name different properties and constrain nothing else."""
    if "allOf" not in schema or schema.keys() - _PLAIN - {"allOf", "$defs", "definitions"}:
        return
    objects = [{keyword: schema[keyword] for keyword in _PLAIN & schema.keys()}]
    objects += [_resolved(member, targets) for member in schema["allOf"]]
    if not all(isinstance(one, dict) and one.keys() <= _PLAIN for one in objects):
        return
    if not all(isinstance(one.get("required", []), list) for one in objects):
        return
    if any(one.get("type", "object") != "object" for one in objects):
        return
    names = [name for one in objects for name in one.get("properties", ())]
    if not names or len(set(names)) < len(names):
        return
    required = [name for one in objects for name in one.get("required", ())]
    if not all(isinstance(name, str) for name in required):
        return
    del schema["allOf"]
    schema |= {
        "type": "object",
        "properties": {name: value for one in objects for name, value in one.get("properties", {}).items()},
        "required": list(dict.fromkeys(required)),
    }


def _is_joined(schema: Schema) -> bool:
    """Whether the properties of one object are named in more than one place."""
    if len(schema.get("allOf", ())) > 1:
        return True
    options = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    names_elsewhere = (
        "allOf" in schema
        or "$ref" in schema
        or any(
            isinstance(option, dict) and option.keys() & {"properties", "$ref", "allOf", "anyOf", "oneOf"}
            for option in options
        )
    )
    return bool(schema.get("properties")) and names_elsewhere


def _members(schema: Schema, targets: dict[str, Schema]) -> Iterator[Any]:
    """The schemas that hold for the same value."""
    for keyword in ("allOf", "anyOf", "oneOf"):
        yield from schema.get(keyword, ())
    if "$ref" in schema:
        yield _resolved({"$ref": schema["$ref"]}, targets)


def _leave_open(schema: Any, targets: dict[str, Schema], left_open: set[int]) -> None:
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict) and id(part) not in left_open:
            left_open.add(id(part))
            pending += _members(part, targets)


def _resolved(schema: Any, targets: dict[str, Schema]) -> Any:
    """What a schema that is only a `$ref` points to; itself otherwise. Only schemas count: what stands in a `const` was
    never checked."""
    for _ in range(64):  # a circle of references ends here
        if not (isinstance(schema, dict) and schema.keys() == {"$ref"}):
            break
        schema = targets.get(schema["$ref"].rstrip("/"))
    return schema


def _bound_numbers(schema: Schema) -> None:
    """Bounds beyond what is exact are brought nearer, and integers get some: what is valid then was valid before."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    is_integer = "integer" in kinds and "number" not in kinds
    widest = _INTEGER_BOUND if is_integer else MAX_EXACT
    for bound, exclusive, sign in (("minimum", "exclusiveMinimum", -1), ("maximum", "exclusiveMaximum", 1)):
        for keyword in (bound, exclusive):
            if keyword in schema and schema[keyword] * sign > MAX_EXACT:
                del schema[keyword]
                schema.setdefault(bound, sign * widest)
        if is_integer and "multipleOf" not in schema and bound not in schema and exclusive not in schema:
            schema[bound] = sign * widest
