"""Which tests are run: those of some promises, or the quick tier, which is all that are not marked slow.

`make test` runs the quick tier and says how many tests `make test-all` has more. Tests that are named, by file,
promise, -k or -m, are run whatever their tier.
"""

from collections.abc import Callable

import pytest

COLLECTED = pytest.StashKey[list[pytest.Item]]()  # before any of them was left out
_num_left_out = 0  # slow tests of this session, or of the worker that told last: all workers collect the same


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promise", action="append", default=[], metavar="D12", help="only the tests that enforce it")
    parser.addoption("--quick", action="store_true", help="without slow tests, where none are named")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not hasattr(config, "workerinput"):  # a worker gets what was decided here
        named = config.args_source is pytest.Config.ArgsSource.ARGS
        option.quick = option.quick and not (named or option.promise or option.keyword or option.markexpr)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global _num_left_out
    import torch

    config.stash[COLLECTED] = list(items)
    if not torch.cuda.is_available():
        _deselect(config, items, lambda item: item.get_closest_marker("gpu") is not None)
    if promises := set(config.option.promise):
        _deselect(config, items, lambda item: not promises & promises_of(item))
    if config.option.quick:
        _num_left_out = _deselect(config, items, is_slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["num_left_out"] = _num_left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    global _num_left_out
    _num_left_out = getattr(node, "workeroutput", {}).get("num_left_out", _num_left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _num_left_out:
        terminalreporter.write_line(f"make test-all has {_num_left_out} tests more, the slow ones")


def promises_of(item: pytest.Item) -> set[str]:
    """The numbers of the promises that a test enforces."""
    return {number for marker in item.iter_markers("promise") for number in marker.args}


def is_slow(item: pytest.Item) -> bool:
    """Whether a test is in `make test-all` only."""
    return item.get_closest_marker("slow") is not None


def _deselect(config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]) -> int:
    deselected = [item for item in items if unwanted(item)]
    items[:] = [item for item in items if not unwanted(item)]
    config.hook.pytest_deselected(items=deselected)
    return len(deselected)
