"""Preference rows -> prompt and answer ids, for `method: dpo` and `method: kto`.

`training.inputs` comes here for those methods. Rows are {"prompt", "chosen", "rejected"} for DPO and
{"prompt", "completion", "label"} for KTO, prompts a string or a list of messages, answers a string or one message.
Ids are those of serving: the chat format renders both.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.chat_format import ChatFormat, Message
from training.data import (
    Conversation,
    DataConfig,
    OnBadRow,
    PreferenceRow,
    SkippedRow,
    UnpairedRow,
    _BadRow,
    _messages,
    _refuse_or_skip,
    _rows,
    _wrong,
)
from training.errors import ChatFormatError, DatasetError

_KEYS = {"dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion", "label")}


@dataclass(frozen=True, slots=True)
class Preference:
    """One row: a prompt that ends with the user's turn, and its answers.

    Attributes:
        answers: the chosen and the rejected one; or the only one of an unpaired row.
        label: of an unpaired row, whether its answer is desirable.
        source: `file.jsonl:12`.
    """

    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    label: bool | None
    source: str

    @property
    def conversation(self) -> Conversation:
        """The prompt with its first answer."""
        return Conversation((*self.prompt, self.answers[0]), self.source)


@dataclass(frozen=True, slots=True)
class LoadedPreferences:
    """What `load_preferences` read: the usable rows, those left out, and the sha256 of the bytes."""

    rows: list[Preference]
    skipped: list[SkippedRow]
    sha256: str


def load_preferences(config: DataConfig, method: Literal["dpo", "kto"]) -> LoadedPreferences:
    """Read every row of the configured files or hub datasets.

    Raises:
        DatasetError: no row can be used, or one is bad and `on_bad_row` is `error`.
    """
    rows: list[Preference] = []
    skipped: list[SkippedRow] = []
    sha256 = hashlib.sha256()
    for raw in _rows(config, sha256.update):
        try:
            rows.append(_parse(raw.content, raw.source, method))
        except _BadRow as bad:
            excerpt = raw.content[:80].decode("utf-8", errors="replace")
            _refuse_or_skip(SkippedRow(raw.source, str(bad), excerpt), config.on_bad_row, skipped)
    if not rows:
        raise DatasetError(
            f"dataset {', '.join(config.paths)} has no usable row for method {method} ({len(skipped)} skipped): "
            f"it takes rows with {', '.join(_KEYS[method])}"
        )
    return LoadedPreferences(rows, skipped, sha256.hexdigest())


def tokenize_pairs(
    rows: Sequence[Preference],
    chat_format: ChatFormat,
    max_length: int,
    skipped: list[SkippedRow],
    on_bad_row: OnBadRow,
) -> list[PreferenceRow]:
    """DPO's rows as ids; one whose prompt and longer answer exceed `max_length` tokens is a bad row."""
    tokenized: list[PreferenceRow] = []
    for row in rows:
        if ids := _ids(row, chat_format, max_length, skipped, on_bad_row):
            prompt_ids, (chosen_ids, rejected_ids) = ids
            tokenized.append({"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
    return tokenized


def tokenize_unpaired(
    rows: Sequence[Preference],
    chat_format: ChatFormat,
    max_length: int,
    skipped: list[SkippedRow],
    on_bad_row: OnBadRow,
) -> list[UnpairedRow]:
    """KTO's rows as ids; one whose prompt and answer exceed `max_length` tokens is a bad row."""
    tokenized: list[UnpairedRow] = []
    for row in rows:
        if ids := _ids(row, chat_format, max_length, skipped, on_bad_row):
            prompt_ids, (completion_ids,) = ids
            tokenized.append({"prompt_ids": prompt_ids, "completion_ids": completion_ids, "label": bool(row.label)})
    return tokenized


def _ids(
    row: Preference, chat_format: ChatFormat, max_length: int, skipped: list[SkippedRow], on_bad_row: OnBadRow
) -> tuple[list[int], list[list[int]]] | None:
    try:
        prompt_ids = chat_format.render_prompt(row.prompt)
        completions = []
        for answer in row.answers:
            rendered = chat_format.render_training([*row.prompt, answer])
            end = max(i for i, trained in enumerate(rendered.loss_mask) if trained) + 1
            completions.append(rendered.input_ids[len(prompt_ids) : end])
        longest = len(prompt_ids) + max(map(len, completions))
        reason = f"is too long, {longest} tokens with max_length {max_length}" if longest > max_length else None
    except ChatFormatError as error:
        reason = f"is no dialog to learn from: {error}"
    if reason is None:
        return prompt_ids, completions
    _refuse_or_skip(SkippedRow(row.source, reason, row.prompt[0].content[:80]), on_bad_row, skipped)
    return None


def _parse(content: bytes, source: str, method: Literal["dpo", "kto"]) -> Preference:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _BadRow(f"is a JSON {type(row).__name__}, not an object")
    if missing := [key for key in _KEYS[method] if row.get(key) is None]:
        raise _BadRow(f"has no {' and no '.join(missing)}, which method {method} needs")
    prompt = row["prompt"]
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(_messages(prompt, "prompt"))
    label = None
    if method == "kto":
        label = row["label"]
        if not isinstance(label, bool):
            _wrong("label", "true or false", label)
    answers = tuple(_answer(row[key], key) for key in _KEYS[method] if key not in ("prompt", "label"))
    return Preference(tuple(messages), answers, label, source)


def _answer(value: Any, key: str) -> Message:
    messages = [Message("assistant", value)] if isinstance(value, str) else list(_messages(value, key))
    if len(messages) != 1 or messages[0].role != "assistant" or not messages[0].content.strip():
        _wrong(key, "the assistant's answer, a string or one message", value)
    return messages[0]
