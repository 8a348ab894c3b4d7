"""The engine against PEFT on the same NF4 weights (E2), and its promises about neighbours and cancellation."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from deployments.engine.engine import Engine
from deployments.engine.request import Delta, EngineRequest, SamplingParams
from training.base_models import BaseModel, Quantization, load_quantized

PROMPTS = [[1, 4093, 198, 1780, 30, 2], list(range(400, 470)), [9] * 3, list(range(1000, 1150))]


class Answers:
    """Collects deltas by request id."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}

    def add(self, engine: Engine, request: EngineRequest) -> None:
        def deliver(delta: Delta) -> None:
            self.tokens.setdefault(request.request_id, []).extend(delta.token_ids)
            self.reasons[request.request_id] = delta.finish_reason

        engine.add_request(request, deliver)


def drain(engine: Engine) -> None:
    while engine.step():
        pass


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(tiny_base: BaseModel, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with different random weights, strong enough to change answers."""
    folders = {}
    for i, name in enumerate(["one", "two"]):
        folder = tmp_path_factory.mktemp(name)
        (folder / "adapter_config.json").write_text((tiny_adapter / "adapter_config.json").read_text())
        generator = torch.Generator().manual_seed(i)
        tensors = load_file(tiny_adapter / "adapter_model.safetensors")
        random = {key: torch.randn(t.shape, generator=generator) * 0.3 for key, t in tensors.items()}
        save_file(random, folder / "adapter_model.safetensors")
        folders[name] = folder
    return folders


def load(engine: Engine, folder: Path, key: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    assert engine.load_adapter(key, engine.lora_weights(load_file(folder / "adapter_model.safetensors"), scaling))


@pytest.fixture(scope="module")
def fp32_base(tiny_base: BaseModel) -> object:
    return load_quantized(tiny_base, Quantization(compute_dtype="float32"))


@pytest.fixture
def engine(fp32_base: object, adapters: dict[str, Path]) -> Engine:
    engine = Engine(fp32_base, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, max_loras=2)  # type: ignore[arg-type]
    for key, folder in adapters.items():
        load(engine, folder, key)
    return engine


@pytest.fixture(scope="module")
def peft_greedy(tiny_base: BaseModel, adapters: dict[str, Path]) -> dict[tuple[int, str | None], list[int]]:
    """Greedy answers of transformers and PEFT, computed without a cache."""
    base = load_quantized(tiny_base, Quantization(compute_dtype="float32"))
    model = PeftModel.from_pretrained(base, adapters["one"], adapter_name="one").eval()
    model.load_adapter(adapters["two"], adapter_name="two")

    def answer(prompt: list[int]) -> list[int]:
        token_ids = list(prompt)
        with torch.inference_mode():
            for _ in range(12):
                token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
        return token_ids[len(prompt) :]

    answers: dict[tuple[int, str | None], list[int]] = {}
    for i, prompt in enumerate(PROMPTS):
        with model.disable_adapter():
            answers[i, None] = answer(prompt)
        for name in adapters:
            model.set_adapter(name)
            answers[i, name] = answer(prompt)
    return answers


@pytest.mark.parametrize("adapter", [None, "one", "two"])
def test_e2_alone_equals_peft(
    engine: Engine, peft_greedy: dict[tuple[int, str | None], list[int]], adapter: str | None
) -> None:
    for i, prompt in enumerate(PROMPTS):  # the last is longer than one step's token budget: chunked
        answers = Answers()
        answers.add(engine, EngineRequest("r", prompt, greedy(), adapter))
        drain(engine)
        assert answers.tokens["r"] == peft_greedy[i, adapter]


def test_e2_mixed_equals_peft(engine: Engine, peft_greedy: dict[tuple[int, str | None], list[int]]) -> None:
    assert len({tuple(peft_greedy[0, adapter]) for adapter in (None, "one", "two")}) == 3  # the adapters matter
    answers = Answers()
    for i, prompt in enumerate(PROMPTS):
        for adapter in (None, "one", "two"):
            answers.add(engine, EngineRequest(f"{i} {adapter}", prompt, greedy(), adapter))
    assert engine.num_waiting == 12
    drain(engine)
    for (i, adapter), expected in peft_greedy.items():
        assert answers.tokens[f"{i} {adapter}"] == expected
        assert answers.reasons[f"{i} {adapter}"] == "length"


def test_e2_teacher_forced_logprobs_equal_peft(engine: Engine, tiny_base: BaseModel, adapters: dict[str, Path]) -> None:
    from deployments.engine.llama import Chunk

    base = load_quantized(tiny_base, Quantization(compute_dtype="float32"))
    reference = PeftModel.from_pretrained(base, adapters["one"]).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPTS[3]])).logits[0].log_softmax(-1)
    slot = engine._adapters.acquire("one")
    pieces = [PROMPTS[3][:40], PROMPTS[3][40:41], PROMPTS[3][41:]]
    got, start = [], 0
    for piece in pieces:
        lora = engine._adapters.batch([slot] * len(piece), torch.device("cpu"))
        hidden = engine._llama.forward([Chunk(0, start, piece)], engine._cache, lora)
        got.append(engine._llama.logits(hidden).log_softmax(-1))
        start += len(piece)
    engine._adapters.release("one")
    assert (torch.cat(got) - expected).abs().max() < 1e-3


def test_a7_same_seed_same_tokens_alone_and_in_a_crowd(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=1.3, top_p=0.9, top_k=50, seed=7, ignore_eos=True)
    alone = Answers()
    alone.add(engine, EngineRequest("r", PROMPTS[0], sampling))
    drain(engine)
    crowd = Answers()
    for i, prompt in enumerate(PROMPTS[1:]):
        crowd.add(engine, EngineRequest(f"other {i}", prompt, greedy(20), "one"))
    crowd.add(engine, EngineRequest("r", PROMPTS[0], sampling))
    drain(engine)
    assert crowd.tokens["r"] == alone.tokens["r"]
    other_seed = Answers()
    other = SamplingParams(max_tokens=10, temperature=1.3, top_p=0.9, top_k=50, seed=8, ignore_eos=True)
    other_seed.add(engine, EngineRequest("r", PROMPTS[0], other))
    drain(engine)
    assert other_seed.tokens["r"] != alone.tokens["r"]


def test_stop_token_ends_the_answer_and_is_not_part_of_it(
    engine: Engine, peft_greedy: dict[tuple[int, str | None], list[int]]
) -> None:
    expected = peft_greedy[0, None]
    stop = expected[4]
    answers = Answers()
    sampling = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,))
    answers.add(engine, EngineRequest("r", PROMPTS[0], sampling))
    drain(engine)
    assert answers.tokens["r"] == expected[: expected.index(stop)]
    assert answers.reasons["r"] == "stop"


def test_d6_cancel_ends_a_request_and_leaves_nothing(engine: Engine) -> None:
    answers = Answers()
    for i in range(6):
        answers.add(engine, EngineRequest(f"r{i}", PROMPTS[0], greedy(200), "one" if i % 2 else None))
    for _ in range(3):
        engine.step()
    counts = {name: len(tokens) for name, tokens in answers.tokens.items()}
    for i in range(6):
        engine.cancel(f"r{i}")
    engine.cancel("never there")
    drain(engine)
    assert {name: len(tokens) for name, tokens in answers.tokens.items()} == counts
    assert (engine.num_running, engine.num_waiting, engine.num_adapter_references) == (0, 0, 0)
    assert len(engine._scheduler._free_rows) == 4


def test_d10_an_adapter_in_use_keeps_its_slot(engine: Engine, adapters: dict[str, Path]) -> None:
    answers = Answers()
    answers.add(engine, EngineRequest("a", PROMPTS[0], greedy(), "one"))
    answers.add(engine, EngineRequest("b", PROMPTS[0], greedy(), "two"))
    weights = engine.lora_weights(load_file(adapters["one"] / "adapter_model.safetensors"), 1.0)
    assert not engine.load_adapter("third", weights)
    assert not engine.unload_adapter("one")
    drain(engine)
    assert engine.load_adapter("third", weights)
    assert engine.loaded_adapters() == ["two", "third"]  # the least recently used one made room
    with pytest.raises(KeyError):
        answers.add(engine, EngineRequest("c", PROMPTS[0], greedy(), "one"))


def test_d9_a_fault_in_a_step_ends_its_requests_and_the_engine_serves_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, peft_greedy: dict[tuple[int, str | None], list[int]]
) -> None:
    answers = Answers()
    answers.add(engine, EngineRequest("r", PROMPTS[0], greedy(), "one"))
    with monkeypatch.context() as patch:
        patch.setattr(engine._llama, "logits", lambda hidden: 1 / 0)
        engine.step()
    assert answers.reasons["r"] == "error"
    assert engine.num_adapter_references == 0
    answers.add(engine, EngineRequest("again", PROMPTS[0], greedy()))
    drain(engine)
    assert answers.tokens["again"] == peft_greedy[0, None]


def test_b3_what_can_never_fit_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ValueError, match="150 tokens and max_tokens 107 do not fit max_model_len 256"):
        engine.add_request(EngineRequest("r", PROMPTS[3], greedy(107)), lambda delta: None)


def test_e2_bf16_is_no_further_from_fp32_than_peft(embedded_base: BaseModel) -> None:
    """The embedded model in bf16 compute: mean distance of log-probabilities from the fp32 reference."""
    from deployments.engine.llama import Chunk

    token_ids = list(range(3000, 3096))
    with torch.inference_mode():
        fp32 = load_quantized(embedded_base, Quantization(compute_dtype="float32"))
        reference = fp32(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        del fp32
        bf16 = load_quantized(embedded_base, Quantization())
        theirs = bf16(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
    engine = Engine(bf16, max_model_len=128, max_num_seqs=1)
    hidden = engine._llama.forward([Chunk(0, 0, token_ids)], engine._cache, None)
    ours = engine._llama.logits(hidden).log_softmax(-1)
    distance, their_distance = (ours - reference).abs().mean(), (theirs - reference).abs().mean()
    assert 0 < distance <= 1.2 * their_distance
    assert (ours.argmax(-1) == reference.argmax(-1)).float().mean() > 0.9
