"""Chat messages -> pieces -> token ids and loss mask, in the formats llama-2, llama-3 and chatml.

Training and serving share this code, so a model is prompted exactly as it was trained. A piece is a control token or a
text. Text is always encoded as text: `</s>` or `<|im_start|>` typed by a user never becomes a control token. Nothing is
dropped or truncated: a dialog that a format cannot represent raises ChatFormatError. The jinja template of the base
model is never run.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from training.base_models.tokenizer import encode_text
from training.chat.default_system import DefaultSystem
from training.chat.messages import (
    Message,
    check_dialog,
    has_lone_surrogate,
    merge_turns,
    results_in_call_order,
)
from training.chat.templates import CHAT_FORMATS, LAYOUTS, ChatFormatName, Piece, control
from training.chat.tools import TOOL_TAGS, CallSyntax, with_calls_as_text
from training.errors import ChatFormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialog as token ids; `loss_mask[i]` is True where `input_ids[i]` carries loss."""

    input_ids: list[int]
    loss_mask: list[bool]


# "[INST] hi [/INST]" in the Llama-2 vocabulary, which is recognized by these two entries.
_LLAMA_2_VOCABULARY = {"▁[": 518, "INST": 25580}
_LLAMA_2_KNOWN_IDS = [518, 25580, 29962, 7251, 518, 29914, 25580, 29962]


