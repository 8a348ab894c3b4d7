"""Token ids to text as they arrive: whole characters only, and never any part of a stop string.

`answers.py` keeps a Detokenizer per answer, streamed or not, so both give the same text. The Vocabulary below it
knows each token's own bytes, which log-probabilities are reported with.
"""

import codecs
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

_MAX_CHARACTER_BYTES = 4  # of UTF-8: so many tokens can share one character


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


@dataclass(frozen=True, slots=True)
class SentText:
    """Text that may be sent, and where each token that is sent with it begins in the whole text, in characters."""

    text: str
    token_offsets: list[int]


class Detokenizer:
    """Turns one answer's token ids into text that may be sent.

    Text that could be the beginning of a stop string is held back until the next tokens decide; a token is sent when
    all of its text is. Bytes of a character that never gets complete are dropped.

    Args:
        stop: strings that end the text where they begin.
        min_tokens: stop strings count only after so many tokens.
        prompt_token_ids: what the text goes on from; empty where it begins anew.

    Attributes:
        stopped: a stop string was found; nothing may be pushed after it.
        num_tokens: tokens that were taken, up to the one that completed a stop string.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(b"".join(map(vocabulary.text_bytes, prompt_token_ids[-_MAX_CHARACTER_BYTES:])))
        self._strip_space = vocabulary.strips_first_space and not any(map(vocabulary.text_bytes, prompt_token_ids))
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, stop), default=0)
        self._min_tokens = min_tokens
        self._held = ""
        self._held_at = 0  # where the held text begins, in characters
        self._unsent: deque[tuple[int, int]] = deque()  # beginning and end of whole tokens, in characters
        self._begun: list[int] = []  # beginnings of tokens that end inside a character
        self.stopped = False
        self.num_tokens = 0

    def push(self, token_ids: Iterable[int]) -> SentText:
        """The text that these tokens complete; sets `stopped` and ends the text where a stop string begins."""
        num_decided = 0  # characters of the held text that are no part of a stop string, whatever follows
        for token_id in token_ids:
            self.num_tokens += 1
            self._begun.append(self._held_at + len(self._held))
            self._held += self._decode(self._vocabulary.text_bytes(token_id))
            if not self._decoder.getstate()[0]:
                end = self._held_at + len(self._held)
                self._unsent += [(begin, end) for begin in self._begun]
                self._begun.clear()
            if self.num_tokens <= self._min_tokens:
                num_decided = len(self._held)
                continue
            found = [at for at in (self._held.find(s, num_decided) for s in self._stop) if at >= 0]
            if found:
                self.stopped = True
                sent = self._send(min(found))
                self._held = ""
                return sent
        return self._send(len(self._held) - self._num_undecided(num_decided))

    def flush(self) -> SentText:
        """What was held back, when the answer has ended without a stop string."""
        sent = self._send(len(self._held))
        sent.token_offsets.extend(self._begun)
        return sent

    def _decode(self, token: bytes) -> str:
        text = self._decoder.decode(token)
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text

    def _send(self, num_characters: int) -> SentText:
        """Let go of the first characters of the held text, and of the tokens that end there."""
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        self._held_at += num_characters
        offsets = []
        while self._unsent and self._unsent[0][1] <= self._held_at:
            offsets.append(self._unsent.popleft()[0])
        return SentText(text, offsets)

    def _num_undecided(self, num_decided: int) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._held) - num_decided), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
