"""One raw row of each dataset format -> an example. Strict: a row that would have to be guessed is refused."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from training.chat.messages import Message, Role, check_dialog
from training.config.data_config import DatasetFormat
from training.data.examples import BadRow, Dialog, Example, PreferencePair, TextExample, UnpairedExample
from training.errors import ChatFormatError

_EXCERPT_CHARS = 80
# Whether a message is trained: OpenAI's 0 or 1, and the two names of Axolotl's examples, true or false.
TRAINED_KEYS = ("weight", "train", "training")
_GUANACO_TURN = re.compile(r"### (Human|Assistant):")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "chatbot"), "assistant"),
}


def keys_of(fields: dict[str, Any]) -> str:
    # hub rows fill up with null
    return ", ".join(k if fields[k] is not None else f"{k} (null)" for k in sorted(fields, key=str)) or "(none)"


def _from_messages(fields: dict[str, Any]) -> Dialog:
    return _dialog(fields, _messages(fields["messages"], "messages"))


def _from_sharegpt(fields: dict[str, Any]) -> Dialog:
    return _dialog(fields, _messages(fields["conversations"], "conversations", sharegpt=True))


def _from_alpaca(fields: dict[str, Any]) -> Dialog:
    """Instruction and input make one user turn, joined by a line break as LLaMA-Factory joins them; `history` is a
    list of earlier [question, answer] pairs."""
    return _dialog(fields, [*_alpaca_prompt(fields), Message("assistant", _text(fields, "output"))])


def _alpaca_prompt(fields: dict[str, Any]) -> Iterator[Message]:
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        _wrong("history", "a list of [question, answer] pairs", history)
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
            "has a text that does not start with '### Human:', as a dialog in a text does; set data.format to text if "
            "the whole text is to be trained"
        )
    return _dialog(fields, _alternating(turns))


def _from_text(fields: dict[str, Any]) -> TextExample:
    text = _text(fields, "text")
    if not text.strip():
        raise BadRow("has an empty text")
    return TextExample(text)


def _from_preference(fields: dict[str, Any]) -> PreferencePair:
    """With a prompt, or with two whole dialogs that begin alike and differ in the last answer."""
    chosen, rejected = (_turns(fields, key, "assistant") for key in ("chosen", "rejected"))
    if any(message.role == "user" for message in (*chosen, *rejected)):
        prompt = _shared_prefix(chosen, rejected)
        _check_is_beginning(fields, prompt)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = [*_prompt(fields)]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0].role != "assistant":
            raise BadRow(f"has in {key} {len(answer)} messages that differ, expected one answer at the end")
    if chosen == rejected:
        raise BadRow("has the same answer as chosen and as rejected")
    _check_judged(chosen[0], rejected[0])
    return PreferencePair(_checked(fields, prompt, chosen[0]), chosen[0], _answered(rejected[0], "rejected"))


def _from_unpaired(fields: dict[str, Any]) -> UnpairedExample:
    label = verdict(fields["label"])
    if label is None:
        _wrong("label", "true or false", fields["label"])
    completion = _turns(fields, "completion", "assistant")
    if len(completion) != 1 or completion[0].role != "assistant":
        raise BadRow(f"has in completion {len(completion)} messages: expected one answer from the assistant")
    _check_judged(completion[0])
    return UnpairedExample(_checked(fields, [*_prompt(fields)], completion[0]), completion[0], label)


def verdict(label: Any) -> bool | None:
    """Whether an answer is wanted, as JSON, Parquet and the cells of CSV files say it; None for any other value."""
    if isinstance(label, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    return bool(label) if label in (True, False) else None  # 1 and 0 are equal to them


def _check_judged(*answers: Message) -> None:
    """What an answer teaches here is that it is better, worse, wanted or not; a prompt's turns are context anyway."""
    if not all(answer.trained for answer in answers):
        raise BadRow("marks the answer that it judges as not to be trained: leave the mark or the row out")


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    return chosen[:same]


def _check_is_beginning(fields: dict[str, Any], prefix: list[Message]) -> None:
    """UltraFeedback's rows have the question in `prompt` once more."""
    given = fields.get("prompt")
    if isinstance(given, str) and given.strip() not in {m.content.strip() for m in prefix if m.role == "user"}:
        raise BadRow("has a prompt that is not in the dialogs of chosen and rejected")


