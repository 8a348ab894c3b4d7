"""The bytes of each token of a tokenizer."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from training.chat.tools import TOOL_TAGS


class Vocabulary:
    """The bytes that each token of a Llama tokenizer adds to a text.

    There are two kinds of tokenizers: byte-level BPE (Llama 3, the embedded model), which writes every byte as one
    printable character, and SentencePiece (Llama 2), which writes a space as U+2581 and a lone byte as `<0xE2>`.

    Attributes:
        strips_first_space: whether encoding puts a space before a text and decoding removes it again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        decoder = json.loads(tokenizer.decoder.__getstate__())
        steps = {step["type"] for step in decoder.get("decoders", [decoder])}
        self._is_byte_level = "ByteLevel" in steps
        self.strips_first_space = bool(steps & {"Strip", "Metaspace"})
        self._spellings: dict[int, bytes] = {}

    def spelling(self, token_id: int) -> bytes:
        """The token's bytes, including those of control tokens, which add nothing to a text."""
        spelling = self._spellings.get(token_id)
        if spelling is None:
            spelling = self._spellings[token_id] = self._spell(token_id)
        return spelling

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text, perhaps only part of a character; none for a control token.

        The tags of tool calls add theirs.
        """
        added = self._added.get(token_id)
        is_control = added is not None and added.special and added.content not in TOOL_TAGS
        return b"" if is_control else self.spelling(token_id)

    def text(self, token_ids: Sequence[int]) -> str:
        """Token ids as one text, with control tokens spelled out and invalid UTF-8 as U+FFFD."""
        spellings = [self.spelling(token_id) for token_id in token_ids]
        if self.strips_first_space:
            first = next((i for i, token_id in enumerate(token_ids) if self.text_bytes(token_id)), None)
            if first is not None:
                spellings[first] = spellings[first].removeprefix(b" ")
        return b"".join(spellings).decode(errors="replace")

    def name(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty if the tokenizer has no token for this row of the model."""
        return self._tokenizer.id_to_token(token_id) or ""

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # the model's matrices may have more rows than the tokenizer has tokens
            return b""
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        if len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's `bytes_to_unicode`, inverted: printable bytes map to themselves, the others to U+0100 onward."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
