"""A base model's tokenizer, set up to encode every text as plain text."""

from typing import TYPE_CHECKING

from training.base_models.resolve import BaseCheckpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_LONG_TEXT = 2000  # characters; take about a millisecond to encode


def load_tokenizer(base: BaseCheckpoint) -> "Tokenizer":
    """The base's tokenizer; its `encode` treats special tokens inside a text as plain text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Token ids of a text, without special tokens. Releases the GIL for a long text, which `encode` does not."""
    if len(text) <= _LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
