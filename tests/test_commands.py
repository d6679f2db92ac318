"""The console command: what it writes, what it says, and how it refuses."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file

from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANImageProcessor, SANProcessor
from modeling_san.commands.main import _COMMANDS, main, make_parser
from modeling_san.processing import label_colors

LABELS = ("sky", "road", "red truck")
ESCAPE = "\x1b[31m"


@pytest.fixture(scope="session")
def model_folder(make_config, make_model, tokenizer, tmp_path_factory):
    """A tiny model with random weights, no stored labels, and room for long prompts, as save_pretrained writes it."""
    long_tokenizer = copy.deepcopy(tokenizer)
    long_tokenizer.model_max_length = 96
    text_config = {**make_config().text_config.to_dict(), "max_position_embeddings": 96}
    folder = tmp_path_factory.mktemp("model") / "tiny-san"
    make_model(text_config=text_config).save_pretrained(folder)
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    SANProcessor(image_processor, long_tokenizer, templates=["a photo of a {}.", "{}"]).save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(model_folder, tmp_path):
    """A copy of the model's folder to change or damage."""
    return shutil.copytree(model_folder, tmp_path / "changed-model")


@pytest.fixture
def image(tmp_path):
    """Path of an image, 90 pixels wide and 60 high."""
    return save_image(tmp_path / "street.png")


