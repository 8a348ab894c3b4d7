"""One raw row of each dataset format -> an example. Strict: an ambiguous row is rejected, not guessed at."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from training.chat.messages import ROLE_ALIASES, Message, Role, check_dialog
from training.chat.tools import with_tools
from training.config.data_config import DatasetFormat
from training.data.examples import (
    BadRow,
    Dialog,
    Example,
    PreferencePair,
    TextExample,
    UnpairedExample,
    raise_unexpected,
)
from training.data.tools import check_calls, openai_calls, row_tools, sharegpt_calls
from training.errors import ChatFormatError

# Whether a message carries loss: OpenAI's `weight`, 0 or 1, and the two names in Axolotl's examples, true or false.
TRAINED_KEYS = ("weight", "train", "training")
_GUANACO_TURN = re.compile(r"### (Human|Assistant):")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "chatbot", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function", "ipython"), "tool"),
}
_OPENAI_ROLES: dict[str, Role] = {**ROLE_ALIASES, **dict.fromkeys(("function", "ipython"), "tool")}


def keys_of(fields: dict[str, Any]) -> str:
    # rows from the hub have null for every missing key
    return ", ".join(k if fields[k] is not None else f"{k} (null)" for k in sorted(fields, key=str)) or "(none)"


def _from_messages(fields: dict[str, Any]) -> Dialog:
    return _dialog(fields, _messages(fields["messages"], "messages"))


def _from_sharegpt(fields: dict[str, Any]) -> Dialog:
    return _dialog(fields, _messages(fields["conversations"], "conversations", sharegpt=True))


def _from_alpaca(fields: dict[str, Any]) -> Dialog:
    """Instruction and input form one user turn, joined by a line break as in LLaMA-Factory; `history` is a list of
    earlier [question, answer] pairs."""
    return _dialog(fields, [*_alpaca_prompt(fields), Message("assistant", _text(fields, "output"))])


def _alpaca_prompt(fields: dict[str, Any]) -> Iterator[Message]:
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise_unexpected("history", "a list of [question, answer] pairs", history)
    for index, (question, answer) in enumerate(history):
        yield Message("user", _content(question, f"history[{index}][0]"))
        yield Message("assistant", _content(answer, f"history[{index}][1]"))
    parts = [_text(fields, "instruction"), _text(fields, "input") if fields.get("input") else ""]
    yield Message("user", "\n".join(part for part in parts if part.strip()))


def _from_prompt_completion(fields: dict[str, Any]) -> Dialog:
    return _dialog(fields, [*_prompt(fields), *_turns(fields, "completion", "assistant")])


def _from_guanaco(fields: dict[str, Any]) -> Dialog:
    text = _text(fields, "text")
    before, *turns = _GUANACO_TURN.split(text)
    if before.strip() or not turns:
        raise BadRow(
            "text: expected a guanaco dialog, but it does not start with '### Human:'; to train on the complete text, "
            "set data.format to text"
        )
    return _dialog(fields, _alternating(turns))


def _from_text(fields: dict[str, Any]) -> TextExample:
    text = _text(fields, "text")
    if not text.strip():
        raise BadRow("text: empty")
    return TextExample(text)


def _from_preference(fields: dict[str, Any]) -> PreferencePair:
    """Either a prompt and two answers, or two dialogs that differ in the last answer only."""
    chosen, rejected = (_turns(fields, key, "assistant") for key in ("chosen", "rejected"))
    if any(message.role == "user" for message in (*chosen, *rejected)):
        prompt = _shared_prefix(chosen, rejected)
        _check_prompt_in(fields, prompt)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = [*_prompt(fields)]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0].role != "assistant":
            raise BadRow(f"{key}: expected one answer at the end, got {len(answer)} messages after the shared ones")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same answer")
    _check_not_untrained(chosen[0], rejected[0])
    pair = PreferencePair(_checked_prompt(fields, prompt, chosen[0]), chosen[0], rejected[0])
    _check_not_empty(rejected[0], "rejected")
    return pair


def _from_unpaired(fields: dict[str, Any]) -> UnpairedExample:
    label = parse_label(fields["label"])
    if label is None:
        raise_unexpected("label", "true or false", fields["label"])
    completion = _turns(fields, "completion", "assistant")
    if len(completion) != 1 or completion[0].role != "assistant":
        raise BadRow(f"completion: expected one answer from the assistant, got {len(completion)} messages")
    _check_not_untrained(completion[0])
    return UnpairedExample(_checked_prompt(fields, [*_prompt(fields)], completion[0]), completion[0], label)


def parse_label(label: Any) -> bool | None:
    """Whether an answer is desirable, as JSON, Parquet and CSV cells encode it; None for any other value."""
    if isinstance(label, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    return bool(label) if label in (True, False) else None  # 1 and 0 are equal to them


def _check_not_untrained(*answers: Message) -> None:
    """Reject an answer that is marked as untrained: preference methods have nothing else to train on."""
    if not all(answer.trained for answer in answers):
        raise BadRow("the answer to be rated is marked as untrained: remove the mark or the row")


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    num_shared = 0
    while num_shared < min(len(chosen), len(rejected)) - 1 and chosen[num_shared] == rejected[num_shared]:
        num_shared += 1
    return chosen[:num_shared]


def _check_prompt_in(fields: dict[str, Any], prefix: list[Message]) -> None:
    """UltraFeedback's rows repeat the question in `prompt`; it has to be in the shared prefix."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and prompt.strip() not in {m.content.strip() for m in prefix if m.role == "user"}:
        raise BadRow("prompt: not in the dialogs of chosen and rejected")


