"""Token ids to text as they arrive: whole characters only, and never any part of a stop string.

The ingress keeps one per answer, streamed or not, so both give the same text.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns one answer's token ids into text that may be sent.

    Text that could be the beginning of a stop string is held back until the next tokens decide. Bytes of a
    character that never gets complete are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; sets `stopped` and ends the text where a stop string begins."""
        for token_id in token_ids:
            self._held += self._stream.step(self._tokenizer, token_id) or ""
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        num_held = self._num_undecided()
        text, self._held = self._held[: len(self._held) - num_held], self._held[len(self._held) - num_held :]
        return text

    def flush(self) -> str:
        """What was held back, when the answer has ended without a stop string."""
        text, self._held = self._held, ""
        return text

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
