"""Which version an adapter's requests go to: aliases that point at versions, and the champion's canary.

    ROOT/NAME/aliases/champion.json   {"version": 2, "previous": [1], "updated": "..."}
    ROOT/NAME/canary.json             {"version": 3, "percent": 10, "champion": 2, "since": "..."}

A canary belongs to one state of the champion alias: it is valid while its `since` equals the alias's `updated`. So the
single write that moves the alias also ends the canary, even if an older Corral without canaries makes it, and no reader
sees a half-finished change.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from pydantic import AwareDatetime, Field, ValidationError

from training.errors import RegistryError
from training.names import ADAPTER_NAME
from training.registry.manifest import AdapterManifest, Record
from training.storage import Storage

CHAMPION = "champion"

logger = logging.getLogger(__name__)


class AliasState(Record):
    """The content of an alias file."""

    version: int
    previous: list[int]  # oldest first
    updated: AwareDatetime


class Canary(Record):
    """A version that receives a share of the champion's traffic.

    Attributes:
        percent: share of the identities that request the champion.
        champion: the version that the other identities get.
        since: when the champion alias was set to that version.
    """

    version: int
    percent: float = Field(gt=0, lt=100)
    champion: int
    since: AwareDatetime

    def takes(self, name: str, identity: str) -> bool:
        """Whether this identity's requests for adapter `name` go to the canary."""
        return draw(name, self.champion, self.version, identity) < self.percent


def draw(name: str, champion: int, canary: int, identity: str) -> float:
    """An identity's position in [0, 100), the same on every replica and in every request.

    A canary takes the identities below its percentage, so whoever gets it at 10 % also gets it at 20 %. Another pair of
    versions gives another order, so that new versions are not always tried by the same users.
    """
    text = f"{name}\n{champion}\n{canary}\n{identity}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:6]) / 2**48 * 100


@dataclass(frozen=True, slots=True)
class Traffic:
    """Where requests for one alias go; `version` is None if the alias does not exist."""

    version: int | None
    canary: Canary | None = None

    def record(self) -> dict[str, Any] | None:
        """The entry for the audit log."""
        if self.version is None:
            return None
        canary = {"canary": self.canary.version, "percent": self.canary.percent} if self.canary else {}
        return {"version": self.version, **canary}


@dataclass(frozen=True, slots=True)
class Change:
    """What a promotion or rollback did.

    Attributes:
        manifest: manifest of the version that was promoted or rolled back to.
    """

    alias: str
    manifest: AdapterManifest
    before: Traffic
    after: Traffic


class Aliases:
    """Reads the alias and canary files of all adapters of one registry."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def names(self, name: str) -> list[str]:
        """The aliases of adapter `name`."""
        with self._storage.guard(f"read the aliases of {name!r}"):
            files = [path.rsplit("/", 1)[1] for path in self._storage.find(f"{name}/aliases")]
        aliases = (file.removesuffix(".json") for file in files if file.endswith(".json"))
        return [alias for alias in aliases if ADAPTER_NAME.fullmatch(alias)]

    def read(self, name: str, alias: str) -> AliasState | None:
        """The state of one alias; None if it does not exist.

        Raises:
            RegistryError: its file is damaged.
        """
        text = self._storage.read_if_there(f"{name}/aliases/{alias}.json")
        try:
            return None if text is None else AliasState.model_validate_json(text)
        except ValidationError as error:
            raise RegistryError(
                f"alias {alias!r} of {name!r} is damaged ({first_error(error)}): promote a version to rewrite it"
            ) from error

    def canary(self, name: str, champion: AliasState) -> Canary | None:
        """The canary of this state of the champion alias, if any; a damaged file is logged and ignored."""
        text = self._storage.read_if_there(f"{name}/canary.json")
        try:
            canary = None if text is None else Canary.model_validate_json(text)
        except ValidationError as error:
            logger.warning(
                "the canary of %r is damaged (%s): all requests go to the champion", name, first_error(error)
            )
            return None
        return canary if canary is not None and canary.since == champion.updated else None


def first_error(error: ValidationError) -> str:
    """The first error in a damaged file, as `key: message`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
