"""A dataset prepared for the tiny model, and rows to make one of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.chat_format import ChatFormat
from training.chat.detect import load_chat_format
from training.config.data_config import DataConfig
from training.data.prepare import PreparedData, prepare_data

Prepare = Callable[..., PreparedData]


@pytest.fixture(scope="session")
def chatml(tiny_base: BaseCheckpoint) -> ChatFormat:
    return load_chat_format("chatml", tiny_base)


@pytest.fixture(scope="session")
def prepare(tiny_base: BaseCheckpoint, chatml: ChatFormat) -> Prepare:
    tokenizer = load_tokenizer(tiny_base)

    def prepared(path: Any, max_length: int = 200, seed: int = 0, kind: Any = "sft", **values: Any) -> PreparedData:
        config = DataConfig(path=path, **{"held_out": 0, **values})
        return prepare_data(config, tiny_base, chatml, tokenizer, max_length=max_length, seed=seed, kind=kind)

    return prepared


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(question: str, answer: str = "answer", **more: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **more}


def questions(num: int) -> list[dict[str, Any]]:
    return [row(f"question {index}") for index in range(num)]


def questions_of(prepared: PreparedData, side: str = "train") -> list[str]:
    """The first user message of every row of a side, in order."""
    rows = getattr(prepared, side)
    conversations = [rows.conversation(at) for at in range(len(rows))]
    return [next(m.content for m in c.messages if m.role == "user") for c in conversations]
