"""Model ids: their four forms, and what else is refused."""

import pytest

from training.errors import RegistryError
from training.names import ModelId, parse_model_id


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("smollm2-135m", ("smollm2-135m", None, None)),
        ("smollm2-135m:ranch-hand", ("smollm2-135m", "ranch-hand", None)),
        ("smollm2-135m:ranch-hand@2", ("smollm2-135m", "ranch-hand", "2")),
        ("llama-2-7b:a.b_c@champion", ("llama-2-7b", "a.b_c", "champion")),
    ],
)
def test_model_id_forms(text: str, parts: tuple[str, str | None, str | None]) -> None:
    assert parse_model_id(text) == ModelId(*parts)
    assert str(parse_model_id(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", ":b", "a:b@", "a:B", "a@2", "a:b@2@3", "a:b:c", "a:../b", "a:b@../c", "a\n", "a:b\n", "a:b c"],
)
def test_other_model_ids_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(RegistryError, match="BASE:ADAPTER@VERSION"):
        parse_model_id(text)
