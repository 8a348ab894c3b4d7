"""The workloads of a benchmark: the conversations of each level, and their arrival times in an open loop.

Pure: the same settings give the same prompts and arrivals. No two levels or warm-ups share a prompt that a server could
have in its prefix cache, except in `chat`, whose questions are too short for that to matter.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from clients.bench.results import Load, Settings

QUESTIONS = (
    "What can I cook tonight with rice, two eggs and half an onion?",
    "Write a short note to my neighbour: their dog barks while they are at work.",
    "Explain in simple words how a vaccine works.",
    "Which is the better first bike for a ten-year-old, and why: three gears or eight?",
    "My tomato plants have yellow leaves at the bottom. What should I look at first?",
    "Give me a plan for learning the guitar with twenty minutes a day.",
    "Translate into French: the train leaves at noon from platform four.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that counts the vowels in a word.",
    "Tell a bedtime story about a lighthouse that is afraid of the dark.",
    "How do I remove a coffee stain from a wool carpet?",
    "List five things to check before I buy a used car.",
    "Why do we see the same side of the moon every night?",
    "Help me decline a wedding invitation politely.",
    "How much paint do I need for a room of four by five metres?",
    "Summarize what happened in the first week of the French Revolution.",
)
_FOLLOW_UPS = (
    "Thank you. What would you do first?",
    "Can you give me an example?",
    "Why is that so?",
    "Say that again, but shorter.",
)
# One token each in the usual vocabularies.
_WORDS = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work number night point home water room mother area money
    story fact month lot right study book eye job word business issue side kind head house service friend father
    power hour game line end member law car city name team minute idea body back parent face level office door
    health person art war history party result change morning reason research girl guy moment air teacher force
"""
_OPEN_LOOP_S = 10
_MIN_ARRIVALS = 8


@dataclass(frozen=True, slots=True)
class Conversation:
    """Questions that one user asks a model one after another, each sent with the dialog before it."""

    model: str
    system: str | None
    questions: tuple[str, ...]
    seed: int


def loads(settings: Settings) -> list[Load]:
    """The levels, in the order in which they run."""
    sizes = settings.prompt_tokens or (None,)
    closed = [Load(streams, None, size) for size, streams in itertools.product(sizes, settings.concurrency)]
    return closed + [Load(None, rate, size) for size, rate in itertools.product(sizes, settings.rates)]


def conversations(settings: Settings, load: Load) -> list[Conversation]:
    """The conversations of one level, with the models in turn."""
    return [_conversation(settings, load, index) for index in range(_num_conversations(settings, load))]


def warm_up(settings: Settings, load: Load) -> Conversation:
    """The conversation before a level, which is not measured: one request."""
    return _conversation(settings, load, -1, turns=1)


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Start times of conversations, in seconds since the level began: an endless Poisson process that starts at 0."""
    rng = random.Random(f"{seed}/arrivals")
    arrival_s = 0.0
    while True:
        yield arrival_s
        arrival_s += rng.expovariate(rate)


def _num_conversations(settings: Settings, load: Load) -> int:
    num_requests = settings.num_requests
    if num_requests is None and load.rate is not None:
        num_requests = max(_MIN_ARRIVALS, math.ceil(load.rate * _OPEN_LOOP_S)) * settings.turns
    elif num_requests is None:
        num_requests = max(2, settings.turns) * (load.concurrency or 1)
    return math.ceil(num_requests / settings.turns)


def _conversation(settings: Settings, load: Load, index: int, turns: int | None = None) -> Conversation:
    """The conversation of an index; negative indices have prompts of their own, too."""
    system, question = None, QUESTIONS[index % len(QUESTIONS)]
    if load.prompt_tokens is not None:
        question = f"{_words(load.prompt_tokens, settings, load, index)}. What is this about?"
    if settings.prefix_tokens is not None:
        prefix = index if settings.num_prefixes is None or index < 0 else index % settings.num_prefixes
        system = f"{_words(settings.prefix_tokens, settings, load, prefix)}. Answer briefly."
    follow_ups = itertools.islice(itertools.cycle(_FOLLOW_UPS), (turns or settings.turns) - 1)
    model = settings.models[index % len(settings.models)]
    return Conversation(model, system, (question, *follow_ups), settings.seed + max(index, 0))


def _words(count: int, settings: Settings, load: Load, index: int) -> str:
    return " ".join(random.Random(f"{settings.seed}/{load}/{index}").choices(_WORDS.split(), k=count))
