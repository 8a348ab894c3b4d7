"""A raw row -> an example, in the format that its keys or `data.format` determine.

The formats are those of OpenAI, ShareGPT, Alpaca, Guanaco, TRL, UltraFeedback and Anthropic's HH datasets, as TRL,
Axolotl and LLaMA-Factory read them. A row in none of them raises BadRow. Knows nothing of tokens.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args

from training.config.data_config import DatasetFormat, DataSource, RowKind
from training.data.examples import BadRow, ParsedRow
from training.data.parsers import PARSERS, TRAINED_KEYS, keys_of, parse_label
from training.data.sources import RawRow
from training.data.tools import TOOL_COLUMNS

# Listed in the error for a row that is not accepted.
ACCEPTED: dict[RowKind, str] = {
    "sft": 'accepted rows are {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}, '
    '{"conversations": [{"from": "human", "value": "..."}, ...]}, {"instruction": ..., "output": ...}, '
    '{"prompt": ..., "completion": ...} and {"text": "### Human: ... ### Assistant: ..."}; rows with other '
    "keys need data.columns, such as {prompt: question, completion: answer}",
    "preference": 'accepted rows are {"prompt": ..., "chosen": ..., "rejected": ...} with texts or messages, and '
    '{"chosen": [...], "rejected": [...]} with dialogs that differ in the last answer only',
    "unpaired_preference": 'accepted rows are {"prompt": ..., "completion": ..., "label": true or false}',
}

# The keys that may hold the prompt, in order of precedence, each with all keys that are read with it.
_PROMPT_KEYS = {
    "prompt": {"prompt"},
    "conversations": {"conversations"},
    "instruction": {"instruction", "input", "history"},
}


def parse_row(row: RawRow, source: DataSource, kind: RowKind) -> ParsedRow:
    """Parse a row of `source` into an example.

    Args:
        source: with `format` and `columns` filled in.
        kind: what the training method consumes; limits the formats.

    Raises:
        BadRow: the row cannot be used.
    """
    if row.problem:
        raise BadRow(row.problem)
    original = _fields(row.content)
    columns = source.columns or {}
    fields = _renamed(original, columns) if columns else original
    row_format = _format_of(fields, source.format or "auto", kind, columns)
    return ParsedRow(row_format, PARSERS[row_format](fields), _unused_keys(original, fields, columns, row_format))


def formats_of(kind: RowKind) -> tuple[DatasetFormat, ...]:
    """The dataset formats that yield rows of `kind`."""
    preferences: dict[RowKind, DatasetFormat] = {
        "preference": "preference",
        "unpaired_preference": "unpaired_preference",
    }
    if kind in preferences:
        return (preferences[kind],)
    return tuple(f for f in get_args(DatasetFormat) if f not in preferences.values())


def _fields(content: Any) -> dict[str, Any]:
    if isinstance(content, bytes):
        try:
            content = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadRow("not valid UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadRow(f"expected a JSON object, got {type(content).__name__}")
    return content


def _renamed(fields: dict[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    """The row with the columns in `columns` under our names; they take precedence over keys that have such a name."""
    missing = [column for column in columns.values() if column not in fields]
    if missing:
        raise BadRow(f"no key {missing[0]!r}, which data.columns names: the row has the keys {keys_of(fields)}")
    dropped = set(columns.values())
    if any(name in columns for name in _PROMPT_KEYS):  # the row's other prompts could take precedence over this one
        dropped.update(_PROMPT_KEYS)
    kept = {name: value for name, value in fields.items() if name not in dropped}
    return kept | {name: fields[column] for name, column in columns.items()}


def _format_of(fields: dict[str, Any], requested: str, kind: RowKind, columns: Mapping[Any, str]) -> DatasetFormat:
    candidates = formats_of(kind)
    if columns:  # formats with a key that `columns` names come first
        candidates = tuple(sorted(candidates, key=lambda candidate: columns.keys().isdisjoint(_KEYS[candidate])))
    for row_format in candidates:
        is_requested = requested == row_format or (requested == "auto" and row_format != "text")
        if is_requested and all(fields.get(key) is not None for key in _KEYS[row_format]):
            is_labelled = row_format == "prompt_completion" and parse_label(fields.get("label")) is not None
            if requested == "auto" and is_labelled:
                raise BadRow(
                    "the answer is labelled (label) and may be a bad one: set method: kto to train on such rows, or "
                    "data.format: prompt_completion to train on every answer"
                )
            return row_format
    if kind == "sft" and requested == "auto" and fields.keys() >= {"chosen", "rejected"}:
        raise BadRow("the row compares two answers (chosen, rejected): set method: dpo to train on such rows")
    if requested != "auto":
        expected = f"format {requested!r}"
    else:
        expected = f"format {candidates[0]!r}" if len(candidates) == 1 else "any known format"
    raise BadRow(f"does not match {expected}: the row has the keys {keys_of(fields)}")


def _unused_keys(
    original: dict[str, Any], fields: dict[str, Any], columns: Mapping[Any, str], row_format: DatasetFormat
) -> frozenset[str]:
    """The keys of the original row that its format ignores; `fields` is the row with its columns renamed."""
    read = _READ[row_format]
    if row_format in ("preference", "unpaired_preference"):
        read |= next((parts for key, parts in _PROMPT_KEYS.items() if fields.get(key) is not None), set())
    used = {columns.get(key, key) for key in fields.keys() & read} if columns else read
    unused = {str(key) for key in original.keys() - used if not _is_empty(original[key])}
    for key in fields.keys() & read & _MESSAGE_LISTS:
        if isinstance(fields[key], list):
            unused.update(
                f"{columns.get(key, key)}[].{name}"
                for item in fields[key]
                if isinstance(item, dict)
                for name in item.keys() - _MESSAGE_KEYS
                if not _is_empty(item[name])
            )
    return frozenset(unused)


def _is_empty(value: Any) -> bool:
    """Whether a value only fills a column: null in Parquet and hub rows, an empty CSV cell."""
    return value is None or (isinstance(value, str | list | dict) and not value)


_KEYS: dict[DatasetFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "guanaco": ("text",),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("completion", "label"),
}

_TOOL_COLUMNS = frozenset(TOOL_COLUMNS)
# The keys that each format reads; the prompt of the two preference formats is one of _PROMPT_KEYS.
_READ: dict[DatasetFormat, frozenset[str]] = {
    "messages": frozenset({"messages", "system"}) | _TOOL_COLUMNS,
    "sharegpt": frozenset({"conversations", "system"}) | _TOOL_COLUMNS,
    "alpaca": frozenset({"instruction", "input", "output", "history", "system"}) | _TOOL_COLUMNS,
    "prompt_completion": frozenset({"prompt", "completion", "system"}) | _TOOL_COLUMNS,
    "guanaco": frozenset({"text", "system"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"chosen", "rejected", "system"}) | _TOOL_COLUMNS,
    "unpaired_preference": frozenset({"completion", "label", "system"}) | _TOOL_COLUMNS,
}
_MESSAGE_LISTS = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected"})
_MESSAGE_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "tool_call_id", "function_call", *TRAINED_KEYS}
)
