"""A registered adapter as a model of its own: a folder for transformers and vLLM, a GGUF file for llama.cpp, or both.

`corral adapters export` calls `export`. Merging gives another model than the one that was trained and is served, so
the held-out loss of each is measured and written down beside the weights. Files appear under their names when they
are whole, and not before.
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
_WORDS: dict[MergeBase, str] = {
    "nf4": "the base's weights as they are served, in NF4, and brought back to 16 bit",
    "original": "the base's own 16-bit weights, which are not those that the adapter was trained on",
}


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """What was exported, and how far it is from what is served; `corral_export.json` in a merged folder.

    Attributes:
        onto: see `MergedWeights`.
        dtype: of a merged folder's tensors.
        evaluated_on: which rows, in words, or why none.
        served_loss: mean cross entropy over `eval_tokens` tokens, in nats: NF4 base and unmerged adapter.
        merged_loss: of the merged folder; None where it was not written or not measured.
        gguf_loss: of the GGUF file, as transformers reads it.
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
    """Where to: a folder, a GGUF file of a type, or both."""

    merged: Path | None
    gguf: Path | None
    gguf_type: GgufType = "F16"

    def check(self) -> None:
        """Refuse what is there already.

        Raises:
            ExportError: nothing is asked for, or a target is in use.
        """
        if self.merged is None and self.gguf is None:
            raise ExportError("nothing to export: give --merged DIR, --gguf FILE or both")
        if self.merged is not None and self.merged.exists():
            if not self.merged.is_dir():
                raise ExportError(f"{self.merged} is a file: name a folder that is not there yet, or an empty one")
            if any(self.merged.iterdir()):
                raise ExportError(f"{self.merged} is not empty: name a folder that is not there yet, or an empty one")
        if self.gguf is not None and self.gguf.exists():
            raise ExportError(f"{self.gguf} is there already: remove it, or name another file")


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
    """Merge, write and measure.

    Args:
        adapter_dir: the version's files, checked.
        base: what it was trained on, checked.
        rows: what the losses are measured on; without rows nothing is.

    Raises:
        ExportError: a target is in use or cannot be written, or GGUF cannot say what this base is.
    """
    targets.check()
    weights = MergedWeights(base, adapter_dir, manifest.lora, manifest.quantization, onto)
    chat_format = load_chat_format(manifest.chat_format, base)
    template = chat_template(chat_format.name, chat_format.bos_token)
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
    with contextlib.ExitStack() as written:
        if targets.gguf is not None:
            file = written.enter_context(_whole_or_not_at_all(targets.gguf))
            write_gguf(
                weights,
                file,
                targets.gguf_type,
                name=manifest.model_id,
                description=f"LoRA adapter {manifest.model_id}, merged into {_WORDS[onto]}",
                chat_template=template,
                eot_token_id=chat_format.stop_token_ids[0],
            )
            if rows.rows:
                record["gguf_loss"] = loss_of_gguf(file, rows, device)
        if targets.merged is not None:
            folder = written.enter_context(_whole_or_not_at_all(targets.merged))
            _write_folder(weights, folder, chat_format, template)
            if rows.rows:
                record["merged_loss"] = loss_of_folder(folder, manifest.quantization, rows, device)
            finished = ExportRecord(**record)
            (folder / RECORD_FILE).write_text(json.dumps(asdict(finished), indent=2) + "\n")
            (folder / "README.md").write_text(_readme(finished))
    return ExportRecord(**record)


def describe_losses(record: ExportRecord) -> list[str]:
    """What the merge costs, a line for each thing measured."""
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
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A path beside `target` that takes its name when the block ends well, and is gone when it does not."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield fresh
            fresh.replace(target)
        except (OSError, SafetensorError) as error:
            words = getattr(error, "strerror", None) or str(error)
            raise ExportError(f"{target} cannot be written ({words}): nothing of it is left; free space") from error
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)


def _write_folder(weights: MergedWeights, folder: Path, chat_format: ChatFormat, template: str) -> None:
    folder.mkdir()
    base = weights.base
    config = {key: value for key, value in base.llama_config().items() if key not in ("torch_dtype", "_name_or_path")}
    config.pop("quantization_config", None)
    _write_json(folder / "config.json", {**config, "dtype": str(weights.dtype).removeprefix("torch.")})
    sizes = 0
    files: dict[str, str] = {}
    for file, names in weights.shards.items():
        tensors = {name: weights.tensor(name) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes it the owner's alone
        sizes += sum(tensor.nbytes for tensor in tensors.values())
        files |= dict.fromkeys(names, file)
        del tensors
    if len(weights.shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sizes}, "weight_map": files})

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

A LoRA adapter merged into {_WORDS[record.onto]}, in {record.dtype}.
The chat template is the one that the adapter was trained with.

- adapter: {record.model_id}, sha256 {record.adapter_sha256}
- base: {record.base}, weights sha256 {record.base_weights_sha256}

A merged model is not quite the one that was trained, which keeps the base in NF4 and the adapter beside it:

{losses}
"""
