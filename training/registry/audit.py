"""The audit log: one JSON line in `CORRAL_HOME/audit.jsonl` for every change that only administrators may make.

Whoever makes one (a route, a command, the end of a training run) does it inside `audited`, with who asks and what
for. Prompts, answers and keys have no place in it.
"""

import getpass
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from training.errors import CorralError
from training.home import corral_home

AUDIT_FILE = "audit.jsonl"

logger = logging.getLogger(__name__)


@contextmanager
def audited(actor: Mapping[str, Any], action: str, target: str, **details: Any) -> Iterator[dict[str, Any]]:
    """Do something and record how it ended; without a log to write to, it is not done.

    Args:
        actor: who asks: `os_user()`, or the id and name of a key, and the request's id.
        action: such as `promote`.
        target: what it is done to.

    Yields:
        A dict for what is only known when it is done, such as `before` and `after`.

    Raises:
        CorralError: the log cannot be opened; or what the block raised, which is recorded.
    """
    path = corral_home() / AUDIT_FILE
    try:
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise CorralError(
            f"{action} {target}: not done, because {path} cannot be written ({error.strerror}), where every change "
            "is recorded: give write access, or name another CORRAL_HOME"
        ) from error
    entry = {"time": datetime.now(UTC).isoformat(), "actor": dict(actor), "action": action, "target": target, **details}
    try:
        result: dict[str, Any] = {}
        try:
            yield result
        except BaseException as error:
            outcome = "refused" if isinstance(error, CorralError) else "failed"
            reason = str(error) if isinstance(error, CorralError) else type(error).__name__
            _append(log, {**entry, "outcome": outcome, "reason": reason})
            raise
        _append(log, {**entry, **result, "outcome": "done"})
    finally:
        os.close(log)


def os_user() -> dict[str, str]:
    """Who runs this program."""
    try:
        return {"user": getpass.getuser()}
    except (KeyError, OSError):  # a container's user without a name
        return {"user": f"uid {os.getuid()}"}


def _append(log: int, entry: dict[str, Any]) -> None:
    line = json.dumps(entry, default=str)
    try:
        os.write(log, f"{line}\n".encode())  # one write: lines of several writers do not mix
    except OSError as error:  # it is done; all that is left is to say so
        logger.error("%s: %s: not recorded: %s", AUDIT_FILE, error.strerror, line)
