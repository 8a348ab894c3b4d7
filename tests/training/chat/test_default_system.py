"""Prompts equal those of the base's own chat template, its default system text included, which is never run (F5)."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.training.chat.test_chat_format import FIXTURES
from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.resolve import BaseCheckpoint, resolve_base_model
from training.chat.chat_format import ChatFormat
from training.chat.default_system import ChatSettings, DefaultSystem, default_system_in
from training.chat.detect import configured_default_system, default_system_setting, load_chat_format
from training.chat.messages import Message, Role
from training.errors import ChatFormatError

TEMPLATES = FIXTURES / "chat_templates"
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Escapes in the literal, parts that are joined, and the condition the other way around.
ESCAPES = (
    "{% if not (messages[0].role == 'system') %}"
    r"""{{ "<|im_start|>system\n" ~ 'It\'s \\boxed{}' + " — \u00e9<|im_end|>\n" }}"""
    """{% endif %}{% for message in messages %}{{- '<|im_start|>' + message.role }}
{{ message.content + '<|im_end|>' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

FAMILIES: dict[str, tuple[str, str | None, DefaultSystem | None]] = {
    "smollm2": ("chatml", None, DefaultSystem(SMOLLM2)),
    "qwen2": ("chatml", QWEN2, DefaultSystem("You are a helpful assistant.")),
    "qwen2.5": (
        "chatml",
        (TEMPLATES / "qwen2.5.jinja").read_text(),
        DefaultSystem("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ),
    "escapes": ("chatml", ESCAPES, DefaultSystem("It's \\boxed{} — é")),
    "llama-3": ("llama-3", LLAMA_3, None),
    "llama-3.1": ("llama-3", (TEMPLATES / "llama3.1.jinja").read_text(), DefaultSystem("", DATES)),
    "llama-3.2": ("llama-3", (TEMPLATES / "llama3.2.jinja").read_text(), DefaultSystem("", DATES)),
}


def base_of(folder: Path, name: str, template: str | None) -> BaseCheckpoint:
    """A base without weights: a tokenizer and its template; None: the embedded model's."""
    folder.mkdir()
    embedded = resolve_base_model(EMBEDDED_MODEL).path
    tokenizer = embedded / "tokenizer.json" if name == "chatml" else FIXTURES / "llama3_reduced_tokenizer.json"
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<|begin_of_text|>"} if name == "llama-3" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = (embedded / "chat_template.jinja").read_text() if template is None else template
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return BaseCheckpoint(folder.name, str(folder), folder, None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseCheckpoint]:
    root = tmp_path_factory.mktemp("bases")
    return {family: base_of(root / family, name, template) for family, (name, template, _) in FAMILIES.items()}


@pytest.mark.promise("F5")
@pytest.mark.parametrize("family", FAMILIES)
def test_default_is_read_from_the_template(bases: dict[str, BaseCheckpoint], family: str) -> None:
    name, _, expected = FAMILIES[family]
    assert configured_default_system("template", name, bases[family]) == expected
    assert configured_default_system("none", name, bases[family]) is None
    prefix = expected.prefix if expected else ""
    assert configured_default_system("Be brief.", name, bases[family]) == DefaultSystem("Be brief.", prefix)


# Ordinary text: what looks like a control token is one for transformers. An answer's leading space is another token.
texts = st.text("abc DE.,?!\n'é", max_size=12)
turns = st.one_of(
    st.tuples(st.just("user"), texts.filter(str.strip)),
    st.tuples(st.just("assistant"), texts.map(str.strip)),
    st.tuples(st.just("system"), texts),
)


@pytest.mark.promise("F5")
@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dialog=st.lists(turns, min_size=1, max_size=5))
def test_prompt_is_that_of_the_bases_own_template(
    bases: dict[str, BaseCheckpoint],
    loaded: dict[str, tuple[ChatFormat, object]],
    family: str,
    dialog: list[tuple[Role, str]],
) -> None:
    chat_format, tokenizer = loaded[family]
    messages = [{"role": role, "content": content} for role, content in dialog]
    expected = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    assert chat_format.render_prompt([Message(role, content) for role, content in dialog]) == expected


@pytest.fixture(scope="module")
def loaded(bases: dict[str, BaseCheckpoint]) -> dict[str, tuple[ChatFormat, object]]:
    return {
        family: (load_chat_format("auto", base, default_system="template"), AutoTokenizer.from_pretrained(base.path))
        for family, base in bases.items()
    }


@pytest.mark.promise("F5")
@pytest.mark.parametrize("family", FAMILIES)
def test_default_carries_no_loss_and_training_begins_with_the_prompt(
    loaded: dict[str, tuple[ChatFormat, object]], family: str
) -> None:
    question, answer = Message("user", "a"), Message("assistant", "b")
    rendered = loaded[family][0].render_training([question, answer])
    prompt = loaded[family][0].render_prompt([question])
    assert rendered.input_ids[: len(prompt)] == prompt
    assert not any(rendered.loss_mask[: len(prompt)])


BEGIN, END = "<|im_start|>system\\n", "<|im_end|>\\n"
LOOP = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
)


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    "template",
    [
        "",
        LOOP,
        f"{{{{ '{BEGIN}Always there.{END}' }}}}" + LOOP,
        f"{{% if add_default is defined %}}{{{{ '{BEGIN}Maybe.{END}' }}}}{{% endif %}}" + LOOP,
        f"{{% if messages[0].role == 'system' %}}{{{{ '{BEGIN}Instead.{END}' }}}}{{% endif %}}" + LOOP,
        "{% if x %}" + QWEN2 + "{% endif %}",
        QWEN2.replace("loop.first and ", ""),
        QWEN2 + QWEN2.replace("helpful", "another"),
        QWEN2.replace("a helpful assistant", "' + name + '"),
        QWEN2.replace("You are a helpful assistant.", ""),
        QWEN2.replace("{% endif %}", ""),
        "{% endif %}" + LOOP,
        "{{ 'unfinished",
        " " * 70_000 + QWEN2,
    ],
)
def test_what_cannot_be_read_for_certain_adds_nothing(template: str) -> None:
    assert default_system_in(template, "chatml") is None


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"26 Jul 2024"', 'strftime_now("%d %b %Y")'),
        ('{%- set system_message = "" %}', "{%- set system_message = fallback %}"),
        ("{{- system_message }}", "{{- system_message }}\n{{- footer }}"),
        ('{{- "Cutting', "{%- if knows_dates %}{{- '' }}{%- endif %}{{- \"Cutting"),
        ("messages[0]['content']|trim", "messages[0]['content']|upper"),
    ],
)
def test_dates_that_depend_on_more_are_not_added(old: str, new: str) -> None:
    template = (TEMPLATES / "llama3.1.jinja").read_text()
    assert old in template
    assert default_system_in(template.replace(old, new), "llama-3") is None