@pytest.fixture
def san(capsys):
    """Runs `san` and returns its exit code and the lines it wrote to standard output and standard error."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        written = capsys.readouterr()
        return code, written.out.splitlines(), written.err.splitlines()

    return run


@pytest.fixture
def segment(san, model_folder, tmp_path):
    """Runs `san segment` with the tiny model, into the folder `out`."""

    def run(*arguments, labels="sky, road, red truck", model=model_folder, output=tmp_path / "out"):
        given = [] if labels is None else ["--labels", labels]
        return san("segment", *arguments, *given, "--model", model, "--output", output)

    return run


def save_image(path, seed=0, size=(90, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).save(path)
    return path


def write_unless_missing(path, content):
    if content is not None:
        path.write_bytes(content)
    return path


def read_summary(folder, name="street"):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_refused(result, *facts):
    """Exit code 2, nothing on standard output, and one line that holds the facts."""
    code, out, err = result
    assert (code, out, len(err)) == (2, [], 1), err
    assert err[0].startswith("san: error: ")
    for fact in facts:
        assert str(fact) in err[0]


# The parser


def test_help_loads_nothing_heavy_and_one_command_none_of_the_others():
    code = (
        "import sys; sys.argv = ['/usr/bin/san']; from modeling_san.commands.main import make_parser; "
        "make_parser(['segment']).format_help(); "
        "print('modeling_san.commands.train' in sys.modules); make_parser().format_help(); "
        "print({'torch', 'transformers', 'numpy', 'PIL', 'datasets', 'tqdm'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == ("False\nset()\n", "")


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_is_listed_and_explains_itself_with_an_example(san, command):
    assert command in make_parser().format_help()
    code, out, _ = san(command, "--help")
    assert code == 0
    assert any(line.strip().startswith(f"san {command}") for line in out[out.index("example:") :])


def test_version_is_the_packages(san):
    import modeling_san

    assert san("--version") == (0, [f"san {modeling_san.__version__}"], [])


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ((), "COMMAND"),
        (("paint",), "paint"),
        (("segment",), "IMAGE"),
        (("segment", "a.png", "--colour"), "--colour"),
        (("segment", "a.png", "--opacity", "2"), "'2'"),
        (("segment", "a.png", "--threshold", "nan"), "'nan'"),
        (("segment", "a.png", "--extend-labels", "ade"), "coco-stuff"),
        (("segment", "a.png", "--labels", "sky", "--labels-file", "classes.json"), "--labels-file"),
        (("prepare", "ade20k_150", "in", "out", "--workers", "0"), "'0'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(san, arguments, fact):
    assert_refused(san(*arguments), fact, "--help")


# Segmentation


def test_overlay_label_image_summary_and_printed_line_agree(segment, image, model_folder, tmp_path):
    code, [line], err = segment(image)
    assert (code, err) == (0, [])
    summary = read_summary(tmp_path / "out")
    assert (summary["width"], summary["height"]) == (90, 60)
    assert (summary["image"], summary["model"]) == (str(image), str(model_folder))
    assert summary["labels"] == list(LABELS)
    assert sum(part["area"] for part in summary["segments"]) == pytest.approx(1)

    label_map = Image.open(tmp_path / "out" / summary["label_map"])
    assert (label_map.mode, label_map.size) == ("P", (90, 60))
    assert label_map.getpalette()[:9] == label_colors(LABELS).ravel().tolist()
    indices = np.asarray(label_map)
    for part in summary["segments"]:
        assert part["pixels"] == (indices == LABELS.index(part["label"])).sum()
        assert part["score"] > 0

    largest = summary["segments"][0]
    assert line.startswith(f"{image}: {largest['label']} {largest['area']:.0%}")
    assert str(tmp_path / "out" / summary["overlay"]) in line


def test_segment_finds_what_the_python_interface_finds(segment, image, model_folder, tmp_path):
    segment(image)
    model = SANForOpenVocabSegmentation.from_pretrained(model_folder)
    processor = SANProcessor.from_pretrained(model_folder)
    image = Image.open(image)
    with torch.no_grad():
        outputs = model(**processor(images=image, text=list(LABELS), return_tensors="pt"))
    [expected] = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "street_labels.png")), expected.numpy())


def test_a_turned_photograph_is_segmented_upright(segment, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60), "green").save(tmp_path / "turned.jpg", exif=exif)
    segment(tmp_path / "turned.jpg")
    assert Image.open(tmp_path / "out" / "turned_labels.png").size == (60, 90)


def test_images_of_one_name_do_not_replace_each_other(segment, tmp_path):
    names = ("one/street.png", "two/street.png", "two/Street.bmp", "two/street-2.png")
    paths = [save_image(tmp_path / name, seed) for seed, name in enumerate(names)]
    code, out, _ = segment(*paths, paths[0])
    assert (code, len(out)) == (0, 4)
    sources = {read_summary(tmp_path / "out", path.stem)["image"] for path in (tmp_path / "out").glob("*.json")}
    assert sources == set(map(str, paths))
    assert read_summary(tmp_path / "out", "street-2")["image"] == str(paths[3])


def test_results_never_replace_an_image(segment, tmp_path):
    paths = [save_image(tmp_path / "out" / "a.png"), save_image(tmp_path / "out" / "a_overlay.png", 1)]
    before = [path.read_bytes() for path in paths]
    assert segment(*paths)[0] == 0
    assert [path.read_bytes() for path in paths] == before


def test_a_dash_reads_paths_from_standard_input(segment, tmp_path, monkeypatch):
    paths = [save_image(tmp_path / f"{number} of 2.png", number) for number in (1, 2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{paths[0]}\n\n{paths[1]}\n"))
    code, out, err = segment("-")
    assert code == 0
    assert [line.split(": ")[0] for line in out] == list(map(str, paths))
    assert any("/2" in line for line in err)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_refused(segment("-"), "standard input")


def test_pixels_that_no_label_is_sure_of_become_other(segment, image, tmp_path):
    areas = []
    for threshold in (0, 0.5, 1):
        segment(image, "--threshold", threshold, labels="brick, red plain", model=BUILTIN_MODEL)
        summary = read_summary(tmp_path / "out")
        assert ("other" in summary["labels"]) == (threshold > 0)
        areas.append(sum(part["area"] for part in summary["segments"] if part["label"] == "other"))
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]


def test_a_full_disk_leaves_no_part_of_a_file(segment, image, tmp_path, monkeypatch):
    def write_bytes(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert_refused(segment(image), image, "No space left")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_terminal_would_obey_is_printed_escaped(segment, tmp_path):
    path = save_image(tmp_path / f"{ESCAPE}street.png")
    code, out, err = segment(path, tmp_path / f"missing{ESCAPE}.png", labels=f"sky{ESCAPE}")
    assert code == 2
    assert sum(line.count(r"\x1b[31m") for line in out) >= 2
    assert any(r"missing\x1b[31m" in line for line in err)
    assert ESCAPE not in "".join(out + [line for line in err if "error" in line])
    assert read_summary(tmp_path / "out", path.stem)["image"] == str(path)


def test_a_file_name_may_be_any_bytes(segment, image, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(image, path)
    assert segment(path)[0] == 0
    assert read_summary(tmp_path / "out", path.stem)["image"].endswith("caf\ufffd.png")


# Labels and templates


@pytest.mark.parametrize(
    ("option", "name", "content"),
    [
        ("--labels", "classes.json", '{"classes": ["sky", "Road", "red  truck"], "ignore_index": 255}'),
        ("--labels-file", "classes", "sky\nroad\n\nred truck\n"),
    ],
)
def test_labels_may_come_from_a_file(segment, image, tmp_path, option, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert segment(image, option, tmp_path / name, labels=None)[0] == 0
    assert read_summary(tmp_path / "out")["labels"] == list(LABELS)


def test_labels_may_be_a_set_that_ships_with_the_package(segment, image, tmp_path):
    assert segment(image, labels="pascal_voc_20")[0] == 0
    assert len(read_summary(tmp_path / "out")["labels"]) == 20


def test_a_label_is_not_read_from_a_file_that_happens_to_have_its_name(segment, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sky", "sky.txt"):
        (tmp_path / name).write_text("road\nred truck\n")
    for given, labels in (("sky", ["sky"]), ("sky.txt", ["road", "red truck"]), ("./sky", ["road", "red truck"])):
        assert segment(image, labels=given)[0] == 0
        assert read_summary(tmp_path / "out")["labels"] == labels


@pytest.mark.parametrize(
    ("labels", "fact"),
    [
        ("", "--labels"),
        (" ", "--labels"),
        ("sky,,road", "label 1"),
        ("sky, Sky", "'sky'"),
        ("pascal_voc_21", "pascal_voc_20"),
        ("missing.json", "missing.json"),
        ("sky, " + "very " * 50 + "long", "very"),
        (None, "--labels"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(segment, image, labels, fact):
    assert_refused(segment(image, labels=labels), fact)


@pytest.mark.parametrize(
    ("option", "content", "fact"),
    [
        ("--labels-file", None, "check"),
        ("--labels-file", b'{"names": ["sky"]}', "'names'"),
        ("--labels-file", b'["sky", "road"', "JSON"),
        ("--labels-file", b"\xff\xfe\x00sky", "UTF-8"),
        ("--templates", None, "vild"),
        ("--templates", b"a photo", "'a photo'"),
        ("--templates", b"", "empty"),
        ("--templates", b'{"prompts": 3}', "'prompts'"),
    ],
)
def test_a_file_of_labels_or_templates_that_cannot_be_used_is_refused(segment, image, tmp_path, option, content, fact):
    path = write_unless_missing(tmp_path / "given.txt", content)
    labels = None if option == "--labels-file" else "sky"
    assert_refused(segment(image, option, path, labels=labels), path, fact)


def test_without_labels_those_stored_with_the_model_are_used(segment, model_copy, image, tmp_path):
    model = SANForOpenVocabSegmentation.from_pretrained(model_copy)
    model.set_labels(["tree", "car"], SANProcessor.from_pretrained(model_copy))
    model.save_pretrained(model_copy)
    code, _, err = segment(image, labels=None, model=model_copy)
    assert (code, err) == (0, [])
    assert read_summary(tmp_path / "out")["labels"] == ["tree", "car"]


@pytest.mark.parametrize(("labels", "shown"), [("sky", ["sky", "other"]), ("other, sky", ["other", "sky"])])
def test_what_an_added_name_wins_becomes_other(segment, image, tmp_path, labels, shown):
    code, _, err = segment(image, "--extend-labels", "coco-stuff", "--templates", "vild", labels=labels)
    assert (code, err) == (0, [])
    summary = read_summary(tmp_path / "out")
    assert (summary["labels"], summary["extended_by"]) == (shown, "coco-stuff")
    # One name against ninety cannot win everywhere with random weights
    assert "other" in [part["label"] for part in summary["segments"]]
    assert np.asarray(Image.open(tmp_path / "out" / "street_labels.png")).max() <= 1


def test_templates_change_the_prompts(segment, image, tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("tree {}\ncar {}\n")
    scores = []
    for options in ((), ("--templates", path), ("--templates", "vild")):
        assert segment(image, *options)[0] == 0
        scores.append(read_summary(tmp_path / "out")["segments"][0]["score"])
    assert len(set(scores)) == 3


def test_words_the_model_was_not_trained_on_are_named_once_with_those_it_was(segment, model_copy, image):
    change_config(model_copy, training_labels=["sky", "tree"])
    code, _, [line] = segment(image, labels="sky, road, car|tree", model=model_copy)
    assert code == 0
    assert line.startswith("san: warning: ")
    assert "road, car;" in line
    assert line.endswith("sky, tree")
    assert segment(image, labels="sky, tree", model=model_copy)[2] == []


# Images that cannot be segmented


def save_half(path):
    whole = save_image(path.with_suffix(".png")).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


BAD_IMAGES = {
    "missing": (lambda path: None, "No such file"),
    "null\0byte": (lambda path: None, "null"),
    "truncated": (save_half, "truncated"),
    "zero-byte": (lambda path: path.touch(), "0 bytes"),
    "text": (lambda path: path.write_text("This is no image.\n"), "cannot identify"),
    "huge": (lambda path: Image.new("1", (20_000, 5_000)).save(path, format="png"), "pixels"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "endless-link": (lambda path: path.symlink_to(path), "symbolic links"),
}
"""What makes a file that is no image, and what is said of it."""


@pytest.fixture
def bad_image(tmp_path):
    """Makes one of them."""

    def make(kind):
        path = tmp_path / f"{kind}.jpg"
        BAD_IMAGES[kind][0](path)
        return path

    return make


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_refused_in_one_line(segment, bad_image, kind):
    path = bad_image(kind)
    assert_refused(segment(path), str(path).replace("\0", r"\x00"), BAD_IMAGES[kind][1])


def test_an_image_that_is_a_program_is_not_run(segment, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    path = tmp_path / "program.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert_refused(segment(path), path)


def test_good_images_are_done_beside_bad_ones(segment, bad_image, image, tmp_path):
    other = save_image(tmp_path / "other.png", 1)
    code, out, err = segment(bad_image("text"), image, bad_image("zero-byte"), bad_image("endless-link"), other)
    assert (code, len(out)) == (2, 2)
    assert sum("san: error: " in line for line in err) == 3
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"street.json", "other.json"}


def test_an_output_folder_that_cannot_be_written_is_refused(segment, image):
    for output in (image, image / "below"):
        assert_refused(segment(image, output=output), output, "--output")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(segment, image, device):
    assert_refused(segment(image, "--device", device), device, "cpu")


# Models


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def leave_out_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "mask_decoder" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: change_config(folder, model_type="clip"), "'clip'"),
        (lambda folder: change_config(folder, model_type="nothing-known"), "'nothing-known'"),
        (lambda folder: change_config(folder, num_queries=7), "other shapes"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (damage_weights, "cannot be loaded"),
        (leave_out_weights, "mask_decoder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "processor_config.json").unlink(), "cannot be loaded"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(segment, model_copy, image, damage, fact):
    damage(model_copy)
    assert_refused(segment(image, model=model_copy), model_copy, fact)


def test_what_is_no_model_is_refused(segment, image):
    assert_refused(segment(image, model=image), image, "is a file")
    assert_refused(segment(image, model="nobody/nothing"), "nobody/nothing", "Hub")


def test_code_in_a_model_folder_is_never_run(segment, model_copy, image, tmp_path):
    trap = tmp_path / "trap-sprang"
    (model_copy / "trap.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    change_config(model_copy, auto_map={"AutoConfig": "trap.Config", "AutoModel": "trap.Model"})
    assert segment(image, model=model_copy)[0] == 0
    assert not trap.exists()


# Ends of a run


def test_an_interrupted_command_ends_quietly(segment, image, monkeypatch):
    from modeling_san.commands import models

    monkeypatch.setattr(models, "load_model", Mock(side_effect=KeyboardInterrupt))
    assert segment(image) == (130, [], [])


def test_the_console_command_does_what_main_does(model_folder, image, bad_image, tmp_path):
    arguments = [image, bad_image("text"), "--labels", "sky, road", "--model", model_folder, "--device", "cpu"]
    finished = subprocess.run(
        [sys.executable, "-m", "modeling_san.commands.main", "segment", *arguments, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert len(finished.stdout.splitlines()) == 1
    assert "Traceback" not in finished.stderr
    assert (tmp_path / "out" / "street_overlay.png").is_file()


# The other commands


def test_demo_segments_its_image_and_prints_the_results_of_the_model(san, model_copy, tmp_path):
    from modeling_san.builtin import format_results
    from modeling_san.training.metrics import RESULTS_FILE

    scores = {"seen": 0.8, "never seen": 0.6, "backgrounds": 0.9}
    figures = {"bias on": scores, "bias off": {group: score / 4 for group, score in scores.items()}}
    (model_copy / RESULTS_FILE).write_text(json.dumps(figures))
    code, out, err = san("demo", "--model", model_copy, "--output", tmp_path / "out")
    assert (code, err) == (0, [])
    assert any(str(tmp_path / "out" / "demo_overlay.png") in line for line in out)
    assert "\n".join(out).endswith(format_results(figures))
    assert Image.open(tmp_path / "out" / "demo.png").size == Image.open(tmp_path / "out" / "demo_labels.png").size


def test_a_model_trained_on_ones_own_images_segments_with_their_labels(san, segment, model_folder, image, tmp_path):
    rows = {"image": [], "annotation": []}
    for seed in range(4):
        path = save_image(tmp_path / "images" / f"{seed}.png", seed, (64, 64))
        label_map = io.BytesIO()
        Image.fromarray((np.arange(64) >= 24 + seed).astype(np.uint8)[None].repeat(64, 0)).save(label_map, "png")
        rows["image"].append({"bytes": path.read_bytes(), "path": None})
        rows["annotation"].append({"bytes": label_map.getvalue(), "path": None})
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "classes.json").write_text('{"classes": ["Sky", "road"]}')
    code, _, _ = san(
        *("train", "--config", "fine_tune", "--model", model_folder, "--output_dir", tmp_path / "new"),
        *("--dataset", tmp_path / "data.parquet", "--labels", tmp_path / "classes.json"),
        *("--steps", 1, "--warmup_steps", 0, "--batch_size", 2, "--cpu", "true"),
    )
    assert code == 0
    assert segment(image, labels=None, model=tmp_path / "new")[0] == 0
    assert read_summary(tmp_path / "out")["labels"] == ["sky", "road"]


# Conversion


@pytest.fixture(scope="session")
def checkpoint(reference, reference_weights, tmp_path_factory):
    """A checkpoint file of the reference's tiny model."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    torch.save({"model": reference_weights.make_state_dict(reference / "tiny_shapes.json")}, path)
    return path