def _prompt(fields: dict[str, Any]) -> Iterator[Message]:
    """The messages before the answer, from whichever key holds them."""
    if fields.get("prompt") is not None:
        yield from _turns(fields, "prompt", "user")
    elif fields.get("conversations") is not None:
        yield from _messages(fields["conversations"], "conversations", sharegpt=True)
    elif fields.get("instruction") is not None:
        yield from _alpaca_prompt(fields)
    else:
        raise BadRow(f"no prompt: the row has the keys {keys_of(fields)}")


def _turns(fields: dict[str, Any], key: str, role: Role) -> list[Message]:
    """The messages of a text, a message, a list of messages, or a dialog as text in the format of Anthropic's HH."""
    value = fields[key]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        sharegpt = bool(value) and isinstance(value[0], dict) and "from" in value[0]
        return [*_messages(value, key, sharegpt)]
    text = _text(fields, key)
    before, *turns = _HH_TURN.split(text)
    if turns and not before.strip():
        return [m for m in _alternating(turns) if m.content or m.role == "user"]  # a prompt ends with "Assistant:"
    return [Message(role, text)]


def _alternating(turns: list[str]) -> Iterator[Message]:
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        yield Message("user" if speaker == "Human" else "assistant", content.strip())


def _dialog(fields: dict[str, Any], messages: Iterable[Message]) -> Dialog:
    turns = [*messages]
    if not turns:
        return Dialog(_checked_prompt(fields, [], None))
    *prompt, answer = turns
    messages = (*_checked_prompt(fields, prompt, answer), answer)
    if not any(message.learned for message in messages):
        raise BadRow("nothing to train on: every answer is marked as untrained")
    return Dialog(messages)


def _checked_prompt(fields: dict[str, Any], prompt: list[Message], answer: Message | None) -> tuple[Message, ...]:
    """The prompt, preceded by the row's `system`, after checking that prompt and answer form a valid dialog."""
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and (not prompt or prompt[0].role != "system"):
        prompt = [Message("system", system), *prompt]
    messages = (*prompt, answer) if answer else tuple(prompt)
    try:
        check_dialog(messages, answered=True)
    except ChatFormatError as error:
        raise BadRow(f"not a valid dialog for training: {error}") from error
    tools = row_tools(fields)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            _check_not_empty(message, f"messages[{index}]")
            check_calls(message.tool_calls, tools, f"messages[{index}]")
    return tuple(with_tools(prompt, tools))


def _check_not_empty(answer: Message, where: str) -> None:
    if not answer.content.strip() and not answer.tool_calls:
        raise BadRow(f"{where}: the answer is empty")


def _messages(items: Any, key: str, sharegpt: bool = False) -> Iterator[Message]:
    if isinstance(items, str) and items.lstrip().startswith("["):  # a CSV cell
        try:
            items = json.loads(items)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{key}: not valid JSON ({error})") from error
    if not isinstance(items, list):
        raise_unexpected(key, "a list of messages", items)
    names = ("from", "value") if sharegpt else ("role", "content")
    for index, item in enumerate(items):
        where = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise_unexpected(where, f"an object with {' and '.join(names)}", item)
        if sharegpt and "from" not in item and "role" in item:
            names = ("role", "content")
        calls = openai_calls(item, where)
        missing = [name for name in names if name not in item and not (calls and name == "content")]
        if missing:
            raise BadRow(f"{where}: {' and '.join(missing)} missing, the message has the keys {keys_of(item)}")
        role, content = item[names[0]], item.get(names[1])
        if role == "function_call" and sharegpt:
            calls, content = sharegpt_calls(content, f"{where}.value"), ""
        if isinstance(role, str):
            role = _SHAREGPT_ROLES.get(role.lower(), role) if sharegpt else _OPENAI_ROLES.get(role, role)
        if calls and role != "assistant":
            raise BadRow(f"{where}: only the assistant calls tools, but the message is from the {role!r:.40}")
        if calls and content is None:
            content = ""
        if role == "tool" and isinstance(content, dict):
            content = json.dumps(content, ensure_ascii=False)
        call_id = item.get("tool_call_id")
        yield Message(
            role,
            _content(content, f"{where}.{names[1]}"),
            _is_trained(item, role, where),
            calls,
            call_id if isinstance(call_id, str) else "",
        )


def _is_trained(item: dict[str, Any], role: Any, where: str) -> bool:
    """Whether a message carries loss, by the keys of OpenAI and Axolotl; an assistant's does by default."""
    if len(item) == 2:  # the common case: role and content only
        return True
    if item.get("train_detail"):
        raise BadRow(f"{where}: train_detail is not supported, a message is trained completely or not at all")
    marks = {key: item[key] for key in TRAINED_KEYS if item.get(key) is not None}  # Parquet has null for missing keys
    for key, mark in marks.items():
        if mark not in (0, 1):  # false and true are equal to them
            raise_unexpected(f"{where}.{key}", "0 or 1" if key == "weight" else "true or false", mark)
        if mark and role != "assistant":
            raise BadRow(f"{where}.{key}: only assistant messages can be trained, got {json.dumps(mark)}")
    return all(marks.values())


def _text(fields: dict[str, Any], key: str) -> str:
    return _content(fields[key], key, "a string")


def _content(content: Any, where: str, expected: str = "a string or a list of text parts") -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or expected == "a string":
        raise_unexpected(where, expected, content)
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise_unexpected(f"{where}[{index}]", 'a part {"type": "text", "text": "..."}', part)
        texts.append(text)
    return "".join(texts)


PARSERS: dict[DatasetFormat, Callable[[dict[str, Any]], Example]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "guanaco": _from_guanaco,
    "text": _from_text,
    "preference": _from_preference,
    "unpaired_preference": _from_unpaired,
}