def _prompt(fields: dict[str, Any]) -> Iterator[Message]:
    """What precedes an answer, wherever a row has it."""
    if fields.get("prompt") is not None:
        yield from _turns(fields, "prompt", "user")
    elif fields.get("conversations") is not None:
        yield from _messages(fields["conversations"], "conversations", sharegpt=True)
    elif fields.get("instruction") is not None:
        yield from _alpaca_prompt(fields)
    else:
        raise BadRow(f"has no prompt: it has the keys {keys_of(fields)}")


def _turns(fields: dict[str, Any], key: str, role: Role) -> list[Message]:
    """A text, one message, a list of messages, or a dialog written out as in Anthropic's HH sets."""
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
        return Dialog(_checked(fields, [], None))
    *prompt, answer = turns
    messages = (*_checked(fields, prompt, answer), answer)
    if not any(message.learned for message in messages):
        raise BadRow("has nothing to learn: every answer is marked as not to be trained")
    return Dialog(messages)


def _checked(fields: dict[str, Any], prompt: list[Message], answer: Message | None) -> tuple[Message, ...]:
    """The prompt, with the row's `system` before it, if it makes a dialog together with `answer`."""
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and (not prompt or prompt[0].role != "system"):
        prompt = [Message("system", system), *prompt]
    messages = (*prompt, answer) if answer else tuple(prompt)
    try:
        check_dialog(messages, "assistant")
    except ChatFormatError as error:
        raise BadRow(f"is no dialog to learn from: {error}") from error
    for index, message in enumerate(messages):
        if message.role == "assistant":
            _answered(message, f"messages[{index}]")
    return tuple(prompt)


def _answered(message: Message, where: str) -> Message:
    if not message.content.strip():
        raise BadRow(f"has an empty answer in {where}")
    return message


def _messages(items: Any, key: str, sharegpt: bool = False) -> Iterator[Message]:
    if isinstance(items, str) and items.lstrip().startswith("["):  # a CSV cell
        try:
            items = json.loads(items)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"has in {key} a text that is not JSON ({error})") from error
    if not isinstance(items, list):
        _wrong(key, "a list of messages", items)
    names = ("from", "value") if sharegpt else ("role", "content")
    for index, item in enumerate(items):
        where = f"{key}[{index}]"
        if not isinstance(item, dict):
            _wrong(where, f"an object with {' and '.join(names)}", item)
        if sharegpt and "from" not in item and "role" in item:
            names = ("role", "content")
        missing = [name for name in names if name not in item]
        if missing:
            raise BadRow(f"has no {' and no '.join(missing)} in {where}: it has the keys {keys_of(item)}")
        if item.get("tool_calls") or item.get("function_call"):
            raise BadRow(f"calls a tool in {where}: chat formats know text only")
        role, content = (item[name] for name in names)
        if sharegpt and isinstance(role, str):
            role = _SHAREGPT_ROLES.get(role.lower(), role)
        yield Message(role, _content(content, f"{where}.{names[1]}"), _is_trained(item, role, where))


def _is_trained(item: dict[str, Any], role: Any, where: str) -> bool:
    """As OpenAI and Axolotl mark a message; an assistant's is trained unless it says otherwise."""
    if len(item) == 2:  # nearly all: a role and a content
        return True
    if item.get("train_detail"):
        raise BadRow(f"trains parts of a message (train_detail) in {where}: only whole messages can be left out")
    marks = {key: item[key] for key in TRAINED_KEYS if item.get(key) is not None}  # Parquet fills up with null
    for key, mark in marks.items():
        if mark not in (0, 1):  # false and true are equal to them
            _wrong(f"{where}.{key}", "0 or 1" if key == "weight" else "true or false", mark)
        if mark and role != "assistant":
            _wrong(f"{where}.{key}", "none: only messages of the assistant are trained", mark)
    return all(marks.values())


def _text(fields: dict[str, Any], key: str) -> str:
    return _content(fields[key], key, "a string")


def _content(content: Any, where: str, expected: str = "a string or a list of text parts") -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or expected == "a string":
        _wrong(where, expected, content)
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            _wrong(f"{where}[{index}]", 'a part {"type": "text", "text": "..."}', part)
        texts.append(text)
    return "".join(texts)


def _wrong(where: str, expected: str, found: Any) -> NoReturn:
    text = json.dumps(found, ensure_ascii=False, default=str)
    raise BadRow(f"has in {where} {text[:_EXCERPT_CHARS]}, expected {expected}")


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