@pytest.fixture(scope="session")
def clip_tokenizer_folder(clip_processor, tmp_path_factory):
    """CLIP's tokenizer, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    clip_processor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def convert(san, clip_tokenizer_folder, reference):
    """Runs `san convert` on the reference's tiny model."""

    def run(*arguments, tokenizer=clip_tokenizer_folder):
        return san("convert", *arguments, "--config", reference / "tiny_config.json", "--tokenizer", tokenizer)

    return run


def test_a_converted_checkpoint_segments(convert, segment, checkpoint, image, tmp_path):
    model = tmp_path / "new" / "model"
    code, out, err = convert(checkpoint, model)
    assert (code, err) == (0, [])
    assert str(model) in out[0]
    assert [path.name for path in model.parent.iterdir()] == ["model"]
    (tmp_path / "any file").touch()
    assert (model / "model.safetensors").stat().st_mode == (tmp_path / "any file").stat().st_mode
    processor = SANProcessor.from_pretrained(model)
    assert (processor.templates_name, len(processor.tokenizer)) == ("vild", 49408)
    code, _, err = segment(image, model=model)
    assert (code, err) == (0, [])


def test_a_model_is_replaced_only_when_asked_for(convert, checkpoint, model_copy, tmp_path):
    before = (model_copy / "model.safetensors").read_bytes()
    assert_refused(convert(checkpoint, model_copy), model_copy, "--overwrite")
    assert (model_copy / "model.safetensors").read_bytes() == before
    assert convert(checkpoint, model_copy, "--overwrite")[0] == 0
    assert (model_copy / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == [model_copy.name]


def test_a_folder_that_is_no_model_is_never_replaced(san, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(san("convert", "any.pth", tmp_path, "--overwrite"), tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(("source", "fact"), [("hub:vit-b-16", "network"), ("hub:vit-h-14", "hub:vit-b-16")])
def test_a_released_checkpoint_that_cannot_be_had_is_refused_and_nothing_written(san, source, fact, tmp_path):
    assert_refused(san("convert", source, tmp_path / "model"), fact)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_missing_or_another_models_is_refused(convert, checkpoint, model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for tokenizer, fact in ((tmp_path / "empty", "empty"), ("nobody/nothing", "nothing"), (model_folder, "49408")):
        assert_refused(convert(checkpoint, tmp_path / "model", tokenizer=tokenizer), fact, "--tokenizer")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(san, tmp_path, content):
    path = write_unless_missing(tmp_path / "damaged.pth", content)
    assert_refused(san("convert", path, tmp_path / "model"), path)


def test_a_checkpoint_of_another_model_is_refused(san, clip_tokenizer_folder, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    arguments = (tmp_path / "other.pth", tmp_path / "model", "--tokenizer", clip_tokenizer_folder)
    assert_refused(san("convert", *arguments), "other.pth")


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"MODEL.SAN": {}}'])
def test_a_config_that_cannot_be_used_is_refused(san, tmp_path, content):
    path = write_unless_missing(tmp_path / "config.json", content)
    assert_refused(san("convert", "any.pth", tmp_path / "model", "--config", path), path)
