"""From the name of a base model to a local directory of Llama weights, and those weights in NF4.

Training and serving both come here, so both run the same 4-bit weights. A name is the embedded default
(`smollm2-135m`), a hub id (`meta-llama/Llama-2-13b-chat-hf`) or a local directory. Nothing is fetched
unless the name is a hub id. torch and transformers are imported only where weights are touched.
"""

import errno
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.base_models.embedded import EMBEDDED_MODEL, EMBEDDED_PACKAGE, embedded_model
from training.errors import BaseModelError
from training.home import corral_home

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]

# When it is imported, it advises to install a package that fetches kernels from the hub at run time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """A base model on local disk.

    Attributes:
        name: the `BASE` of model ids, e.g. `smollm2-135m` or `llama-2-13b-chat-hf`.
        source: what the user named: `smollm2-135m`, a hub id or a directory.
        path: directory with `config.json`, `tokenizer.json` and safetensors.
        revision: the hub's commit, the pinned package of the embedded model, or None for a directory.
    """

    name: str
    source: str
    path: Path
    revision: str | None

    def llama_config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return config

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(self.llama_config()["max_position_embeddings"])

    def weights_sha256(self) -> str:
        """One hash over all safetensors shards in name order; remembered per file size and mtime."""
        shards = sorted(self.path.glob("*.safetensors"))
        stamp = [[s.name, s.stat().st_size, s.stat().st_mtime_ns] for s in shards]
        key = hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        memo = corral_home() / "models" / ".sha256" / f"{key}.json"
        if memo.exists():
            known = json.loads(memo.read_text())
            if known["stamp"] == stamp:
                return str(known["sha256"])
        total = hashlib.sha256()
        for shard in shards:
            with shard.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        memo.parent.mkdir(parents=True, exist_ok=True)
        fresh = memo.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"stamp": stamp, "sha256": total.hexdigest()}))
        fresh.replace(memo)
        return total.hexdigest()


def base_name(source: str) -> str:
    """The `BASE` of model ids for a source: its last path component in lower case."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(source).name.lower()).strip("-._") or "base"


def resolve_base_model(source: str, revision: str | None = None, *, weights: bool = True) -> BaseCheckpoint:
    """Find the base model `source` and make sure that it is a usable Llama on local disk.

    Args:
        weights: False fetches and asks for everything but the weights.

    Raises:
        BaseModelError: it is missing, gated, not a Llama, has no safetensors, or the disk is full.
    """
    try:
        if source == EMBEDDED_MODEL:
            base = BaseCheckpoint(EMBEDDED_MODEL, source, embedded_model(), EMBEDDED_PACKAGE)
        elif Path(source).expanduser().is_dir():
            path = Path(source).expanduser().absolute()
            base = BaseCheckpoint(base_name(source), source, path, None)
        elif _HUB_ID.fullmatch(source) and not source.startswith("."):
            path = _download(source, revision, weights)
            base = BaseCheckpoint(base_name(source), source, path, path.name)
        else:
            raise BaseModelError(
                f"base model {source!r} is neither {EMBEDDED_MODEL!r}, nor a directory here, nor a hub id like "
                "'meta-llama/Llama-2-13b-chat-hf': check the spelling"
            )
        _check_usable(base, weights)
        return base
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BaseModelError(
                f"no space left while preparing base model {source!r} (CORRAL_HOME is {corral_home()}): "
                "free some space or set CORRAL_HOME to a larger disk"
            ) from error
        raise BaseModelError(f"base model {source!r} cannot be read: {error}") from error


def _check_usable(base: BaseCheckpoint, weights: bool) -> None:
    config_file = base.path / "config.json"
    if not config_file.is_file():
        raise BaseModelError(f"base model {base.source!r} has no config.json in {base.path}: name a model directory")
    _check_llama(base.source, base.llama_config())
    if weights and not any(base.path.glob("*.safetensors")):
        raise BaseModelError(
            f"base model {base.source!r} has no .safetensors in {base.path}: only safetensors weights are loaded; "
            "convert it with save_pretrained"
        )
    if not (base.path / "tokenizer.json").is_file():
        raise BaseModelError(
            f"base model {base.source!r} has no tokenizer.json in {base.path}: write one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _check_llama(source: str, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or ["none"]
    if architectures != ["LlamaForCausalLM"]:
        raise BaseModelError(
            f"base model {source!r} is a {architectures[0]}: Corral runs Llama models only (LlamaForCausalLM), "
            f"such as {EMBEDDED_MODEL} or meta-llama/Llama-2-13b-chat-hf"
        )


def _download(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        config_file = hf_hub_download(hub_id, "config.json", revision=revision)
        _check_llama(hub_id, json.loads(Path(config_file).read_text()))  # before gigabytes are fetched
        files = _HUB_FILES if weights else [name for name in _HUB_FILES if name != "*.safetensors"]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise BaseModelError(
            f"base model {hub_id!r} is gated: accept its licence on its hub page, "
            "then set HF_TOKEN or run 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(f"base model {hub_id!r} has no revision {revision!r}: check base_revision") from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"base model {hub_id!r} is not on the hub, or is private: check the spelling, or set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise BaseModelError(
            f"base model {hub_id!r} is not in the local cache and the hub cannot be reached: "
            "connect once, or name a directory"
        ) from error
