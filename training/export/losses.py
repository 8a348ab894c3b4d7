"""Held-out losses of an exported model and of the served model, on the same rows.

Each model is loaded, evaluated and released before the next.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import LlamaForCausalLM

from training.base_models.nf4 import Quantization, compute_dtype_on, load_quantized, quiet_loading
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.detect import default_system_setting, load_chat_format
from training.chat.messages import Message
from training.config.load import recorded
from training.config.train_config import TrainConfig
from training.data.row_store import IGNORED_LABEL, TokenizedRow
from training.data.run_inputs import read_inputs
from training.errors import CorralError
from training.registry.manifest import AdapterManifest
from training.trainer.evaluate import held_out_loss, load_adapter, num_labelled

_TEXT_ROW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class EvaluationRows:
    """Rows to evaluate on and a description of them; if there are none, the description says why."""

    rows: Sequence[TokenizedRow]
    description: str


def evaluation_rows(manifest: AdapterManifest, base: BaseCheckpoint, file: Path | None) -> EvaluationRows:
    """The rows of `file`, else the held-out rows of the run if its dataset is unchanged, else its sample answers.

    Args:
        file: a dataset that training can read, or a `.txt` file, of which every token is evaluated.

    Raises:
        CorralError: `file` cannot be read or used.
    """
    if file is not None and file.suffix == ".txt":
        return _text_rows(base, file)
    if file is not None:
        default_system = default_system_setting(manifest.default_system, manifest.chat_format, base)
        inputs = read_inputs(
            TrainConfig.model_validate(
                {
                    "base_model": base.source,
                    "base_revision": base.revision if "/" in base.source else None,
                    "adapter": manifest.name,
                    "chat_format": manifest.chat_format,
                    "chat": {"default_system": default_system or "template"},
                    "max_length": base.context_length,
                    "data": {"path": str(file), "held_out": 0},
                }
            )
        )
        return EvaluationRows(inputs.train_rows, f"{len(inputs.train_rows)} rows of {file}")
    return _held_out_rows(manifest) or _sample_rows(manifest, base)


def served_loss(
    base: BaseCheckpoint, manifest: AdapterManifest, adapter_dir: Path, rows: EvaluationRows, device: torch.device
) -> tuple[float, int]:
    """Mean loss of the NF4 base with the unmerged adapter, and the number of tokens evaluated."""
    model, _ = load_adapter(adapter_dir, load_quantized(base, manifest.quantization, device))
    loss, num_tokens = held_out_loss(model, rows.rows)
    return loss, int(num_tokens)


def loss_of_folder(folder: Path, quantization: Quantization, rows: EvaluationRows, device: torch.device) -> float:
    """Loss of a merged folder, computed in the served model's compute dtype."""
    return _loss(folder, rows, device, dtype=getattr(torch, compute_dtype_on(device, quantization)))


def loss_of_gguf(file: Path, rows: EvaluationRows, device: torch.device) -> float:
    """Loss of a GGUF file as transformers reads it, computed in float32."""
    return _loss(file.parent, rows, device, gguf_file=file.name, dtype=torch.float32)


def _loss(folder: Path, rows: EvaluationRows, device: torch.device, **options: Any) -> float:
    with (
        quiet_loading(),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # transformers' GGUF bar has no switch
        model: Any = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    assert isinstance(model, LlamaForCausalLM)
    module: Any = model.eval()
    return held_out_loss(module.to(device), rows.rows)[0]


def _held_out_rows(manifest: AdapterManifest) -> EvaluationRows | None:
    if manifest.config is None or manifest.dataset is None:
        return None
    try:
        inputs = read_inputs(TrainConfig.model_validate(recorded(manifest.config)))
    except (CorralError, ValidationError):
        return None  # the configuration of another Corral version, or the data have moved
    if inputs.dataset.sha256 != manifest.dataset.sha256 or not len(inputs.held_out_rows):
        return None
    if num_labelled(inputs.held_out_rows) != manifest.metrics.get("eval_tokens"):
        return None  # another Corral version split differently, so some of these rows were trained on
    description = f"the {len(inputs.held_out_rows)} held-out rows of {', '.join(manifest.dataset.sources)}"
    return EvaluationRows(inputs.held_out_rows, description)


def _sample_rows(manifest: AdapterManifest, base: BaseCheckpoint) -> EvaluationRows:
    if not manifest.samples:
        return EvaluationRows(
            [], "the run's dataset has changed or is missing, and the run recorded no samples: give --eval FILE"
        )
    chat_format = load_chat_format(manifest.chat_format, base, default_system=manifest.default_system)
    rows: list[TokenizedRow] = []
    for sample in manifest.samples:
        dialog = [Message("user", sample.prompt), Message("assistant", sample.reference)]
        rendered = chat_format.render_training(dialog)
        pairs = zip(rendered.input_ids, rendered.loss_mask, strict=True)
        labels = [token_id if trained else IGNORED_LABEL for token_id, trained in pairs]
        rows.append({"input_ids": rendered.input_ids, "labels": labels})
    return EvaluationRows(rows, f"the {len(rows)} recorded samples; the run's dataset has changed or is missing")


def _text_rows(base: BaseCheckpoint, file: Path) -> EvaluationRows:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorralError(f"--eval {file} cannot be read: {error}") from error
    ids = load_tokenizer(base).encode(text, add_special_tokens=False).ids
    chunks = [ids[start : start + _TEXT_ROW_TOKENS] for start in range(0, len(ids), _TEXT_ROW_TOKENS)]
    rows: list[TokenizedRow] = [{"input_ids": chunk, "labels": chunk} for chunk in chunks if len(chunk) > 1]
    if not rows:
        raise CorralError(f"--eval {file} has {len(ids)} tokens, at least 2 are needed")
    return EvaluationRows(rows, f"the text {file}")
