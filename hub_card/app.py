"""The demo page: an image, any words, and every pixel with its word. Needs Gradio, `pip install ".[app]"`."""

from __future__ import annotations

import base64
import html
import io
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from modeling_san import SANForOpenVocabSegmentation, SANProcessor
from modeling_san.builtin import is_drawn_world, load_examples
from modeling_san.processing import EXTENSIONS, normalize_labels

from .segmenting import MAX_BYTES, Segmentation, Segmenter, read_upload, read_words

if TYPE_CHECKING:
    import gradio

_ASSETS = Path(__file__).parent / "assets"
_TITLE = "SAN: any words, every pixel"

_KEPT_SECONDS = 30 * 60
"""How long uploads and results are kept after they were last of use."""
_CLEANED_EVERY_SECONDS = 60
_KEPT_VISITORS = 200
_WAITING_VISITORS = 32

_EXTENSION_NAMES = {
    "none": "only my words",
    "coco-stuff": "+ COCO stuff",
    "coco-all": "+ all of COCO",
}
_MIME_TYPES = {"overlay": "image/png", "labels": "image/png", "json": "application/json"}
_SUGGESTED_WORDS = 60
_FIRST_WORDS = ("sky", "tree", "road", "person", "building", "grass")

_DISTRACTORS = ("red plain", "green dotted", "water", "brick")

_Example = tuple[Image.Image, tuple[str, ...]]
"""An image to start with and the names of what is in it."""

# What the page may load and talk to: the server it came from. Gradio's own scripts need "unsafe-eval".
_CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'self'; object-src 'none'"
)


def make_page(
    model: SANForOpenVocabSegmentation,
    processor: SANProcessor,
    *,
    name: str = "built-in",
    labels: Sequence[str] | None = None,
    concurrency: int = 1,
) -> gradio.Blocks:
    """
    The page of a model. `launch_page` gives it its looks.

    All that belongs to a visitor lies in the state of the visitor's own session, but for the uploaded file, which
    Gradio keeps under a name nobody can guess and removes after half an hour.

    Args:
        model: to segment with; put into evaluation mode.
        processor: that was saved with it.
        name: what the results call the model.
        labels: words to begin with; None takes some that fit the model.
        concurrency: images that are segmented at the same time; other visitors wait in a queue.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: a label cannot be used.
    """
    import gradio as gr

    # Where a folder lies on the server is nobody's business
    segmenter = Segmenter(model.eval(), processor, Path(name).resolve().name if Path(name).is_dir() else name)
    examples = _draw_examples() if _knows_drawn_world(segmenter) else []
    words = normalize_labels(labels) if labels is not None else _first_words(segmenter, examples)
    suggestions = _suggested_words(segmenter)
    handlers = _Handlers(gr, segmenter, examples)

    with gr.Blocks(
        title=_TITLE, analytics_enabled=False, delete_cache=(_CLEANED_EVERY_SECONDS, _KEPT_SECONDS)
    ) as page:
        result = gr.State(None, time_to_live=_KEPT_SECONDS)
        gr.HTML(_heading(segmenter, bool(examples)), elem_id="san-head", apply_default_css=False, js_on_load=None)
        with gr.Row(elem_id="san-columns"):
            with gr.Column(scale=5, min_width=320, elem_id="san-left"):
                image = _image_field(gr)
                if examples:
                    thumbnails = gr.HTML(
                        html_template='<div class="san-title">Examples <small>drawn for this model</small></div>',
                        js_on_load=_script("app_examples.js"),
                        apply_default_css=False,
                        elem_id="san-examples",
                        images=[{"address": _address(image), "name": ", ".join(names)} for image, names in examples],
                    )
                field = gr.HTML(
                    words,
                    html_template=(
                        '<div class="san-title">Words <small>Enter or comma after each; a|b are synonyms</small></div>'
                    ),
                    js_on_load=_script("app_words.js"),
                    apply_default_css=False,
                    elem_id="san-words",
                    suggestions=suggestions,
                )
                added = gr.Radio(
                    [(_EXTENSION_NAMES[how], how) for how in EXTENSIONS],
                    value="none",
                    label="Vocabulary",
                    info='Names of COCO-Stuff compete with yours; what they win becomes "other".',
                    elem_id="san-added",
                )
                run = gr.Button("Segment", variant="primary", elem_id="san-run")
            with gr.Column(scale=7, min_width=320, elem_id="san-right"):
                viewer = gr.HTML(
                    html_template="",
                    js_on_load=_script("app_viewer.js"),
                    apply_default_css=False,
                    elem_id="san-viewer",
                )

        private: dict[str, Any] = {"api_visibility": "private"}
        on_model: dict[str, Any] = {**private, "concurrency_id": "model", "concurrency_limit": concurrency}
        on_result: dict[str, Any] = {
            **private,
            "concurrency_id": "result",
            "concurrency_limit": 2,
            "show_progress": "hidden",
        }
        inputs, outputs = [image, field, added], [viewer, result]
        run.click(handlers.segment, inputs, outputs, **on_model)
        field.submit(handlers.segment, inputs, outputs, **on_model)
        if examples:
            chosen = thumbnails.select(
                _with_event(gr, handlers.choose), None, [image, field], show_progress="hidden", **private
            )
            chosen.success(handlers.segment, inputs, outputs, **on_model)
        viewer.select(_with_event(gr, handlers.show_heat), [result], [viewer], **on_result)
        viewer.download(_with_event(gr, handlers.download), [result], [viewer], **on_result)
    page.queue(max_size=_WAITING_VISITORS, api_open=False)
    return page


