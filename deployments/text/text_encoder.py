"""Encodes a plain text as a prompt with the base model's tokenizer, with its BOS token if it has one.

Text that looks like a control token stays text. Knows nothing of dialogs or chat templates.
"""

from itertools import compress, takewhile, zip_longest

from tokenizers import Tokenizer

from deployments.text.vocabulary import Vocabulary
from training.base_models.tokenizer import encode_text
from training.chat.messages import has_lone_surrogate


class TextEncoder:
    """Encodes texts with one tokenizer, which must have `encode_special_tokens` on.

    Attributes:
        prefix: token ids that precede every text: the BOS token, or none.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self.prefix = _prefix(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: it is not valid Unicode, or the model has no token for one of its characters, which would be
                dropped silently.
        """
        if has_lone_surrogate(text):
            raise ValueError("it contains half a UTF-16 surrogate pair: give valid Unicode text")
        ids = encode_text(self._tokenizer, text)
        encoded = b"".join(map(self._vocabulary.spelling, ids))
        expected = text.encode()
        if self._vocabulary.strips_first_space:  # SentencePiece writes a space and U+2581 alike
            expected = text.replace("\u2581", " ").encode()
            encoded = encoded.removeprefix(b" ") if len(encoded) > len(expected) else encoded
        if encoded != expected:
            num_equal = next(i for i, (a, b) in enumerate(zip_longest(encoded, expected)) if a != b)
            lost = text[min(len(expected[:num_equal].decode(errors="ignore")), len(text) - 1)]
            raise ValueError(
                f"it contains the character U+{ord(lost):04X}, for which this model has no token: remove it"
            )
        return self.prefix + ids


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer's template puts first. Like transformers, ignores tokenizer_config.json."""
    encoding = tokenizer.encode("a")
    return list(compress(encoding.ids, takewhile(bool, encoding.special_tokens_mask)))
