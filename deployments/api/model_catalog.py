"""The models of a server, the base and its adapters: lists them, and resolves the model id of a request."""

import asyncio
import difflib
import itertools
import time

from deployments.api.adapter_admin import canary_of
from deployments.errors import ModelNotFound
from deployments.protocol.adapters import Canary
from deployments.protocol.models import Model
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, RegistryError
from training.names import parse_model_id
from training.registry.aliases import CHAMPION
from training.registry.manifest import AdapterManifest
from training.registry.registry import AdapterRegistry


class ModelCatalog:
    """The base and every adapter version in the registry that was trained on it.

    Args:
        max_model_len: longest prompt plus completion, in tokens.
    """

    def __init__(self, base: BaseCheckpoint, registry: AdapterRegistry, max_model_len: int) -> None:
        self._base = base
        self._registry = registry
        self._max_model_len = max_model_len
        self._started = int(time.time())

    async def models(self) -> list[Model]:
        """The base first, then each adapter: itself, as requests should name it, and its versions, newest first."""

        def adapters() -> list[Model]:
            served = [m for m in self._registry.list() if m.base.name == self._base.name]
            pointers = {name: self._pointers(name) for name in {m.name for m in served}}
            newest_first = sorted(served, key=lambda m: (m.name, -m.version))
            cards = []
            for name, versions in itertools.groupby(newest_first, key=lambda m: m.name):
                of_name = [self._version_card(manifest, *pointers[name]) for manifest in versions]
                default = next((card for card in of_name if CHAMPION in card.aliases), of_name[0])
                cards += [self._adapter_card(default), *of_name]
            return cards

        return [self._base_card(), *await asyncio.to_thread(adapters)]

    async def model(self, model_id: str) -> Model:
        """One model, by any id that a request may name.

        Raises:
            ModelNotFound: there is no such model.
        """
        manifest = await self.resolve(model_id)
        if manifest is None:
            return self._base_card()
        card = self._version_card(manifest, *await asyncio.to_thread(self._pointers, manifest.name))
        return card if parse_model_id(model_id).ref is not None else self._adapter_card(card)

    async def resolve(self, model: str, identity: str | None = None) -> AdapterManifest | None:
        """The adapter version that a model id selects for this identity, None for the base.

        Raises:
            ModelNotFound: the id is not valid, or there is no such model.
        """
        try:
            requested = parse_model_id(model)
        except RegistryError as error:
            raise ModelNotFound(str(error), "model") from error
        if requested.base != self._base.name:
            suggestions = difflib.get_close_matches(requested.base, [self._base.name], n=1)
            served = f"this server serves {self._base.name!r} and its adapters"
            hint = f"did you mean {suggestions[0]!r}?" if suggestions else served
            raise ModelNotFound(f"model {model!r} is not served here: {hint}", "model")
        if requested.adapter is None:
            return None
        try:
            return await asyncio.to_thread(self._registry.resolve, requested.adapter, requested.ref, identity)
        except AdapterNotFound as error:
            raise ModelNotFound(str(error), "model") from error

    def model_id(self, manifest: AdapterManifest | None) -> str:
        """The full id of what `resolve` returned."""
        return self._base.name if manifest is None else manifest.model_id

    def _base_card(self) -> Model:
        base = self._base
        return Model(id=base.name, created=self._started, root=base.source, max_model_len=self._max_model_len)

    def _pointers(self, name: str) -> tuple[dict[str, int], Canary | None]:
        """The aliases and the canary of an adapter."""
        return self._registry.aliases(name), canary_of(self._registry.traffic(name))

    def _adapter_card(self, default: Model) -> Model:
        """The adapter without a version, which is answered by its champion, else by its newest version."""
        return default.model_copy(update={"id": f"{self._base.name}:{default.root}", "canary_percent": None})

    def _version_card(self, manifest: AdapterManifest, aliases: dict[str, int], canary: Canary | None) -> Model:
        return Model(
            id=manifest.model_id,
            created=int(manifest.created.timestamp()),
            parent=self._base.name,
            root=manifest.name,
            version=manifest.version,
            aliases=sorted(alias for alias, version in aliases.items() if version == manifest.version),
            canary_percent=canary.percent if canary is not None and canary.version == manifest.version else None,
            max_model_len=self._max_model_len,
        )
