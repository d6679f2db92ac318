"""The demo page: what it computes, what it refuses, the Space it is written as, and how it behaves in a browser."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drawn_world.world import draw_scene
from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.commands.main import main
from modeling_san.hub_card import segmenting
from modeling_san.hub_card.app import is_upload
from modeling_san.hub_card.segmenting import Segmenter, open_upload, read_upload, read_words
from modeling_san.processing import extend_labels

REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SCREENSHOTS = os.environ.get("SAN_SCREENSHOTS")
WAIT = 60_000
"""Milliseconds that the browser waits for an answer."""
WORDS = ["purple striped", "orange plain", "grass", "brick"]
HOSTILE = "<img src=x onerror=window.hacked=1>"


def scene_file(folder, number, name, size=(120, 180)):
    """A file with a drawn image; returns its path."""
    path = folder / name
    Image.fromarray(draw_scene(5, number, size=size, min_regions=2, max_regions=2).image).save(path)
    return path


@pytest.fixture(scope="module")
def segmenter():
    """The built-in model."""
    model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()
    return Segmenter(model, SANProcessor.from_pretrained(BUILTIN_MODEL), "built-in")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """An image of something purple striped and something orange on grass."""
    return scene_file(tmp_path_factory.mktemp("images"), 6, "meadow.png")


@pytest.fixture(scope="module")
def segmentation(segmenter, image):
    return segmenter.segment(image.read_bytes(), WORDS, source="meadow.png")


# Words


def test_only_files_among_the_uploads_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "other.png")
    assert is_upload(str(tmp_path / "uploads" / "0123" / "image.png"))
    assert not is_upload(str(tmp_path / "other.png"))
    assert not is_upload(str(tmp_path / "uploads" / ".." / "other.png"))
    assert not is_upload(str(tmp_path / "uploads" / "link.png"))
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    assert not is_upload(str(tmp_path / "uploads" / "0123" / "image.png"))


def test_what_is_no_file_is_not_read():
    with pytest.raises(ValueError, match="no file"):
        read_upload("/dev/zero")


def test_words_come_as_chips_or_as_a_line():
    assert read_words(["Sky ", "car|Automobile"]) == ["sky", "car|automobile"]
    assert read_words('sky, "road, route"') == ["sky", "road, route"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "no words yet"),
        ([], "no words yet"),
        (" \n ", "no words yet"),
        ({"a": 1}, "not a list"),
        ([["sky"]], "not a list"),
        ([3], "not a list"),
        (["sky", "SKY"], "given 2 times"),
        (["x" * 20_001], "letters"),
        ([f"word {number}" for number in range(301)], "301 labels"),
    ],
)
def test_words_that_cannot_be_used_are_refused_in_a_sentence(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_words(given)
    assert "\n" not in str(caught.value)


# Images


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(21 * 2**20)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("the file was read"))
    with pytest.raises(ValueError, match="21 MB"):
        read_upload(str(path))


@pytest.mark.parametrize(("name", "message"), [(None, "no image yet"), ("gone.png", "no longer"), ("none", "empty")])
def test_uploads_that_are_not_there_are_refused_in_a_sentence(tmp_path, name, message):
    (tmp_path / "none").touch()
    with pytest.raises(ValueError, match=message):
        read_upload(None if name is None else str(tmp_path / name))


def test_a_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    buffer = io.BytesIO()
    Image.new("1", (10_000, 4000)).save(buffer, format="PNG")
    # The header alone: decoding would find that there are no pixels
    header = buffer.getvalue()[:33]
    with pytest.raises(ValueError, match="10000 x 4000 pixels"):
        open_upload(header + b"\0\0\0\0IDAT")


@pytest.mark.parametrize(
    "content", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_no_image_is_refused_in_a_sentence(content):
    with pytest.raises(ValueError, match="no image that can be read"):
        open_upload(content)


def test_a_image_that_was_cut_off_is_refused(image):
    content = image.read_bytes()
    with pytest.raises(ValueError, match="no image that can be read"):
        open_upload(content[: len(content) // 2])


def test_images_are_turned_upright():
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    assert open_upload(buffer.getvalue()).shape == (40, 20, 3)


# Results


def test_the_files_are_those_that_the_command_writes(segmentation, image, tmp_path, capsys):
    arguments = ["segment", str(image), "--labels", ", ".join(WORDS), "--output", str(tmp_path), "--opacity", "0.3"]
    assert main(arguments) == 0
    for kind, ending in (("overlay", "_overlay.png"), ("labels", "_labels.png")):
        name, content = segmentation.file(kind, 0.3)
        assert name == f"meadow{ending}"
        ours, theirs = Image.open(io.BytesIO(content)), Image.open(tmp_path / name)
        assert ours.mode == theirs.mode
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    name, content = segmentation.file("json")
    ours, theirs = json.loads(content), json.loads((tmp_path / name).read_text())
    assert Path(theirs.pop("image")).name == ours.pop("image")
    assert ours == theirs


def test_a_heat_map_is_the_labels_score_among_those_of_all(segmenter, segmentation, image):
    inputs = segmenter.processor(images=Image.open(image), text=WORDS, return_tensors="pt")
    with torch.inference_mode():
        outputs = segmenter.model(**inputs)
    [scores] = segmenter.processor.post_process_semantic_scores(outputs, target_sizes=[segmentation.size])
    for index in range(len(WORDS)):
        assert np.allclose(segmentation.heat_map(index), scores[index].numpy(), atol=1e-4)


def test_the_heat_map_of_other_is_the_sum_of_the_added_names(segmenter, image):
    labels = ["purple striped", "orange plain"]
    extended = segmenter.segment(image.read_bytes(), labels, "coco-stuff")
    assert extended.labels == (*labels, "other")
    vocabulary = extend_labels(labels, "coco-stuff")
    inputs = segmenter.processor(images=Image.open(image), text=vocabulary, return_tensors="pt")
    with torch.inference_mode():
        outputs = segmenter.model(**inputs)
    [scores] = segmenter.processor.post_process_semantic_scores(outputs, target_sizes=[extended.size])
    assert np.allclose(extended.heat_map(2), scores[2:].sum(0).numpy(), atol=1e-3)
    expected = np.minimum(scores.argmax(0).numpy(), 2)
    assert (extended.label_map()[0] == expected).mean() > 0.999


@pytest.mark.parametrize("index", [-1, 4])
def test_a_heat_map_of_no_label_is_refused(segmentation, index):
    with pytest.raises(ValueError, match="no label"):
        segmentation.heat_map(index)


def test_files_that_do_not_exist_are_refused(segmentation):
    with pytest.raises(ValueError, match="no file of the kind"):
        segmentation.file("../../etc/passwd")


def test_a_large_image_is_shown_smaller_and_saved_in_full(segmenter):
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 100), "green").save(buffer, format="PNG")
    wide = segmenter.segment(buffer.getvalue(), ["grass", "sand"], source="../..//<b>.png")
    view = wide.view()
    assert (view["height"], view["width"]) == (64, 1280)
    shown = Image.open(io.BytesIO(base64.b64decode(view["image"].split(",")[1])))
    assert shown.size == (1280, 64)
    assert len(zlib.decompress(base64.b64decode(view["map"]))) == 2 * 64 * 1280
    name, content = wide.file("labels")
    assert re.fullmatch(r"[\w.-]+_labels\.png", name)
    assert Image.open(io.BytesIO(content)).size == (2000, 100)


def test_what_is_shown_are_the_labels_found(segmentation):
    view = json.loads(json.dumps(segmentation.view()))
    label_map = np.frombuffer(zlib.decompress(base64.b64decode(view["map"])), dtype="<u2").reshape(120, 180)
    assert np.array_equal(label_map, segmentation.label_map()[0])
    assert view["labels"] == WORDS
    assert {segment["index"] for segment in view["segments"]} == set(np.unique(label_map))
    assert sum(segment["area"] for segment in view["segments"]) == pytest.approx(1)


def test_words_are_encoded_once_and_not_kept_for_ever(segmenter, image, monkeypatch):
    counted = Segmenter(segmenter.model, segmenter.processor, "counted")
    encode, calls = SANForOpenVocabSegmentation.get_class_embeds, []
    monkeypatch.setattr(
        SANForOpenVocabSegmentation,
        "get_class_embeds",
        lambda self, **inputs: calls.append(1) or encode(self, **inputs),
    )
    for words in (["grass", "sand"], ["grass", "sand"], ["sand", "grass"]):
        counted.segment(image.read_bytes(), words)
    assert len(calls) == 2
    assert counted._class_embeds.cache_info().maxsize is not None


def test_words_that_the_model_was_not_trained_on_are_named(segmenter, segmentation, image):
    assert segmentation.view()["notice"] == ""
    notice = segmenter.segment(image.read_bytes(), ["grass", "zebra"]).view()["notice"]
    assert "zebra" in notice
    assert "grass" not in notice


# The page


def test_the_page_tells_nobody_about_its_visitors(segmenter):
    gradio_app = pytest.importorskip("modeling_san.hub_card.app")
    pytest.importorskip("gradio")
    page = gradio_app.make_page(segmenter.model, segmenter.processor, name=HOSTILE)
    config = page.get_config_file()
    assert config["analytics_enabled"] is False
    assert {listener["api_visibility"] for listener in config["dependencies"]} == {"private"}
    head = next(block for block in config["components"] if block["props"].get("elem_id") == "san-head")
    assert "knows only" in head["props"]["value"]
    assert "<img" not in gradio_app._heading(Segmenter(segmenter.model, segmenter.processor, HOSTILE), False)


def test_the_page_begins_with_the_labels_given(segmenter):
    pytest.importorskip("gradio")
    from modeling_san.hub_card.app import make_page

    page = make_page(segmenter.model, segmenter.processor, labels=["Sky", "car|automobile"])
    field = next(block for block in page.blocks.values() if block.elem_id == "san-words")
    assert field.value == ["sky", "car|automobile"]
    with pytest.raises(ValueError, match="given 2 times"):
        make_page(segmenter.model, segmenter.processor, labels=["sky", "sky"])


def test_another_models_page_shows_no_drawn_images(make_model, tokenizer):
    pytest.importorskip("gradio")
    from modeling_san.hub_card.app import make_page

    page = make_page(make_model(), SANProcessor(tokenizer=tokenizer, templates=["a {}"]), name="a/b")
    names = {block.elem_id for block in page.blocks.values()}
    assert "san-words" in names
    assert "san-examples" not in names


# The command


def test_the_command_says_which_package_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert 'pip install ".[app]"' in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "70000", "http"])
def test_a_port_that_is_none_is_refused(port, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["app", "--port", port])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_port_that_is_taken_is_refused_in_a_line(capsys):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be listened at" in error
    assert error.count("\n") == 1


def test_the_command_says_where_the_page_is(monkeypatch, capsys):
    pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    from modeling_san.hub_card import app

    served = []

    class Visit:
        """In place of waiting for Ctrl-C."""

        def wait(self):
            found = re.search(r"page: (http://127\.0\.0\.1:\d+/)", capsys.readouterr().out)
            served.append(httpx.get(f"{found[1]}config", timeout=30, trust_env=False).json())

    monkeypatch.setattr(app, "_stopped_by_signals", lambda: contextlib.nullcontext(Visit()))
    before = os.environ.get("GRADIO_TEMP_DIR")
    assert main(["app", "--labels", "sky, road"]) == 0
    [field] = [block for block in served[0]["components"] if block["props"].get("elem_id") == "san-words"]
    assert field["props"]["value"] == ["sky", "road"]
    assert os.environ.get("GRADIO_TEMP_DIR") == before


# The Space


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    pytest.importorskip("gradio")
    from modeling_san.hub_card.space import write_space

    return write_space(tmp_path_factory.mktemp("spaces") / "space", "somebody/san-vit-b-16")


def test_a_space_brings_all_but_public_libraries(space):
    import gradio
    from huggingface_hub import SpaceCard

    card = SpaceCard.load(space / "README.md").data
    assert (card.sdk, card.sdk_version, card.app_file) == ("gradio", gradio.__version__, "app.py")
    assert card.models == ["somebody/san-vit-b-16"]
    requirements = (space / "requirements.txt").read_text()
    assert "torch>=" in requirements
    assert "://" not in requirements
    for source in ("modeling_san", "processing", "training", "hub_card"):
        target = space / "modeling_san" / ("" if source == "modeling_san" else source)
        for file in (REPOSITORY / source).rglob("*.py"):
            assert (target / file.relative_to(REPOSITORY / source)).read_text() == file.read_text()
    assert not list(space.rglob("*.safetensors"))


def test_a_space_copies_the_packages_that_are_installed():
    from modeling_san.hub_card.space import PACKAGES

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert sorted(PACKAGES) == sorted(project["tool"]["setuptools"]["packages"])


def test_a_space_may_install_the_package_instead(tmp_path):
    pytest.importorskip("gradio")
    from modeling_san.hub_card.space import write_space

    folder = write_space(tmp_path / "space", "a/b", package="modeling-san @ https://example.org/modeling_san.whl")
    assert "modeling-san@ https://example.org" in (folder / "requirements.txt").read_text().replace(" @", "@")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]


@pytest.mark.parametrize("model_id", ["", "gpt", "a/b/c", "../model", 'a/b"); import os; ("', "a/b\nc"])
def test_a_space_of_what_is_no_repository_is_refused(tmp_path, model_id):
    pytest.importorskip("gradio")
    from modeling_san.hub_card.space import write_space

    with pytest.raises(ValueError, match="repository"):
        write_space(tmp_path / "space", model_id)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["modeling-san\nevil", "-r other.txt", ""])
def test_a_space_of_a_package_that_pip_cannot_read_is_refused(tmp_path, package):
    pytest.importorskip("gradio")
    from modeling_san.hub_card.space import write_space

    with pytest.raises(ValueError, match="package"):
        write_space(tmp_path / "space", "a/b", package=package)


def test_the_command_writes_a_space_once(tmp_path, capsys):
    pytest.importorskip("gradio")
    folder = tmp_path / "space"
    assert main(["app", "--space", str(folder), "--model", "a/b"]) == 0
    kept = (folder / "app.py").read_text()
    assert main(["app", "--space", str(folder), "--model", "c/d"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (folder / "app.py").read_text() == kept
    assert main(["app", "--space", str(tmp_path / "other")]) == 2


class Server:
    """A process that serves a page; ended and looked after by the tests."""

    def __init__(self, command, folder, **environment):
        # What the page keeps for a while goes where the test can see it
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary), "HF_HUB_OFFLINE": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines, self.address = [], None
        self.started = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                self.address = found[0]
                self.started.set()
        self.started.set()

    def wait(self):
        self.started.wait(180)
        assert self.address, "".join(self.lines)
        return self

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


@pytest.fixture(scope="module")
def server(space, tmp_path_factory):
    """The page of the built-in model, as a Space serves it."""
    folder = shutil.copytree(space, tmp_path_factory.mktemp("served") / "space")
    server = Server(["app.py"], folder, SAN_MODEL=str(BUILTIN_MODEL), GRADIO_SERVER_NAME="127.0.0.1")
    yield server.wait()
    server.stop()


@pytest.fixture
def client(server):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=server.address, timeout=30, trust_env=False) as client:
        yield client


def ask(client, image, words=("grass", "sand"), session="0123456789"):
    """Send what the page's button sends, past the page; returns the server's answer."""
    config = client.get("config").json()
    names = {block["id"]: block["props"].get("elem_id") for block in config["components"]}
    number = next(
        listener["id"] for listener in config["dependencies"] if names.get(listener["targets"][0][0]) == "san-run"
    )
    body = {"data": [image, list(words), "none"], "fn_index": number, "session_hash": session}
    client.post("gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                return message
    raise AssertionError("the server gave no answer")


def test_the_spaces_page_says_what_its_model_knows(client):
    text = client.get("").text
    assert "SAN: any words, every pixel" in text
    assert "knows only a world of drawn images" in text


def test_the_browser_is_told_to_load_nothing_from_elsewhere(client):
    answer = client.get("")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(?:https?:)?//", answer.text)


def test_a_visitor_cannot_have_other_files_of_the_server_shown(client, image):
    given = {"path": str(image), "meta": {"_type": "gradio.FileData"}}
    assert not ask(client, given)["success"]


def test_a_visitor_cannot_have_the_server_fetch_an_address(client):
    with socket.create_server(("127.0.0.1", 0)) as visited:
        visited.settimeout(0.5)
        address = f"http://127.0.0.1:{visited.getsockname()[1]}/image.png"
        answer = ask(client, {"path": address, "meta": {"_type": "gradio.FileData"}})
        assert not answer["success"]
        with pytest.raises(TimeoutError):
            visited.accept()


def test_the_server_does_not_take_files_over_the_limit(client):
    content = b"x" * (segmenting.MAX_BYTES + 2**20)
    assert client.post("gradio_api/upload", files={"files": ("large.png", content)}).status_code == 413


# In a browser


@pytest.fixture(scope="module")
def browser(server):
    """Headless Chromium, and the addresses that its pages asked for."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip("needs Chromium, which is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser.asked = []
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Open the page as a new visitor."""
    contexts = []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.on("request", lambda request: browser.asked.append(request.url))
        page.goto(server.address)
        page.wait_for_selector("#san-words-input")
        return page

    yield open_page
    for context in contexts:
        context.close()


def upload(page, path):
    page.set_input_files("#san-image input[type=file]", path)
    page.wait_for_selector("#san-image img")


def type_words(page, text):
    """Replace the words there are."""
    page.click("#san-words-input")
    for _ in range(page.locator(".san-chip").count()):
        page.keyboard.press("Backspace")
    page.keyboard.type(text)


def chips(page):
    """The words in the field; behind each there is a cross."""
    return [text[:-1] for text in page.locator(".san-chip").all_text_contents()]


def segment(page):
    """Press the button and wait for a new result."""
    before = page.evaluate("document.querySelector('[data-run]')?.dataset.run ?? null")
    page.click("#san-run")
    page.wait_for_function("(old) => (document.querySelector('[data-run]')?.dataset.run ?? null) !== old", arg=before)


def point(page, row, column, size):
    """Move the pointer to the middle of a pixel of the image; returns what the page says of it."""
    frame = page.locator(".san-stage").bounding_box()
    page.mouse.move(
        frame["x"] + frame["width"] * (column + 0.5) / size[1], frame["y"] + frame["height"] * (row + 0.5) / size[0]
    )
    return page.locator(".san-tip").inner_text()


def saved(page, kind):
    with page.expect_download() as download:
        page.click(f"[data-kind={kind}]")
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def keep_screenshot(page, tmp_path, name, **options):
    path = tmp_path / name
    page.screenshot(path=path, **options)
    assert Image.open(path).size[0] >= 390
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, SCREENSHOTS)


@pytest.mark.browser
def test_a_image_and_words_become_labels_under_the_pointer(visit, image, segmentation, tmp_path):
    page = visit()
    upload(page, image)
    # The last word without a comma: what was typed counts when the button is pressed
    type_words(page, ", ".join(WORDS))
    segment(page)
    page.wait_for_function("document.querySelectorAll('.san-chip').length === 4")
    assert chips(page) == WORDS
    label_map, _ = segmentation.label_map()
    for row, column in ((60, 70), (60, 130), (8, 8), (110, 90)):
        assert point(page, row, column, label_map.shape) == WORDS[label_map[row, column]]
    assert len(np.unique(label_map)) >= 3
    areas = dict(text.split("\n") for text in page.locator(".san-legend .san-row").all_inner_texts())
    for entry in segmentation.view()["segments"]:
        assert areas[WORDS[entry["index"]]] == f"{100 * entry['area']:.1f} %"
    colors = page.evaluate(
        "() => { const c = document.querySelector('.san-paint'); return [...c.getContext('2d')"
        ".getImageData(c.width / 2, c.height / 2, 1, 1).data] }"
    )
    code = segmentation.view()["colors"][label_map[60, 90]]
    assert colors[:3] == [int(code[start : start + 2], 16) for start in (1, 3, 5)]
    keep_screenshot(page, tmp_path, "desktop.png")


@pytest.mark.browser
def test_opacity_changes_without_asking_the_server(visit, browser):
    page = visit()
    page.click("#san-examples button >> nth=1")
    page.wait_for_selector(".san-result.san-shown")
    page.wait_for_timeout(300)
    asked = len(browser.asked)
    slider = page.locator("#san-opacity")
    slider.fill("20")
    assert page.locator(".san-paint").evaluate("(canvas) => canvas.style.opacity") == "0.2"
    slider.fill("0")
    assert page.locator(".san-lines").evaluate("(canvas) => canvas.style.opacity") == "0"
    page.wait_for_timeout(200)
    assert [url for url in browser.asked[asked:] if "queue/join" in url] == []


@pytest.mark.browser
def test_a_word_shows_its_heat_map_and_files_are_saved(visit, image, segmentation, tmp_path):
    page = visit()
    upload(page, image)
    type_words(page, ",".join(WORDS) + ",")
    segment(page)
    page.click(".san-legend .san-row:has-text('orange plain')")
    page.wait_for_selector(".san-stage.san-warm")
    heat = segmentation.heat_map(1)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert point(page, row, column, heat.shape) == f"orange plain {heat.max():.2f}"
    keep_screenshot(page, tmp_path, "heat.png")
    page.click(".san-back")
    assert page.locator(".san-stage.san-warm").count() == 0

    page.locator("#san-opacity").fill("30")
    for kind in ("overlay", "labels"):
        assert saved(page, kind) == segmentation.file(kind, 0.3)
    summary = json.loads(saved(page, "json")[1])
    # The folder's name, and not where it lies on the server
    assert summary.pop("model") == BUILTIN_MODEL.name
    assert summary == {key: value for key, value in json.loads(segmentation.file("json")[1]).items() if key != "model"}


@pytest.mark.browser
def test_bad_input_is_answered_in_a_sentence_and_loses_nothing(visit, image, tmp_path):
    page = visit()
    upload(page, image)
    segment(page)
    shown = page.locator(".san-legend").inner_text()
    type_words(page, "")
    page.click("#san-run")
    page.wait_for_selector("text=There are no words yet")
    assert page.locator(".san-legend").inner_text() == shown

    (tmp_path / "letter.png").write_text("no image at all")
    page.click("#san-image [aria-label='Clear'], #san-image [aria-label='Remove Image']")
    page.set_input_files("#san-image input[type=file]", tmp_path / "letter.png")
    page.wait_for_timeout(500)
    type_words(page, "grass, sand,")
    page.click("#san-run")
    page.wait_for_selector("text=no image that can be read")
    assert page.locator(".san-legend").inner_text() == shown
    keep_screenshot(page, tmp_path, "message.png")


@pytest.mark.browser
def test_words_are_never_taken_for_html(visit, image):
    page = visit()
    upload(page, image)
    type_words(page, f"grass, {HOSTILE}, zebra")
    page.keyboard.press("Enter")
    assert chips(page) == ["grass", HOSTILE, "zebra"]
    segment(page)
    everything = page.locator("#san-viewer").inner_text()
    assert HOSTILE.lower() in everything
    assert "not trained on" in page.locator(".san-notice").inner_text()
    # Refused because of the doubled synonym, and quoted in the message
    type_words(page, f"{HOSTILE}|{HOSTILE}")
    page.click("#san-run")
    page.wait_for_selector("text=write each synonym once")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None


@pytest.mark.browser
def test_words_can_be_clicked_pasted_and_taken_away(visit):
    page = visit()
    type_words(page, "")
    page.click(".san-pool button:text-is('red plain')")
    assert page.locator(".san-pool button[aria-pressed=true]").all_inner_texts() == ["red plain"]
    page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.setData("text", 'grass, "brick, wall"\\nRED  plain');
            const paste = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            document.querySelector("#san-words-input").dispatchEvent(paste);
        }"""
    )
    assert chips(page) == ["red plain", "grass", "brick, wall"]
    page.click(".san-chip button >> nth=1")
    page.click(".san-pool button:text-is('red plain')")
    assert chips(page) == ["brick, wall"]


