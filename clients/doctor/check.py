"""The result of one check of `corral doctor`, and the report on all of them."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "note", "error"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check; `fix` says what to do if the status is not ok."""

    name: str
    status: Status
    found: str
    fix: str = ""


def report(checks: list[Check], *, as_json: bool = False) -> str:
    """The checks for a person, or as JSON."""
    if as_json:
        return json.dumps([asdict(check) for check in checks], indent=2)
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<7}{check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(" " * (width + 9) + f"-> {check.fix}")
    num_errors = sum(check.status == "error" for check in checks)
    lines.append(f"\n{num_errors} of {len(checks)} checks failed" if num_errors else "\nno errors")
    return "\n".join(lines)