def launch_page(
    page: gradio.Blocks, *, host: str | None = "127.0.0.1", port: int | None = None, share: bool = False
) -> str:
    """
    Serve a page until it is closed, from threads of its own.

    Args:
        page: what `make_page` returned.
        host: address to listen at; None leaves it to Gradio, which a Space tells where.
        port: to listen at; None takes a free one from 7860 on.
        share: let Gradio's servers pass the page on to anybody who knows its address.

    Returns:
        the page's address.

    Raises:
        OSError: the address cannot be listened at.
    """
    from gradio.themes import Base, colors, sizes
    from starlette.middleware import Middleware

    system = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
    theme = Base(
        primary_hue=colors.emerald,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_lg,
        font=system,
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    ).set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    _, local, shared = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=MAX_BYTES,
        state_session_capacity=_KEPT_VISITORS,
        theme=theme,
        css=(_ASSETS / "app.css").read_text(encoding="utf-8"),
        app_kwargs={"middleware": [Middleware(_ContentPolicy)]},
    )
    return shared or local


def serve(
    model: SANForOpenVocabSegmentation,
    processor: SANProcessor,
    *,
    name: str = "built-in",
    labels: Sequence[str] | None = None,
    host: str | None = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """
    Make a page, serve it until Ctrl-C or SIGTERM, and remove all that was uploaded.

    Args:
        model: see `make_page`.
        processor: see `make_page`.
        name: see `make_page`.
        labels: see `make_page`.
        host: see `launch_page`.
        port: see `launch_page`.
        share: see `launch_page`.
        on_start: called with the page's address once it is served; None prints it.

    Raises:
        ImportError: Gradio is not installed.
        OSError: the address cannot be listened at.
        ValueError: a label cannot be used.
    """
    with _private_uploads(), _stopped_by_signals() as stopped:
        page = make_page(model, processor, name=name, labels=labels)
        try:
            address = launch_page(page, host=host, port=port, share=share)
            print(address, flush=True) if on_start is None else on_start(address)
            stopped.wait()
        finally:
            page.close(verbose=False)


def serve_model(model_id: str) -> None:
    """
    Serve the page of a model on the Hub or in a folder; what the `app.py` of a Space calls.

    No code of the model's repository is run, and its weights come from safetensors only.

    Args:
        model_id: Hub repository or folder.
    """
    model = SANForOpenVocabSegmentation.from_pretrained(model_id, use_safetensors=True, trust_remote_code=False)
    # The host is Gradio's to choose: a Space sets GRADIO_SERVER_NAME
    serve(model, SANProcessor.from_pretrained(model_id), name=model_id, host=None)


class _Handlers:
    """What the page's controls call. Nothing of a visitor is kept here: results go into the visitor's session."""

    def __init__(self, gr: Any, segmenter: Segmenter, examples: Sequence[_Example]) -> None:
        self._gr = gr
        self._segmenter = segmenter
        self._examples = examples

    def segment(self, path: str | None, words: Any, added: str) -> tuple[dict[str, Any], Segmentation]:
        with _told_to_visitor(self._gr):
            content, labels = read_upload(path), read_words(words)
            segmentation = self._segmenter.segment(content, labels, added, source=Path(path or "").name)
            return segmentation.view(), segmentation

    def choose(self, asked: dict[str, Any]) -> tuple[Image.Image, list[str]]:
        with _told_to_visitor(self._gr):
            index = _index(asked)
            if not 0 <= index < len(self._examples):
                raise ValueError("There is no such example")
            image, names = self._examples[index]
            return image, _with_distractors(names)

    def show_heat(self, asked: dict[str, Any], segmentation: Segmentation | None) -> Any:
        with _told_to_visitor(self._gr):
            return self._gr.HTML(heat=_still_here(segmentation).heat_view(_index(asked)))

    def download(self, asked: dict[str, Any], segmentation: Segmentation | None) -> Any:
        with _told_to_visitor(self._gr):
            kind, opacity = str(asked.get("kind")), asked.get("opacity", 0.5)
            if not isinstance(opacity, (int, float)):
                raise ValueError("The opacity is no number")
            name, content = _still_here(segmentation).file(kind, opacity)
            encoded = base64.b64encode(content).decode()
            return self._gr.HTML(file={"name": name, "mime": _MIME_TYPES[kind], "content": encoded})


def _with_event(gr: Any, handler: Callable[..., Any]) -> Callable[..., Any]:
    """A listener that passes on what the page's script sent with an event; it may be anything."""

    def listener(event: Any, *inputs: Any) -> Any:
        asked = getattr(event, "_data", None)
        return handler(asked if isinstance(asked, dict) else {}, *inputs)

    # Gradio looks at the types to know who wants the event
    listener.__annotations__ = {"event": gr.EventData}
    return listener


def _index(asked: dict[str, Any]) -> int:
    index = asked.get("index")
    return index if isinstance(index, int) else -1


class _ContentPolicy:
    """ASGI middleware: tells the browser to load nothing from elsewhere, and to send no addresses there."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", _CONTENT_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self._app(scope, receive, send_with_policy)


@contextmanager
def _private_uploads() -> Iterator[None]:
    """Let Gradio keep its files in a folder that only this user can read and that goes with the server."""
    variable = "GRADIO_TEMP_DIR"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory(prefix="san-app-", ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the handlers before come back."""
    stopped = threading.Event()
    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.signal(kind, lambda *_: stopped.set()) for kind in kinds}
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _told_to_visitor(gr: Any) -> Iterator[None]:
    """Show what is wrong with a visitor's input on the page, in one sentence."""
    try:
        yield
    except ValueError as error:
        # Gradio shows messages as HTML, and they may quote what the visitor typed
        raise gr.Error(
            html.escape(str(error)), title="This does not work", duration=8, print_exception=False
        ) from error
    except MemoryError as error:
        raise gr.Error(
            "The image does not fit into memory: shrink it", title="This does not work", print_exception=False
        ) from error


