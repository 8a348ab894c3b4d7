"""Chat messages -> pieces -> token ids and loss mask, in the formats llama-2, llama-3 and chatml.

Training and the ingress both render here, so a model is asked exactly as it was trained. A piece is a
control token or a text; text is always encoded as text, so `</s>` or `<|im_start|>` typed by a user is
no control token. Nothing is dropped or cut: a dialog that a format cannot hold is a ChatFormatError.
The jinja template of the base model is never run.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from training.base_models.resolve import BaseModel, encode_text, load_tokenizer
from training.errors import ChatFormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Role = Literal["system", "user", "assistant"]
ChatFormatName = Literal["llama-2", "llama-3", "chatml"]

ROLES: tuple[Role, ...] = get_args(Role)
CHAT_FORMATS: tuple[ChatFormatName, ...] = get_args(ChatFormatName)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog. `role` may hold anything a row or request gave; rendering checks it.

    Attributes:
        trained: False for an assistant turn that is only read, not learned; of other turns it says nothing.
    """

    role: Role
    content: str
    trained: bool = True

    @property
    def learned(self) -> bool:
        """Whether training puts loss on this turn."""
        return self.role == "assistant" and self.trained


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialog as token ids; `loss_mask[i]` is True where the model is to learn `input_ids[i]`."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    control: bool = False
    trained: bool = False


def _control(text: str, trained: bool = False) -> _Piece:
    return _Piece(text, control=True, trained=trained)


def _llama_2(messages: Sequence[Message]) -> Iterator[_Piece]:
    """Meta's `llama.generation.chat_completion`: system folded into the first user turn, turns stripped."""
    system = ""
    for message in messages:
        if message.role == "system":
            system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            yield _control("<s>")
            yield _Piece(f"[INST] {(system + message.content).strip()} [/INST]")
            system = ""
        else:
            yield _Piece(f"{message.content.strip()} ", trained=message.learned)
            yield _control("</s>", trained=message.learned)


def _llama_3(messages: Sequence[Message]) -> Iterator[_Piece]:
    """Meta's `ChatFormat.encode_dialog_prompt`: a header per turn, contents stripped, no default system."""
    yield _control("<|begin_of_text|>")
    for message in messages:
        yield from _llama_3_header(message.role)
        yield _Piece(message.content.strip(), trained=message.learned)
        yield _control("<|eot_id|>", trained=message.learned)


def _llama_3_header(role: str) -> Iterator[_Piece]:
    yield _control("<|start_header_id|>")
    yield _Piece(role)
    yield _control("<|end_header_id|>")
    yield _Piece("\n\n")


def _chatml(messages: Sequence[Message]) -> Iterator[_Piece]:
    """OpenAI's ChatML: contents as they are, no default system prompt."""
    for message in messages:
        if message.role == "assistant":
            yield from _chatml_opening()
            yield _Piece(message.content, trained=message.learned)
        else:
            yield _control("<|im_start|>")
            yield _Piece(f"{message.role}\n{message.content}")
        yield _control("<|im_end|>", trained=message.learned)
        yield _Piece("\n")


def _chatml_opening() -> Iterator[_Piece]:
    yield _control("<|im_start|>")
    yield _Piece("assistant\n")


@dataclass(frozen=True, slots=True)
class _Layout:
    turns: Callable[[Sequence[Message]], Iterator[_Piece]]
    opening: Callable[[], Iterator[_Piece]]  # what precedes the model's answer
    controls: tuple[str, ...]  # the tokenizer must have them
    end_of_turn: tuple[str, ...]  # stop tokens: those of them that the tokenizer has
    begin_of_text: str | None  # of a plain text; None: the tokenizer's own, if it has one
    end_of_text: tuple[str, ...]  # of a plain text: the first of them that the tokenizer has


