"""Adapter directories that equal their manifest, byte for byte: checked in place, or fetched from an object store.

The registry calls this each time an adapter is about to be loaded.
"""

import hashlib
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from training.errors import AdapterRefused
from training.home import corral_home
from training.registry.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from training.registry.manifest import MANIFEST_FILE, AdapterManifest
from training.storage import TEMPORARY_PREFIX, Storage


def verify(directory: Path, manifest: AdapterManifest) -> None:
    """Make sure that `directory` holds the manifest's files and no others.

    Raises:
        AdapterRefused: a file is missing, changed, a link or not listed.
    """
    if unknown := sorted({path.name for path in directory.iterdir()} - {*manifest.files, MANIFEST_FILE}):
        raise AdapterRefused(f"{directory} has {unknown[0]!r}, which its manifest does not list: remove it")
    for name, expected in manifest.files.items():
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise AdapterRefused(f"{path} is missing or is no plain file: restore it, or delete the version")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.sha256:
            raise AdapterRefused(
                f"{path} has sha256 {found[:12]}, its manifest says {expected.sha256[:12]}: "
                "restore it, or delete the version"
            )


def verified_copy(storage: Storage, folder: str, manifest: AdapterManifest) -> Path:
    """A local copy of `folder`, kept in `CORRAL_HOME` by content and fetched anew if it is damaged."""
    content = manifest.files[CONFIG_FILE].sha256 + manifest.files[WEIGHTS_FILE].sha256
    copy = corral_home() / "cache" / "adapters" / hashlib.sha256(content.encode()).hexdigest()
    if copy.is_dir():
        with suppress(AdapterRefused):
            verify(copy, manifest)
            return copy
        shutil.rmtree(copy, ignore_errors=True)
    fresh = copy.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    fresh.mkdir(parents=True)
    try:
        for file in manifest.files:
            storage.download(f"{folder}/{file}", fresh / file)
        verify(fresh, manifest)
        with suppress(OSError):  # another replica on this machine was quicker
            fresh.rename(copy)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    verify(copy, manifest)
    return copy
