"""Where an adapter's traffic goes: aliases that point at versions, and the canary beside the champion.

    ROOT/NAME/aliases/champion.json   {"version": 2, "previous": [1], "updated": "..."}
    ROOT/NAME/canary.json             {"version": 3, "percent": 10, "champion": 2, "since": "..."}

A canary belongs to one state of the champion's alias: it counts as long as `since` equals that alias' `updated`. So the
single write that moves the alias ends the canary too, whoever makes it, including a Corral that knows no canaries; and
no reader sees half a change.
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
    """The file of one alias."""

    version: int
    previous: list[int]  # oldest first
    updated: AwareDatetime


class Canary(Record):
    """A version that some of the champion's traffic goes to.

    Attributes:
        percent: of the identities that ask for the champion.
        champion: the version that the others get.
        since: when the champion's alias was set to that version.
    """

    version: int
    percent: float = Field(gt=0, lt=100)
    champion: int
    since: AwareDatetime

    def takes(self, name: str, identity: str) -> bool:
        """Whether this identity's requests for adapter `name` go to the canary."""
        return draw(name, self.champion, self.version, identity) < self.percent


def draw(name: str, champion: int, canary: int, identity: str) -> float:
    """Where an identity falls in [0, 100), the same on every replica and in every request.

    A canary takes what falls below its percentage: who is in at 10 % stays in at 20 %. Another pair of versions
    shuffles anew, so that it is not always the same users who try what is new.
    """
    text = f"{name}\n{champion}\n{canary}\n{identity}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:6]) / 2**48 * 100


@dataclass(frozen=True, slots=True)
class Traffic:
    """Where requests for one alias go; `version` is None where the alias does not exist."""

    version: int | None
    canary: Canary | None = None

    def record(self) -> dict[str, Any] | None:
        """As the audit log tells it."""
        if self.version is None:
            return None
        canary = {"canary": self.canary.version, "percent": self.canary.percent} if self.canary else {}
        return {"version": self.version, **canary}


@dataclass(frozen=True, slots=True)
class Change:
    """What a promotion or rollback did.

    Attributes:
        manifest: of the version that was promoted or gone back to.
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
        """The aliases that adapter `name` has."""
        with self._storage.guard(f"read the aliases of {name!r}"):
            files = [path.rsplit("/", 1)[1] for path in self._storage.find(f"{name}/aliases")]
        aliases = (file.removesuffix(".json") for file in files if file.endswith(".json"))
        return [alias for alias in aliases if ADAPTER_NAME.fullmatch(alias)]

    def read(self, name: str, alias: str) -> AliasState | None:
        """One alias, None if there is no such.

        Raises:
            RegistryError: its file is damaged.
        """
        text = self._storage.read_if_there(f"{name}/aliases/{alias}.json")
        try:
            return None if text is None else AliasState.model_validate_json(text)
        except ValidationError as error:
            raise RegistryError(
                f"alias {alias!r} of {name!r} is damaged ({first_error(error)}): promote a version to write it anew"
            ) from error

    def canary(self, name: str, champion: AliasState) -> Canary | None:
        """The canary beside this state of the champion's alias; a damaged file is logged and is none."""
        text = self._storage.read_if_there(f"{name}/canary.json")
        try:
            canary = None if text is None else Canary.model_validate_json(text)
        except ValidationError as error:
            logger.warning("the canary of %r is damaged (%s), its champion gets everything", name, first_error(error))
            return None
        return canary if canary is not None and canary.since == champion.updated else None


def first_error(error: ValidationError) -> str:
    """The first thing that a damaged file has wrong."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
