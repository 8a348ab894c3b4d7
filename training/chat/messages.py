"""The messages of a dialog, and the order of roles that chat formats accept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from training.errors import ChatFormatError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog. `role` is whatever the row or request contained; it is checked when rendered.

    Attributes:
        trained: False for an assistant turn that is context only, without loss; ignored for other roles.
    """

    role: Role
    content: str
    trained: bool = True

    @property
    def learned(self) -> bool:
        """Whether training puts loss on this turn."""
        return self.role == "assistant" and self.trained


def has_lone_surrogate(text: str) -> bool:
    """Whether a text contains half a UTF-16 pair, as JSON allows: it cannot be encoded as UTF-8, nor as tokens."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_dialog(messages: Sequence[Message], last_role: Role) -> None:
    """Check that a dialog can be rendered: an optional system message, then user and assistant alternating.

    Raises:
        ChatFormatError: with the index of the offending message and what was expected there.
    """
    if not messages:
        raise ChatFormatError("messages is empty: expected at least one user message")
    expected: tuple[str, ...] = ("system", "user")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in ROLES:
            raise ChatFormatError(
                f"{where} has role {message.role!r:.80}: expected {' or '.join(expected)} (supported roles: "
                f"{', '.join(ROLES)})",
                index,
            )
        if message.role not in expected:
            raise ChatFormatError(_out_of_order(messages, index, expected), index)
        expected = ("assistant",) if message.role == "user" else ("user",)
        if message.role == "user" and not message.content.strip():
            raise ChatFormatError(f"{where} from the user is empty: expected some text", index)
        if has_lone_surrogate(message.content):
            raise ChatFormatError(f"{where} contains half a UTF-16 surrogate pair: expected valid Unicode text", index)
    last = len(messages) - 1
    if messages[last].role != last_role:
        purpose = "for the assistant to answer" if last_role == "user" else "to train on"
        raise ChatFormatError(
            f"messages[{last}], the last, is from the {messages[last].role}: expected a last message from the "
            f"{last_role} {purpose}",
            last,
        )


def _out_of_order(messages: Sequence[Message], index: int, expected: tuple[str, ...]) -> str:
    role = messages[index].role
    if role == "system":
        problem = (
            "is a second system message" if messages[0].role == "system" else "is a system message after the start"
        )
    elif index == 0:
        problem = f"is the first message, but from the {role}"
    else:
        problem = f"is from the {role} and follows one from the {messages[index - 1].role}"
    return f"messages[{index}] {problem}: expected {' or '.join(expected)} there"
