"""The engine against PEFT on the same NF4 weights (E2), and its guarantees on other requests, faults and cancellation.

Everything runs on the compiled CPU kernels, on torch's operators, and on a GPU where there is one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from deployments.engine.engine import Engine
from deployments.engine.llama import cpu_kernels
from deployments.engine.request import Delta, EngineRequest, SamplingParams, TokenLogprob
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint

PROMPTS = [[1, 4093, 198, 1780, 30, 2], list(range(400, 470)), [9] * 3, list(range(1000, 1150))]
RANKS = {"r4": 4, "r8": 8, "r16": 16, "r64": 64}
ADAPTERS = [None, *RANKS]
NUM_NEW = 12


class Answers:
    """Collects deltas by request id and answer."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.cached: dict[str, int] = {}
        self.prompt_logprobs: dict[str, tuple[TokenLogprob | None, ...]] = {}

    def add(self, engine: Engine, request: EngineRequest) -> None:
        def receive(deltas: list[Delta]) -> None:
            for delta in deltas:
                name = request.request_id + (f"/{delta.index}" if request.n > 1 else "")
                self.tokens.setdefault(name, []).extend(delta.token_ids)
                self.logprobs.setdefault(name, []).extend(delta.logprobs)
                self.cached.setdefault(name, delta.num_cached_tokens)
                self.reasons[name] = delta.finish_reason
                if delta.prompt_logprobs is not None:
                    self.prompt_logprobs[name] = delta.prompt_logprobs

        engine.add_request(request, receive)


def drain(engine: Engine) -> None:
    while engine.step():
        pass


def greedy(max_tokens: int = NUM_NEW) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def answer(engine: Engine, prompt: list[int], sampling: SamplingParams, adapter: str | None = None) -> Answers:
    answers = Answers()
    answers.add(engine, EngineRequest("r", prompt, sampling, adapter))
    drain(engine)
    return answers


