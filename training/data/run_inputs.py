"""A run's base model, chat format and rows, read and checked before any weights are loaded.

The driver reads them to fail early on a bad dataset, every worker to train on them. Does not import torch.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from training.base_models.resolve import BaseCheckpoint, resolve_base_model
from training.base_models.tokenizer import load_tokenizer
from training.chat.chat_format import ChatFormat
from training.chat.detect import load_chat_format
from training.config.data_config import RowKind
from training.config.train_config import TrainConfig
from training.data.prepare import PreparedData, prepare_data
from training.data.report import DataReport
from training.data.row_store import Conversation, Rows
from training.errors import ConfigError
from training.registry.manifest import DatasetRef

_KINDS: dict[str, RowKind] = {"sft": "sft", "dpo": "preference", "kto": "unpaired_preference"}


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Everything a run trains with, apart from the weights.

    Attributes:
        train_rows: the rows of one epoch, at least one, of the kind that the method consumes. Mapped from disk:
            `train_rows[i]` reads one row.
        held_out_rows: empty if `data.held_out` is 0.
        held_out_samples: up to a hundred of the conversations behind `held_out_rows`, evenly spaced over them.
        report: what was read, dropped and counted.
        dataset: what the registry records of the data.
    """

    base: BaseCheckpoint
    tokenizer: Tokenizer
    chat_format: ChatFormat
    train_rows: Rows[Any]
    held_out_rows: Rows[Any]
    held_out_samples: list[Conversation]
    report: DataReport
    dataset: DatasetRef


def read_inputs(config: TrainConfig, *, weights: bool = True) -> RunInputs:
    """Resolve the base and the chat format, and read, tokenize and split the dataset; the same on every worker.

    Args:
        weights: if False, the base's weights are neither required nor downloaded.

    Raises:
        CorralError: the base, the chat format, a row or a key is not accepted.
    """
    base, tokenizer, chat_format = _load_base(config, weights)
    data = _prepare(config, base, tokenizer, chat_format)
    report = data.report
    return RunInputs(
        base=base,
        tokenizer=tokenizer,
        chat_format=chat_format,
        train_rows=data.train,
        held_out_rows=data.held_out,
        held_out_samples=data.held_out_samples(),
        report=report,
        dataset=DatasetRef(
            sources=config.data.paths,
            sha256=report.sha256,
            num_rows=report.num_train_rows + report.num_held_out,
            num_held_out=report.num_held_out,
            weights=[source.weight for source in config.data.path],
            formats=[*report.formats],
            num_duplicates=report.num_duplicates,
            num_skipped=report.num_skipped + report.num_too_long,
            num_tokens=report.num_train_tokens,
        ),
    )


def read_data(config: TrainConfig) -> PreparedData:
    """Only the dataset of `read_inputs`.

    Raises:
        CorralError: the base, the chat format, a row or a key is not accepted.
    """
    return _prepare(config, *_load_base(config, weights=False))


def _prepare(config: TrainConfig, base: BaseCheckpoint, tokenizer: Tokenizer, chat_format: ChatFormat) -> PreparedData:
    kind = _KINDS[config.method]
    return prepare_data(
        config.data, base, chat_format, tokenizer, max_length=config.max_length, seed=config.seed, kind=kind
    )


def _load_base(config: TrainConfig, weights: bool) -> tuple[BaseCheckpoint, Tokenizer, ChatFormat]:
    base = resolve_base_model(config.base_model, config.base_revision, weights=weights)
    if config.max_length > base.context_length:
        raise ConfigError(
            f"max_length is {config.max_length}, but {base.source} has a context of {base.context_length} tokens: "
            f"set max_length={base.context_length} or less"
        )
    tokenizer = load_tokenizer(base)
    chat_format = load_chat_format(config.chat_format, base, tokenizer, default_system=config.chat.default_system)
    return base, tokenizer, chat_format
