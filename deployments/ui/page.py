"""How the chat page looks, and which event does what. The doing is in `deployments.ui.conversations`."""

from typing import Any

import gradio as gr

from deployments.ui.conversations import Backend, Conversations
from deployments.ui.sessions import Sessions

_EXAMPLES = [
    ("Say hello", "Hello! How are you doing today?"),
    ("What is Python?", "Explain briefly what the Python programming language is."),
    ("A story in one sentence", "Tell me the story of Cinderella in one sentence."),
    ("A helicopter and a human", "How long does it take a human to eat a helicopter?"),
    ("Write an article", "Write a short article about the benefits of open source in artificial intelligence."),
]
_MAX_CONCURRENT_ANSWERS = 256
_MAX_WAITING = 512
_QUEUE_POLL_S = 0.02  # Gradio looks every millisecond otherwise, 5 % of a core on an idle page

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
    """Fonts of the system: the page loads nothing from outside."""
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
    """The page; answers come from `backend`, in the name of whoever is logged in."""
    on = Conversations(backend, sessions)
    page: gr.Blocks
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {title}\nChat with the base model and its fine-tuned adapters.", elem_id="title")
            account = gr.Markdown(visible=False, sanitize_html=False, elem_id="account")  # gr.HTML wants eval
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
                    placeholder="### What do you want to talk about?",
                    examples=[{"display_text": label, "text": text} for label, text in _EXAMPLES],
                )
                message = gr.Textbox(
                    elem_id="message",
                    label="Message",
                    show_label=False,
                    container=False,
                    placeholder="Write a message; Shift+Enter for a new line",
                    lines=1,
                    max_lines=10,
                    autofocus=True,
                    submit_btn=True,
                )
            with gr.Column(scale=1, min_width=320, elem_id="settings"):
                model = gr.Dropdown([], label="Model", elem_id="model")
                refresh = gr.Button("↻ Refresh models", size="sm", elem_id="refresh")
                system = gr.Textbox(label="System prompt", placeholder="None", lines=3, max_lines=8, elem_id="system")
                sliders = [
                    gr.Slider(1, 2048, 1024, step=1, label="Max new tokens", elem_id="max-tokens"),
                    # the API follows OpenAI and takes at most 2
                    gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature", elem_id="temperature"),
                    gr.Slider(0.05, 1.0, 0.95, step=0.05, label="Top-p", elem_id="top-p"),
                    gr.Slider(1, 1000, 50, step=1, label="Top-k", elem_id="top-k"),
                    gr.Slider(1.0, 2.0, 1.2, step=0.05, label="Repetition penalty", elem_id="repetition-penalty"),
                ]

        settings = [model, system, *sliders]
        answers: dict[str, Any] = {
            "outputs": [chat, message],
            "concurrency_limit": _MAX_CONCURRENT_ANSWERS,
            "concurrency_id": "answers",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        refreshes: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8, "api_visibility": "private"}
        # without the queue an event waits for no other, and can show no toast
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        message.submit(on.send, [message, chat, *settings], **answers)
        chat.example_select(on.example, [message, *settings], **answers)
        chat.retry(on.retry, [message, chat, *settings], **answers)
        chat.edit(on.edit, [message, chat, *settings], **answers)
        message.stop(on.stop, **at_once)
        chat.undo(on.undo, [message, chat], [chat, message], **at_once)
        gr.on([clear.click, chat.clear], on.clear, None, [chat, message], **at_once)
        refresh.click(on.refresh, model, model, **refreshes)
        page.load(on.refresh, model, model, **refreshes)
        page.load(on.account, None, account, **at_once)
        page.unload(on.leave)
    page.queue(max_size=_MAX_WAITING, api_open=False)
    page._queue.sleep_when_free = _QUEUE_POLL_S  # no public name for it
    return page