_LAYOUTS: dict[ChatFormatName, _Layout] = {
    "llama-2": _Layout(_llama_2, lambda: iter(()), ("<s>", "</s>"), ("</s>",), "<s>", ("</s>",)),
    "llama-3": _Layout(
        _llama_3,
        lambda: _llama_3_header("assistant"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "<|begin_of_text|>",
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "chatml": _Layout(
        _chatml,
        _chatml_opening,
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
        None,
        ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>"),
    ),
}

# "[INST] hi [/INST]" in the Llama-2 vocabulary, which these two entries tell.
_LLAMA_2_VOCABULARY = {"▁[": 518, "INST": 25580}
_LLAMA_2_KNOWN_IDS = [518, 25580, 29962, 7251, 518, 29914, 25580, 29962]

# What a base model's own chat template holds if it is of this format.
_TEMPLATE_MARKS: dict[ChatFormatName, str] = {
    "llama-2": "[INST]",
    "llama-3": "<|start_header_id|>",
    "chatml": "<|im_start|>",
}


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half a UTF-16 pair, as JSON may: such a text has no bytes, and so no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class ChatFormat:
    """One format over one tokenizer.

    Attributes:
        name: the format, as adapter manifests record it.
        stop_token_ids: every token that ends an assistant turn or the text.
        bos_token: what begins a chatml text, where the base asks for it; the other formats bring their own.
    """

    name: ChatFormatName
    stop_token_ids: tuple[int, ...]
    bos_token: str | None

    def __init__(self, name: ChatFormatName, tokenizer: "Tokenizer", bos_token: str | None = None) -> None:
        """Check that the tokenizer fits the format.

        Args:
            name: the format.
            tokenizer: with `encode_special_tokens` on; control tokens that are not marked special in it get marked.
            bos_token: begins every chatml text; the other formats bring their own.

        Raises:
            ChatFormatError: a control token is missing, or text would be parsed for control tokens.
        """
        self.name = name
        self._tokenizer = tokenizer
        self._layout = _LAYOUTS[name]
        self.bos_token = bos_token if name == "chatml" else None
        self._control_ids = _control_ids(tokenizer)
        needed = self._layout.controls + ((self.bos_token,) if self.bos_token else ())
        missing = [token for token in needed if token not in self._control_ids]
        if missing:
            raise ChatFormatError(
                f"this tokenizer does not fit chat format {name!r}: it has no {', '.join(missing)}; "
                f"set chat_format to auto or one of {', '.join(CHAT_FORMATS)}"
            )
        ends = [token for token in self._layout.end_of_turn if token in self._control_ids]
        self.stop_token_ids = tuple(self._control_ids[token] for token in ends)
        _mark_special(tokenizer, {*needed, *ends})
        self._check_text_stays_text()
        if name == "llama-2":
            self._check_known_ids()
        self._lost_lead_bytes = _lost_lead_bytes(tokenizer)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that ask for the next assistant turn; `messages` end with a user's.

        Raises:
            ChatFormatError: the dialog has no rendering; its `message_index` says where.
        """
        check_dialog(messages, "user")
        self._check_encodable(messages)
        return self._render(messages, self._layout.opening()).input_ids

    def render_training(self, messages: Sequence[Message]) -> Rendered:
        """A dialog that ends with an assistant turn, with loss on text and end of turn of every learned message.

        `render_prompt(m)` is exactly the beginning of `render_training([*m, answer]).input_ids`.

        Raises:
            ChatFormatError: the dialog has no rendering; its `message_index` says where.
        """
        check_dialog(messages, "assistant")
        self._check_encodable(messages)
        return self._render(messages, iter(()))

    def render_all(self, rows: Sequence[Sequence[Message] | str]) -> list[Rendered | ChatFormatError]:
        """`render_training` of each dialog and `render_text` of each plain text, all encoded in one parallel call.

        What cannot be rendered is answered with its error.
        """
        pieces = [self._pieces_or_error(row) for row in rows]
        texts = [*dict.fromkeys(p.text for row in pieces if isinstance(row, list) for p in row if not p.control)]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [self._assemble(row, ids.__getitem__) if isinstance(row, list) else row for row in pieces]

    def render_text(self, text: str) -> Rendered:
        """A text for continued pretraining, between the tokens that begin and end a text; all of it is trained.

        Raises:
            ChatFormatError: it holds a character for which there is no token.
        """
        return self._assemble(self._text_pieces(text), self._encode)

    def _pieces_or_error(self, row: Sequence[Message] | str) -> list[_Piece] | ChatFormatError:
        try:
            if isinstance(row, str):
                return self._text_pieces(row)
            check_dialog(row, "assistant")
            self._check_encodable(row)
            return self._dialog_pieces(row, iter(()))
        except ChatFormatError as error:
            return error

    def _render(self, messages: Sequence[Message], opening: Iterator[_Piece]) -> Rendered:
        return self._assemble(self._dialog_pieces(messages, opening), self._encode)

    def _dialog_pieces(self, messages: Sequence[Message], opening: Iterator[_Piece]) -> list[_Piece]:
        bos = [_control(self.bos_token)] if self.bos_token else []
        return [*bos, *self._layout.turns(messages), *opening]

    def _text_pieces(self, text: str) -> list[_Piece]:
        if has_lone_surrogate(text):
            raise ChatFormatError("the text holds half a UTF-16 surrogate pair: expected valid Unicode text")
        self._check_encodable([Message("user", text)])
        begin = self._layout.begin_of_text or self.bos_token
        ends = [end for end in self._layout.end_of_text if end in self._control_ids]
        return [*([_control(begin)] if begin else []), _Piece(text, trained=True), _control(ends[0], trained=True)]

    def _assemble(self, pieces: Sequence[_Piece], encode: Callable[[str], list[int]]) -> Rendered:
        rendered = Rendered([], [])
        for piece in pieces:
            ids = [self._control_ids[piece.text]] if piece.control else encode(piece.text)
            rendered.input_ids.extend(ids)
            rendered.loss_mask.extend([piece.trained] * len(ids))
        return rendered

    def _encode(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)

    def _check_encodable(self, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages):
            text = message.content.encode()
            if len(text.translate(None, self._lost_lead_bytes)) < len(text):
                lost = next(char for char in message.content if char.encode()[0] in self._lost_lead_bytes)
                raise ChatFormatError(
                    f"messages[{index}] holds the character U+{ord(lost):04X}, for which this model has no token: "
                    "remove it",
                    index,
                )

    def _check_text_stays_text(self) -> None:
        if not self._tokenizer.encode_special_tokens:
            raise ChatFormatError(
                "the tokenizer parses texts for special tokens: set encode_special_tokens = True on it first"
            )
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            if token.special and token_id in self._encode(token.content):
                raise ChatFormatError(
                    f"this tokenizer turns the plain text {token.content!r} into a control token, so chat format "
                    f"{self.name!r} would not be safe on it: use the tokenizer.json of the original model"
                )

    def _check_known_ids(self) -> None:
        if any(self._tokenizer.token_to_id(token) != token_id for token, token_id in _LLAMA_2_VOCABULARY.items()):
            return
        found = self._encode("[INST] hi [/INST]")
        if found != _LLAMA_2_KNOWN_IDS:
            raise ChatFormatError(
                f"this Llama-2 tokenizer encodes '[INST] hi [/INST]' as {found}, Llama 2 was trained on "
                f"{_LLAMA_2_KNOWN_IDS}: use the tokenizer.json of the original model"
            )


def load_chat_format(name: str, base: BaseModel, tokenizer: "Tokenizer | None" = None) -> ChatFormat:
    """The chat format `name` (`llama-2`, `llama-3`, `chatml` or `auto`) for a base model.

    Raises:
        ChatFormatError: the name is unknown, does not fit the tokenizer, or `auto` finds no single format.
    """
    if name not in CHAT_FORMATS and name != "auto":
        raise ChatFormatError(f"chat_format {name!r} is unknown: set it to auto or one of {', '.join(CHAT_FORMATS)}")
    if tokenizer is None:
        tokenizer = load_tokenizer(base)
    chosen = next((known for known in CHAT_FORMATS if known == name), None)
    if chosen is None:
        chosen = detect_chat_format(tokenizer, _chat_template(base.path))
    return ChatFormat(chosen, tokenizer, _bos_token(base.path))


def detect_chat_format(tokenizer: "Tokenizer", chat_template: str = "") -> ChatFormatName:
    """The format that the tokenizer's vocabulary tells and its chat template, if any, does not deny.

    Many chat models share Llama 2's vocabulary, and some carry the control tokens of two formats, so a
    template decides between them.

    Raises:
        ChatFormatError: no format fits, or more than one does.
    """
    control_ids = _control_ids(tokenizer)
    fitting = [name for name in CHAT_FORMATS if all(token in control_ids for token in _LAYOUTS[name].controls)]
    if tokenizer.token_to_id("▁[") is None and "llama-2" in fitting:
        fitting.remove("llama-2")  # <s> and </s> alone are common to many families
    if chat_template:
        found = [name for name in fitting if _TEMPLATE_MARKS[name] in chat_template]
    else:
        found = [name for name in fitting if name != "llama-2"] or fitting
    if len(found) == 1:
        return found[0]
    reason = (
        f"{' and '.join(found)} both fit"
        if found
        else f"its chat template is not of the format {' or '.join(fitting)}"
        if fitting
        else "it has the control tokens of none"
    )
    raise ChatFormatError(
        f"the chat format cannot be told from this tokenizer ({reason}): set chat_format to one of "
        f"{', '.join(CHAT_FORMATS)}"
    )


def check_dialog(messages: Sequence[Message], last_role: Role) -> None:
    """Refuse a dialog that no format renders: an optional system message, then user and assistant in turn.

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
                f"{where} has role {message.role!r:.80}: expected {' or '.join(expected)} (chat formats know "
                f"{', '.join(ROLES)})",
                index,
            )
        if message.role not in expected:
            raise ChatFormatError(_out_of_order(messages, index, expected), index)
        expected = ("assistant",) if message.role == "user" else ("user",)
        if message.role == "user" and not message.content.strip():
            raise ChatFormatError(f"{where} from the user is empty: expected some text", index)
        if has_lone_surrogate(message.content):
            raise ChatFormatError(f"{where} holds half a UTF-16 surrogate pair: expected valid Unicode text", index)
    last = len(messages) - 1
    if messages[last].role != last_role:
        purpose = "so that the assistant can answer" if last_role == "user" else "to learn from"
        raise ChatFormatError(
            f"messages[{last}] is the last and from the {messages[last].role}: expected a last message from the "
            f"{last_role} {purpose}",
            last,
        )


def _out_of_order(messages: Sequence[Message], index: int, expected: tuple[str, ...]) -> str:
    role = messages[index].role
    if role == "system":
        what = "is a second system message" if messages[0].role == "system" else "is a system message after the start"
    elif index == 0:
        what = f"is the first and from the {role}"
    else:
        what = f"is from the {role} and follows one from the {messages[index - 1].role}"
    return f"messages[{index}] {what}: expected {' or '.join(expected)} there"


def _control_ids(tokenizer: "Tokenizer") -> dict[str, int]:
    return {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}


def _lost_lead_bytes(tokenizer: "Tokenizer") -> bytes:
    """First UTF-8 bytes of characters that vanish in encoding: some vocabularies miss rare single bytes."""
    two_bytes = range(0x80, 0x800, 0x40)
    three_bytes = (0x800, *range(0x1000, 0x10000, 0x1000))
    four_bytes = (0x10000, *range(0x40000, 0x110000, 0x40000))
    lost = bytearray()
    for char in map(chr, (*range(0x80), *two_bytes, *three_bytes, *four_bytes)):  # one for every lead byte
        ids = tokenizer.encode(char, add_special_tokens=False).ids
        if not ids or "\ufffd" in tokenizer.decode(ids, skip_special_tokens=False):
            lost.append(char.encode()[0])
    return bytes(lost)


def _mark_special(tokenizer: "Tokenizer", controls: set[str]) -> None:
    """Some models list their control tokens as ordinary added tokens, which would be parsed in user text."""
    from tokenizers import AddedToken

    added = tokenizer.get_added_tokens_decoder().values()
    ordinary = [token.content for token in added if token.content in controls and not token.special]
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in ordinary])


def _chat_template(path: Path) -> str:
    """The base's own template: only looked at for its marks, never run."""
    template_file = path / "chat_template.jinja"
    if template_file.is_file():
        return template_file.read_text(encoding="utf-8")
    template = _tokenizer_config(path).get("chat_template")
    return template if isinstance(template, str) else json.dumps(template) if template else ""


def _bos_token(path: Path) -> str | None:
    config = _tokenizer_config(path)
    token = config.get("bos_token")
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    return token if config.get("add_bos_token") is True and isinstance(token, str) else None


def _tokenizer_config(path: Path) -> dict[str, object]:
    config_file = path / "tokenizer_config.json"
    if not config_file.is_file():
        return {}
    config: dict[str, object] = json.loads(config_file.read_text(encoding="utf-8"))
    return config
