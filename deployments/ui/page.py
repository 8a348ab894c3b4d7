"""Layout of the chat page, and the wiring of its events to `Conversations`."""

from typing import Any

import gradio as gr

from deployments.ui.conversations import PLACEHOLDER, Backend, Conversations
from deployments.ui.sessions import Sessions

_EXAMPLES = [
    ("Say hello", "Hello! How are you doing today?"),
    ("What is Python?", "Explain briefly what the Python programming language is."),
    ("A story in one sentence", "Tell me the story of Cinderella in one sentence."),
    ("A helicopter and a human", "How long does it take a human to eat a helicopter?"),
    ("Write an article", "Write a short article about the benefits of open source in artificial intelligence."),
]
_LATEX: list[dict[str, str | bool]] = [  # no single dollar, which is money more often
    {"left": "$$", "right": "$$", "display": True},
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]
_MAX_CONCURRENT_COMPLETIONS = 256
_MAX_WAITING = 512
_QUEUE_POLL_S = 0.02  # seconds; Gradio's default of 1 ms takes 5 % of a core while idle

HEAD = (
    '<link rel="icon" href="data:image/svg+xml,<svg xmlns=%22http://www.w3.org/2000/svg%22 viewBox=%220 0 16 16%22>'
    '<circle cx=%228%22 cy=%228%22 r=%225.5%22 fill=%22none%22 stroke=%22%23f97316%22 stroke-width=%223%22/></svg>">'
)
CSS = """
main.fillable { padding: 16px 24px !important; max-width: 1400px !important; }
#head { align-items: center; flex-wrap: nowrap; flex-grow: 0; }
#title h1 { font-size: 1.3rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
#title p { margin: 0; color: var(--body-text-color-subdued); font-size: .875rem; }
#clear { height: 34px; }
#account form { display: flex; justify-content: flex-end; align-items: center; gap: 10px; font-size: .875rem; }
#account span { color: var(--body-text-color-subdued); overflow: hidden; text-overflow: ellipsis; max-width: 12rem; }
#account button { text-decoration: underline; white-space: nowrap; }
#columns { gap: 20px; }
#chat { height: calc(100dvh - 178px) !important; min-height: 320px; border-radius: 14px; }
#chat, #message, #settings > .block, #settings > .form { border: 1px solid var(--border-color-primary) !important; }
#chat .bubble-wrap { background: transparent; }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: 10px; }
#message { border-radius: 12px; background: var(--input-background-fill); }
#message:focus-within { border-color: var(--color-accent) !important; }
#message textarea { font-size: 1rem; background: transparent; box-shadow: none; border: 0; padding: 12px 14px; }
#message button { margin: 4px 6px; }
#settings { gap: 12px; }
@media (max-width: 768px) { main.fillable { padding: 10px !important; } #title p { display: none; } }
"""


def theme() -> gr.themes.Base:
    """Uses system fonts, so that the page loads nothing from other hosts."""
    return gr.themes.Soft(
        primary_hue="orange",
        secondary_hue="amber",
        neutral_hue="stone",
        font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
    ).set(
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="500",
        block_title_padding="0",
    )


def build_page(backend: Backend, sessions: Sessions, title: str) -> gr.Blocks:
    """The page; `backend` generates the completions, on behalf of the user who is logged in."""
    conversations = Conversations(backend, sessions)
    page: gr.Blocks
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {title}\nChat with the base model and its fine-tuned adapters.", elem_id="title")
            account = gr.Markdown(visible=False, sanitize_html=False, elem_id="account")  # gr.HTML needs eval
            clear = gr.Button("Clear", variant="secondary", size="sm", scale=0, min_width=90, elem_id="clear")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=3, min_width=340):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    editable="user",
                    buttons=["copy", "copy_all"],
                    sanitize_html=True,
                    allow_tags=False,
                    latex_delimiters=_LATEX,
                    placeholder="### What do you want to talk about?",
                    examples=[{"display_text": label, "text": text} for label, text in _EXAMPLES],
                )
                message = gr.Textbox(
                    elem_id="message",
                    label="Message",
                    show_label=False,
                    container=False,
                    placeholder=PLACEHOLDER,
                    lines=1,
                    max_lines=10,
                    autofocus=True,
                    submit_btn=True,
                )
            with gr.Column(scale=1, min_width=320, elem_id="settings"):
                model = gr.Dropdown([], label="Model", elem_id="model")
                refresh = gr.Button("↻ Refresh models", size="sm", elem_id="refresh")
                system = gr.Textbox(label="System prompt", placeholder="None", lines=3, max_lines=8, elem_id="system")
                with gr.Accordion("Tools", open=False, elem_id="tools-panel"):
                    tools = gr.Textbox(
                        label="JSON list, as OpenAI's API takes them; you type what they return",
                        placeholder='[{"type": "function", "function": {"name": "get_weather"}}]',
                        lines=4,
                        max_lines=12,
                        elem_id="tools",
                    )
                sliders = [
                    gr.Slider(1, 2048, 1024, step=1, label="Max new tokens", elem_id="max-tokens"),
                    # OpenAI's maximum is 2
                    gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature", elem_id="temperature"),
                    gr.Slider(0.05, 1.0, 0.95, step=0.05, label="Top-p", elem_id="top-p"),
                    gr.Slider(1, 1000, 50, step=1, label="Top-k", elem_id="top-k"),
                    gr.Slider(1.0, 2.0, 1.2, step=0.05, label="Repetition penalty", elem_id="repetition-penalty"),
                ]

        settings = [model, system, tools, *sliders]
        generation: dict[str, Any] = {
            "outputs": [chat, message],
            "concurrency_limit": _MAX_CONCURRENT_COMPLETIONS,
            "concurrency_id": "completions",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        model_refresh: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8, "api_visibility": "private"}
        # without the queue, an event waits for no other, but cannot show a toast
        unqueued: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        message.submit(conversations.send, [message, chat, *settings], **generation)
        chat.example_select(conversations.example, [message, *settings], **generation)
        chat.retry(conversations.retry, [message, chat, *settings], **generation)
        chat.edit(conversations.edit, [message, chat, *settings], **generation)
        message.stop(conversations.stop, **unqueued)
        chat.undo(conversations.undo, [message, chat], [chat, message], **unqueued)
        gr.on([clear.click, chat.clear], conversations.clear, None, [chat, message], **unqueued)
        refresh.click(conversations.refresh, model, model, **model_refresh)
        page.load(conversations.refresh, model, model, **model_refresh)
        page.load(conversations.account, None, account, **unqueued)
        page.unload(conversations.leave)
    page.queue(max_size=_MAX_WAITING, api_open=False)
    page._queue.sleep_when_free = _QUEUE_POLL_S  # not public
    return page
