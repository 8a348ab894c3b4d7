"""The bytes of every token of a tokenizer."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer


class Vocabulary:
    """What each token of a Llama tokenizer adds to a text, as bytes.

    There are two kinds: byte-level BPE (Llama 3, the embedded model), where every byte is written as one printable
    character, and SentencePiece (Llama 2), where a space is written as U+2581 and a lone byte as `<0xE2>`.

    Attributes:
        strips_first_space: encoding puts a space before a text, and decoding takes it away again.
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
        """The token's bytes, also of a control token, which adds nothing to a text."""
        known = self._spellings.get(token_id)
        if known is None:
            known = self._spellings[token_id] = self._spell(token_id)
        return known

    def text_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text: part of a character, or nothing where it is a control token."""
        added = self._added.get(token_id)
        return b"" if added is not None and added.special else self.spelling(token_id)

    def text(self, token_ids: Sequence[int]) -> str:
        """Token ids as one text, control tokens written out; bytes that are no UTF-8 are U+FFFD."""
        spelled = [self.spelling(token_id) for token_id in token_ids]
        if self.strips_first_space:
            first = next((i for i, token_id in enumerate(token_ids) if self.text_bytes(token_id)), None)
            if first is not None:
                spelled[first] = spelled[first].removeprefix(b" ")
        return b"".join(spelled).decode(errors="replace")

    def name(self, token_id: int) -> str:
        """What the vocabulary calls a token, nothing where the model has a row for it and the tokenizer no token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # the model's matrices may have rows that the tokenizer has no token for
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
    """GPT-2's `bytes_to_unicode`, reversed: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
