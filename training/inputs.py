"""A run's base, chat format and rows, read and checked before any weights are loaded.

The driver reads them to refuse a bad dataset at once, every worker reads them to train. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from training.base_models import BaseModel, load_tokenizer, resolve_base_model
from training.chat_format import ChatFormat, load_chat_format
from training.config import TrainConfig
from training.data import (
    Conversation,
    PreferenceRow,
    SkippedRow,
    TokenizedRow,
    UnpairedRow,
    load_conversations,
    split_held_out,
    tokenize,
)
from training.errors import ConfigError
from training.preference_data import Preference, load_preferences, tokenize_pairs, tokenize_unpaired
from training.registry import DatasetRef

Rows = list[TokenizedRow] | list[PreferenceRow] | list[UnpairedRow]


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What a run trains on and with.

    Attributes:
        train_rows: tokenized, at least one; of the kind that the method takes.
        held_out_rows: tokenized, empty where `data.held_out` is 0.
        held_out: the conversations behind `held_out_rows`, those that were skipped included.
        skipped: rows left out, with the reason.
        dataset: what the registry records of the data.
    """

    base: BaseModel
    tokenizer: Tokenizer
    chat_format: ChatFormat
    train_rows: Rows
    held_out_rows: Rows
    held_out: list[Conversation]
    skipped: list[SkippedRow]
    dataset: DatasetRef


def read_inputs(config: TrainConfig) -> RunInputs:
    """Find the base, choose the chat format, and read, split and tokenize the dataset; the same on every worker.

    Raises:
        CorralError: naming the base, the format, the row or the key that is wrong.
    """
    base = resolve_base_model(config.base_model, config.base_revision)
    if config.max_length > base.context_length:
        raise ConfigError(
            f"max_length is {config.max_length}, but {base.source} was made for {base.context_length} tokens: "
            f"set max_length={base.context_length} or less"
        )
    tokenizer = load_tokenizer(base)
    chat_format = load_chat_format(config.chat_format, base, tokenizer)
    rows = _preferences(config, chat_format) if config.method != "sft" else _conversations(config, chat_format)
    return RunInputs(
        base=base,
        tokenizer=tokenizer,
        chat_format=chat_format,
        train_rows=rows.train,
        held_out_rows=rows.held_out,
        held_out=rows.held_out_conversations,
        skipped=rows.skipped,
        dataset=DatasetRef(
            sources=config.data.paths,
            sha256=rows.sha256,
            num_rows=len(rows.train) + len(rows.held_out),
            num_held_out=len(rows.held_out),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Split:
    train: Rows
    held_out: Rows
    held_out_conversations: list[Conversation]
    skipped: list[SkippedRow]
    sha256: str


def _conversations(config: TrainConfig, chat_format: ChatFormat) -> _Split:
    loaded = load_conversations(config.data)
    train, held_out = split_held_out(loaded.conversations, config.data.held_out, config.seed)
    train_rows = tokenize(train, chat_format, config.max_length, config.data.on_bad_row)
    held_out_rows = tokenize(held_out, chat_format, config.max_length, config.data.on_bad_row)
    skipped = [*loaded.skipped, *train_rows.skipped, *held_out_rows.skipped]
    return _Split(train_rows.rows, held_out_rows.rows, held_out, skipped, loaded.sha256)


def _preferences(config: TrainConfig, chat_format: ChatFormat) -> _Split:
    assert config.method != "sft"
    loaded = load_preferences(config.data, config.method)
    by_source = {row.source: row for row in loaded.rows}
    conversations = [row.conversation for row in loaded.rows]
    train, held_out = split_held_out(conversations, config.data.held_out, config.seed)
    skipped = [*loaded.skipped]

    def tokenized(chosen: Sequence[Conversation]) -> Rows:
        rows: list[Preference] = [by_source[conversation.source] for conversation in chosen]
        as_ids = tokenize_pairs if config.method == "dpo" else tokenize_unpaired
        return as_ids(rows, chat_format, config.max_length, skipped, config.data.on_bad_row)

    return _Split(tokenized(train), tokenized(held_out), held_out, skipped, loaded.sha256)
