"""Exports a registered adapter as a standalone model: a folder for transformers and vLLM, or a GGUF file for llama.cpp.

A merged model differs from the one that was trained and is served, so the held-out loss of each is measured, and
recorded with the weights. Files get their final names only when they are complete.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from training.base_models.resolve import BaseCheckpoint
from training.chat.chat_format import ChatFormat
from training.chat.detect import load_chat_format
from training.chat.jinja_templates import chat_template
from training.errors import ExportError
from training.export.gguf import GgufType, write_gguf
from training.export.losses import EvaluationRows, loss_of_folder, loss_of_gguf, served_loss
from training.export.merge import MergeBase, MergedWeights
from training.registry.manifest import AdapterManifest

RECORD_FILE = "corral_export.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
_MERGE_BASE_DESCRIPTIONS: dict[MergeBase, str] = {
    "nf4": "the base's weights as they are served, quantized to NF4 and dequantized to 16 bit",
    "original": "the base's original 16-bit weights, which are not the ones that the adapter was trained on",
}


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """What was exported and how its losses compare with the served model's; `corral_export.json` in a merged folder.

    Attributes:
        onto: see `MergedWeights`.
        dtype: dtype of a merged folder's tensors.
        evaluated_on: a description of the rows, or why there are none.
        served_loss: mean cross entropy over `eval_tokens` tokens, in nats, of the NF4 base with the unmerged adapter.
        merged_loss: loss of the merged folder; None if it was not written or not measured.
        gguf_loss: loss of the GGUF file, as transformers reads it; None if it was not written or not measured.
    """

    model_id: str
    base: str
    base_weights_sha256: str
    adapter_sha256: str
    onto: MergeBase
    dtype: str
    gguf_type: GgufType | None
    evaluated_on: str
    eval_tokens: int | None = None
    served_loss: float | None = None
    merged_loss: float | None = None
    gguf_loss: float | None = None


@dataclass(frozen=True, slots=True)
class ExportPaths:
    """What to write: a merged folder, a GGUF file of `gguf_type`, or both."""

    merged: Path | None
    gguf: Path | None
    gguf_type: GgufType = "F16"

    def check(self) -> None:
        """Check that there is a target and that none exists.

        Raises:
            ExportError: neither target is given, or one exists already.
        """
        if self.merged is None and self.gguf is None:
            raise ExportError("nothing to export: give --merged DIR, --gguf FILE or both")
        if self.merged is not None and self.merged.exists():
            if not self.merged.is_dir():
                raise ExportError(f"{self.merged} is a file: choose a new or empty folder")
            if any(self.merged.iterdir()):
                raise ExportError(f"{self.merged} is not empty: choose a new or empty folder")
        if self.gguf is not None and self.gguf.exists():
            raise ExportError(f"{self.gguf} already exists: remove it, or choose another file")


def export(
    manifest: AdapterManifest,
    adapter_dir: Path,
    base: BaseCheckpoint,
    targets: ExportPaths,
    *,
    onto: MergeBase,
    rows: EvaluationRows,
    device: torch.device,
) -> ExportRecord:
    """Merge the adapter, write the targets and measure their losses.

    Args:
        adapter_dir: the version's verified files.
        base: the verified base that the adapter was trained on.
        rows: the rows that losses are measured on; if empty, none are measured.

    Raises:
        ExportError: a target exists or cannot be written, or GGUF cannot represent this base.
    """
    targets.check()
    weights = MergedWeights(base, adapter_dir, manifest.lora, manifest.quantization, onto)
    chat_format = load_chat_format(manifest.chat_format, base, default_system=manifest.default_system)
    template = chat_template(chat_format.name, chat_format.bos_token, chat_format.default_system)
    record: dict[str, Any] = {
        "model_id": manifest.model_id,
        "base": base.source,
        "base_weights_sha256": manifest.base.weights_sha256,
        "adapter_sha256": manifest.weights_sha256,
        "onto": onto,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "gguf_type": targets.gguf_type if targets.gguf else None,
        "evaluated_on": rows.description,
    }
    if rows.rows:
        record["served_loss"], record["eval_tokens"] = served_loss(base, manifest, adapter_dir, rows, device)
    with contextlib.ExitStack() as outputs:
        if targets.gguf is not None:
            file = outputs.enter_context(_written_atomically(targets.gguf))
            write_gguf(
                weights,
                file,
                targets.gguf_type,
                name=manifest.model_id,
                description=f"LoRA adapter {manifest.model_id}, merged into {_MERGE_BASE_DESCRIPTIONS[onto]}",
                chat_template=template,
                eot_token_id=chat_format.stop_token_ids[0],
            )
            if rows.rows:
                record["gguf_loss"] = loss_of_gguf(file, rows, device)
        if targets.merged is not None:
            folder = outputs.enter_context(_written_atomically(targets.merged))
            _write_folder(weights, folder, chat_format, template)
            if rows.rows:
                record["merged_loss"] = loss_of_folder(folder, manifest.quantization, rows, device)
            export_record = ExportRecord(**record)
            (folder / RECORD_FILE).write_text(json.dumps(asdict(export_record), indent=2) + "\n")
            (folder / "README.md").write_text(_readme(export_record))
    return ExportRecord(**record)


def describe_losses(record: ExportRecord) -> list[str]:
    """The measured losses for people, one per line, with their difference from the served model's."""
    if record.served_loss is None:
        return [f"held-out loss was not measured: {record.evaluated_on}"]
    lines = [f"held-out loss over {record.eval_tokens} tokens ({record.evaluated_on}), nats:"]
    lines.append(f"  served (NF4 base, adapter unmerged)  {record.served_loss:.4f}")
    for name, loss in (
        (f"merged, {record.dtype}", record.merged_loss),
        (f"GGUF {record.gguf_type}", record.gguf_loss),
    ):
        if loss is not None:
            lines.append(f"  {name:<37}{loss:.4f}  ({loss - record.served_loss:+.4f})")
    return lines


