"""What is sent, and when: arrivals, prompts and shared prefixes."""

import statistics
from dataclasses import replace
from itertools import islice, pairwise

import pytest

from clients.bench.results import Settings
from clients.bench.workloads import arrivals, conversations, loads, warm_up

SETTINGS = Settings(
    url="http://127.0.0.1:1",
    models=("a", "b"),
    workload="chat",
    concurrency=(2,),
    rates=(),
    num_requests=None,
    max_tokens=4,
    prompt_tokens=(),
    prefix_tokens=None,
    num_prefixes=None,
    turns=1,
    temperature=0.0,
    ignore_eos=True,
    seed=7,
    label="",
)


def test_poisson_arrivals_are_reproducible_and_keep_their_rate() -> None:
    first = list(islice(arrivals(20.0, seed=1), 2000))
    assert first == list(islice(arrivals(20.0, seed=1), 2000))
    assert first[:5] != list(islice(arrivals(20.0, seed=2), 5))
    gaps = [after - before for before, after in pairwise(first)]
    assert first[0] == 0.0
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)  # exponential: as large as the mean


def test_the_same_seed_gives_the_same_prompts_and_no_two_share_a_prefix() -> None:
    settings = replace(SETTINGS, workload="prompt-length", prompt_tokens=(50, 100), concurrency=(1, 8))
    prompts = [
        conversation.questions[0]
        for load in loads(settings)
        for conversation in (warm_up(settings, load), *conversations(settings, load))
    ]
    assert len(prompts) == 2 * (1 + 2 + 1 + 16)
    assert {len(prompt.split()) // 10 for prompt in prompts} == {5, 10}
    assert len({" ".join(prompt.split()[:4]) for prompt in prompts}) == len(prompts)
    relabelled = replace(settings, label="again")
    assert conversations(relabelled, loads(relabelled)[0]) == conversations(settings, loads(settings)[0])
    other = replace(settings, seed=8)
    assert conversations(other, loads(other)[0]) != conversations(settings, loads(settings)[0])


def test_prefixes_are_shared_by_as_many_conversations_as_asked() -> None:
    settings = replace(SETTINGS, workload="shared-prefix", prefix_tokens=30, turns=3, concurrency=(4,))
    [load] = loads(settings)
    conversation_list = conversations(settings, load)
    assert [len(conversation.questions) for conversation in conversation_list] == [3] * 4
    assert len({conversation.system for conversation in conversation_list}) == 4
    shared = replace(settings, num_prefixes=1)
    assert len({conversation.system for conversation in conversations(shared, load)}) == 1
    assert warm_up(shared, load).system not in {conversation.system for conversation in conversations(shared, load)}
