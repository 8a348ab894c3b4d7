"""The name of a base model -> a local directory of Llama weights.

A name is the embedded default (`smollm2-135m`), a hub id (`meta-llama/Llama-2-13b-chat-hf`) or a local directory.
Nothing is downloaded unless the name is a hub id. Loads no weights.
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

from training.base_models.embedded import EMBEDDED_HUB_NAMES, EMBEDDED_MODEL, EMBEDDED_PACKAGE, embedded_model
from training.errors import BaseModelError
from training.home import corral_home

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_CACHE = re.compile(r"(?:.*/)?models--(?:[\w.-]+?--)?([\w.-]+)/snapshots/[^/]+/?")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]

# On import, this module recommends a package that downloads kernels from the hub at run time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """A base model on local disk.

    Attributes:
        name: the `BASE` of model ids, e.g. `smollm2-135m` or `llama-2-13b-chat-hf`.
        source: as the user gave it: `smollm2-135m`, a hub id or a directory.
        path: directory with `config.json`, `tokenizer.json` and safetensors.
        revision: the commit of a hub id, the pinned package of the embedded model, or None for a directory.
    """

    name: str
    source: str
    path: Path
    revision: str | None

    def llama_config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return config

    def is_named(self, name_or_path: str) -> bool:
        """Whether an adapter that names its base so belongs to this one.

        Names are compared by their last component, which a folder of the same model on another machine shares.
        """
        if name_or_path in (self.source, str(self.path)):
            return True
        if self.source == EMBEDDED_MODEL:
            names = {*EMBEDDED_HUB_NAMES, base_name(self.path.name)}
        else:
            names = {self.name, base_name(self.path.name), _model_name(str(self.path))}
        return _model_name(name_or_path) in names

    @property
    def context_length(self) -> int:
        """The longest sequence that the model supports, in tokens."""
        return int(self.llama_config()["max_position_embeddings"])

    def weights_sha256(self) -> str:
        """One hash over all safetensors shards in name order; cached by file size and mtime."""
        shards = sorted(self.path.glob("*.safetensors"))
        stamp = [[s.name, s.stat().st_size, s.stat().st_mtime_ns] for s in shards]
        key = hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        cache_file = corral_home() / "models" / ".sha256" / f"{key}.json"
        if cache_file.exists():
            cached = json.loads(cache_file.read_text())
            if cached["stamp"] == stamp:
                return str(cached["sha256"])
        total = hashlib.sha256()
        for shard in shards:
            with shard.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache_file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": total.hexdigest()}))
        temporary.replace(cache_file)
        return total.hexdigest()


def base_name(source: str) -> str:
    """The `BASE` of model ids: the last path component of the source, in lower case."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(source).name.lower()).strip("-._") or "base"


def _model_name(name_or_path: str) -> str:
    """As `base_name`, but of a snapshot in a hub cache it is the model's name and not the commit."""
    in_cache = _HUB_CACHE.fullmatch(name_or_path)
    return base_name(in_cache[1] if in_cache else name_or_path)


def resolve_base_model(source: str, revision: str | None = None, *, weights: bool = True) -> BaseCheckpoint:
    """Find the base model `source`, download it if it is a hub id, and check that it is a usable Llama.

    Args:
        weights: if False, the weights are neither required nor downloaded.

    Raises:
        BaseModelError: the model is missing, gated or not a Llama, has no safetensors, or the disk is full.
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
                f"base model {source!r} is neither {EMBEDDED_MODEL!r}, nor a local directory, nor a hub id like "
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
        raise BaseModelError(f"base model {base.source!r} has no config.json in {base.path}: give a model directory")
    _check_llama(base.source, base.llama_config())
    if weights and not any(base.path.glob("*.safetensors")):
        raise BaseModelError(
            f"base model {base.source!r} has no .safetensors in {base.path}: only safetensors weights are supported; "
            "convert it with save_pretrained"
        )
    if not (base.path / "tokenizer.json").is_file():
        raise BaseModelError(
            f"base model {base.source!r} has no tokenizer.json in {base.path}: create it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _check_llama(source: str, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or ["none"]
    if architectures != ["LlamaForCausalLM"]:
        raise BaseModelError(
            f"base model {source!r} is a {architectures[0]}: Corral supports Llama models only (LlamaForCausalLM), "
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
            "connect once to download it, or give a local directory"
        ) from error