@contextlib.contextmanager
def _written_atomically(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it if the block succeeds, else removed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ExportError(
                f"{target} cannot be written ({reason}): its partial files were removed; free some space or choose "
                "another path"
            ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _write_folder(weights: MergedWeights, folder: Path, chat_format: ChatFormat, template: str) -> None:
    folder.mkdir()
    base = weights.base
    config = {key: value for key, value in base.llama_config().items() if key not in ("torch_dtype", "_name_or_path")}
    config.pop("quantization_config", None)
    _write_json(folder / "config.json", {**config, "dtype": str(weights.dtype).removeprefix("torch.")})
    num_bytes = 0
    files: dict[str, str] = {}
    for file, names in weights.shards.items():
        tensors = {name: weights.tensor(name) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors creates it readable by the owner only
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        files |= dict.fromkeys(names, file)
        del tensors
    if len(weights.shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": num_bytes}, "weight_map": files}
        )

    generation = base.path / "generation_config.json"
    defaults = json.loads(generation.read_text()) if generation.is_file() else {}
    _write_json(folder / "generation_config.json", {**defaults, "eos_token_id": list(chat_format.stop_token_ids)})
    for name in _TOKENIZER_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)
    tokenizer_config = base.path / "tokenizer_config.json"
    if tokenizer_config.is_file():
        settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        _write_json(folder / tokenizer_config.name, settings)
    (folder / "chat_template.jinja").write_text(template)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readme(record: ExportRecord) -> str:
    losses = "\n".join(f"    {line}" for line in describe_losses(record))
    return f"""# {record.model_id}, merged

A LoRA adapter merged into {_MERGE_BASE_DESCRIPTIONS[record.onto]}, in {record.dtype}.
The chat template is the one that the adapter was trained with.

- adapter: {record.model_id}, sha256 {record.adapter_sha256}
- base: {record.base}, weights sha256 {record.base_weights_sha256}

A merged model differs slightly from the one that was trained, which keeps the base in NF4 and the adapter unmerged:

{losses}
"""