def _still_here(segmentation: Segmentation | None) -> Segmentation:
    if segmentation is None:
        raise ValueError("The result is no longer here: it is kept for half an hour, segment the image again")
    return segmentation


def _image_field(gr: Any) -> Any:
    """Gradio's field for images, made to hand over the uploaded file as it is, undecoded."""
    field = gr.Image(
        label=f"Image, up to {MAX_BYTES // 2**20} MB",
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        buttons=[],
        height=250,
        elem_id="san-image",
    )
    keep_in_cache = field.async_move_resource_to_block_cache

    async def keep_files_only(source: Any) -> Any:
        if str(source).lower().startswith(("http:", "https:")):
            # Gradio would have the server fetch whatever address a visitor's program names
            raise gr.Error("Upload the image: addresses are not read", print_exception=False)
        return await keep_in_cache(source)

    def hand_over(payload: Any) -> str | None:
        if payload is None or is_upload(payload.path):
            return payload and payload.path
        raise gr.Error("That is no upload of yours: upload the image", print_exception=False)

    # On the object: Gradio takes a subclass for a component with a front end of its own, and writes files beside it
    field.preprocess = hand_over
    field.async_move_resource_to_block_cache = keep_files_only
    return field


def is_upload(path: str | None) -> bool:
    """
    Whether a path lies where uploads are kept, or is none; a visitor's program may name any file of the server.

    Args:
        path: as the page, or what speaks in its place, sends it.
    """
    folder = os.environ.get("GRADIO_TEMP_DIR")
    return path is None or (folder is not None and Path(path).resolve().is_relative_to(Path(folder).resolve()))


def _script(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _heading(segmenter: Segmenter, is_drawn_world: bool) -> str:
    """The head of the page: what it does and, if the model is the small one, what it does not."""
    text = "Upload an image, name what to look for in any words, and every pixel gets the word that fits best."
    if is_drawn_world:
        text += (
            " <strong>The model behind this page is tiny and knows only a world of drawn images</strong>: eight "
            "colours, four patterns and six backgrounds. Its words are below the field; others will not work."
        )
    else:
        text += f" Model: {html.escape(segmenter.name)}."
    return f"<h1>{html.escape(_TITLE)}</h1><p>{text}</p>"


def _knows_drawn_world(segmenter: Segmenter) -> bool:
    """Whether a model was trained on the images that the project draws, and on no others."""
    return is_drawn_world(segmenter.trained_words)


def _draw_examples() -> list[_Example]:
    """Images to start with and the names of what is in each."""
    return [(example.image, example.labels) for example in load_examples(enlargement=4)]


def _with_distractors(names: Sequence[str]) -> list[str]:
    """Names, and some that the model may fall for."""
    return [*names, *(name for name in _DISTRACTORS if name not in names)]


def _suggested_words(segmenter: Segmenter) -> list[str]:
    """Words to click on: the model's own, or some everyday ones."""
    config = segmenter.model.config
    own = segmenter.trained_words
    if not own and config.has_stored_labels:
        own = list(dict(config.id2label or {}).values())
    return own[:_SUGGESTED_WORDS] or list(_FIRST_WORDS)


def _first_words(segmenter: Segmenter, examples: Sequence[_Example]) -> list[str]:
    """Words that the field begins with."""
    return _with_distractors(examples[0][1]) if examples else _suggested_words(segmenter)[: len(_FIRST_WORDS)]


def _address(image: Image.Image) -> str:
    """A small copy of an image as an address that holds it."""
    buffer = io.BytesIO()
    image.resize((image.width // 2, image.height // 2)).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
