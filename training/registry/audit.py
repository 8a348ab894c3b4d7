"""The audit log: one JSON line in `CORRAL_HOME/audit.jsonl` for every change that only administrators may make.

Each change, from a route, a command or a training run, is made inside `audited`. The log never has prompts, answers or
keys.
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
    """Run the block and record its outcome. If the log cannot be opened, the block does not run.

    Args:
        actor: who makes the change: `os_user()`, or a key's id and name with the request's id.
        action: such as `promote`.
        target: what is changed.

    Yields:
        A dict for details that are known only afterwards, such as `before` and `after`.

    Raises:
        CorralError: the log cannot be opened. What the block raises is recorded and raised again.
    """
    path = corral_home() / AUDIT_FILE
    try:
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise CorralError(
            f"{action} {target}: not done, because the audit log {path} cannot be written ({error.strerror}): "
            "give write access, or set another CORRAL_HOME"
        ) from error
    entry = {"time": datetime.now(UTC).isoformat(), "actor": dict(actor), "action": action, "target": target, **details}
    try:
        late_details: dict[str, Any] = {}
        try:
            yield late_details
        except BaseException as error:
            outcome = "refused" if isinstance(error, CorralError) else "failed"
            reason = str(error) if isinstance(error, CorralError) else type(error).__name__
            _append(log, {**entry, "outcome": outcome, "reason": reason})
            raise
        _append(log, {**entry, **late_details, "outcome": "done"})
    finally:
        os.close(log)


def os_user() -> dict[str, str]:
    """The user that runs this program, as an actor."""
    try:
        return {"user": getpass.getuser()}
    except (KeyError, OSError):  # a user without a name, as in a container
        return {"user": f"uid {os.getuid()}"}


def _append(log: int, entry: dict[str, Any]) -> None:
    line = json.dumps(entry, default=str)
    try:
        os.write(log, f"{line}\n".encode())  # one write, so lines of concurrent writers do not mix
    except OSError as error:  # the change has been made already
        logger.error("%s: %s: not recorded: %s", AUDIT_FILE, error.strerror, line)
