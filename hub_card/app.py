# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The demo page: an image, any words, and every pixel with its word. Needs the extra "app"."""

from __future__ import annotations

import html
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_bytes_to_cache
from gradio.themes import Base, colors, sizes
from gradio.utils import get_upload_folder
from PIL import Image, ImageOps
from starlette.middleware import Middleware

from modeling_san.auto import classes_of
from modeling_san.builtin import is_drawn_world, load_examples
from modeling_san.open_vocabulary import OpenVocabularyModel
from modeling_san.processing import EXTENSIONS, SANProcessor, normalize_labels
from modeling_san.processing.images_san import open_image, read_byte_image, resize_image
from modeling_san.processing.results import RESULT_ENDINGS, encode_result
from modeling_san.processing.segmenter import Segmentation, Segmenter
from modeling_san.processing.wording_san import listed

from .space import TAGLINE

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 32_000_000
"""Largest image that is decoded; twice that would take half a gigabyte on its way through."""
MAX_LABELS = 300
MAX_CHARACTERS = 20_000
"""Of all labels together: more than anybody types, less than what would keep the tokenizer busy."""

_ASSETS = Path(__file__).parent / "assets"
_TITLE = "SAN: any words, every pixel"
_SHOWN_SIDE, _SHOWN_SEGMENTS = 1024, 60
"""Longest side of images on their way to a browser, and how many labels are painted, largest first."""
_OPACITY = 55
_KEPT_SECONDS, _CLEANED_EVERY_SECONDS = 30 * 60, 60
"""How long uploads and results are kept after they were last of use."""
_KEPT_VISITORS, _WAITING_VISITORS = 200, 32
_SUGGESTED_WORDS = 200
_FIRST_WORDS = ("sky", "tree", "road", "person", "building", "grass")
_EXTENSION_NAMES = {"none": "only my words", "coco-stuff": "+ COCO stuff", "coco-all": "+ all of COCO"}
_SET_OPACITY = "(percent) => document.documentElement.style.setProperty('--san-opacity', percent / 100)"

