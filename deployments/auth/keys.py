"""The API keys of a server: `CORRAL_HOME/keys.json`, which holds what each may do and the hash of its secret.

`corral keys` writes the file; `auth.py` and the chat page ask at every request who a key belongs to, so a new, revoked
or expired key counts at once, on every replica that sees the file. Knows nothing of HTTP.

A key is `sk-corral-ID-SECRET`. The secret is 256 random bits, so there is nothing to guess, and a plain SHA-256
protects it as well as a slow password hash would, at a microsecond a request.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from deployments.auth.caller import NO_LIMITS, Caller, KeyLimits, Scope
from deployments.errors import InvalidKey, KeysUnreadable
from training.home import corral_home, replace_private_file

KEY_PREFIX = "sk-corral-"
_SECRET_BYTES = 32
_ID_BYTES = 5  # names a key, and is no secret
_LOCK_TIMEOUT_S = 30

KeyStatus = Literal["valid", "expired", "revoked"]


class ApiKey(BaseModel):
    """All that is kept of a key. It stays after the key was revoked: usage of last month still has a name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{10}$")]
    name: Annotated[str, Field(pattern=r"^[\w.@+ -]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="of the whole key")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    limits: KeyLimits = NO_LIMITS
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    @property
    def status(self) -> KeyStatus:
        """Whether it is accepted now, and if not, why."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= datetime.now(UTC) else "valid"

    @property
    def caller(self) -> Caller:
        """Who sends this key; `admin` includes `chat`."""
        return Caller(self.id, self.name, frozenset({"chat", *self.scopes}), self.limits)


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ApiKey]


_Version = tuple[int, int, int]  # of a file: mtime in ns, size, inode

# What an unknown id is compared with, so that it takes as long as a known one.
_NOBODY = ApiKey(id="0" * 10, name="nobody", sha256="0" * 64, scopes=("chat",), created=datetime.now(UTC))


class KeyStore:
    """The keys in one file, by default `CORRAL_HOME/keys.json`; read again whenever it has changed.

    Every method raises KeysUnreadable if the file is there and cannot be read: a broken file lets nobody in.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or corral_home() / "keys.json"
        self._known: tuple[_Version, dict[str, ApiKey] | str] | None = None

    def list(self) -> list[ApiKey]:
        """Every key that was ever made, the oldest first."""
        return list(self._keys().values())

    @property
    def required(self) -> bool:
        """Whether everybody needs a key: as soon as there was one, and also when none is valid any more."""
        return bool(self._keys())

    @property
    def num_valid(self) -> int:
        """How many keys are accepted now."""
        return sum(key.status == "valid" for key in self._keys().values())

    def authenticate(self, key: str) -> Caller:
        """Who `key` belongs to.

        Raises:
            InvalidKey: it is none of ours, or is revoked or expired.
        """
        key_id, _, _ = key.removeprefix(KEY_PREFIX).partition("-")
        known = self._keys().get(key_id, _NOBODY)
        if not hmac.compare_digest(_hash(key), known.sha256):
            raise InvalidKey("the API key is not valid: ask whoever runs this server for one ('corral keys create')")
        return _accepted(known)

    def caller(self, key_id: str) -> Caller:
        """Who the key with this id belongs to, for a session that a whole key began.

        Raises:
            InvalidKey: there is none, or it is revoked or expired.
        """
        known = self._keys().get(key_id)
        if known is None:
            raise InvalidKey("the key of this session is not there any more: log in with another")
        return _accepted(known)

    def create(
        self, name: str, scopes: tuple[Scope, ...], limits: KeyLimits = NO_LIMITS, expires: datetime | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns what is kept of it, and the key itself, which nobody can tell again.

        Raises:
            pydantic.ValidationError: a name or time that the file cannot hold.
        """
        key_id = secrets.token_hex(_ID_BYTES)
        key = f"{KEY_PREFIX}{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
        made = ApiKey(
            id=key_id,
            name=name,
            sha256=_hash(key),
            scopes=scopes,
            limits=limits,
            created=datetime.now(UTC).replace(microsecond=0),
            expires=expires,
        )
        with self._changing() as keys:
            keys[key_id] = made
        return made, key

    def revoke(self, key_id: str) -> ApiKey:
        """Accept a key no more.

        Raises:
            InvalidKey: no key has this id.
        """
        with self._changing() as keys:
            if key_id not in keys:
                raise InvalidKey(f"no key has the id {key_id!r}: 'corral keys list' shows the ids")
            if keys[key_id].revoked is None:
                keys[key_id] = keys[key_id].model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        return keys[key_id]

    def _keys(self) -> dict[str, ApiKey]:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise KeysUnreadable(self._unread(error)) from None
        version = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._known is None or self._known[0] != version:
            self._known = (version, self._read())
        keys = self._known[1]
        if isinstance(keys, str):
            raise KeysUnreadable(keys)
        return keys

    def _read(self) -> dict[str, ApiKey] | str:
        """The keys by id, or what is wrong with the file."""
        mend = "nobody is let in until it is restored, or removed and new keys are made"
        try:
            listed = _KeyFile.model_validate_json(self.path.read_bytes()).keys
        except OSError as error:
            return self._unread(error)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            return f"{self.path} is broken ({f'{place}: ' if place else ''}{first['msg']}): {mend}"
        keys = {key.id: key for key in listed}
        return keys if len(keys) == len(listed) else f"{self.path} is broken (two keys have the same id): {mend}"

    def _unread(self, error: OSError) -> str:
        return f"{self.path} cannot be read ({error.strerror}): nobody is let in until it can"

    @contextmanager
    def _changing(self) -> Iterator[dict[str, ApiKey]]:
        """The keys by id, to be changed within the block; written at its end, with other writers kept out."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(f"{self.path}.lock", timeout=_LOCK_TIMEOUT_S, mode=0o600):
                keys = dict(self._keys())
                yield keys
                content = _KeyFile(keys=list(keys.values())).model_dump_json(indent=2)
                replace_private_file(self.path, content.encode())
        except Timeout as error:
            raise KeysUnreadable(f"{self.path} is locked by another command: try again") from error
        except OSError as error:
            raise KeysUnreadable(f"{self.path} cannot be written: {error.strerror}") from error


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def _accepted(key: ApiKey) -> Caller:
    if key.status == "expired":
        raise InvalidKey(f"the API key {key.name!r} expired at {key.expires:%Y-%m-%d %H:%M} UTC: ask for a new one")
    if key.status == "revoked":
        raise InvalidKey(f"the API key {key.name!r} was revoked: ask for a new one")
    return key.caller
