"""A plain text as a prompt: token ids as the base model's own tokenizer makes them, with its BOS where it has one.

For `/v1/completions`; dialogs are rendered by `training.chat.chat_format`. What looks like a control token stays text.
"""

from itertools import compress, takewhile, zip_longest

from tokenizers import Tokenizer

from deployments.text.vocabulary import Vocabulary
from training.base_models.tokenizer import encode_text
from training.chat.messages import has_lone_surrogate


class TextEncoder:
    """Encodes texts for one tokenizer, which has `encode_special_tokens` on.

    Attributes:
        prefix: token ids that every text begins with: the BOS token, or none.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self.prefix = _prefix(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: it is no valid Unicode, or the model has no token for one of its characters, which would vanish
                without a word.
        """
        if has_lone_surrogate(text):
            raise ValueError("it holds half a UTF-16 surrogate pair: give valid Unicode text")
        ids = encode_text(self._tokenizer, text)
        encoded = b"".join(map(self._vocabulary.spelling, ids))
        wanted = text.encode()
        if self._vocabulary.strips_first_space:  # SentencePiece has one sign for a space and U+2581
            wanted = text.replace("\u2581", " ").encode()
            encoded = encoded.removeprefix(b" ") if len(encoded) > len(wanted) else encoded
        if encoded != wanted:
            same = next(i for i, (got, byte) in enumerate(zip_longest(encoded, wanted)) if got != byte)
            lost = text[min(len(wanted[:same].decode(errors="ignore")), len(text) - 1)]
            raise ValueError(f"it holds the character U+{ord(lost):04X}, for which this model has no token: remove it")
        return self.prefix + ids


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer's template puts first; transformers too goes by that alone, not by tokenizer_config.json."""
    encoding = tokenizer.encode("a")
    return list(compress(encoding.ids, takewhile(bool, encoding.special_tokens_mask)))