# What the page may load and talk to: the server it came from. Gradio's own scripts need "unsafe-eval".
_HEADERS = {
    "content-security-policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'self'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


# What a visitor sends


def read_words(given: Any) -> list[str]:
    """
    Normalised labels from what the page's field of words sends: a list of labels, or of lines of several.

    Raises:
        ValueError: there are none, too many, or one cannot be used.
    """
    if not isinstance(given or [], list) or not all(isinstance(word, str) for word in given or []):
        raise ValueError("The words are not a list of texts: type them into the field, separated by commas")
    line = ",".join(word for word in given or [] if word.strip())
    if not line:
        raise ValueError("There are no words yet: type what to look for, for example: sky, road, car")
    if len(line) > MAX_CHARACTERS:
        raise ValueError(f"The words have {len(line):,} letters: keep to {MAX_CHARACTERS:,}")
    labels = normalize_labels(line)
    if len(labels) > MAX_LABELS:
        raise ValueError(f"There are {len(labels)} labels: keep to {MAX_LABELS}")
    return labels


def read_upload(path: str | None) -> bytes:
    """
    Content of an uploaded image file, whose size on disk is checked before it is read; None is no upload.

    Raises:
        ValueError: there is none, it is gone, empty or too large.
    """
    if path is None:
        raise ValueError("There is no image yet: upload one, paste one, or choose an example")
    if not Path(path).is_file():
        raise ValueError("The image is no longer here: uploads are kept for a short time, upload it again")
    if (size := Path(path).stat().st_size) > MAX_BYTES:
        raise ValueError(f"The file has {size / 2**20:.0f} MB: keep to {MAX_BYTES // 2**20} MB, or shrink the image")
    if not size:
        raise ValueError("The file is empty: it may not have been saved completely")
    return Path(path).read_bytes()


def open_upload(content: bytes) -> np.ndarray:
    """
    Pixels of an image file, whose number of pixels is checked before they are decoded.

    Returns:
        `(height, width, 3)` bytes, upright.

    Raises:
        ValueError: it is no image of a usual format, damaged, or too large.
    """
    try:
        with open_image(content) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                return read_byte_image(image, "The image")
    except Exception as error:
        # Decoders of damaged files raise what they please
        raise ValueError(
            "The file is no image that can be read: use PNG, JPEG, WebP, TIFF, BMP or GIF, "
            f"of up to {MAX_PIXELS // 10**6} million pixels"
        ) from error
    raise ValueError(f"The image has {width} x {height} pixels: keep to {MAX_PIXELS // 10**6} million, or shrink it")


# What a visitor gets


@dataclass(frozen=True, eq=False)
class Result:
    """One visitor's image, segmented."""

    content: bytes
    """Of the image's file."""
    source: str
    """The file's name."""
    size: tuple[int, int]
    """Height and width of the image, upright."""
    shown: Segmentation
    """At the size at which a browser gets it."""

    def image(self) -> np.ndarray:
        """The image as a browser gets it."""
        return resize_image(open_upload(self.content), self.shown.size, Image.Resampling.BOX)

    def annotations(self) -> tuple[list[Any], dict[str, str]]:
        """A mask for each label found with what the legend calls it, and colours by these names."""
        segments = self.shown.segments()[:_SHOWN_SEGMENTS]
        names = {segment.index: f"{segment.label}  {100 * segment.area:.1f} %" for segment in segments}
        masks = [((self.shown.label_map == index).numpy().astype(np.float32), name) for index, name in names.items()]
        return masks, {names[segment.index]: segment.color for segment in segments}

    def heat(self, label: str) -> tuple[Image.Image, float]:
        """Where a label scores, glowing on the grey image, and its highest score, which is white."""
        scores = self.shown.heat_map(label).numpy()
        highest = float(scores.max())
        glow = Image.fromarray(np.rint(scores * (255 / max(highest, 1e-12))).clip(0, 255).astype(np.uint8))
        glow = ImageOps.colorize(glow, black="#1b0c41", mid="#ed6925", white="#fcffa4")
        return Image.blend(ImageOps.grayscale(Image.fromarray(self.image())).convert("RGB"), glow, 0.7), highest

    def file(self, kind: str, opacity: float, model: str) -> tuple[str, bytes]:
        """
        Name and content of a file to download, one of `RESULT_ENDINGS`, at the image's own size.

        The overlay's colours have an opacity of 0 ... 1; the JSON file names the model.
        """
        stem = re.sub(r"[^\w.-]+", "_", Path(self.source).stem)[:60].strip("._") or "image"
        segmentation = self.shown.resized(self.size)
        image = open_upload(self.content) if kind == "overlay" else None
        content = encode_result(kind, segmentation, image, stem, source=self.source, model=model, opacity=opacity)
        return stem + RESULT_ENDINGS[kind], content


def segment_upload(segmenter: Segmenter, content: bytes, labels: Sequence[str], extend: str, source: str) -> Result:
    """Segment an image file of this name; a `ValueError` says why the image or the labels cannot be used."""
    image = open_upload(content)
    height, width = image.shape[:2]
    scale = min(1.0, _SHOWN_SIDE / max(height, width))
    shown = max(1, round(height * scale)), max(1, round(width * scale))
    vocabulary = segmenter.vocabulary(labels, extend=extend)
    [segmentation] = segmenter.segment(replace(segmenter.prepare(image), target_sizes=[shown]), vocabulary)
    return Result(content, source, (height, width), segmentation)


# The page


def make_page(
    model: OpenVocabularyModel,
    processor: SANProcessor,
    *,
    name: str = "built-in",
    labels: Sequence[str] | None = None,
    concurrency: int = 1,
) -> gr.Blocks:
    """
    The page of a model. `serve` gives it its looks.

    All that belongs to a visitor lies in the state of the visitor's own session, and in files that Gradio keeps under
    names nobody can guess and removes after half an hour.

    Args:
        model: to segment with; put into evaluation mode.
        processor: that was saved with it.
        name: what the results call the model.
        labels: words to begin with; None takes some that fit the model.
        concurrency: images that are segmented at the same time; other visitors wait in a queue.

    Raises:
        ValueError: a label cannot be used.
    """
    # Where a folder lies on the server is nobody's business
    name = Path(name).resolve().name if Path(name).is_dir() else name
    handlers = _Handlers(Segmenter(model.eval(), processor), name)
    known = list(model.config.training_labels or ())
    is_builtin = is_drawn_world(known)
    examples: list[list[Any]] = (
        [[one.image, list(one.labels)] for one in load_examples(enlargement=4)] if is_builtin else []
    )
    suggested = known or list(model.config.stored_labels or _FIRST_WORDS)
    first = examples[0][1] if examples else suggested[: len(_FIRST_WORDS)]

    with gr.Blocks(
        title=_TITLE, analytics_enabled=False, delete_cache=(_CLEANED_EVERY_SECONDS, _KEPT_SECONDS)
    ) as page:
        result = gr.State(None, time_to_live=_KEPT_SECONDS)
        gr.HTML(_heading(name, is_builtin), elem_id="san-head", padding=False)
        with gr.Row(elem_id="san-columns"):
            with gr.Column(scale=5, min_width=320):
                asked = _question(examples, suggested, first if labels is None else normalize_labels(labels))
            with gr.Column(scale=7, min_width=320):
                shown = _answer()

        private: dict[str, Any] = {"api_visibility": "private"}
        on_result: dict[str, Any] = {
            **private,
            "show_progress": "hidden",
            "concurrency_id": "result",
            "concurrency_limit": 2,
        }
        show_heat = {**on_result, "fn": handlers.show_heat, "inputs": [result, shown.label], "outputs": [shown.heat]}
        for start in [asked.run.click, *([asked.gallery.load_input_event.success, page.load] if examples else [])]:
            start(
                handlers.segment,
                [asked.image, asked.words, asked.extend],
                [result, shown.painted, shown.notice, shown.label, shown.table, asked.words, shown.tabs],
                concurrency_id="model",
                concurrency_limit=concurrency,
                show_progress_on=[shown.painted],
                **private,
            ).success(**show_heat)
        chosen = shown.painted.select(handlers.choose_label, [result], [shown.label, shown.tabs], **on_result)
        chosen.success(**show_heat)
        shown.label.input(**show_heat)
        shown.opacity.input(None, [shown.opacity], None, js=_SET_OPACITY)
        for kind, button in shown.buttons.items():
            write = partial(handlers.write_file, kind)
            written = button.click(write, [result, shown.opacity], [shown.saved], **on_result)
            written.success(None, None, None, js="() => document.querySelector('#san-saved').click()")
    page.queue(max_size=_WAITING_VISITORS, api_open=False)
    return page


def _question(examples: list[list[Any]], suggested: list[str], first: list[str]) -> Any:
    """The fields of the page's left column, by name: what is asked."""
    image = _image_field(examples[0][0] if examples else None)
    words = gr.Dropdown(
        suggested[:_SUGGESTED_WORDS],
        value=first,
        multiselect=True,
        allow_custom_value=True,
        label="Words",
        info="Type any, with Enter after each or commas between; a|b are synonyms.",
        elem_id="san-words",
    )
    extend = gr.Radio(
        [(_EXTENSION_NAMES[how], how) for how in EXTENSIONS],
        value="none",
        label="Vocabulary",
        info='Names that compete with yours; what they win is "other".',
        elem_id="san-extend",
    )
    run = gr.Button("Segment", variant="primary", elem_id="san-run")
    gallery = examples and gr.Examples(
        examples,
        [image, words],
        label="Examples, drawn for this model",
        visible_columns=[0],
        elem_id="san-examples",
        api_visibility="private",
    )
    return SimpleNamespace(image=image, words=words, extend=extend, run=run, gallery=gallery)


def _answer() -> Any:
    """The fields of the page's right column, by name: what comes out."""
    view: dict[str, Any] = {"height": 430, "buttons": ["fullscreen"]}
    with gr.Tabs(elem_id="san-tabs") as tabs:
        with gr.Tab("Labels", id="labels"):
            painted = gr.AnnotatedImage(show_label=False, elem_id="san-painted", **view)
        with gr.Tab("Heat map", id="heat"):
            label = gr.Dropdown([], show_label=False, container=False, elem_id="san-label")
            heat = gr.Image(interactive=False, format="jpeg", elem_id="san-heat", **view)
        with gr.Tab("Table", id="table"):
            columns = ["label", "area", "pixels", "mean score"]
            table = gr.Dataframe(headers=columns, interactive=False, elem_id="san-table")
    notice = gr.HTML(elem_id="san-notice", padding=False)
    with gr.Row(elem_id="san-bar"):
        opacity = gr.Slider(
            *(0, 100, _OPACITY),
            step=1,
            label="Opacity in percent",
            buttons=[],
            scale=4,
            min_width=260,
            elem_id="san-opacity",
        )
        buttons = {
            kind: gr.Button(f"\u2193 {title}", size="sm", min_width=80, elem_id=f"san-{kind}")
            for kind, title in (("overlay", "Overlay"), ("label_map", "Label map"), ("summary", "JSON"))
        }
    saved = gr.DownloadButton(visible="hidden", elem_id="san-saved")
    return SimpleNamespace(
        **{"tabs": tabs, "painted": painted, "label": label, "heat": heat, "table": table},
        **{"notice": notice, "opacity": opacity, "buttons": buttons, "saved": saved},
    )


def serve(
    model: OpenVocabularyModel,
    processor: SANProcessor,
    *,
    name: str = "built-in",
    labels: Sequence[str] | None = None,
    host: str | None = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    on_start: Callable[[str], None] = print,
) -> None:
    """
    Make a page, see `make_page`, serve it until Ctrl-C or SIGTERM, and remove all that was uploaded.

    Args:
        model: to segment with.
        processor: of the model.
        name: of the model.
        labels: words to begin with.
        host: address to listen at; None leaves it to Gradio, which a Space tells where.
        port: to listen at; None takes a free one from 7860 on.
        share: let Gradio's servers pass the page on to anybody who knows its address.
        on_start: called with the page's address once it is served.

    Raises:
        OSError: the address cannot be listened at.
        ValueError: a label cannot be used.
    """
    # Nothing is fetched from elsewhere, fonts neither
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
    theme = Base(
        primary_hue=colors.emerald,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_lg,
        font=fonts,
        font_mono=fonts[-1:],
    )
    with _private_uploads(), _stopped_by_signals() as stopped:
        page = make_page(model, processor, name=name, labels=labels)
        try:
            _, local, shared = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                quiet=True,
                inline=False,
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
                head=f"<script>{(_ASSETS / 'app.js').read_text(encoding='utf-8')}</script>",
                app_kwargs={"middleware": [Middleware(_SafeHeaders)]},
            )
            on_start(shared or local)
            stopped.wait()
        finally:
            page.close(verbose=False)