@settings(deadline=None, max_examples=200)
@given(data=st.data(), family=st.sampled_from(["qwen2", "llama-3.2"]))
def test_no_template_is_an_error(data: st.DataObject, family: str) -> None:
    name, template, _ = FAMILIES[family]
    assert template is not None
    start, end = sorted((data.draw(st.integers(0, len(template))), data.draw(st.integers(0, len(template)))))
    noise = data.draw(st.text("{}%#'\"\\+=-[] \nifesx", max_size=6))
    default_system_in(template[:start] + noise + template[end:], name)


def test_default_of_several_templates_is_read(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "chatml", "")
    (base.path / "chat_template.jinja").unlink()
    several = [{"name": "tool_use", "template": LOOP}, {"name": "default", "template": QWEN2}]
    (base.path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert configured_default_system("template", "chatml", base) == DefaultSystem("You are a helpful assistant.")
    assert load_chat_format("auto", base).name == "chatml"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", ["none", "template", "Be brief."])
def test_setting_is_found_again_from_what_is_recorded(
    bases: dict[str, BaseCheckpoint], family: str, setting: str
) -> None:
    name = FAMILIES[family][0]
    recorded = configured_default_system(setting, name, bases[family])
    again = default_system_setting(recorded, name, bases[family])
    assert again is not None
    assert configured_default_system(again, name, bases[family]) == recorded
    assert default_system_setting(DefaultSystem("", "other dates"), name, bases[family]) is None


def test_text_that_the_model_has_no_token_for_is_refused(bases: dict[str, BaseCheckpoint]) -> None:
    with pytest.raises(ChatFormatError, match=r"^chat\.default_system contains the character U\+50000"):
        load_chat_format("auto", bases["smollm2"], default_system="\U00050000")


@pytest.mark.parametrize("value", ["", "  ", None, 1, "\ud800"])
def test_setting_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="default_system"):
        ChatSettings.model_validate({"default_system": value})
