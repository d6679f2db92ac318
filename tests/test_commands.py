"""The console command: what it writes, what it says, and how it refuses."""

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
from conftest import coarse_image
from datasets import Dataset, DatasetDict
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file

from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.builtin import format_results
from modeling_san.commands.main import _COMMANDS, make_parser
from modeling_san.processing import label_colors, load_vocabulary
from modeling_san.training.metrics import RESULTS_FILE

LABELS = ("sky", "road", "red truck")
ESCAPE = "\x1b[31m"


@pytest.fixture
def model_copy(model_folder, tmp_path):
    """A copy of the model's folder to change or damage."""
    return shutil.copytree(model_folder, tmp_path / "changed-model")


@pytest.fixture
def image(tmp_path):
    """Path of an image, 90 pixels wide and 60 high."""
    return save_image(tmp_path / "street.png")


@pytest.fixture
def segment(san, model_folder, tmp_path):
    """Runs `san segment` with the tiny model, into the folder `out`."""

    def run(*arguments, labels="sky, road, red truck", model=model_folder, output=tmp_path / "out"):
        given = [] if labels is None else ["--labels", labels]
        return san("segment", *given, "--model", model, "--output", output, *arguments)

    return run


def save_image(path, seed=0, size=(90, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse_image(seed, size).save(path)
    return path


def read_summary(folder, name="street"):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_layers(folder, number):
    """The config of the image encoder, with fewer layers than the weights have."""
    vision_config = json.loads((folder / "config.json").read_text())["vision_config"]
    return {**vision_config, "num_hidden_layers": number}


def assert_refused(result, *facts):
    """Exit code 2, nothing on standard output, and one line that holds the facts."""
    code, out, err = result
    assert (code, out, len(err)) == (2, [], 1), err
    assert err[0].startswith("san: error: ")
    for fact in facts:
        assert str(fact) in err[0]


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


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ((), "COMMAND"),
        (("paint",), "paint"),
        (("segment", "a.png", "--colour"), "--colour"),
        (("segment", "a.png", "--threshold", "nan"), "'nan'"),
        (("segment", "a.png", "--extend-labels", "ade"), "coco-stuff"),
        (("segment", "a.png", "--labels", "sky", "--labels-file", "classes.json"), "--labels-file"),
        (("prepare", "ade20k_150", "in", "out", "--workers", "0"), "'0'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(san, arguments, fact):
    assert_refused(san(*arguments), fact, "--help")


def test_overlay_label_image_summary_and_printed_line_agree_with_the_python_interface(
    segment, image, model_folder, tmp_path
):
    code, [line], err = segment(image)
    assert (code, err) == (0, [])
    summary = read_summary(tmp_path / "out")
    assert (summary["width"], summary["height"]) == (90, 60)
    assert (summary["image"], summary["model"]) == (str(image), str(model_folder))
    assert summary["labels"] == list(LABELS)
    assert sum(part["area"] for part in summary["segments"]) == pytest.approx(1)

    model = SANForOpenVocabSegmentation.from_pretrained(model_folder)
    processor = SANProcessor.from_pretrained(model_folder)
    with torch.no_grad():
        outputs = model(**processor(images=Image.open(image), text=list(LABELS), return_tensors="pt"))
    [expected] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(60, 90)])
    label_map = Image.open(tmp_path / "out" / summary["label_map"])
    assert label_map.mode == "P"
    assert label_map.getpalette()[:9] == label_colors(LABELS).ravel().tolist()
    indices = np.asarray(label_map)
    assert np.array_equal(indices, expected.numpy())
    for part in summary["segments"]:
        assert part["pixels"] == (indices == LABELS.index(part["label"])).sum()
        assert part["score"] > 0

    largest = summary["segments"][0]
    assert line.startswith(f"{image}: {largest['label']} {largest['area']:.0%}")
    assert str(tmp_path / "out" / summary["overlay"]) in line


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
    assert segment(image, "--threshold", 1)[0] == 0
    summary = read_summary(tmp_path / "out")
    assert summary["labels"] == [*LABELS, "other"]
    assert "other" in [part["label"] for part in summary["segments"]]


def test_large_images_are_seen_in_windows(segment, image, tmp_path):
    labels = []
    for options in ((), ("--window", 64), ("--window", 640)):
        assert segment(image, *options)[0] == 0
        labels.append(np.asarray(Image.open(tmp_path / "out" / "street_labels.png")))
    assert np.array_equal(labels[0], labels[2])
    assert not np.array_equal(labels[0], labels[1])
    assert_refused(segment(image, "--window", 8), "window is 8")


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


def test_names_that_a_model_brings_are_printed_escaped(segment, image, tmp_path):
    model = shutil.copytree(BUILTIN_MODEL, tmp_path / "model")
    names = json.loads((model / "config.json").read_text())["id2label"]
    names = {index: f"{ESCAPE}{name}" for index, name in names.items()}
    change_config(model, id2label=names, label2id={name: int(index) for index, name in names.items()})
    code, out, err = segment(image, labels=None, model=model)
    assert code == 0, err
    assert r"\x1b[31m" in out[0]
    assert ESCAPE not in "".join(out + err)


def test_what_the_package_logs_is_said_in_one_line_and_escaped(san, tmp_path):
    data = tmp_path / f"data{ESCAPE}"
    rows = {"image": [Image.new("RGB", (64, 64))], "annotation": [Image.new("L", (64, 64))]}
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(str(data))
    options = ("--labels", f"sky{ESCAPE}, road", "--count", 1, "--output", tmp_path / "sheet.png")
    code, out, err = san("contact-sheet", "--dataset", data, *options)
    assert code == 0, err
    [warning] = [line for line in err if "no split" in line]
    assert warning.startswith("san: warning: ")
    assert r"data\x1b[31m" in warning
    assert any(r"sky\x1b[31m" in line for line in out)
    assert ESCAPE not in "".join([warning, *out])


def test_a_file_name_may_be_any_bytes(segment, image, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(image, path)
    assert segment(path)[0] == 0
    assert read_summary(tmp_path / "out", path.stem)["image"].endswith("caf\ufffd.png")


@pytest.mark.parametrize(
    ("option", "given", "labels"),
    [
        ("--labels", "classes.json", LABELS),
        ("--labels-file", "classes", LABELS),
        ("--labels", "sky.txt", ("road", "red truck")),
        ("--labels", "./sky", ("road", "red truck")),
        ("--labels", "sky", ("sky",)),  # not read from the file that happens to have its name
        ("--labels", "pascal_voc_20", load_vocabulary("pascal_voc_20").classes),
    ],
)
def test_labels_may_be_names_or_a_file_or_a_set_of_the_package(
    segment, image, tmp_path, monkeypatch, option, given, labels
):
    monkeypatch.chdir(tmp_path)
    Path("classes.json").write_text('{"classes": ["sky", "Road", "red  truck"], "ignore_index": 255}')
    Path("classes").write_text("sky\nroad\n\nred truck\n")
    for name in ("sky", "sky.txt"):
        Path(name).write_text("road\nred truck\n")
    assert segment(image, option, given, labels=None)[0] == 0
    assert read_summary(tmp_path / "out")["labels"] == list(labels)


@pytest.mark.parametrize(
    ("option", "value", "fact"),
    [
        (None, None, "--labels"),
        ("--labels", "", "--labels"),
        ("--labels", "sky, Sky", "'sky'"),
        ("--labels", "pascal_voc_21", "pascal_voc_20"),
        ("--labels", "missing.json", "missing.json"),
        ("--labels", "sky, " + "very " * 50 + "long", "very"),
        ("--labels-file", "missing", "check"),
        ("--labels-file", "names", "'names'"),
        ("--labels-file", "half", "JSON"),
        ("--labels-file", "bytes", "UTF-8"),
        ("--templates", "missing", "vild"),
        ("--templates", "photo", "'a photo'"),
        ("--templates", "empty", "empty"),
        ("--templates", "number", "'prompts'"),
    ],
)
def test_labels_and_templates_that_cannot_be_used_are_refused(
    segment, image, tmp_path, monkeypatch, option, value, fact
):
    monkeypatch.chdir(tmp_path)
    files = {"names": b'{"names": ["sky"]}', "half": b'["sky", "road"', "bytes": b"caf\xe9"}
    files |= {"photo": b"a photo", "empty": b"", "number": b'{"prompts": 3}'}
    for name, content in files.items():
        Path(name).write_bytes(content)
    given = () if option is None else (option, value)
    named = value if option in ("--labels-file", "--templates") else fact
    assert_refused(segment(image, *given, labels="sky" if option == "--templates" else None), named, fact)


def test_without_labels_those_stored_with_the_model_are_used(segment, model_copy, image, tmp_path):
    model = SANForOpenVocabSegmentation.from_pretrained(model_copy)
    model.set_labels(["tree", "car"], SANProcessor.from_pretrained(model_copy))
    model.save_pretrained(model_copy)
    code, _, err = segment(image, labels=None, model=model_copy)
    assert (code, err) == (0, [])
    assert read_summary(tmp_path / "out")["labels"] == ["tree", "car"]


def test_what_an_added_name_wins_becomes_other(segment, image, tmp_path):
    code, _, err = segment(image, "--extend-labels", "coco-stuff", "--templates", "vild", labels="sky")
    assert (code, err) == (0, [])
    summary = read_summary(tmp_path / "out")
    assert (summary["labels"], summary["extended_by"]) == (["sky", "other"], "coco-stuff")
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


def save_half(path):
    whole = save_image(path.with_suffix(".png")).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


BAD_IMAGES = {
    "missing": (lambda path: None, "there is no file"),
    "two\nlines": (lambda path: None, "there is no file"),
    os.fsdecode(b"caf\xe9"): (lambda path: None, "there is no file"),
    "n" * 300: (lambda path: None, "too long"),
    "null\0byte": (lambda path: None, "null"),
    "truncated": (save_half, "truncated"),
    "zero-byte": (lambda path: path.touch(), "0 bytes"),
    "text": (lambda path: path.write_text("This is no image.\n"), "cannot identify"),
    "huge": (lambda path: Image.new("1", (20_000, 5_000)).save(path, format="png"), "pixels"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "endless-link": (lambda path: path.symlink_to(path), "symbolic links"),
}
"""What makes a file that is no image, and what is said of it."""


def test_each_bad_image_is_refused_in_one_line_and_the_good_ones_beside_them_are_done(segment, image, tmp_path):
    paths = [tmp_path / "bad" / f"{kind}.jpg" for kind in BAD_IMAGES]
    paths[0].parent.mkdir()
    for path, (make, _) in zip(paths, BAD_IMAGES.values(), strict=True):
        make(path)
    other = save_image(tmp_path / "other.png", 1)
    code, out, err = segment(image, *paths, other)
    assert (code, len(out)) == (2, 2)
    errors = [line for line in err if "san: error: " in line]
    for path, (_, fact), line in zip(paths, BAD_IMAGES.values(), errors, strict=True):
        assert repr(str(path)) in line
        assert fact in line
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"street.json", "other.json"}


def test_an_image_that_is_a_program_is_not_run(segment, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    path = tmp_path / "program.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert_refused(segment(path), path)


@pytest.mark.parametrize(
    ("option", "value", "fact"),
    [
        ("--output", "street.png", "street.png"),
        ("--output", "street.png/below", "street.png/below"),
        ("--device", "cuda:99", "cpu"),
        ("--device", "abacus", "cpu"),
        ("--model", "street.png", "is a file"),
        ("--model", "nobody/nothing", "Hub"),
    ],
)
def test_what_is_not_there_is_refused(segment, image, monkeypatch, option, value, fact):
    monkeypatch.chdir(image.parent)
    assert_refused(segment(image, option, value), value, fact)


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
        (lambda folder: change_config(folder, vision_config=with_layers(folder, 3)), "vision_model.encoder.layers.3"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "cannot be loaded"),
        (leave_out_weights, "mask_decoder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "processor_config.json").unlink(), "cannot be loaded"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(segment, model_copy, image, damage, fact):
    damage(model_copy)
    assert_refused(segment(image, model=model_copy), model_copy, fact)


def test_code_in_a_model_folder_is_never_run(segment, model_copy, image, tmp_path):
    trap = tmp_path / "trap-sprang"
    (model_copy / "trap.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    change_config(model_copy, auto_map={"AutoConfig": "trap.Config", "AutoModel": "trap.Model"})
    assert segment(image, model=model_copy)[0] == 0
    assert not trap.exists()


def test_an_interrupted_command_ends_quietly(segment, image, monkeypatch):
    from modeling_san.commands import models

    monkeypatch.setattr(models, "load_model", Mock(side_effect=KeyboardInterrupt))
    assert segment(image) == (130, [], [])


@pytest.mark.slow
def test_the_console_command_does_what_main_does(model_folder, image, tmp_path):
    arguments = [image, "missing.png", "--labels", "sky", "--model", model_folder, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "modeling_san.commands.main", "segment", *arguments, "--device", "cpu"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, len(finished.stdout.splitlines())) == (2, 1)
    assert "Traceback" not in finished.stderr
    assert (tmp_path / "out" / "street_overlay.png").is_file()


def test_demo_segments_its_image_and_prints_the_results_of_the_model(san, tmp_path):
    code, out, err = san("demo", "--output", tmp_path / "out")
    assert (code, err) == (0, [])
    assert any(str(tmp_path / "out" / "demo_overlay.png") in line for line in out)
    assert "\n".join(out).endswith(format_results(json.loads((BUILTIN_MODEL / RESULTS_FILE).read_text())))
    assert Image.open(tmp_path / "out" / "demo.png").size == Image.open(tmp_path / "out" / "demo_labels.png").size


def test_a_model_trained_on_ones_own_images_segments_with_their_labels(san, segment, model_folder, image, tmp_path):
    label_maps = [(np.arange(64) >= 24 + seed).astype(np.uint8)[None].repeat(64, 0) for seed in range(4)]
    rows = {"image": [coarse_image(seed, (64, 64)) for seed in range(4)]}
    rows["annotation"] = [Image.fromarray(label_map) for label_map in label_maps]
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "classes.json").write_text('{"classes": ["Sky", "road"]}')
    code, _, _ = san(
        *("train", "--config", "fine_tune", "--model", model_folder, "--output_dir", tmp_path / "new"),
        *("--dataset", tmp_path / "data.parquet", "--labels", tmp_path / "classes.json"),
        *("--steps", 1, "--warmup_steps", 0, "--batch_size", 2, "--workers", 0, "--cpu", "true"),
    )
    assert code == 0
    assert segment(image, labels=None, model=tmp_path / "new")[0] == 0
    assert read_summary(tmp_path / "out")["labels"] == ["sky", "road"]


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


def test_a_converted_checkpoint_segments_and_replaces_a_model_only_when_asked_to(
    san, segment, checkpoint, clip_tokenizer_folder, reference, image, tmp_path
):
    model = tmp_path / "new" / "model"
    command = ["convert", checkpoint, model, "--config", reference / "tiny_config.json"]
    command += ["--tokenizer", clip_tokenizer_folder]
    code, out, err = san(*command)
    assert (code, err) == (0, [])
    assert str(model) in out[0]
    (tmp_path / "any file").touch()
    assert (model / "model.safetensors").stat().st_mode == (tmp_path / "any file").stat().st_mode
    processor = SANProcessor.from_pretrained(model)
    assert (processor.templates_name, len(processor.tokenizer)) == ("vild", 49408)
    code, _, err = segment(image, model=model)
    assert (code, err) == (0, [])

    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(b"of another model")
    assert_refused(san(*command), model, "--overwrite")
    assert (model / "model.safetensors").read_bytes() == b"of another model"
    assert san(*command, "--overwrite")[0] == 0
    assert (model / "model.safetensors").read_bytes() == weights
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_folder_that_is_no_model_is_never_replaced(san, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(san("convert", "any.pth", tmp_path, "--overwrite"), tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        ({"checkpoint": "hub:vit-b-16"}, "network"),
        ({"checkpoint": "hub:vit-h-14"}, "hub:vit-b-16"),
        ({"checkpoint": "missing"}, "missing"),
        ({"checkpoint": "damaged"}, "damaged"),
        ({"checkpoint": "other.pth", "config": None}, "other.pth"),
        ({"tokenizer": "empty"}, "empty"),
        ({"tokenizer": "nobody/nothing"}, "nobody/nothing"),
        ({"tokenizer": "tiny-san"}, "49408"),
        ({"config": "missing"}, "missing"),
        ({"config": "damaged"}, "damaged"),
        ({"config": "list"}, "list"),
        ({"config": "half"}, "half"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_and_nothing_written(
    san, checkpoint, clip_tokenizer_folder, reference, model_folder, tmp_path, monkeypatch, wrong, fact
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("tiny-san").symlink_to(model_folder)
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    for name, content in (("damaged", "{"), ("list", "[]"), ("half", '{"MODEL.SAN": {}}')):
        Path(name).write_text(content)
    given = {
        **{"checkpoint": checkpoint, "tokenizer": clip_tokenizer_folder, "config": reference / "tiny_config.json"},
        **wrong,
    }
    config = [] if given["config"] is None else ["--config", given["config"]]
    assert_refused(san("convert", given["checkpoint"], "model", "--tokenizer", given["tokenizer"], *config), fact)
    assert not Path("model").exists()
