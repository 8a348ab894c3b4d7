"""One finding of `corral doctor`: what `doctor.py` and `doctor_security.py` both make."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `fix` says what to do where it is not ok."""

    name: str
    status: Status
    found: str
    fix: str = ""