class ChatFormat:
    """One format over one tokenizer.

    Attributes:
        name: the format, as adapter manifests record it.
        call_syntax: how answers write calls of tools.
        tag_ids: the tags of calls and results that are tokens of the vocabulary.
        stop_token_ids: every token that ends an assistant turn or the text.
        bos_token: prepended to a chatml dialog if the base requires it; the other formats include their own.
        default_system: what is added to the system text of a dialog; None: nothing.
    """

    name: ChatFormatName
    call_syntax: CallSyntax
    tag_ids: dict[str, int]
    stop_token_ids: tuple[int, ...]
    bos_token: str | None
    default_system: DefaultSystem | None

    def __init__(
        self,
        name: ChatFormatName,
        tokenizer: "Tokenizer",
        bos_token: str | None = None,
        default_system: DefaultSystem | None = None,
    ) -> None:
        """Check that the tokenizer fits the format.

        Args:
            name: the format.
            tokenizer: with `encode_special_tokens` on; control tokens that are not special tokens are marked as such.
            bos_token: prepended to every chatml dialog; the other formats include their own.
            default_system: added to the system text of every dialog.

        Raises:
            ChatFormatError: a control token is missing, text would be parsed for control tokens, or the default system
                text has a character without a token.
        """
        self.name = name
        self._tokenizer = tokenizer
        self._layout = LAYOUTS[name]
        self.call_syntax = self._layout.call_syntax
        self.bos_token = bos_token if name == "chatml" else None
        self._control_ids = control_ids(tokenizer)
        self.tag_ids = {tag: self._control_ids[tag] for tag in TOOL_TAGS if tag in self._control_ids}
        required = self._layout.controls + ((self.bos_token,) if self.bos_token else ())
        missing = [token for token in required if token not in self._control_ids]
        if missing:
            raise ChatFormatError(
                f"this tokenizer does not fit chat format {name!r}: it has no {', '.join(missing)}; "
                f"set chat_format to auto or one of {', '.join(CHAT_FORMATS)}"
            )
        stop_tokens = [token for token in self._layout.end_of_turn if token in self._control_ids]
        self.stop_token_ids = tuple(self._control_ids[token] for token in stop_tokens)
        _mark_special(tokenizer, {*required, *stop_tokens, *TOOL_TAGS})
        self._check_text_stays_text()
        if name == "llama-2":
            self._check_known_ids()
        self._lost_lead_bytes = _lost_lead_bytes(tokenizer)
        self.default_system = default_system
        if default_system is not None:
            self._check_default_system(default_system)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that prompt for the next assistant turn.

        Raises:
            ChatFormatError: the dialog cannot be rendered; `message_index` is the offending message.
        """
        return self._assemble(self._dialog_pieces(messages, answered=False), self._encode).input_ids

    def render_training(self, messages: Sequence[Message]) -> Rendered:
        """A dialog that ends with an assistant turn, with loss on text and end of turn of every learned message.

        `render_prompt(m)` is exactly a prefix of `render_training([*m, answer]).input_ids`.

        Raises:
            ChatFormatError: the dialog cannot be rendered; `message_index` is the offending message.
        """
        return self._assemble(self._dialog_pieces(messages, answered=True), self._encode)

    def render_all(self, rows: Sequence[Sequence[Message] | str]) -> list[Rendered | ChatFormatError]:
        """`render_training` of each dialog and `render_text` of each plain text, encoded in one parallel call.

        For a row that cannot be rendered, the result is its error.
        """
        pieces = [self._pieces_or_error(row) for row in rows]
        texts = [*dict.fromkeys(p.text for row in pieces if isinstance(row, list) for p in row if not p.control)]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [self._assemble(row, ids.__getitem__) if isinstance(row, list) else row for row in pieces]

    def render_text(self, text: str) -> Rendered:
        """A text for continued pretraining, between begin-of-text and end-of-text; all but begin-of-text carry loss.

        Raises:
            ChatFormatError: the text contains a character that the model has no token for.
        """
        return self._assemble(self._text_pieces(text), self._encode)

    def _pieces_or_error(self, row: Sequence[Message] | str) -> list[Piece] | ChatFormatError:
        try:
            return self._text_pieces(row) if isinstance(row, str) else self._dialog_pieces(row, answered=True)
        except ChatFormatError as error:
            return error

    def _dialog_pieces(self, messages: Sequence[Message], *, answered: bool) -> list[Piece]:
        check_dialog(messages, answered=answered)
        self._check_encodable(messages)
        messages = results_in_call_order(messages)
        if not self._layout.any_order:
            messages = merge_turns([*with_calls_as_text(messages)], "assistant" if answered else "user")
        messages = _with_system_message(messages, self.default_system)
        bos = [control(self.bos_token)] if self.bos_token else []
        opening = () if answered else self._layout.opening()
        return [*bos, *self._with_tags(self._layout.turns(messages)), *opening]

    def _with_tags(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with every tag as a control token, or joined to the text before and after it."""
        resolved: list[Piece] = []
        after_tag = False  # the last piece ends with a tag, which a text continues
        for piece in pieces:
            if piece.tag and piece.text in self.tag_ids:
                resolved.append(control(piece.text, piece.trained))
                after_tag = False
                continue
            last = resolved[-1] if resolved else None
            is_joined = piece.tag or (after_tag and not piece.control)
            if is_joined and last is not None and not last.control and last.trained == piece.trained:
                resolved[-1] = replace(last, text=last.text + piece.text)
            else:
                resolved.append(piece)
            after_tag = piece.tag
        return resolved

    def _text_pieces(self, text: str) -> list[Piece]:
        if has_lone_surrogate(text):
            raise ChatFormatError("the text contains half a UTF-16 surrogate pair: expected valid Unicode text")
        self._check_encodable([Message("user", text)])
        begin = self._layout.begin_of_text or self.bos_token
        ends = [end for end in self._layout.end_of_text if end in self._control_ids]
        return [*([control(begin)] if begin else []), Piece(text, trained=True), control(ends[0], trained=True)]

    def _assemble(self, pieces: Sequence[Piece], encode: Callable[[str], list[int]]) -> Rendered:
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
            content = "".join(message.texts)
            text = content.encode()
            if len(text.translate(None, self._lost_lead_bytes)) < len(text):
                lost = next(char for char in content if char.encode()[0] in self._lost_lead_bytes)
                raise ChatFormatError(
                    f"messages[{index}] contains the character U+{ord(lost):04X}, for which this model has no token: "
                    "remove it",
                    index,
                )

    def _check_default_system(self, default_system: DefaultSystem) -> None:
        try:
            self._check_encodable([Message("system", default_system.text)])
        except ChatFormatError as error:
            raise ChatFormatError(f"chat.default_system{str(error).removeprefix('messages[0]')}") from None

    def _check_text_stays_text(self) -> None:
        if not self._tokenizer.encode_special_tokens:
            raise ChatFormatError(
                "the tokenizer parses text for special tokens: set encode_special_tokens = True on it first"
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
        ids = self._encode("[INST] hi [/INST]")
        if ids != _LLAMA_2_KNOWN_IDS:
            raise ChatFormatError(
                f"this Llama-2 tokenizer encodes '[INST] hi [/INST]' as {ids}, but Llama 2 was trained on "
                f"{_LLAMA_2_KNOWN_IDS}: use the tokenizer.json of the original model"
            )


def _with_system_message(messages: Sequence[Message], default: DefaultSystem | None) -> Sequence[Message]:
    """The dialog with the default system text, and with the tools in a system message; without one, it is added."""
    first = messages[0]
    if first.role != "system" and (default is not None or first.tools):
        text = default.text if default is not None else ""
        messages = [Message("system", text, tools=first.tools), replace(first, tools=()), *messages[1:]]
    if default is None:
        return messages
    return [replace(messages[0], prefix=default.prefix), *messages[1:]]


def control_ids(tokenizer: "Tokenizer") -> dict[str, int]:
    """All added tokens of the tokenizer, special or not, with their ids."""
    return {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}


def _lost_lead_bytes(tokenizer: "Tokenizer") -> bytes:
    """First UTF-8 bytes of characters that are lost in encoding: some vocabularies lack rare single bytes."""
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
    """Mark control tokens as special: some models list them as ordinary added tokens, which are parsed in user text."""
    from tokenizers import AddedToken

    added = tokenizer.get_added_tokens_decoder().values()
    ordinary = [token.content for token in added if token.content in controls and not token.special]
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in ordinary])
