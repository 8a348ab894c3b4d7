"""Scripted token deltas through the formatters: n answers, log-probabilities and echo as a client sees them."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from tokenizers import Tokenizer

from deployments.api.openai_responses import ChatFormatter, CompletionFormatter, ResponseFormatter, collect, sse_events
from deployments.api.outputs import PromptOutput, TextDelta, interleaved
from deployments.engine.request import Delta, SamplingParams, TokenLogprob
from deployments.errors import EngineFault
from deployments.protocol.generation import StreamOptions
from deployments.replica.request import GenerationRequest
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(embedded_base: BaseCheckpoint) -> Tokenizer:
    return load_tokenizer(embedded_base)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def generation(
    prompt_token_ids: list[int], n: int = 1, *, logprobs: int | None = None, prompt_logprobs: int | None = None
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=99, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    return GenerationRequest("r", prompt_token_ids, sampling, None, n)


def scored(token_id: int, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(token_id, -token_id / 1000, top)


def delta(token_ids: list[int], index: int = 0, **more: Any) -> Delta:
    return Delta(token_ids, index=index, logprobs=tuple(map(scored, token_ids)), **more)


async def grow(
    answers: PromptOutput, batches: Sequence[list[Delta] | Exception]
) -> AsyncGenerator[list[TextDelta], None]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        if pieces := answers.add(batch):
            yield pieces


def stream(
    formatter: ResponseFormatter,
    answers: PromptOutput,
    batches: Sequence[list[Delta] | Exception],
    options: StreamOptions | None = None,
) -> list[str]:
    async def collect() -> list[str]:
        return [
            text async for text in sse_events(formatter, [answers], grow(answers, batches), options or StreamOptions())
        ]

    return asyncio.run(collect())


def parsed(events: Sequence[str]) -> list[Any]:
    lines = "".join(events).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)


@pytest.mark.promise("A1")
def test_a_stop_string_ends_one_of_n_answers_and_the_others_go_on(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    a, b = ids(tokenizer, "one STOP two"), ids(tokenizer, " red blue green")
    answers = PromptOutput(generation([5], n=2, logprobs=0), vocabulary, ["STOP"])
    first = answers.add([delta(a, 0), delta(b[:1], 1)])
    assert [(piece.index, piece.text, piece.finish_reason) for piece in first] == [
        (0, "one ", "stop"),
        (1, " red", None),
    ]
    assert not answers.finished
    assert [piece.index for piece in answers.add([delta(a, 0), delta(b[1:2], 1)])] == [1]
    (last,) = answers.add([delta(b[2:], 1, finish_reason="length")])
    assert (last.index, last.text, last.finish_reason) == (1, " green", "length")
    assert answers.finished
    assert answers.num_tokens < len(a) + len(b)
    sent = b"".join(vocabulary.spelling(token.token_id) for token in first[0].tokens)
    assert sent.startswith(b"one")
    assert b"STOP" not in sent


@pytest.mark.promise("A6")
def test_a_stream_of_two_answers_has_one_role_and_one_finish_reason_each(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    a, b = ids(tokenizer, "alpha beta"), ids(tokenizer, "gamma delta")
    batches = [
        [delta(a[:1], 0, num_cached_tokens=3), delta(b[:1], 1)],
        [delta(a[1:2], 0), delta(a[2:], 0), delta(b[1:], 1, finish_reason="length")],
        [delta([], 0, finish_reason="stop")],
    ]
    formatter = ChatFormatter("chatcmpl-1", "m", vocabulary, with_logprobs=False)
    events = stream(
        formatter, PromptOutput(generation([1, 2, 3, 4], n=2), vocabulary), batches, StreamOptions(include_usage=True)
    )
    assert len(events) == len(batches)  # what is ready together is one write
    chunks = parsed(events)
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        ("chatcmpl-1", "chat.completion.chunk", "m")
    }
    for index, text, reason in ((0, "alpha beta", "stop"), (1, "gamma delta", "length")):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in choice["delta"] for choice in choices[1:])
        assert "".join(choice["delta"].get("content", "") for choice in choices) == text
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [reason]
        assert choices[-1] == {"index": index, "delta": {}, "finish_reason": reason}
    assert sum(choice["delta"].get("content") == "gamma" for chunk in chunks for choice in chunk["choices"]) == 1
    assert chunks[-1]["choices"] == []
    num_tokens = len(a) + len(b)
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": num_tokens,
        "total_tokens": 4 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


@pytest.mark.promise("A1")
def test_streamed_logprobs_are_those_of_the_whole_answer(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    token_ids = ids(tokenizer, "a 👩 b STOP c")
    formatter = ChatFormatter("x", "m", vocabulary, with_logprobs=True)

    def answers() -> PromptOutput:
        return PromptOutput(generation([1], logprobs=2), vocabulary, ["STOP"])

    chunks = parsed(stream(formatter, answers(), [[delta([token_id])] for token_id in token_ids]))
    together = answers()
    response = json.loads(asyncio.run(collect(formatter, [together], grow(together, [[delta(token_ids)]]))))
    (choice,) = response["choices"]
    content = choice["logprobs"]["content"]
    assert content == [
        token
        for chunk in chunks
        for choice in chunk["choices"]
        for token in choice.get("logprobs", {"content": []})["content"]
    ]
    assert choice["message"]["content"] == "a 👩 b "
    assert bytes(byte for token in content for byte in token["bytes"]).decode().strip() == "a 👩 b"
    partial = [token["token"] for token in content if token["token"].startswith("bytes:")]
    assert any("\\xf0" in token for token in partial)
    for token in content:
        if not token["token"].startswith("bytes:"):
            assert token["token"].encode() == bytes(token["bytes"])


def test_top_logprobs_are_listed_likeliest_first(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    cat, dog, cow = (ids(tokenizer, word)[0] for word in (" cat", " dog", " cow"))
    token = TokenLogprob(cow, -5.0, ((cat, -0.1), (dog, float("-inf"))))
    batch = [Delta([cow], "length", logprobs=(token,))]

    def choice(formatter: ResponseFormatter) -> Any:
        answers = PromptOutput(generation([1], logprobs=2), vocabulary, continues_prompt=True)
        return json.loads(asyncio.run(collect(formatter, [answers], grow(answers, [batch]))))["choices"][0]

    (chat,) = choice(ChatFormatter("x", "m", vocabulary, with_logprobs=True))["logprobs"]["content"]
    assert (chat["token"], chat["logprob"], chat["bytes"]) == (" cow", -5.0, list(b" cow"))
    assert [(top["token"], top["logprob"]) for top in chat["top_logprobs"]] == [(" cat", -0.1), (" dog", -9999.0)]
    legacy = choice(CompletionFormatter("x", "m", vocabulary, with_logprobs=True))["logprobs"]
    assert legacy["top_logprobs"] == [{" cat": -0.1, " dog": -9999.0, " cow": -5.0}]


@pytest.mark.promise("A2")
def test_echo_scores_the_prompt_and_every_answer_begins_with_it(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    prompt, more = ids(tokenizer, "the red"), ids(tokenizer, " house is")
    prompt_logprobs = (None, *map(scored, prompt[1:]))
    answers = PromptOutput(
        generation(prompt, n=2, logprobs=0, prompt_logprobs=0),
        vocabulary,
        first_index=4,
        continues_prompt=True,
        echo=True,
    )
    early = [delta(more[:1], 1)]  # answer 1 starts with the output of answer 0
    batches = [early, [delta(more, 0, finish_reason="length", prompt_logprobs=prompt_logprobs)], [delta(more[1:], 1)]]
    batches.append([delta([], 1, finish_reason="length")])
    formatter = CompletionFormatter("x", "m", vocabulary, with_logprobs=True)
    response = json.loads(asyncio.run(collect(formatter, [answers], grow(answers, batches))))
    assert [choice["index"] for choice in response["choices"]] == [4, 5]
    for choice in response["choices"]:
        assert choice["text"] == "the red house is"
        assert choice["logprobs"]["tokens"] == ["the", " red", " house", " is"]
        assert choice["logprobs"]["text_offset"] == [0, 3, 7, 13]
        assert choice["logprobs"]["token_logprobs"] == [None, *(-token_id / 1000 for token_id in (*prompt[1:], *more))]
        assert choice["logprobs"]["top_logprobs"][0] is None
    assert response["usage"]["prompt_tokens"] == len(prompt)
    assert response["usage"]["completion_tokens"] == 2 * len(more)


@pytest.mark.promise("A2")
def test_a_scored_text_is_one_piece_without_new_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    prompt = ids(tokenizer, "é👩!")
    answers = PromptOutput(
        generation(prompt, logprobs=0, prompt_logprobs=0), vocabulary, continues_prompt=True, echo=True
    )
    batch = [Delta([], "length", prompt_logprobs=(None, *map(scored, prompt[1:])))]
    chunks = parsed(stream(CompletionFormatter("x", "m", vocabulary, with_logprobs=True), answers, [batch]))
    ((choice,),) = [chunk["choices"] for chunk in chunks]
    assert (choice["text"], choice["finish_reason"]) == ("é👩!", "length")
    assert len(choice["logprobs"]["tokens"]) == len(prompt)
    assert answers.num_tokens == 0


def test_an_error_before_the_first_batch_is_raised_and_a_later_one_is_an_event(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    formatter = ChatFormatter("x", "m", vocabulary, with_logprobs=False)
    with pytest.raises(EngineFault):
        stream(formatter, PromptOutput(generation([1]), vocabulary), [EngineFault("broke")])
    batches = [[delta(ids(tokenizer, "hi"))], EngineFault("broke")]
    *_, last = parsed(stream(formatter, PromptOutput(generation([1]), vocabulary), batches))
    assert last["error"]["message"] == "broke"
    with pytest.raises(EngineFault):
        PromptOutput(generation([1]), vocabulary).add([Delta([], "error")])


def test_a_closed_stream_closes_what_feeds_it(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    closed = []

    async def endless(answers: PromptOutput) -> AsyncGenerator[list[TextDelta], None]:
        try:
            while True:
                yield answers.add([delta(ids(tokenizer, " la"))])
        finally:
            closed.append(True)

    async def leave() -> None:
        answers = PromptOutput(generation([1]), vocabulary)
        formatter = ChatFormatter("x", "m", vocabulary, with_logprobs=False)
        events = sse_events(formatter, [answers], endless(answers), StreamOptions())
        await anext(events)
        await events.aclose()

    asyncio.run(leave())
    assert closed == [True]


async def counted(length: int, closed: list[int], fails: bool = False) -> AsyncGenerator[list[TextDelta], None]:
    """`length` batches with the index `length`, then an error or the end."""
    try:
        for _ in range(length):
            await asyncio.sleep(0)
            yield [TextDelta(length, "", [])]
        if fails:
            raise EngineFault("broke")
    finally:
        closed.append(length)


def test_streams_of_several_prompts_come_together_and_an_error_or_a_leaving_client_closes_them_all() -> None:
    async def drain(fails: bool, leave_after: int) -> tuple[list[int], list[int]]:
        indices: list[int] = []
        closed: list[int] = []
        lengths = (1, 5, 50)
        streams = [counted(length, closed, fails and length == 5) for length in lengths]
        async with aclosing(interleaved(streams)) as together:
            try:
                async for (piece,) in together:
                    indices.append(piece.index)
                    if len(indices) == leave_after:
                        break
            except EngineFault:
                indices.append(-1)
        return indices, sorted(closed)

    indices, closed = asyncio.run(drain(False, 100))
    assert sorted(indices) == [1] + [5] * 5 + [50] * 50
    assert indices.index(50) < 3  # none waits for another's end
    assert closed == [1, 5, 50]
    indices, closed = asyncio.run(drain(True, 100))
    assert indices[-1] == -1
    assert indices.count(50) < 50
    assert closed == [1, 5, 50]
    _, closed = asyncio.run(drain(False, 6))
    assert closed == [1, 5, 50]


@pytest.mark.promise("A6")
def test_prompts_that_end_together_lose_no_last_piece(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    batches = [[delta(ids(tokenizer, "the end"), finish_reason="length")]]

    async def collect() -> list[str]:
        prompts = [PromptOutput(generation([1]), vocabulary, first_index=i, continues_prompt=True) for i in range(3)]
        formatter = CompletionFormatter("x", "m", vocabulary, with_logprobs=False)
        together = interleaved([grow(prompt, batches) for prompt in prompts])  # all have grown when one is seen
        return [text async for text in sse_events(formatter, prompts, together, StreamOptions())]

    chunks = parsed(asyncio.run(collect()))
    texts = {choice["index"]: choice["text"] for chunk in chunks for choice in chunk["choices"]}
    assert texts == dict.fromkeys(range(3), "the end")
