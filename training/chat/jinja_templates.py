"""Our chat formats as jinja templates, for an exported model that other software serves.

The base's own template may be another (it may add a system prompt that the adapter never saw) or be missing. Corral
itself runs none of these: `training.chat.chat_format` renders there. They give the same tokens, with two exceptions
that a text cannot express: other software parses control tokens inside a message, and joins white space that a chatml
answer begins with to the line break before it.
"""

from training.chat.templates import ChatFormatName

CHAT_TEMPLATES: dict[ChatFormatName, str] = {
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "llama-3": (
        "{{ '<|begin_of_text|>' }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


def chat_template(name: ChatFormatName, bos_token: str | None = None) -> str:
    """The template of a format; `bos_token` begins every chatml text where the base asks for it."""
    return (bos_token or "") + CHAT_TEMPLATES[name] if name == "chatml" else CHAT_TEMPLATES[name]
