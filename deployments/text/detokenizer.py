"""Incremental detokenization: complete characters only, and never any part of a stop string.

One Detokenizer per answer, streamed or not, so that both give the same text. Knows nothing of requests or sampling.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.text.vocabulary import Vocabulary

_MAX_CHARACTER_BYTES = 4  # in UTF-8, and so the most tokens that can share one character


@dataclass(frozen=True, slots=True)
class SentText:
    """Text that may be sent, and the offset of each of its tokens in the full text, in characters."""

    text: str
    token_offsets: list[int]


class Detokenizer:
    """Converts one answer's token ids to text that may be sent.

    Text that could be the start of a stop string is held back until the next tokens decide; a token is sent once all of
    its text is. Bytes of a character that is never completed are dropped.

    Args:
        stop: stop strings; the text ends before the first of them.
        min_tokens: number of tokens before which stop strings are ignored.
        prompt_token_ids: tokens that the text continues; empty if it stands alone.

    Attributes:
        stopped: whether a stop string was found; nothing may be pushed after it.
        num_tokens: number of tokens consumed, up to the one that completed a stop string.
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
        self._held_start = 0  # offset of the held text, in characters
        self._unsent: deque[tuple[int, int]] = deque()  # start and end of complete tokens, in characters
        self._partial_starts: list[int] = []  # starts of tokens that end inside a character
        self.stopped = False
        self.num_tokens = 0

    def push(self, token_ids: Iterable[int]) -> SentText:
        """The text that these tokens complete; a stop string sets `stopped` and ends the text."""
        num_decided = 0  # leading characters of the held text that cannot be part of a stop string
        for token_id in token_ids:
            self.num_tokens += 1
            self._partial_starts.append(self._held_start + len(self._held))
            self._held += self._decode(self._vocabulary.text_bytes(token_id))
            if not self._decoder.getstate()[0]:
                end = self._held_start + len(self._held)
                self._unsent += [(start, end) for start in self._partial_starts]
                self._partial_starts.clear()
            if self.num_tokens <= self._min_tokens:
                num_decided = len(self._held)
                continue
            matches = [index for index in (self._held.find(s, num_decided) for s in self._stop) if index >= 0]
            if matches:
                self.stopped = True
                sent = self._send(min(matches))
                self._held = ""
                return sent
        return self._send(len(self._held) - self._num_undecided(num_decided))

    def flush(self) -> SentText:
        """The text held back so far, for an answer that ended without a stop string."""
        sent = self._send(len(self._held))
        sent.token_offsets.extend(self._partial_starts)
        return sent

    def _decode(self, token: bytes) -> str:
        text = self._decoder.decode(token)
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text

    def _send(self, num_characters: int) -> SentText:
        """Release the first characters of the held text, with the tokens that end there."""
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        self._held_start += num_characters
        offsets = []
        while self._unsent and self._unsent[0][1] <= self._held_start:
            offsets.append(self._unsent.popleft()[0])
        return SentText(text, offsets)

    def _num_undecided(self, num_decided: int) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._held) - num_decided), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