@pytest.mark.browser
def test_two_visitors_at_once_see_their_own_images_only(visit, image, segmentation, tmp_path):
    other = scene_file(tmp_path, 8, "pond.png", size=(150, 150))
    first, second = visit(), visit()
    upload(first, image)
    upload(second, other)
    type_words(first, ",".join(WORDS) + ",")
    type_words(second, "pink checkered, blue plain, water,")
    first.click("#san-run")
    second.click("#san-run")
    for page in (first, second):
        page.wait_for_selector(".san-result.san-shown")
    assert set(first.locator(".san-name").all_inner_texts()) == set(WORDS)
    assert set(second.locator(".san-name").all_inner_texts()) == {"pink checkered", "blue plain", "water"}
    for page, name, size in ((first, "meadow.png", [180, 120]), (second, "pond.png", [150, 150])):
        summary = json.loads(saved(page, "json")[1])
        assert (summary["image"], [summary["width"], summary["height"]]) == (name, size)
    # What one asks for afterwards is still about the own image
    second.click(".san-legend .san-row >> nth=0")
    first.click(".san-legend .san-row:has-text('grass')")
    first.wait_for_selector(".san-stage.san-warm")
    assert point(first, 8, 8, (120, 180)) == f"grass {segmentation.heat_map(2)[8, 8]:.2f}"


