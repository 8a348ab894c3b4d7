"""A4: /tokenize and /detokenize agree with generation (E1), on every kind of tokenizer."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.api.rendering import RequestRenderer
from deployments.protocol.chat import ChatCompletionRequest
from deployments.protocol.completions import CompletionRequest
from deployments.protocol.tokenize import DetokenizeRequest, TokenizeRequest, TokenizeResponse
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.detect import load_chat_format
from training.chat.messages import Message
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

FIXTURES = Path(__file__).parents[2] / "fixtures"
FORMATS = {"embedded": "chatml", "llama2": "llama-2", "llama3": "llama-3"}
CONTROL_TEXT = "<s> </s> [INST] <<SYS>> <|im_start|> <|eot_id|> <|begin_of_text|>"


@pytest.fixture(scope="module")
def renderers(embedded_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RequestRenderer]:
    """For the embedded model (byte-level BPE), Llama 2 (SentencePiece) and Llama 3 (byte-level BPE with BOS)."""
    by_family = {}
    for family, chat_format in FORMATS.items():
        base = embedded_base
        if family != "embedded":
            folder = tmp_path_factory.mktemp(family)
            content = (FIXTURES / f"{family}_reduced_tokenizer.json").read_text()
            (folder / "tokenizer.json").write_text(content)
            ids = json.loads(content)["model"]["vocab"].values()
            added = (token["id"] for token in json.loads(content)["added_tokens"])
            vocab_size = max(*ids, *added) + 1
            config = json.loads((embedded_base.path / "config.json").read_text()) | {"vocab_size": vocab_size}
            (folder / "config.json").write_text(json.dumps(config))
            base = replace(embedded_base, path=folder)
        tokenizer = load_tokenizer(base)
        by_family[family] = RequestRenderer(
            base, chat_format, tokenizer, Vocabulary(tokenizer), max_model_len=8192, default_system="none"
        )
    return by_family


def tokenize(renderer: RequestRenderer, **fields: Any) -> TokenizeResponse:
    return renderer.tokenize(TokenizeRequest.model_validate(fields), None)


def detokenize(renderer: RequestRenderer, tokens: list[int]) -> str:
    return renderer.detokenize(DetokenizeRequest.model_validate({"tokens": tokens})).prompt


ALPHABET = " aé漢👩\u200d\U0001f3fd\n\t\0<>|[]/sINThibcd"


@pytest.fixture(scope="module")
def known_characters(renderers: dict[str, RequestRenderer]) -> dict[str, str]:
    """The characters of ALPHABET that each vocabulary has; the reduced ones lack some."""
    characters = {}
    for family, renderer in renderers.items():
        characters[family] = ""
        for character in ALPHABET:
            with contextlib.suppress(RequestValidationError):
                tokenize(renderer, prompt=character)
                characters[family] += character
    assert characters["embedded"] == characters["llama3"] == ALPHABET
    assert set(" \n\0[]/hiabc") <= set(characters["llama2"])
    return characters


@pytest.mark.promise("A4")
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=ALPHABET, max_size=60))
def test_a_text_comes_back_as_it_was(
    renderers: dict[str, RequestRenderer], known_characters: dict[str, str], text: str
) -> None:
    for family, renderer in renderers.items():
        part = "".join(character for character in text if character in known_characters[family])
        tokens = tokenize(renderer, prompt=part, add_special_tokens=False).tokens
        assert detokenize(renderer, tokens) == part


@pytest.mark.promise("A4")
def test_special_tokens_of_a_text_are_the_bos_token_or_none(renderers: dict[str, RequestRenderer]) -> None:
    for family, bos in (("embedded", ""), ("llama3", "<|begin_of_text|>")):
        with_bos = tokenize(renderers[family], prompt="hi").tokens
        without = tokenize(renderers[family], prompt="hi", add_special_tokens=False).tokens
        assert with_bos[-len(without) :] == without
        assert detokenize(renderers[family], with_bos) == f"{bos}hi"
    assert detokenize(renderers["llama2"], [1, *tokenize(renderers["llama2"], prompt="hi").tokens, 2]) == "<s>hi</s>"


@pytest.mark.promise("B5")
def test_what_looks_like_a_control_token_stays_text(renderers: dict[str, RequestRenderer]) -> None:
    renderer = renderers["embedded"]
    special = {1, 2}  # <|im_start|>, <|im_end|>
    tokens = tokenize(renderer, prompt=CONTROL_TEXT).tokens
    assert not special & set(tokens)
    assert detokenize(renderer, tokens) == CONTROL_TEXT
    dialog = tokenize(renderer, messages=[{"role": "user", "content": CONTROL_TEXT}]).tokens
    plain = tokenize(renderer, messages=[{"role": "user", "content": "hi"}]).tokens
    assert [t for t in dialog if t in special] == [t for t in plain if t in special]


DIALOGS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
]


@pytest.mark.promise("E1")
@pytest.mark.parametrize("family", FORMATS)
def test_tokenize_gives_the_ids_that_generation_begins_from(renderers: dict[str, RequestRenderer], family: str) -> None:
    renderer = renderers[family]
    for messages in DIALOGS:
        chat = ChatCompletionRequest.model_validate({"model": "m", "messages": messages})
        response = tokenize(renderer, messages=messages)
        assert response.tokens == renderer.chat(chat, None, "r").prompt_token_ids
        assert response.count == len(response.tokens)
        assert response.max_model_len == 8192
    for prompt in ("hi", "a b"):
        (generation,) = renderer.completion(
            CompletionRequest.model_validate({"model": "m", "prompt": prompt}), None, "r"
        )
        assert tokenize(renderer, prompt=prompt).tokens == generation.prompt_token_ids


@pytest.mark.promise("E1")
def test_an_adapters_dialogs_are_in_its_own_format(
    renderers: dict[str, RequestRenderer], tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    draft = AdapterDraft(name="ranch", base=tiny_base, chat_format="chatml")
    adapter = AdapterPublisher(AdapterRegistry(tmp_path / "registry")).register(tiny_adapter, draft, force=True)
    tokenizer = load_tokenizer(tiny_base)
    other = RequestRenderer(tiny_base, "chatml", tokenizer, Vocabulary(tokenizer), 512, default_system="none")
    body = TokenizeRequest.model_validate({"messages": DIALOGS[1]})
    chat = ChatCompletionRequest.model_validate({"model": "m", "messages": DIALOGS[1]})
    assert other.tokenize(body, adapter).tokens == other.chat(chat, adapter, "r").prompt_token_ids


@pytest.mark.promise("F5")
def test_adapter_is_asked_with_its_manifests_system_text_and_the_base_with_the_configured_one(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    tokenizer = load_tokenizer(tiny_base)
    publisher = AdapterPublisher(AdapterRegistry(tmp_path / "registry"))
    body = TokenizeRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}]})
    dialog = [Message("user", "Hi")]
    settings = ("template", "none", "Be brief.")
    prompts = {
        setting: load_chat_format("auto", tiny_base, tokenizer, default_system=setting).render_prompt(dialog)
        for setting in settings
    }
    assert len({*map(tuple, prompts.values())}) == 3
    for setting in settings:
        renderer = RequestRenderer(tiny_base, "auto", tokenizer, Vocabulary(tokenizer), 512, default_system=setting)
        assert renderer.tokenize(body, None).tokens == prompts[setting]
        for trained_with in settings:
            recorded = load_chat_format("auto", tiny_base, tokenizer, default_system=trained_with).default_system
            draft = AdapterDraft(name="ranch", base=tiny_base, chat_format="chatml", default_system=recorded)
            adapter = publisher.register(tiny_adapter, draft, force=True)
            reread = AdapterRegistry(tmp_path / "registry").manifest("ranch", adapter.version)
            assert renderer.tokenize(body, reread).tokens == prompts[trained_with]


@pytest.mark.promise("A4")
def test_token_strs_are_the_vocabularys_names(renderers: dict[str, RequestRenderer]) -> None:
    response = tokenize(renderers["embedded"], prompt="The capital", return_token_strs=True)
    assert response.token_strs == ["The", "Ġcapital"]
    assert tokenize(renderers["embedded"], prompt="The capital").token_strs is None
    assert tokenize(renderers["embedded"], prompt="").tokens == []


@pytest.mark.promise("B1")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "either prompt or messages"),
        ({"prompt": "a", "messages": DIALOGS[0]}, "either prompt or messages"),
        ({"messages": DIALOGS[0], "add_special_tokens": True}, "leave it out"),
        ({"prompt": [1, 2]}, "string"),
        ({"prompt": "a", "chat_template": "x"}, "follows from the model"),
        ({"prompt": "a", "add_special_token": True}, "did you mean 'add_special_tokens'"),
    ],
)
def test_bodies_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TokenizeRequest.model_validate(fields)


@pytest.mark.promise("B2")
def test_ids_outside_the_vocabulary_are_refused(renderers: dict[str, RequestRenderer]) -> None:
    assert detokenize(renderers["embedded"], []) == ""
    assert detokenize(renderers["embedded"], [49151])
    with pytest.raises(RequestValidationError, match="0 to 49151") as exc_info:
        detokenize(renderers["embedded"], [5, 49152])
    assert exc_info.value.errors()[0]["loc"] == ("body", "tokens", "1")
    for tokens in ([-1], [1.5], ["5"], [True]):
        with pytest.raises(ValidationError):
            DetokenizeRequest.model_validate({"tokens": tokens})
