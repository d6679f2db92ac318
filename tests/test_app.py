"""The demo page: what it computes, what it refuses, the Space it is written as, and how it behaves in a browser."""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.builtin import load_examples
from modeling_san.commands.main import main
from modeling_san.processing.segmenter import Segmenter

pytest.importorskip("gradio")
from modeling_san.hub_card.app import MAX_BYTES, make_page, open_upload, read_upload, read_words, segment_upload
from modeling_san.hub_card.space import PACKAGES, write_space

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
WAIT = 30_000
"""Milliseconds that the browser waits for an answer."""
HOSTILE = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def segmenter():
    """The built-in model."""
    model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()
    return Segmenter(model, SANProcessor.from_pretrained(BUILTIN_MODEL))


@pytest.fixture(scope="module")
def words():
    """What is in the image, and something that is not."""
    return [*load_examples()[1].labels, "brick"]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A file with the second of the drawn images, 128 x 192 pixels."""
    path = tmp_path_factory.mktemp("images") / "meadow.png"
    load_examples()[1].image.save(path)
    return path


@pytest.fixture(scope="module")
def result(segmenter, image, words):
    return segment_upload(segmenter, image.read_bytes(), words, "none", "meadow.png")


def test_words_come_one_by_one_or_as_lines():
    assert read_words(["Sky, car|Automobile", " ", '"road, route"']) == ["sky", "car|automobile", "road, route"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "no words"),
        ([" \n "], "no words"),
        ("sky", "not a list"),
        ([3], "not a list"),
        (["sky", "SKY"], "'sky'"),
        (["x" * 20_001], "20,001"),
        ([f"word {number}" for number in range(301)], "301"),
    ],
    ids=["none", "blank", "text", "number", "twice", "letters", "labels"],
)
def test_words_that_cannot_be_used_are_refused_in_a_sentence(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_words(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [None, "gone.png", "empty.png", ".", "large.png"])
def test_uploads_that_are_not_there_or_too_large_are_refused_before_they_are_read(tmp_path, monkeypatch, name):
    for file, size in (("empty.png", 0), ("large.png", 21 * 2**20)):
        (tmp_path / file).touch()
        os.truncate(tmp_path / file, size)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("the file was read"))
    with pytest.raises(ValueError, match="21 MB" if name == "large.png" else r"image|file"):
        read_upload(None if name is None else str(tmp_path / name))


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    buffer = io.BytesIO()
    Image.new("1", (10_000, 4000)).save(buffer, format="PNG")
    # The header alone: decoding would find that there are no pixels
    header = buffer.getvalue()[:33]
    with pytest.raises(ValueError, match="10000 x 4000 pixels"):
        open_upload(header + b"\0\0\0\0IDAT")


@pytest.mark.parametrize("content", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='a'/>", "half of an image"])
def test_what_is_no_image_is_refused(content, image):
    content = image.read_bytes()[:2000] if isinstance(content, str) else content
    with pytest.raises(ValueError, match="no image that can be read"):
        open_upload(content)


def test_the_files_are_those_that_the_command_writes(result, image, words, tmp_path):
    arguments = ["segment", str(image), "--labels", ", ".join(words), "--output", str(tmp_path), "--opacity", "0.3"]
    assert main(arguments) == 0
    for kind, ending in (("overlay", "_overlay.png"), ("label_map", "_labels.png")):
        name, content = result.file(kind, 0.3, "built-in")
        assert name == f"meadow{ending}"
        ours, theirs = Image.open(io.BytesIO(content)), Image.open(tmp_path / name)
        assert ours.mode == theirs.mode
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    ours = json.loads(result.file("summary", 0.3, "built-in")[1])
    theirs = json.loads((tmp_path / "meadow.json").read_text())
    assert (ours["labels"], ours["model"], ours["image"]) == (theirs["labels"], theirs["model"], "meadow.png")
    assert [one["area"] for one in ours["segments"]] == [one["area"] for one in theirs["segments"]]


def test_a_large_image_is_shown_smaller_and_saved_in_full(segmenter):
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 100), "green").save(buffer, format="PNG")
    wide = segment_upload(segmenter, buffer.getvalue(), ["grass", "sand"], "none", "../..//<b>.png")
    assert wide.image().shape == (51, 1024, 3)
    assert {mask.shape for mask, _ in wide.annotations()[0]} == {(51, 1024)}
    name, content = wide.file("label_map", 0.5, "built-in")
    assert re.fullmatch(r"[\w.-]+_labels\.png", name)
    assert Image.open(io.BytesIO(content)).size == (2000, 100)


def test_the_masks_are_the_label_map_and_the_legend_tells_the_areas(result, words):
    masks, colors = result.annotations()
    assert np.array_equal(sum(mask for mask, _ in masks), np.ones((128, 192)))
    for mask, name in masks:
        label, area = re.fullmatch(r"(.*)  ([\d.]+) %", name).groups()
        assert np.array_equal(mask == 1, result.shown.label_map.numpy() == words.index(label))
        assert float(area) == pytest.approx(100 * mask.mean(), abs=0.051)
        assert re.fullmatch("#[0-9a-f]{6}", colors[name])


def test_a_heat_map_glows_where_its_label_scores(result, words):
    scores = result.shown.heat_map("grass").numpy()
    glow, highest = result.heat("grass")
    assert highest == scores.max()
    where = result.shown.label_map.numpy() == words.index("grass")
    brightness = np.asarray(glow.convert("L"))
    assert brightness[where].mean() > brightness[~where].mean() + 50


def test_the_page_tells_nobody_about_its_visitors_or_its_folders(segmenter):
    page = make_page(segmenter.model, segmenter.processor, name=str(BUILTIN_MODEL))
    config = page.get_config_file()
    assert config["analytics_enabled"] is False
    assert {listener["api_visibility"] for listener in config["dependencies"]} == {"private"}
    assert str(REPOSITORY) not in json.dumps(config, default=str)


def test_another_models_page_shows_its_name_and_no_drawn_images(make_model, tokenizer):
    page = make_page(make_model(), SANProcessor(tokenizer=tokenizer, templates=["a {}"]), name=HOSTILE)
    blocks = {block.elem_id: block for block in page.blocks.values()}
    assert "san-examples" not in blocks
    assert "&lt;img" in blocks["san-head"].value
    assert "<img" not in blocks["san-head"].value


def test_the_command_says_which_package_is_missing(monkeypatch, san):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, [error] = san("app")
    assert code == 2
    assert 'pip install "modeling-san[app]"' in error


def test_a_port_that_is_none_or_taken_is_refused_in_a_line(san):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        for port, fact in (("0", "'0'"), ("70000", "70000"), (number, f"127.0.0.1:{number}")):
            code, _, [error] = san("app", "--port", port)
            assert code == 2
            assert fact in error


def test_the_command_says_where_the_page_is_which_begins_with_the_labels_given(monkeypatch, capsys):
    httpx = pytest.importorskip("httpx")
    served = []

    class Visit:
        """In place of waiting for Ctrl-C."""

        def wait(self):
            found = re.search(r"page: (http://127\.0\.0\.1:\d+/)", capsys.readouterr().out)
            served.append(httpx.get(f"{found[1]}config", timeout=30, trust_env=False).json())

    monkeypatch.setattr("modeling_san.hub_card.app._stopped_by_signals", lambda: contextlib.nullcontext(Visit()))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "elsewhere")
    assert main(["app", "--labels", "Sky, car|automobile"]) == 0
    [field] = [block for block in served[0]["components"] if block["props"].get("elem_id") == "san-words"]
    assert field["props"]["value"] == ["sky", "car|automobile"]
    assert os.environ["GRADIO_TEMP_DIR"] == "elsewhere"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
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
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert sorted(PACKAGES) == sorted(project["tool"]["setuptools"]["packages"])


def test_a_space_may_install_the_package_instead(tmp_path):
    folder = write_space(tmp_path / "space", "a/b", package="modeling-san @ https://example.org/modeling_san.whl")
    assert "https://example.org/modeling_san.whl" in (folder / "requirements.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]


@pytest.mark.parametrize(
    ("model_id", "package"),
    [
        *((model_id, None) for model_id in ("", "gpt", "a/b/c", "../model", 'a/b"); import os; ("', "a/b\nc")),
        *(("a/b", package) for package in ("modeling-san\nevil", "-r other.txt", "")),
    ],
)
def test_a_space_of_what_is_no_repository_or_no_package_is_refused(tmp_path, model_id, package):
    with pytest.raises(ValueError, match=r"repository|package"):
        write_space(tmp_path / "space", model_id, package=package)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_space_once(tmp_path, san):
    folder = tmp_path / "space"
    assert san("app", "--space", folder, "--model", "a/b")[0] == 0
    kept = (folder / "app.py").read_text()
    code, _, [error] = san("app", "--space", folder, "--model", "c/d")
    assert code == 2
    assert str(folder) in error
    assert (folder / "app.py").read_text() == kept
    assert san("app", "--space", tmp_path / "other")[0] == 2


@pytest.fixture(scope="module")
def server(space, tmp_path_factory):
    """The page of the built-in model, as a Space serves it: its process, address, and folder of temporary files."""
    folder = shutil.copytree(space, tmp_path_factory.mktemp("served") / "space")
    # What the page keeps for a while goes where the test can see it
    temporary, log = folder / "temporary", folder / "log"
    temporary.mkdir()
    places = {"SAN_MODEL": str(BUILTIN_MODEL), "GRADIO_SERVER_NAME": "127.0.0.1", "TMPDIR": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=folder,
            env={**os.environ, **places, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 180
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield SimpleNamespace(process=process, address=found[0], temporary=temporary)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(server):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=server.address, timeout=30, trust_env=False) as client:
        yield client


def ask(client, path):
    """Send what the page's button sends, past the page; returns the server's answer."""
    config = client.get("config").json()
    names = {block["id"]: block["props"].get("elem_id") for block in config["components"]}
    number = next(
        listener["id"]
        for listener in config["dependencies"]
        if listener["targets"] and names.get(listener["targets"][0][0]) == "san-run"
    )
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [image, ["grass", "sand"], "none"], "fn_index": number, "session_hash": "0123456789"}
    client.post("gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": "0123456789"}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                return message
    raise AssertionError("the server gave no answer")


def upload_past_the_page(client, name, content):
    return client.post("gradio_api/upload", files={"files": (name, content)})


def test_the_browser_is_told_to_load_nothing_from_elsewhere(client):
    answer = client.get("")
    assert "drawn images" in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(?:https?:)?//", answer.text)


def test_only_uploads_are_segmented_and_no_other_files_of_the_server(client, server, image):
    uploaded = upload_past_the_page(client, "image.png", image.read_bytes()).json()[0]
    assert ask(client, uploaded)["success"]
    outside = server.temporary / "outside.png"
    shutil.copy(image, outside)
    upload_folder = Path(uploaded).parents[1]
    for path in (str(image), str(outside), f"{upload_folder}/../outside.png", "/dev/zero"):
        assert not ask(client, path)["success"]


def test_a_visitor_cannot_have_the_server_fetch_an_address(client):
    with socket.create_server(("127.0.0.1", 0)) as visited:
        visited.settimeout(0.5)
        assert not ask(client, f"http://127.0.0.1:{visited.getsockname()[1]}/image.png")["success"]
        with pytest.raises(TimeoutError):
            visited.accept()


def test_the_server_does_not_take_files_over_the_limit(client):
    assert upload_past_the_page(client, "large.png", b"x" * (MAX_BYTES + 2**20)).status_code == 413


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
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 850}, **options})
        contexts.append(context)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.on("request", lambda request: browser.asked.append(request.url))
        page.goto(server.address)
        # An example is there from the start
        page.wait_for_selector("#san-painted .legend-item")
        return page

    yield open_page
    for context in contexts:
        context.close()


def segment(page, path, text):
    """Upload an image, write words in place of those there are, and wait for the result."""
    page.click("#san-image [aria-label='Clear'], #san-image [aria-label='Remove Image']")
    page.set_input_files("#san-image input[type=file]", path)
    page.wait_for_selector("#san-image img")
    write_words(page, text)
    before = page.locator("#san-painted .base-image").get_attribute("src")
    page.click("#san-run")
    page.wait_for_function(
        "(old) => document.querySelector('#san-painted .base-image').src !== old && "
        "document.querySelector('#san-painted .mask') && "
        "[...document.querySelectorAll('#san-painted img')].every((image) => image.complete && image.naturalWidth)",
        arg=before,
    )


def write_words(page, text):
    if page.locator("#san-words .token").count():
        page.click("#san-words [title=Clear]")
    page.click("#san-words input")
    page.keyboard.type(text)


def found(page):
    """What the legend says: areas by label."""
    return dict(text.rsplit(" ", 2)[:2] for text in page.locator("#san-painted .legend-item").all_inner_texts())


def label_under(page, row, column, size):
    """Move the pointer to the middle of a pixel of the image; returns what the page says of it."""
    frame = page.locator("#san-painted .base-image").bounding_box()
    scale = min(frame["width"] / size[1], frame["height"] / size[0])
    page.mouse.move(
        frame["x"] + frame["width"] / 2 + scale * (column + 0.5 - size[1] / 2),
        frame["y"] + frame["height"] / 2 + scale * (row + 0.5 - size[0] / 2),
    )
    return page.locator("#san-tip").inner_text().rsplit(" ", 2)[0].strip()


def saved(page, kind):
    with page.expect_download() as download:
        page.click(f"#san-{kind}")
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


@pytest.mark.browser
def test_an_image_and_words_become_labels_heat_maps_and_files(visit, image, words, result):
    page = visit()
    button = page.locator("#san-run").bounding_box()
    assert button["y"] + button["height"] < 850
    # All words in one line, not ended by Enter: what was typed counts when the button is pressed
    segment(page, image, ", ".join(words))
    page.wait_for_function(f"document.querySelectorAll('#san-words .token').length === {len(words)}")
    segments = result.shown.segments()
    assert found(page) == {one.label: f"{100 * one.area:.1f}" for one in segments}
    assert "brick" in page.locator("#san-notice").inner_text()
    label_map = result.shown.label_map.numpy()
    for row, column in ((20, 20), (64, 60), (64, 96), (100, 140)):
        assert label_under(page, row, column, label_map.shape) == words[label_map[row, column]]

    page.locator("#san-opacity input[type=range]").fill("30")
    page.wait_for_function("getComputedStyle(document.querySelector('#san-painted .mask')).opacity === '0.3'")
    for kind in ("overlay", "label_map"):
        assert saved(page, kind) == result.file(kind, 0.3, "")
    # The folder's name, and not where it lies on the server
    assert saved(page, "summary") == result.file("summary", 0.3, BUILTIN_MODEL.name)

    page.click(f"#san-painted .legend-item >> text={segments[1].label}")
    page.wait_for_selector(f"#san-heat >> text=score of {segments[1].label}")
    page.click("button[role=tab] >> text=Table")
    page.wait_for_selector(f"#san-table >> text={segments[0].pixels} >> visible=true")


@pytest.mark.browser
def test_bad_input_is_answered_in_a_sentence_and_loses_nothing(visit, tmp_path):
    page = visit()
    shown = found(page)
    page.click("#san-words [title=Clear]")
    page.click("#san-run")
    page.wait_for_selector("text=There are no words yet")
    (tmp_path / "letter.png").write_text("no image at all")
    page.click("#san-image [aria-label='Clear'], #san-image [aria-label='Remove Image']")
    page.set_input_files("#san-image input[type=file]", tmp_path / "letter.png")
    page.wait_for_timeout(500)
    write_words(page, "grass, sand")
    page.click("#san-run")
    page.wait_for_selector("text=no image that can be read")
    assert found(page) == shown


@pytest.mark.browser
def test_words_are_never_taken_for_html(visit, image):
    page = visit()
    segment(page, image, f"grass, {HOSTILE}, zebra")
    page.wait_for_selector("#san-notice >> text=not trained on")
    assert HOSTILE in page.locator("#san-words").inner_text()
    assert "zebra" in page.locator("#san-notice").inner_text()
    # Refused because of the doubled synonym, and quoted in the message
    write_words(page, f"{HOSTILE}|{HOSTILE}")
    page.click("#san-run")
    page.wait_for_selector("text=write each synonym once")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None


@pytest.mark.browser
def test_two_visitors_at_once_see_their_own_images_only(visit, image, words, tmp_path):
    other = tmp_path / "snow.png"
    load_examples()[2].image.resize((150, 150)).save(other)
    first, second = visit(), visit()
    segment(first, image, ", ".join(words))
    segment(second, other, "snow, water")
    for page, name, size in ((first, "meadow.png", (192, 128)), (second, "snow.png", (150, 150))):
        summary = json.loads(saved(page, "summary")[1])
        assert (summary["image"], summary["width"], summary["height"]) == (name, *size)


@pytest.mark.browser
def test_the_page_fits_a_phone_and_follows_its_colours(visit):
    background = "getComputedStyle(document.body).backgroundColor"
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    brightness = {}
    for scheme in ("light", "dark"):
        page = visit(**phone, color_scheme=scheme)
        labels = load_examples()[2].labels
        page.tap("#san-examples button >> nth=2")
        page.wait_for_selector(f"#san-painted .legend-item >> text={labels[0]}")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#san-painted .base-image").bounding_box()["width"] > 300
        brightness[scheme] = sum(map(int, re.findall(r"\d+", page.evaluate(background))[:3]))
    assert brightness["light"] > 600
    assert brightness["dark"] < 200


@pytest.mark.browser
def test_nothing_was_fetched_from_elsewhere(browser, server):
    assert browser.asked
    elsewhere = [url for url in browser.asked if not url.startswith((server.address, "data:", "blob:"))]
    assert elsewhere == []


def test_nothing_uploaded_is_left_when_the_server_ends(server, client):
    answer = upload_past_the_page(client, "secret.png", b"secret")
    assert server.temporary in Path(answer.json()[0]).parents
    server.process.terminate()
    assert server.process.wait(20) == 0
    left = [path for path in server.temporary.rglob("*") if path.is_file() and path.name != "outside.png"]
    assert left == []
