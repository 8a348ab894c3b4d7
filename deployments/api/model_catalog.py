"""Which models this server has: the base and its adapters, as clients list them and as a request names them."""

import asyncio
import difflib
import time

from deployments.api.adapter_admin import canary_of
from deployments.errors import ModelNotFound
from deployments.protocol.adapters import Canary
from deployments.protocol.models import Model
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, RegistryError
from training.names import parse_model_id
from training.registry.manifest import AdapterManifest
from training.registry.registry import AdapterRegistry


class ModelCatalog:
    """The base and every adapter version in the registry that was trained on it.

    Args:
        max_model_len: longest prompt plus answer, in tokens.
    """

    def __init__(self, base: BaseCheckpoint, registry: AdapterRegistry, max_model_len: int) -> None:
        self._base = base
        self._registry = registry
        self._max_model_len = max_model_len
        self._started = int(time.time())

    async def models(self) -> list[Model]:
        """The base first, then every adapter version that it can serve, newest first."""

        def adapters() -> list[Model]:
            served = [m for m in self._registry.list() if m.base.name == self._base.name]
            pointing = {name: self._pointing_at(name) for name in {m.name for m in served}}
            newest_first = sorted(served, key=lambda m: (m.name, -m.version))
            return [self._adapter_card(manifest, *pointing[manifest.name]) for manifest in newest_first]

        return [self._base_card(), *await asyncio.to_thread(adapters)]

    async def model(self, model_id: str) -> Model:
        """One model, by any id that a request could use.

        Raises:
            ModelNotFound: there is no such model.
        """
        manifest = await self.resolve(model_id)
        if manifest is None:
            return self._base_card()
        return self._adapter_card(manifest, *await asyncio.to_thread(self._pointing_at, manifest.name))

    async def resolve(self, model: str, identity: str | None = None) -> AdapterManifest | None:
        """The adapter version that a model id means to this identity, None for the base.

        Raises:
            ModelNotFound: it is not a model id, or there is no such model.
        """
        try:
            wanted = parse_model_id(model)
        except RegistryError as error:
            raise ModelNotFound(str(error), "model") from error
        if wanted.base != self._base.name:
            near = difflib.get_close_matches(wanted.base, [self._base.name], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"this server has {self._base.name!r} and its adapters"
            raise ModelNotFound(f"model {model!r} is not served here: {hint}", "model")
        if wanted.adapter is None:
            return None
        try:
            return await asyncio.to_thread(self._registry.resolve, wanted.adapter, wanted.ref, identity)
        except AdapterNotFound as error:
            raise ModelNotFound(str(error), "model") from error

    def model_id(self, manifest: AdapterManifest | None) -> str:
        """The full id of what `resolve` returned."""
        return self._base.name if manifest is None else manifest.model_id

    def _base_card(self) -> Model:
        base = self._base
        return Model(id=base.name, created=self._started, root=base.source, max_model_len=self._max_model_len)

    def _pointing_at(self, name: str) -> tuple[dict[str, int], Canary | None]:
        """The aliases and the canary of an adapter."""
        return self._registry.aliases(name), canary_of(self._registry.traffic(name))

    def _adapter_card(self, manifest: AdapterManifest, aliases: dict[str, int], canary: Canary | None) -> Model:
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
