"""What every client of this folder is asked, and the one JSON object that it prints: an answer for each scenario.

These programs know nothing of Corral: they run in an environment of their own, whose packages Corral could not have.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "What is the capital of France?"
SECOND_QUESTION = "And of Italy?"
TOOL_QUESTION = "How warm is it in Paris?"
TEMPERATURE = "18 degrees"

# Closed sets of values: any model finishes them within few tokens.
CityName = Literal["Paris", "Rome"]


class City(BaseModel):
    """A city, and whether it is a capital."""

    name: CityName
    is_capital: bool


def report(scenarios: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Run each scenario, whatever became of those before it."""
    answers: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        try:
            answers[name] = scenario()
        except Exception:
            answers[name] = {"error": traceback.format_exc(limit=-3)}
    json.dump(answers, sys.stdout)