@pytest.mark.browser
def test_the_page_fits_a_phone_and_follows_its_colours(visit, tmp_path):
    background = "getComputedStyle(document.body).backgroundColor"
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    brightness = {}
    for scheme in ("light", "dark"):
        page = visit(**phone, color_scheme=scheme)
        page.tap("#san-examples button >> nth=2")
        page.wait_for_selector(".san-result.san-shown")
        page.wait_for_timeout(800)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        stage = page.locator(".san-stage").bounding_box()
        assert stage["width"] > 300
        page.touchscreen.tap(stage["x"] + 10, stage["y"] + 10)
        assert page.locator(".san-tip").inner_text() == "grass"
        brightness[scheme] = sum(map(int, re.findall(r"\d+", page.evaluate(background))[:3]))
        keep_screenshot(page, tmp_path, f"phone_{scheme}.png", full_page=True)
    assert brightness["light"] > 600
    assert brightness["dark"] < 200


@pytest.mark.browser
def test_nothing_was_fetched_from_elsewhere(browser, server):
    assert browser.asked
    elsewhere = [url for url in browser.asked if not url.startswith((server.address, "data:", "blob:"))]
    assert elsewhere == []


def test_nothing_uploaded_is_left_when_the_server_ends(server, client):
    answer = client.post("gradio_api/upload", files={"files": ("secret.png", b"secret")})
    assert b"secret" in Path(answer.json()[0]).read_bytes()
    assert server.temporary in Path(answer.json()[0]).parents
    assert server.stop() == 0
    assert [path for path in server.temporary.rglob("*") if path.is_file()] == []