def serve_model(model_id: str) -> None:
    """
    Serve the page of a model on the Hub or in a folder; what the `app.py` of a Space calls.

    No code of the model's repository is run, and its weights come from safetensors only.
    """
    _, model_class, processor_class = classes_of(model_id)
    model = model_class.from_pretrained(model_id, use_safetensors=True, trust_remote_code=False)
    # The host is Gradio's to choose: a Space sets GRADIO_SERVER_NAME
    serve(model, processor_class.from_pretrained(model_id), name=model_id, host=None)


class _Handlers:
    """What the page's controls call. Nothing of a visitor is kept here: results go into the visitor's session."""

    def __init__(self, segmenter: Segmenter, name: str) -> None:
        self._segmenter = segmenter
        self._name = name

    def segment(self, path: str | None, words: Any, extend: str) -> tuple[Any, ...]:
        with _told_to_visitor():
            content, own = read_upload(path), read_words(words)
            result = segment_upload(self._segmenter, content, own, extend, Path(path or "").name)
            image, segments = result.image(), result.shown.segments()
        masks, colors = result.annotations()
        found = [segment.label for segment in segments]
        absent = [label for label in result.shown.labels if label not in found]
        notes = [f"Not found: {listed(absent, 12)}."] if absent else []
        if unknown := self._segmenter.unknown_words(own):
            notes += [f"This model was not trained on {listed(unknown, 8)}: expect poor results there."]
        return (
            result,
            gr.AnnotatedImage((image, masks), color_map=colors),
            html.escape(" ".join(notes)),
            gr.Dropdown(choices=found + absent, value=found[0]),
            [[one.label, f"{100 * one.area:.1f} %", one.pixels, f"{one.score:.3f}"] for one in segments],
            [f'"{label}"' if "," in label else label for label in own],
            gr.Tabs(selected="labels"),
        )

    def choose_label(self, result: Result | None, event: gr.SelectData) -> tuple[Any, Any]:
        with _told_to_visitor():
            segments = _still_here(result).shown.segments()
            if event.index not in range(len(segments)):
                raise ValueError("There is no such label")
            return segments[event.index].label, gr.Tabs(selected="heat")

    def show_heat(self, result: Result | None, label: str) -> Any:
        with _told_to_visitor():
            image, highest = _still_here(result).heat(label)
            return gr.Image(image, label=f"score of {label}, up to {highest:.2f}")

    def write_file(self, kind: str, result: Result | None, opacity: float) -> str:
        with _told_to_visitor():
            name, content = _still_here(result).file(kind, opacity / 100, self._name)
            return save_bytes_to_cache(content, name, get_upload_folder())


