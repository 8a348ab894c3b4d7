"""How tests are spread over the processes of pytest-xdist: what shares an expensive fixture stays together.

A group is a module, or the tests of all modules on the shared server or the quickstart's adapter, or what
`@pytest.mark.xdist_group` names. Groups with slow tests are begun first, since they mostly wait, and the server's next.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiers import is_slow

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

_SHARED = ("quickstart", "server")  # fixtures of the session; the server's tests need the first, too, but elsewhere


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        import torch

        torch.set_num_threads(1)  # the processes share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow_groups = {group_of(item) for item in items if is_slow(item)}

    def turn(item: pytest.Item) -> int:
        group = group_of(item)
        return 1 if group in _SHARED else 0 if group in slow_groups else 2

    items.sort(key=turn)  # the order is otherwise kept


@pytest.hookimpl(tryfirst=True)  # xdist's own tells the controller that this worker is ready
def pytest_collection_finish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        file = _groups_file()
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({item.nodeid: group_of(item) for item in session.items}))
        written.replace(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> "LoadScopeScheduling":
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return collected_groups()[nodeid]

    config.option.loadscopereorder = False
    return Scheduler(config, log)


def group_of(item: pytest.Item) -> str:
    """What a test stays together with."""
    if marker := item.get_closest_marker("xdist_group"):
        return str(marker.args[0])
    fixtures = getattr(item, "fixturenames", ())
    return next((name for name in _SHARED if name in fixtures), item.nodeid.split("::")[0])


_groups: dict[str, str] = {}


def collected_groups() -> dict[str, str]:
    """The groups by test id that the workers found; the controller collects nothing itself."""
    if not _groups:
        _groups.update(json.loads(_groups_file().read_text()))
    return _groups


def _groups_file() -> Path:
    return Path(os.environ["CORRAL_TEST_SCRATCH"], "groups.json")