@pytest.fixture(scope="module")
def adapters(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different ranks, targets and scalings (one rsLoRA), strong enough to change answers."""
    folders = {}
    config = json.loads((tiny_adapter / "adapter_config.json").read_text())
    tensors = load_file(tiny_adapter / "adapter_model.safetensors")
    for name, r in RANKS.items():
        folder = tmp_path_factory.mktemp(name)
        generator = torch.Generator().manual_seed(r)
        random = {}
        for key, tensor in tensors.items():
            if name == "r8" and not any(f".{target}." in key for target in ("q_proj", "down_proj")):
                continue
            a_or_b = (r, tensor.shape[1]) if "lora_A" in key else (tensor.shape[0], r)
            random[key] = torch.randn(a_or_b, generator=generator) * 0.3
        targets = ["q_proj", "down_proj"] if name == "r8" else config["target_modules"]
        changed = {"r": r, "lora_alpha": 8, "use_rslora": name == "r64", "target_modules": targets}
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
        save_file(random, folder / "adapter_model.safetensors")
        folders[name] = folder
    return folders


def load(engine: Engine, folder: Path, key: str) -> bool:
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return engine.load_adapter(key, engine.lora_weights(load_file(folder / "adapter_model.safetensors"), scaling))


@pytest.fixture(scope="module", params=["kernels", "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which forward runs; `torch` as on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv("CXX", "no-such-compiler")
            cpu_kernels.load_kernels.cache_clear()
        yield request.param
    cpu_kernels.load_kernels.cache_clear()


def new_engine(base: BaseCheckpoint, backend: str, **changes: int) -> Engine:
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_loras": 4} | changes
    return engine_of(base, Quantization(compute_dtype="float32"), backend, **sizes)


def engine_of(base: BaseCheckpoint, quantization: Quantization, backend: str, **sizes: Any) -> Engine:
    model = load_quantized(base, quantization, "cuda" if backend == "cuda" else "cpu")
    engine = Engine(model, **sizes)
    assert type(engine._llama).__name__ == ("CpuLlama" if backend == "kernels" else "TorchLlama")
    return engine


@pytest.fixture(scope="module")
def loaded(tiny_base: BaseCheckpoint, adapters: dict[str, Path], backend: str) -> Engine:
    engine = new_engine(tiny_base, backend)
    for key, folder in adapters.items():
        assert load(engine, folder, key)
    return engine


@pytest.fixture
def engine(loaded: Engine) -> Iterator[Engine]:
    """The engine, and a check that a test leaks nothing (D6)."""
    yield loaded
    drain(loaded)
    assert (loaded.num_running, loaded.num_waiting, loaded.num_adapter_references) == (0, 0, 0)
    assert loaded.num_free_blocks == loaded.num_blocks


@pytest.fixture(scope="module")
def peft_model(tiny_base: BaseCheckpoint, adapters: dict[str, Path]) -> PeftModel:
    base = load_quantized(tiny_base, Quantization(compute_dtype="float32"))
    model = PeftModel.from_pretrained(base, adapters["r4"], adapter_name="r4").eval()
    for name in ("r8", "r16", "r64"):
        model.load_adapter(adapters[name], adapter_name=name)
    return model


def peft_logits(model: PeftModel, token_ids: list[int], adapter: str | None) -> torch.Tensor:
    with torch.inference_mode():
        if adapter is None:
            with model.disable_adapter():
                return model(torch.tensor([token_ids])).logits[0]
        model.set_adapter(adapter)
        return model(torch.tensor([token_ids])).logits[0]


@pytest.fixture(scope="module")
def peft_greedy(peft_model: PeftModel) -> dict[tuple[int, str | None], list[int]]:
    """Greedy answers of transformers and PEFT, computed without a cache."""
    answers: dict[tuple[int, str | None], list[int]] = {}
    for i, prompt in enumerate(PROMPTS):
        for adapter in ADAPTERS:
            token_ids = list(prompt)
            for _ in range(NUM_NEW):
                token_ids.append(int(peft_logits(peft_model, token_ids, adapter)[-1].argmax()))
            answers[i, adapter] = token_ids[len(prompt) :]
    return answers


@pytest.mark.promise("E2")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alone_equals_peft(
    engine: Engine, peft_greedy: dict[tuple[int, str | None], list[int]], adapter: str | None
) -> None:
    for i, prompt in enumerate(PROMPTS):  # the last is longer than one step's token budget: chunked
        assert answer(engine, prompt, greedy(), adapter).tokens["r"] == peft_greedy[i, adapter]


@pytest.mark.promise("E2")
def test_mixed_and_prefix_reused_equals_peft(
    engine: Engine, peft_greedy: dict[tuple[int, str | None], list[int]]
) -> None:
    assert len({tuple(peft_greedy[0, adapter]) for adapter in ADAPTERS}) == len(ADAPTERS)  # the adapters matter
    for _ in range(2):  # the second time, prompts are in the prefix cache
        answers = Answers()
        for i, prompt in enumerate(PROMPTS):
            for adapter in ADAPTERS:
                answers.add(engine, EngineRequest(f"{i} {adapter}", prompt, greedy(), adapter))
        assert engine.num_waiting == 20
        drain(engine)
        for (i, adapter), expected in peft_greedy.items():
            assert answers.tokens[f"{i} {adapter}"] == expected
            assert answers.reasons[f"{i} {adapter}"] == "length"
    assert answers.cached["3 r16"] == 144  # all full blocks before the last of 150 tokens


@pytest.mark.promise("E2")
def test_preempted_equals_peft(
    tiny_base: BaseCheckpoint,
    adapters: dict[str, Path],
    backend: str,
    peft_greedy: dict[tuple[int, str | None], list[int]],
) -> None:
    """A cache for one sequence of the full length: five long ones preempt each other, and none loses a token."""
    engine = new_engine(tiny_base, backend, kv_cache_bytes=1)
    assert load(engine, adapters["r16"], "r16")
    answers = Answers()
    for n in range(6):
        adapter = "r16" if n % 2 else None
        answers.add(engine, EngineRequest(str(n), PROMPTS[1], greedy(), adapter))
    longest = 0
    while engine.step():
        longest = max(longest, engine.num_running)
    assert longest > 1
    for n in range(6):
        assert answers.tokens[str(n)] == peft_greedy[1, "r16" if n % 2 else None]


@pytest.mark.promise("E2")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_teacher_forced_logprobs_equal_peft(engine: Engine, peft_model: PeftModel, adapter: str | None) -> None:
    prompt = PROMPTS[3]
    expected = peft_logits(peft_model, prompt, adapter).log_softmax(-1)
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=3)
    answers = answer(engine, prompt, sampling, adapter)
    first, *rest = answers.prompt_logprobs["r"]
    assert first is None
    assert answers.tokens["r"] == []
    for i, entry in enumerate(rest):
        assert entry is not None
        assert entry.token_id == prompt[i + 1]
        assert abs(entry.logprob - float(expected[i, prompt[i + 1]])) < 1e-3
        top = expected[i].topk(3)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert max(abs(a - b) for (_, a), b in zip(entry.top, top.values.tolist(), strict=True)) < 1e-3


@pytest.mark.promise("A7")
def test_same_seed_same_tokens_alone_and_in_a_batch(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=1.3, top_p=0.9, top_k=50, seed=7, ignore_eos=True, logprobs=2)
    expected = answer(engine, PROMPTS[0], sampling)
    batched = Answers()
    for i, prompt in enumerate(PROMPTS[1:]):
        odd = SamplingParams(max_tokens=20, temperature=2, min_p=0.1, frequency_penalty=2, logit_bias=((5, 90.0),))
        batched.add(engine, EngineRequest(f"other {i}", prompt, odd, "r4"))
    batched.add(engine, EngineRequest("r", PROMPTS[0], sampling))
    drain(engine)
    assert batched.tokens["r"] == expected.tokens["r"]
    if type(engine._llama).__name__ == "CpuLlama":  # bit for bit
        assert batched.logprobs["r"] == expected.logprobs["r"]
    other_seed = SamplingParams(max_tokens=10, temperature=1.3, top_p=0.9, top_k=50, seed=8, ignore_eos=True)
    assert answer(engine, PROMPTS[0], other_seed).tokens["r"] != expected.tokens["r"]


def test_n_answers_share_the_prompt_and_draw_from_their_own_streams(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=3, ignore_eos=True)
    prompt = list(range(700, 770))  # not in the prefix cache
    answers = Answers()
    answers.add(engine, EngineRequest("r", prompt, sampling, "r16", n=3))
    drain(engine)
    assert answers.cached == {"r/0": 0, "r/1": 64, "r/2": 64}
    for i in range(3):
        params = SamplingParams(max_tokens=8, temperature=1.5, seed=3 + i, ignore_eos=True)
        assert answer(engine, prompt, params, "r16").tokens["r"] == answers.tokens[f"r/{i}"]


def test_logprobs_of_the_answer_are_the_models_own(engine: Engine, peft_model: PeftModel) -> None:
    sampling = SamplingParams(max_tokens=5, temperature=1.7, seed=1, ignore_eos=True, logprobs=2, presence_penalty=1.0)
    answers = answer(engine, PROMPTS[0], sampling, "r4")
    expected = peft_logits(peft_model, PROMPTS[0] + answers.tokens["r"], "r4").log_softmax(-1)
    for i, entry in enumerate(answers.logprobs["r"]):
        row = expected[len(PROMPTS[0]) - 1 + i]
        assert entry.token_id == answers.tokens["r"][i]
        assert abs(entry.logprob - float(row[entry.token_id])) < 1e-3
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_stop_token_ends_the_answer_and_is_not_part_of_it(
    engine: Engine, peft_greedy: dict[tuple[int, str | None], list[int]]
) -> None:
    expected = peft_greedy[0, None]
    stop = expected[4]
    answers = answer(engine, PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,)))
    assert answers.tokens["r"] == expected[: expected.index(stop)]
    assert answers.reasons["r"] == "stop"
    longer = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,), min_tokens=9)
    assert stop not in answer(engine, PROMPTS[0], longer).tokens["r"][:9]


def test_a_long_prompt_joins_at_once_and_running_answers_get_a_token_every_step(engine: Engine) -> None:
    answers = Answers()
    answers.add(engine, EngineRequest("short", PROMPTS[0], greedy(30)))
    engine.step()
    answers.add(engine, EngineRequest("long", list(range(2000, 2200)), greedy(2)))
    for n in range(2, 6):  # 200 tokens in steps of at most 64
        assert 1 < engine.step() <= 64
        assert len(answers.tokens["short"]) == n
    assert len(answers.tokens["long"]) == 1


@pytest.mark.promise("D6")
def test_cancel_ends_a_request_and_leaves_nothing(engine: Engine) -> None:
    answers = Answers()
    for i in range(12):
        answers.add(engine, EngineRequest(f"r{i}", PROMPTS[0], greedy(200), "r4" if i % 2 else None, n=1 + i % 2))
    for _ in range(3):
        engine.step()
    counts = {name: len(tokens) for name, tokens in answers.tokens.items()}
    for i in range(12):
        engine.cancel(f"r{i}")
    engine.cancel("never there")
    assert engine.step() == 0
    assert {name: len(tokens) for name, tokens in answers.tokens.items()} == counts


@pytest.mark.promise("D10")
def test_an_adapter_in_use_keeps_its_slot(engine: Engine, adapters: dict[str, Path]) -> None:
    answers = Answers()
    for name in RANKS:
        answers.add(engine, EngineRequest(name, PROMPTS[0], greedy(), name))
    assert not load(engine, adapters["r4"], "fifth")
    assert not engine.unload_adapter("r4")
    drain(engine)
    assert load(engine, adapters["r4"], "fifth")
    assert engine.loaded_adapters() == ["r8", "r16", "r64", "fifth"]  # the least recently used one was evicted
    with pytest.raises(KeyError):
        answers.add(engine, EngineRequest("c", PROMPTS[0], greedy(), "r4"))
    assert load(engine, adapters["r4"], "r4")
    engine.unload_adapter("fifth")
    assert load(engine, adapters["r8"], "r8")


@pytest.mark.promise("D10")
def test_the_same_prompt_never_gets_another_adapters_keys_and_values(
    engine: Engine, peft_greedy: dict[tuple[int, str | None], list[int]]
) -> None:
    for adapter in ["r16", None, "r64", "r16"]:
        answers = answer(engine, PROMPTS[3], greedy(), adapter)
        assert answers.tokens["r"] == peft_greedy[3, adapter]


@pytest.mark.promise("D11")
def test_more_adapters_than_slots_give_what_each_gives_alone(
    tiny_base: BaseCheckpoint,
    adapters: dict[str, Path],
    backend: str,
    peft_greedy: dict[tuple[int, str | None], list[int]],
) -> None:
    engine = new_engine(tiny_base, backend, max_loras=2)
    answers = Answers()
    waiting = [(i, name) for i in range(len(PROMPTS)) for name in RANKS]
    while waiting:
        for i, name in list(waiting):
            if load(engine, adapters[name], name):
                answers.add(engine, EngineRequest(f"{i} {name}", PROMPTS[i], greedy(), name))
                waiting.remove((i, name))
        engine.step()
    drain(engine)
    for i in range(len(PROMPTS)):
        for name in RANKS:
            assert answers.tokens[f"{i} {name}"] == peft_greedy[i, name]
    assert len(engine.loaded_adapters()) == 2


@pytest.mark.promise("D9")
def test_nan_from_an_adapter_ends_its_own_request_only(
    engine: Engine, adapters: dict[str, Path], peft_greedy: dict[tuple[int, str | None], list[int]]
) -> None:
    tensors = load_file(adapters["r4"] / "adapter_model.safetensors")
    broken = {key: torch.full_like(tensor, 1e38) for key, tensor in tensors.items()}  # finite, and overflows
    engine.unload_adapter("r8")
    assert engine.load_adapter("broken", engine.lora_weights(broken, 1.0))
    answers = Answers()
    answers.add(engine, EngineRequest("bad", PROMPTS[0], greedy(), "broken"))
    for adapter in (None, "r4"):
        answers.add(engine, EngineRequest(str(adapter), PROMPTS[0], greedy(), adapter))
    drain(engine)
    assert answers.reasons["bad"] == "error"
    assert engine.unhealthy_adapters == {"broken"}
    for adapter in (None, "r4"):
        assert answers.tokens[str(adapter)] == peft_greedy[0, adapter]
    engine.unload_adapter("broken")
    engine.unhealthy_adapters.clear()
    assert load(engine, adapters["r8"], "r8")


@pytest.mark.promise("D9")
def test_a_fault_in_a_step_ends_its_requests_and_the_engine_serves_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, peft_greedy: dict[tuple[int, str | None], list[int]]
) -> None:
    answers = Answers()
    answers.add(engine, EngineRequest("r", PROMPTS[0], greedy(), "r4"))
    with monkeypatch.context() as patch:
        patch.setattr(engine._llama, "logits", lambda hidden: 1 / 0)
        engine.step()
    assert answers.reasons["r"] == "error"
    assert engine.num_adapter_references == 0
    assert answer(engine, PROMPTS[0], greedy()).tokens["r"] == peft_greedy[0, None]


@pytest.mark.promise("B3")
def test_what_can_never_fit_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ValueError, match="150 tokens and max_tokens 107 do not fit max_model_len 256"):
        engine.add_request(EngineRequest("r", PROMPTS[3], greedy(107)), lambda deltas: None)


@pytest.mark.promise("E2")
def test_bf16_is_no_further_from_fp32_than_peft(embedded_base: BaseCheckpoint, backend: str) -> None:
    """The embedded model in bf16 compute: mean distance of log-probabilities from the fp32 reference."""
    token_ids = list(range(3000, 3096))
    with torch.inference_mode():
        fp32 = load_quantized(embedded_base, Quantization(compute_dtype="float32"))
        reference = fp32(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        del fp32
        bf16 = load_quantized(embedded_base, Quantization(compute_dtype="bfloat16"))
        theirs = bf16(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
    del bf16  # bitsandbytes has repacked it
    sizes = {"max_model_len": 128, "max_num_seqs": 1}
    engine = engine_of(embedded_base, Quantization(compute_dtype="bfloat16"), backend, **sizes)
    answers = answer(engine, token_ids, SamplingParams(max_tokens=0, prompt_logprobs=20))
    ours = answers.prompt_logprobs["r"][1:]
    distances, their_distances, agreed = [], [], 0
    for i, entry in enumerate(ours):
        assert entry is not None
        tokens = [token for token, _ in entry.top]
        expected = reference[i, tokens]
        distances.append((torch.tensor([logprob for _, logprob in entry.top]) - expected).abs().mean())
        their_distances.append((theirs[i, tokens] - expected).abs().mean())
        agreed += tokens[0] == int(reference[i].argmax())
    assert 0 < torch.stack(distances).mean() <= 1.2 * torch.stack(their_distances).mean()
    assert agreed / len(ours) > 0.9


@pytest.mark.promise("A4")
def test_stats_tell_what_runs_and_what_was_cached(engine: Engine) -> None:
    before = engine.stats()
    assert (before.num_running, before.num_waiting, before.kv_cache_usage) == (0, 0, 0.0)
    assert before.num_loaded_adapters == len(RANKS)
    prompt = [7] * 100
    answers = Answers()
    answers.add(engine, EngineRequest("first", prompt, greedy(), None))
    assert engine.stats().num_waiting == 1
    engine.step()
    during = engine.stats()
    assert (during.num_running, during.num_waiting) == (1, 0)
    assert 0 < during.kv_cache_usage < 1
    drain(engine)
    answers.add(engine, EngineRequest("second", prompt, greedy(), None))
    drain(engine)
    after = engine.stats()
    assert after.prefix_cache_queries - before.prefix_cache_queries == 2 * len(prompt)
    assert after.prefix_cache_hits - before.prefix_cache_hits == answers.cached["second"] > 50
    assert after.kv_cache_usage == 0.0
