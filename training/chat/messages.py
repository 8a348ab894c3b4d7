"""The messages of a dialog, and the order of roles that chat formats can express."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from training.errors import ChatFormatError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
ROLE_ALIASES: dict[str, Role] = {"developer": "system"}  # OpenAI's newer name


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in an assistant's turn.

    Attributes:
        arguments: JSON text of an object; a call that was cut off has only its beginning.
        id: by which a result names its call; not part of a prompt.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog. `role` is whatever the row or request contained; it is checked when rendered.

    Attributes:
        trained: False for an assistant turn that is context only, without loss; ignored for other roles.
        tool_calls: of an assistant's turn; the `tool` messages after it are their results.
        tool_call_id: of a `tool` message: which call it is the result of.
        tools: what the assistant may call in this dialog, each as `tools.tool_json` writes it; of the first message.
        prefix: of a system message: what the base's chat template puts before its content.
    """

    role: Role
    content: str
    trained: bool = True
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def learned(self) -> bool:
        """Whether training puts loss on this turn."""
        return self.role == "assistant" and self.trained

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the turn, as it was given."""
        calls = (text for call in self.tool_calls for text in (call.name, call.arguments))
        return (self.content, *calls, *self.tools)


def has_lone_surrogate(text: str) -> bool:
    """Whether a text contains half a UTF-16 pair, as JSON allows: it cannot be encoded as UTF-8, nor as tokens."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_dialog(messages: Sequence[Message], *, answered: bool) -> None:
    """Check what every chat format requires of a dialog.

    Args:
        answered: it is a dialog to train on, which contains a question and ends with the answer.

    Raises:
        ChatFormatError: with the index of the offending message and what was expected there.
    """
    if not messages:
        raise ChatFormatError("messages is empty: expected at least one user message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in ROLES:
            raise ChatFormatError(
                f"{where} has role {message.role!r:.80}: expected one of {', '.join(ROLES)}, or developer for system",
                index,
            )
        if message.role == "user" and not message.content.strip():
            raise ChatFormatError(f"{where} from the user is empty: expected some text", index)
        if any(map(has_lone_surrogate, message.texts)):
            raise ChatFormatError(f"{where} contains half a UTF-16 surrogate pair: expected valid Unicode text", index)
    last = len(messages) - 1
    if answered and messages[last].role != "assistant":
        raise ChatFormatError(
            f"messages[{last}], the last, is from the {messages[last].role}: expected a last message from the "
            "assistant to train on",
            last,
        )
    if answered and all(message.role != "user" for message in messages):
        raise ChatFormatError(f"messages[{last}] answers nothing: expected a user message before it", last)


def results_in_call_order(messages: Sequence[Message]) -> list[Message]:
    """The dialog with the results of each answer's calls in the order of the calls, which is how prompts pair them.

    Without ids, results are taken as being in this order. The last calls of an answer may lack a result.

    Raises:
        ChatFormatError: a result belongs to no call, or the order leaves open to which; with the message's index.
    """
    ordered: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        if message.role == "tool":
            raise ChatFormatError(f"messages[{position}] is a result, but no call stands before it", position)
        results = [*itertools.takewhile(lambda other: other.role == "tool", messages[position + 1 :])]
        ordered += [message, *_in_call_order(message.tool_calls, results, position + 1)]
        position += 1 + len(results)
    return ordered


def _in_call_order(calls: Sequence[ToolCall], results: Sequence[Message], first_index: int) -> Sequence[Message]:
    if len(results) > len(calls):
        index = first_index + len(calls)
        calls_before = f"only {len(calls)} calls stand" if calls else "no call stands"
        raise ChatFormatError(f"messages[{index}] is a result, but {calls_before} before it", index)
    ids = [call.id for call in calls]
    if not any(result.tool_call_id for result in results) or not all(ids) or len({*ids}) < len(ids):
        return results
    by_id: dict[str, Message] = {}
    for index, result in enumerate(results, first_index):
        if result.tool_call_id not in ids or result.tool_call_id in by_id:
            problem = "has a result already" if result.tool_call_id in by_id else "is not among them"
            raise ChatFormatError(
                f"messages[{index}].tool_call_id is {result.tool_call_id!r:.80}, which {problem}: the calls before it "
                f"are {', '.join(ids)}",
                index,
            )
        by_id[result.tool_call_id] = result
    if missing := [call_id for call_id in ids[: len(results)] if call_id not in by_id]:
        raise ChatFormatError(
            f"messages[{first_index - 1}] has the call {missing[0]!r:.80} without a result, though a later call has "
            "one: send a tool message for each call",
            first_index - 1,
        )
    return [by_id[call_id] for call_id in ids[: len(results)]]


def merge_turns(messages: Sequence[Message], last_role: Role) -> list[Message]:
    """A dialog as an optional system message, then user and assistant in turn: the only order that Llama 2 knows.

    Adjacent messages of one role become one, joined by a blank line; any other order is refused.

    Raises:
        ChatFormatError: with the index of the offending message and what was expected there.
    """
    merged: list[Message] = []
    expected: tuple[Role, ...] = ("system", "user")
    for index, message in enumerate(messages):
        if merged and message.role == merged[-1].role:
            if message.learned != merged[-1].learned:
                raise ChatFormatError(
                    f"messages[{index}] follows another message from the assistant, and only one of them is trained: "
                    "llama-2 writes both as one turn, so mark both or neither",
                    index,
                )
            merged[-1] = replace(merged[-1], content=f"{merged[-1].content}\n\n{message.content}")
            continue
        if message.role not in expected:
            raise ChatFormatError(_out_of_order(messages, index, expected), index)
        merged.append(message)
        expected = ("assistant",) if message.role == "user" else ("user",)
    if merged[-1].role != last_role:
        last = len(messages) - 1
        raise ChatFormatError(
            f"messages[{last}], the last, is from the {merged[-1].role}: in llama-2 the {last_role} has the last turn",
            last,
        )
    return merged


def _out_of_order(messages: Sequence[Message], index: int, expected: tuple[Role, ...]) -> str:
    role = messages[index].role
    if index == 0:
        problem = f"is the first message, but from the {role}"
    elif role == "system":
        problem = "is a system message after the start"
    else:
        problem = f"is from the {role} and follows one from the {messages[index - 1].role}"
    return f"messages[{index}] {problem}: in llama-2, expected {' or '.join(expected)} there"
