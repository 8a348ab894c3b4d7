"""A run's base, chat format and rows, read and checked before any weights are loaded.

The driver reads them to refuse a bad dataset at once, every worker reads them to train. Imports no torch.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from training.base_models import BaseModel, load_tokenizer, resolve_base_model
from training.chat_format import ChatFormat, load_chat_format
from training.config import TrainConfig
from training.data import Conversation, SkippedRow, TokenizedRow, load_conversations, split_held_out, tokenize
from training.errors import ConfigError
from training.registry import DatasetRef


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What a run trains on and with.

    Attributes:
        train_rows: tokenized, at least one.
        held_out_rows: tokenized, empty where `data.held_out` is 0.
        held_out: the conversations behind `held_out_rows`, those that were skipped included.
        skipped: rows left out, with the reason.
        dataset: what the registry records of the data.
    """

    base: BaseModel
    tokenizer: Tokenizer
    chat_format: ChatFormat
    train_rows: list[TokenizedRow]
    held_out_rows: list[TokenizedRow]
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
    loaded = load_conversations(config.data)
    train, held_out = split_held_out(loaded.conversations, config.data.held_out, config.seed)
    train_rows = tokenize(train, chat_format, config.max_length, config.data.on_bad_row)
    held_out_rows = tokenize(held_out, chat_format, config.max_length, config.data.on_bad_row)
    return RunInputs(
        base=base,
        tokenizer=tokenizer,
        chat_format=chat_format,
        train_rows=train_rows.rows,
        held_out_rows=held_out_rows.rows,
        held_out=held_out,
        skipped=[*loaded.skipped, *train_rows.skipped, *held_out_rows.skipped],
        dataset=DatasetRef(
            sources=config.data.paths,
            sha256=loaded.sha256,
            num_rows=len(train_rows.rows) + len(held_out_rows.rows),
            num_held_out=len(held_out_rows.rows),
        ),
    )
