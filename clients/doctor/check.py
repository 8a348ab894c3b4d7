"""One finding of `corral doctor`: what `doctor.py` and `doctor_security.py` both make."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "note", "error"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `fix` says what to do where it is not ok."""

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
    broken = sum(check.status == "error" for check in checks)
    lines.append(f"\n{broken} of {len(checks)} checks found something broken" if broken else "\nnothing is broken")
    return "\n".join(lines)
