"""A raw row -> what it teaches: a dialog, a plain text, a pair of answers or a rated answer.

The shapes are those of OpenAI, ShareGPT, Alpaca, Guanaco, TRL, UltraFeedback and Anthropic's HH sets, as TRL, Axolotl
and LLaMA-Factory read them. A row that has no such shape is a BadRow. Knows no tokens.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args

from training.config.data_config import DatasetFormat, DataSource, RowKind
from training.data.examples import BadRow, ParsedRow
from training.data.parsers import PARSERS, TRAINED_KEYS, keys_of, verdict
from training.data.sources import RawRow

# What an error tells about the rows that would be accepted.
ACCEPTED: dict[RowKind, str] = {
    "sft": 'accepted rows are {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}, '
    '{"conversations": [{"from": "human", "value": "..."}, ...]}, {"instruction": ..., "output": ...}, '
    '{"prompt": ..., "completion": ...} and {"text": "### Human: ... ### Assistant: ..."}; rows with other '
    "keys need data.columns, such as {prompt: question, completion: answer}",
    "preference": 'accepted rows are {"prompt": ..., "chosen": ..., "rejected": ...} with texts or messages, and '
    '{"chosen": [...], "rejected": [...]} with dialogs that differ in their last answer',
    "unpaired_preference": 'accepted rows are {"prompt": ..., "completion": ..., "label": true or false}',
}

# What precedes an answer, the first that a row has, each with the keys that it is read from.
_PROMPTS = {
    "prompt": {"prompt"},
    "conversations": {"conversations"},
    "instruction": {"instruction", "input", "history"},
}


def parse_row(row: RawRow, source: DataSource, kind: RowKind) -> ParsedRow:
    """What a row of `source` teaches.

    Args:
        source: with `format` and `columns` filled in.
        kind: which formats the training method can use.

    Raises:
        BadRow: it cannot be used.
    """
    if row.problem:
        raise BadRow(row.problem)
    given = _fields(row.content)
    columns = source.columns or {}
    fields = _renamed(given, columns) if columns else given
    row_format = _format_of(fields, source.format or "auto", kind, columns)
    return ParsedRow(row_format, PARSERS[row_format](fields), _unused_keys(given, fields, columns, row_format))


def formats_of(kind: RowKind) -> tuple[DatasetFormat, ...]:
    """The formats that rows of a kind can have."""
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
            raise BadRow("is not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadRow(f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadRow(f"is a JSON {type(content).__name__}, not an object")
    return content


def _renamed(fields: dict[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    """The row with what `columns` names under our names, before anything that has such a name of its own."""
    missing = [column for column in columns.values() if column not in fields]
    if missing:
        raise BadRow(f"has no {missing[0]!r}, which data.columns names: it has the keys {keys_of(fields)}")
    others = set(columns.values())
    if any(name in columns for name in _PROMPTS):  # another prompt of the row would stand in for the named one
        others.update(_PROMPTS)
    kept = {name: value for name, value in fields.items() if name not in others}
    return kept | {name: fields[column] for name, column in columns.items()}


def _format_of(fields: dict[str, Any], wanted: str, kind: RowKind, columns: Mapping[Any, str]) -> DatasetFormat:
    possible = formats_of(kind)
    if columns:  # a format of which they name a part comes first
        possible = tuple(sorted(possible, key=lambda known: columns.keys().isdisjoint(_KEYS[known])))
    for row_format in possible:
        asked = wanted == row_format or (wanted == "auto" and row_format != "text")
        if asked and all(fields.get(key) is not None for key in _KEYS[row_format]):
            if wanted == "auto" and row_format == "prompt_completion" and verdict(fields.get("label")) is not None:
                raise BadRow(
                    "rates an answer (label), which may be a bad one: set method: kto to train on such rows, or "
                    "data.format: prompt_completion to learn all of the answers"
                )
            return row_format
    if kind == "sft" and wanted == "auto" and fields.keys() >= {"chosen", "rejected"}:
        raise BadRow("compares two answers (chosen, rejected): train on such rows with method dpo")
    named = f"format {wanted!r}" if wanted != "auto" else possible[0] if len(possible) == 1 else "any known format"
    raise BadRow(f"is not of {named}: it has the keys {keys_of(fields)}")


def _unused_keys(
    given: dict[str, Any], fields: dict[str, Any], columns: Mapping[Any, str], row_format: DatasetFormat
) -> frozenset[str]:
    """Keys of the row as it was `given` that reading its `fields` in a format makes nothing of."""
    read = _READ[row_format]
    if row_format in ("preference", "unpaired_preference"):
        read |= next((parts for key, parts in _PROMPTS.items() if fields.get(key) is not None), set())
    used = {columns.get(key, key) for key in fields.keys() & read} if columns else read
    unused = {str(key) for key in given.keys() - used if not _is_nothing(given[key])}
    for key in fields.keys() & read & _MESSAGE_LISTS:
        if isinstance(fields[key], list):
            unused.update(
                f"{columns.get(key, key)}[].{name}"
                for item in fields[key]
                if isinstance(item, dict)
                for name in item.keys() - _MESSAGE_KEYS
                if not _is_nothing(item[name])
            )
    return frozenset(unused)


def _is_nothing(value: Any) -> bool:
    """What the rows of Parquet files and the hub fill up with, and an empty cell."""
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

# What reading a format looks at; a judged answer's prompt is one of _PROMPTS.
_READ: dict[DatasetFormat, frozenset[str]] = {
    "messages": frozenset({"messages", "system"}),
    "sharegpt": frozenset({"conversations", "system"}),
    "alpaca": frozenset({"instruction", "input", "output", "history", "system"}),
    "prompt_completion": frozenset({"prompt", "completion", "system"}),
    "guanaco": frozenset({"text", "system"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"chosen", "rejected", "system"}),
    "unpaired_preference": frozenset({"completion", "label", "system"}),
}
_MESSAGE_LISTS = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected"})
_MESSAGE_KEYS = frozenset({"role", "content", "from", "value", *TRAINED_KEYS})
