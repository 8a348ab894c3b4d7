"""A base model's tokenizer, for which every text is plain text."""

from typing import TYPE_CHECKING

from training.base_models.resolve import BaseCheckpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_LONG_TEXT = 2000  # characters: about a millisecond to encode


def load_tokenizer(base: BaseCheckpoint) -> "Tokenizer":
    """The base's tokenizer; `encode` on it treats special tokens inside a text as plain text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Token ids of a text alone. While a long one is encoded, other threads run: `encode` would keep the GIL."""
    if len(text) <= _LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
