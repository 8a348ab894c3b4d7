"""Token ids to text as they arrive: whole characters only, and never any part of a stop string.

`answers.py` keeps a Detokenizer per answer, streamed or not, so both give the same text. The Vocabulary below it
knows each token's own bytes, which log-probabilities are reported with.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.text.vocabulary import Vocabulary

_MAX_CHARACTER_BYTES = 4  # of UTF-8: so many tokens can share one character


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
