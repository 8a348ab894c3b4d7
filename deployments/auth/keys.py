"""The API keys of a server, in `CORRAL_HOME/keys.json`: the permissions of each key and its hash.

Every lookup notices a changed file, so new, revoked and expired keys take effect with the next request, on every
replica that sees the file. Knows nothing of HTTP.

A key is `sk-corral-ID-SECRET`. The secret is 256 random bits and cannot be guessed, so a plain SHA-256 protects it as
well as a slow password hash would, in a microsecond per request.
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
_ID_BYTES = 5  # public
_LOCK_TIMEOUT_S = 30

KeyStatus = Literal["valid", "expired", "revoked"]


class ApiKey(BaseModel):
    """What is stored of a key. Revoked keys stay in the file, so that their past usage keeps its name."""

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
        """Whether the key is accepted now, and if not, why."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= datetime.now(UTC) else "valid"

    @property
    def caller(self) -> Caller:
        """The caller that this key identifies; the scope `admin` includes `chat`."""
        return Caller(self.id, self.name, frozenset({"chat", *self.scopes}), self.limits)


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ApiKey]


_Version = tuple[int, int, int]  # of a file: mtime in ns, size, inode

# Keys with an unknown id are compared with this one, so that they take as long to refuse as keys with a known id.
_DUMMY_KEY = ApiKey(id="0" * 10, name="dummy", sha256="0" * 64, scopes=("chat",), created=datetime.now(UTC))


class KeyStore:
    """The keys in one file, by default `CORRAL_HOME/keys.json`, which is read again whenever it has changed.

    Every method raises KeysUnreadable if the file exists and cannot be read: no request is accepted then.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or corral_home() / "keys.json"
        self._cache: tuple[_Version, dict[str, ApiKey] | str] | None = None

    def list(self) -> list[ApiKey]:
        """All keys, including revoked and expired ones, oldest first."""
        return list(self._keys().values())

    @property
    def required(self) -> bool:
        """Whether requests need a key: true once a key exists, even if none is valid."""
        return bool(self._keys())

    @property
    def num_valid(self) -> int:
        """Number of keys that are accepted now."""
        return sum(key.status == "valid" for key in self._keys().values())

    def authenticate(self, key: str) -> Caller:
        """The caller that `key` identifies.

        Raises:
            InvalidKey: the key is unknown, revoked or expired.
        """
        key_id, _, _ = key.removeprefix(KEY_PREFIX).partition("-")
        api_key = self._keys().get(key_id, _DUMMY_KEY)
        if not hmac.compare_digest(_hash(key), api_key.sha256):
            raise InvalidKey("the API key is not valid: ask the operator of this server for one ('corral keys create')")
        return _valid_caller(api_key)

    def caller(self, key_id: str) -> Caller:
        """The caller of a session that was started with the key of this id.

        Raises:
            InvalidKey: the key no longer exists, or is revoked or expired.
        """
        api_key = self._keys().get(key_id)
        if api_key is None:
            raise InvalidKey("the key of this session no longer exists: log in with another key")
        return _valid_caller(api_key)

    def create(
        self, name: str, scopes: tuple[Scope, ...], limits: KeyLimits = NO_LIMITS, expires: datetime | None = None
    ) -> tuple[ApiKey, str]:
        """Create a key; returns what is stored of it, and the key itself, which cannot be recovered later.

        Raises:
            pydantic.ValidationError: the name or a time is not valid.
        """
        key_id = secrets.token_hex(_ID_BYTES)
        key = f"{KEY_PREFIX}{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
        api_key = ApiKey(
            id=key_id,
            name=name,
            sha256=_hash(key),
            scopes=scopes,
            limits=limits,
            created=datetime.now(UTC).replace(microsecond=0),
            expires=expires,
        )
        with self._locked_keys() as keys:
            keys[key_id] = api_key
        return api_key, key

    def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key; revoking it twice changes nothing.

        Raises:
            InvalidKey: no key has this id.
        """
        with self._locked_keys() as keys:
            if key_id not in keys:
                raise InvalidKey(f"no key has the id {key_id!r}: 'corral keys list' shows the ids")
            if keys[key_id].revoked is None:
                keys[key_id] = keys[key_id].model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        return keys[key_id]

    def _keys(self) -> dict[str, ApiKey]:
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise KeysUnreadable(self._unreadable_message(error)) from None
        version = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if self._cache is None or self._cache[0] != version:
            self._cache = (version, self._read())
        keys = self._cache[1]
        if isinstance(keys, str):
            raise KeysUnreadable(keys)
        return keys

    def _read(self) -> dict[str, ApiKey] | str:
        """The keys by id, or an error message about the file."""
        remedy = "requests are refused until it is restored, or removed and new keys are created"
        try:
            keys = _KeyFile.model_validate_json(self.path.read_bytes()).keys
        except OSError as error:
            return self._unreadable_message(error)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            return f"{self.path} is broken ({f'{field}: ' if field else ''}{first['msg']}): {remedy}"
        by_id = {key.id: key for key in keys}
        return by_id if len(by_id) == len(keys) else f"{self.path} is broken (two keys have the same id): {remedy}"

    def _unreadable_message(self, error: OSError) -> str:
        return f"{self.path} cannot be read ({error.strerror}): requests are refused until it can be read"

    @contextmanager
    def _locked_keys(self) -> Iterator[dict[str, ApiKey]]:
        """The keys by id, for changes within the block; written at its end, under a lock against other writers."""
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


def _valid_caller(key: ApiKey) -> Caller:
    if key.status == "expired":
        raise InvalidKey(f"API key {key.name!r} expired at {key.expires:%Y-%m-%d %H:%M} UTC: ask for a new one")
    if key.status == "revoked":
        raise InvalidKey(f"API key {key.name!r} was revoked: ask for a new one")
    return key.caller
