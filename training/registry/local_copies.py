"""Adapter directories verified against their manifest, byte for byte: in place, or as a copy from an object store."""

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
    """Check that `directory` has the manifest's files and no others.

    Raises:
        AdapterRefused: a file is missing, changed, a link or not listed.
    """
    if unknown := sorted({path.name for path in directory.iterdir()} - {*manifest.files, MANIFEST_FILE}):
        raise AdapterRefused(f"{directory} has {unknown[0]!r}, which its manifest does not list: remove it")
    for name, expected in manifest.files.items():
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise AdapterRefused(f"{path} is missing or not a regular file: restore it, or delete the version")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != expected.sha256:
            raise AdapterRefused(
                f"{path} has sha256 {sha256[:12]}, its manifest says {expected.sha256[:12]}: "
                "restore it, or delete the version"
            )


def verified_copy(storage: Storage, folder: str, manifest: AdapterManifest) -> Path:
    """A local copy of `folder`, cached in `CORRAL_HOME` by content hash and fetched again if it is damaged."""
    content = manifest.files[CONFIG_FILE].sha256 + manifest.files[WEIGHTS_FILE].sha256
    copy = corral_home() / "cache" / "adapters" / hashlib.sha256(content.encode()).hexdigest()
    if copy.is_dir():
        with suppress(AdapterRefused):
            verify(copy, manifest)
            return copy
        shutil.rmtree(copy, ignore_errors=True)
    temporary = copy.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        for file in manifest.files:
            storage.download(f"{folder}/{file}", temporary / file)
        verify(temporary, manifest)
        with suppress(OSError):  # another replica on this machine was faster
            temporary.rename(copy)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verify(copy, manifest)
    return copy