class _SafeHeaders:
    """ASGI middleware: tells the browser to load nothing from elsewhere, and to send no addresses there."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self._app(scope, receive, send_with_headers)


@contextmanager
def _private_uploads() -> Iterator[None]:
    """Let Gradio keep its files in a folder that only this user can read and that goes with the server."""
    before = os.environ.pop("GRADIO_TEMP_DIR", None)
    with tempfile.TemporaryDirectory(prefix="san-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            os.environ |= {} if before is None else {"GRADIO_TEMP_DIR": before}


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
def _told_to_visitor() -> Iterator[None]:
    """Show what is wrong with a visitor's input on the page, in one sentence."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        sentence = str(error) if isinstance(error, ValueError) else "The image does not fit into memory: shrink it"
        # Gradio shows messages as HTML, and they may quote what the visitor typed
        raise gr.Error(html.escape(sentence), title="This does not work", duration=8, print_exception=False) from error


def _still_here(result: Result | None) -> Result:
    if result is None:
        raise ValueError("The result is no longer here: it is kept for half an hour, segment the image again")
    return result


def _image_field(value: Image.Image | None) -> Any:
    """Gradio's field for images, made to hand over the uploaded file as it is, undecoded."""
    field: Any = gr.Image(
        value,
        label=f"Image, up to {MAX_BYTES // 2**20} MB",
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        buttons=[],
        height=230,
        elem_id="san-image",
    )
    keep_in_cache = field.async_move_resource_to_block_cache

    async def keep_files_only(source: Any) -> Any:
        if str(source).lower().startswith(("http:", "https:")):
            # Gradio would have the server fetch whatever address a visitor's program names
            raise gr.Error("Upload the image: addresses are not read", print_exception=False)
        return await keep_in_cache(source)

    # On the object: Gradio takes a subclass for a component with a front end of its own, and writes files beside it.
    # That the file is an upload, Gradio has checked by then.
    field.preprocess = lambda payload: payload and payload.path
    field.async_move_resource_to_block_cache = keep_files_only
    return field


def _heading(name: str, is_builtin: bool) -> str:
    """The head of the page: what it does and, if the model is the small one, what it does not."""
    text = TAGLINE
    if is_builtin:
        text += " <strong>This model is tiny and knows only a world of drawn images</strong> and the words suggested."
    else:
        text += f" Model: {html.escape(name)}."
    return f"<h1>{html.escape(_TITLE)}</h1><p>{text}</p>"
