"""The console command: what it writes, what it says, and how it refuses."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_san import SANForOpenVocabSegmentation, SANImageProcessor, SANProcessor
from modeling_san.commands.main import main, make_parser
from modeling_san.processing import label_colors

LABELS = ("sky", "road", "red truck")
COMMANDS = (
    "segment",
    "demo",
    "convert",
    "train",
    "fine-tune",
    "curves",
    "contact-sheet",
    "evaluate",
    "segment-dataset",
    "prepare",
    "train-demo",
    "app",
    "export",
    "push",
)


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
    """A copy of the model's folder to damage."""
    return shutil.copytree(model_folder, tmp_path / "damaged-model")


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

    def run(*arguments, labels="sky, road, red truck"):
        given = [] if labels is None else ["--labels", labels]
        return san("segment", *arguments, *given, "--model", model_folder, "--output", tmp_path / "out")

    return run


def save_image(path, seed=0, size=(90, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).save(path)
    return path


def read_summary(folder, name="street"):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_refused(result, *words):
    """Exit code 2, nothing on standard output, and one line that holds the words."""
    code, out, err = result
    assert code == 2
    assert out == []
    assert len(err) == 1, err
    assert err[0].startswith("san: error: ")
    for word in words:
        assert str(word) in err[0]


# The parser


def test_help_starts_without_loading_heavy_libraries():
    code = (
        "import sys; from modeling_san.commands.main import make_parser; make_parser().format_help(); "
        "print({'torch', 'transformers', 'numpy', 'PIL', 'datasets'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == ("set()\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(san, command):
    code, out, _ = san(command, "--help")
    assert code == 0
    assert "example:" in out
    assert any(line.strip().startswith(f"san {command}") for line in out[out.index("example:") :])


def test_help_lists_all_commands():
    text = make_parser().format_help()
    assert all(command in text for command in COMMANDS)


def test_version_is_the_packages(san):
    import modeling_san

    assert san("--version") == (0, [f"san {modeling_san.__version__}"], [])


@pytest.mark.parametrize(
    "arguments",
    [(), ("paint",), ("segment",), ("segment", "a.png", "--opacity", "2"), ("train-demo", "out", "--san-steps", "0")],
)
def test_wrong_arguments_are_refused_in_one_line(san, arguments):
    assert_refused(san(*arguments), "--help")


# Segmentation


def test_segment_writes_overlay_label_image_and_summary_that_agree(segment, image, model_folder, tmp_path):
    code, out, err = segment(image)
    assert (code, len(out), err) == (0, 1, [])
    summary = read_summary(tmp_path / "out")
    assert (summary["width"], summary["height"]) == (90, 60)
    assert summary["model"] == str(model_folder)
    assert summary["image"] == str(image)
    assert summary["labels"] == list(LABELS)
    assert sum(part["area"] for part in summary["segments"]) == pytest.approx(1)

    label_map = Image.open(tmp_path / "out" / summary["label_map"])
    assert (label_map.mode, label_map.size) == ("P", (90, 60))
    assert label_map.getpalette()[:9] == label_colors(LABELS).ravel().tolist()
    indices = np.asarray(label_map)
    for part in summary["segments"]:
        assert part["pixels"] == (indices == LABELS.index(part["label"])).sum()
        assert part["mean_score"] > 0
    overlay = Image.open(tmp_path / "out" / summary["overlay"])
    assert overlay.width >= 90
    assert overlay.height >= 60


def test_segment_finds_what_the_python_interface_finds(segment, image, model_folder, tmp_path):
    segment(image)
    model = SANForOpenVocabSegmentation.from_pretrained(model_folder)
    processor = SANProcessor.from_pretrained(model_folder)
    image = Image.open(image)
    with torch.no_grad():
        outputs = model(**processor(images=image, text=list(LABELS), return_tensors="pt"))
    [expected] = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "street_labels.png")), expected.numpy())


def test_the_line_of_a_image_names_it_its_labels_and_its_overlay(segment, image, tmp_path):
    _, [line], _ = segment(image)
    largest = read_summary(tmp_path / "out")["segments"][0]
    assert line.startswith(f"{image}: {largest['label']} {largest['area']:.0%}")
    assert str(tmp_path / "out" / "street_overlay.png") in line
    assert line.endswith(" s)")


def test_a_turned_photograph_is_segmented_upright(segment, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60), "green").save(tmp_path / "turned.jpg", exif=exif)
    segment(tmp_path / "turned.jpg")
    assert Image.open(tmp_path / "out" / "turned_labels.png").size == (60, 90)


def test_images_of_one_name_do_not_replace_each_other(segment, tmp_path):
    paths = [
        save_image(tmp_path / "one" / "street.png", 1),
        save_image(tmp_path / "two" / "street.png", 2),
        save_image(tmp_path / "two" / "Street.bmp", 3),
        save_image(tmp_path / "two" / "street-2.png", 4),
    ]
    code, out, _ = segment(*paths)
    assert (code, len(out)) == (0, 4)
    sources = {read_summary(tmp_path / "out", path.stem)["image"] for path in (tmp_path / "out").glob("*.json")}
    assert sources == set(map(str, paths))
    assert read_summary(tmp_path / "out", "street-2")["image"] == str(paths[3])


def test_results_never_replace_a_image(segment, tmp_path):
    paths = [save_image(tmp_path / "out" / "a.png"), save_image(tmp_path / "out" / "a_overlay.png", 1)]
    before = [path.read_bytes() for path in paths]
    assert segment(*paths)[0] == 0
    assert [path.read_bytes() for path in paths] == before


def test_a_image_given_twice_is_segmented_once(segment, image):
    assert len(segment(image, image)[1]) == 1


def test_a_dash_reads_paths_from_standard_input(segment, tmp_path, monkeypatch):
    paths = [save_image(tmp_path / f"{number} of 2.png", number) for number in (1, 2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{paths[0]}\n\n{paths[1]}\n"))
    code, out, _ = segment("-")
    assert code == 0
    assert [line.split(": ")[0] for line in out] == list(map(str, paths))


def test_empty_standard_input_is_refused(segment, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_refused(segment("-"), "standard input", "one path")


def test_many_images_have_a_progress_bar_and_one_has_none(segment, image, tmp_path):
    _, _, err = segment(image)
    assert err == []
    _, _, err = segment(image, save_image(tmp_path / "other.png"))
    assert any("segmenting" in line for line in err)


def test_labels_are_encoded_once_for_all_images(segment, image, tmp_path, monkeypatch):
    calls = []
    encode = SANForOpenVocabSegmentation.get_class_embeds
    monkeypatch.setattr(
        SANForOpenVocabSegmentation,
        "get_class_embeds",
        lambda self, *args, **kwargs: calls.append(1) or encode(self, *args, **kwargs),
    )
    segment(image, save_image(tmp_path / "other.png"))
    assert len(calls) == 1


# Labels and templates


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.json", '["sky", "Road", "red  truck"]'),
        ("classes.json", '{"classes": ["sky", "road", "red truck"], "ignore_index": 255}'),
        ("classes.txt", "sky\nroad\n\nred truck\n"),
        ("classes.txt", '\ufeff["sky", "road", "red truck"]'),
    ],
)
def test_a_labels_file_may_be_a_list_an_object_or_lines(segment, image, tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert segment(image, "--labels-file", path, labels=None)[0] == 0
    assert read_summary(tmp_path / "out")["labels"] == list(LABELS)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b'{"names": ["sky"]}', "'names'"),
        (b'["sky", 3]', "3"),
        (b'[["sky"], ["road"]]', "not a string"),
        (b"[]", "no labels"),
        (b'["sky", "road"', "not valid JSON"),
        (b'"sky"', "single value"),
        (b'["sky", " SKY"]', "2 times"),
        (b"\xff\xfe\x00sky", "UTF-8"),
    ],
)
def test_a_labels_file_of_the_wrong_shape_is_refused(segment, image, tmp_path, content, word):
    path = tmp_path / "classes.json"
    path.write_bytes(content)
    assert_refused(segment(image, "--labels-file", path, labels=None), path, word)


def test_a_missing_labels_file_is_refused(segment, image, tmp_path):
    assert_refused(segment(image, "--labels-file", tmp_path / "none.json", labels=None), "none.json", "check")


@pytest.mark.parametrize(
    ("labels", "word"), [("", "empty"), (" ", "empty"), ("sky,,road", "empty"), ("sky, Sky", "2 times")]
)
def test_labels_that_cannot_be_used_are_refused(segment, image, labels, word):
    assert_refused(segment(image, labels=labels), word)


def test_a_label_too_long_for_the_model_is_refused(segment, image):
    assert_refused(segment(image, labels="sky, " + "very " * 50 + "long"), "tokens", "shorten")


def test_labels_and_a_labels_file_exclude_each_other(segment, image):
    assert_refused(segment(image, "--labels-file", "classes.json"), "--labels")


def test_without_labels_those_stored_with_the_model_are_used(san, model_copy, image, tmp_path):
    model = SANForOpenVocabSegmentation.from_pretrained(model_copy)
    model.set_labels(["tree", "car"], SANProcessor.from_pretrained(model_copy))
    model.save_pretrained(model_copy)
    code, _, err = san("segment", image, "--model", model_copy, "--output", tmp_path / "out")
    assert (code, err) == (0, [])
    assert read_summary(tmp_path / "out")["labels"] == ["tree", "car"]


def test_without_any_labels_the_user_is_asked_for_some(segment, image):
    assert_refused(segment(image, labels=None), "no labels", "--labels")


def test_what_an_added_name_wins_becomes_other(segment, image, tmp_path):
    code, _, err = segment(image, "--extend-labels", "coco-stuff", "--templates", "vild", labels="sky")
    assert (code, err) == (0, [])
    summary = read_summary(tmp_path / "out")
    assert summary["labels"] == ["sky", "other"]
    assert summary["extended_by"] == "coco-stuff"
    # One name against ninety cannot win everywhere with random weights
    assert "other" in [part["label"] for part in summary["segments"]]
    assert np.asarray(Image.open(tmp_path / "out" / "street_labels.png")).max() == 1


def test_a_label_other_of_the_users_takes_the_added_names_in(segment, image, tmp_path):
    segment(image, "--extend-labels", "coco-stuff", labels="other, sky")
    assert read_summary(tmp_path / "out")["labels"] == ["other", "sky"]


def test_an_unknown_extension_is_refused(segment, image):
    assert_refused(segment(image, "--extend-labels", "ade"), "ade", "coco-stuff", "coco-all", "none")


def test_templates_change_the_prompts(segment, image, tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("tree {}\ncar {}\n")
    scores = []
    for options in ((), ("--templates", path), ("--templates", "vild")):
        assert segment(image, *options)[0] == 0
        scores.append(read_summary(tmp_path / "out")["segments"][0]["mean_score"])
    assert len(set(scores)) == 3


@pytest.mark.parametrize(("content", "word"), [(None, "vild"), ("a photo", "{}"), ("", "empty")])
def test_templates_that_cannot_be_used_are_refused(segment, image, tmp_path, content, word):
    path = tmp_path / "templates.txt"
    if content is not None:
        path.write_text(content)
    assert_refused(segment(image, "--templates", path), path, word)


def test_words_the_model_was_not_trained_on_are_named_with_those_it_was(san, model_copy, image, tmp_path):
    change_config(model_copy, training_labels=["sky", "tree"])
    options = ("--model", model_copy, "--output", tmp_path / "out")
    code, _, err = san("segment", image, "--labels", "sky, road, car|tree", *options)
    assert code == 0
    [line] = err
    assert line.startswith("san: warning: ")
    assert "not trained on: road, car;" in line
    assert line.endswith("trained on: sky, tree")
    assert san("segment", image, "--labels", "sky, tree", *options)[2] == []


# Images that cannot be segmented


@pytest.fixture
def bad_image(tmp_path):
    """Makes a file that is no image, by kind."""

    def make(kind):
        path = tmp_path / f"{kind}.png"
        if kind == "truncated":
            whole = save_image(tmp_path / "whole.png").read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        elif kind == "zero-byte":
            path.touch()
        elif kind == "text":
            path.write_text("This is no image.\n")
        elif kind == "huge":
            Image.new("1", (20_000, 10_000)).save(path)
        elif kind == "folder":
            path.mkdir()
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("missing", "No such file"),
        ("truncated", "truncated"),
        ("zero-byte", "0 bytes"),
        ("text", "known format"),
        ("huge", "pixels"),
        ("folder", "is a folder"),
    ],
)
def test_a_bad_image_is_refused_in_one_line(segment, bad_image, kind, word):
    path = bad_image(kind)
    assert_refused(segment(path), path, word)


def test_good_images_are_done_beside_bad_ones(segment, bad_image, image, tmp_path):
    other = save_image(tmp_path / "other.png", 1)
    code, out, err = segment(bad_image("text"), image, bad_image("zero-byte"), other)
    assert code == 2
    assert len(out) == 2
    assert sum("san: error: " in line for line in err) == 2
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"street.json", "other.json"}


def test_an_output_folder_that_cannot_be_written_is_refused(san, model_folder, image):
    arguments = ("segment", image, "--labels", "sky", "--model", model_folder, "--output")
    assert_refused(san(*arguments, image), image, "--output")
    assert_refused(san(*arguments, image / "below"), image, "--output")


def test_a_device_that_is_not_there_is_refused(segment, image):
    assert_refused(segment(image, "--device", "cuda:99"), "cuda:99", "cpu")
    assert_refused(segment(image, "--device", "abacus"), "abacus", "cpu")


# Models that cannot be loaded


def damage_nothing_there(folder):
    shutil.rmtree(folder)


def damage_no_config(folder):
    (folder / "config.json").unlink()


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_other_type(folder):
    change_config(folder, model_type="clip")


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def damage_some_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "mask_decoder" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_shapes(folder):
    change_config(folder, num_queries=7)


def damage_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def damage_processor(folder):
    (folder / "processor_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_nothing_there, "no such folder"),
        (damage_no_config, "no config.json"),
        (damage_no_weights, "no weights"),
        (damage_other_type, "'clip'"),
        (damage_config, "config.json"),
        (damage_weights, "cannot be loaded"),
        (damage_some_weights, "lacks"),
        (damage_shapes, "cannot be loaded"),
        (damage_tokenizer, "tokenizer"),
        (damage_processor, "cannot be loaded"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(san, model_copy, image, damage, word):
    damage(model_copy)
    assert_refused(san("segment", image, "--labels", "sky", "--model", model_copy), model_copy, word)


def test_a_file_is_no_model(san, image):
    assert_refused(san("segment", image, "--labels", "sky", "--model", image), image, "is a file")


def test_a_hub_model_out_of_reach_is_refused(san, image):
    assert_refused(san("segment", image, "--labels", "sky", "--model", "nobody/nothing"), "nobody/nothing", "Hub")


def test_code_in_a_model_folder_is_never_run(san, model_copy, image, tmp_path):
    trap = tmp_path / "trap-sprang"
    (model_copy / "trap.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    change_config(model_copy, auto_map={"AutoConfig": "trap.Config", "AutoModel": "trap.Model"})
    code, _, _ = san("segment", image, "--labels", "sky", "--model", model_copy, "--output", tmp_path / "out")
    assert code == 0
    assert not trap.exists()


# Ends of a run


def test_an_interrupted_command_ends_quietly(san, image, monkeypatch):
    from modeling_san.commands import models

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupt)
    assert san("segment", image, "--labels", "sky") == (130, [], [])


def test_the_console_command_does_what_main_does(model_folder, image, bad_image, tmp_path):
    arguments = [image, bad_image("text"), "--labels", "sky, road", "--model", model_folder, "--device", "cpu"]
    finished = subprocess.run(
        [sys.executable, "-m", "modeling_san.commands.main", "segment", *arguments, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
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
    assert f"overlay: {tmp_path / 'out' / 'demo_overlay.png'}" in out
    assert "\n".join(out).endswith(format_results(figures))
    assert Image.open(tmp_path / "out" / "demo.png").size == Image.open(tmp_path / "out" / "demo_labels.png").size


# Conversion


@pytest.fixture(scope="session")
def checkpoint(reference, reference_weights, tmp_path_factory):
    """A checkpoint file of the reference's tiny model."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    torch.save({"model": reference_weights.make_state_dict(reference / "tiny_shapes.json")}, path)
    return path


@pytest.fixture
def convert(san, shared, reference):
    """Runs `san convert` on the reference's tiny model."""

    def run(*arguments, tokenizer=shared / "clip_tokenizer"):
        return san("convert", *arguments, "--config", reference / "tiny_config.json", "--tokenizer", tokenizer)

    return run


def test_a_converted_checkpoint_segments(convert, san, checkpoint, image, tmp_path):
    code, out, err = convert(checkpoint, tmp_path / "new" / "model")
    assert (code, err) == (0, [])
    assert str(tmp_path / "new" / "model") in out[0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert (tmp_path / "new" / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    processor = SANProcessor.from_pretrained(tmp_path / "new" / "model")
    assert (processor.templates_name, len(processor.tokenizer)) == ("vild", 49408)
    code, _, err = san(
        "segment", image, "--labels", "sky", "--model", tmp_path / "new" / "model", "--output", tmp_path / "out"
    )
    assert (code, err) == (0, [])


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_model_is_replaced_only_when_asked_for(convert, checkpoint, model_copy, tmp_path):
    before = (model_copy / "model.safetensors").read_bytes()
    assert_refused(convert(checkpoint, model_copy), model_copy, "--overwrite")
    assert (model_copy / "model.safetensors").read_bytes() == before
    assert convert(checkpoint, model_copy, "--overwrite")[0] == 0
    assert (model_copy / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == [model_copy.name]


def test_a_folder_that_is_no_model_is_never_replaced(san, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(san("convert", "any.pth", tmp_path, "--overwrite"), tmp_path, "not a model folder")
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("source", ["hub:vit-b-16", "hub:vit-l-14"])
def test_without_network_a_released_checkpoint_is_refused_and_nothing_written(san, source, tmp_path):
    assert_refused(san("convert", source, tmp_path / "model"), "could not be fetched", "network")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_released_checkpoint_is_refused(san, tmp_path):
    assert_refused(san("convert", "hub:vit-h-14", tmp_path / "model"), "hub:vit-b-16", "hub:vit-l-14")


def test_a_missing_tokenizer_is_refused_and_nothing_written(convert, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    for tokenizer in (tmp_path / "empty", "nobody/nothing"):
        assert_refused(convert(checkpoint, tmp_path / "model", tokenizer=tokenizer), tokenizer, "--tokenizer")
    assert not (tmp_path / "model").exists()


def test_another_models_tokenizer_is_refused(convert, checkpoint, model_folder, tmp_path):
    assert_refused(convert(checkpoint, tmp_path / "model", tokenizer=model_folder), "tokens", "49408", "--tokenizer")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(san, tmp_path, content):
    path = tmp_path / "damaged.pth"
    if content is not None:
        path.write_bytes(content)
    assert_refused(san("convert", path, tmp_path / "model"), path)


def test_a_checkpoint_of_another_model_is_refused(san, shared, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    arguments = (tmp_path / "other.pth", tmp_path / "model", "--tokenizer", shared / "clip_tokenizer")
    assert_refused(san("convert", *arguments), "other.pth", "not a SAN model")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"MODEL.SAN": {}}'])
def test_a_config_that_cannot_be_used_is_refused(san, tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert_refused(san("convert", "any.pth", tmp_path / "model", "--config", path), path)


# Fine-tuning


@pytest.fixture
def fine_tune(san, model_folder, tmp_path, capsys):
    """Runs `san fine-tune` on four small images of two classes; of standard error, below bars, the last line."""
    rows = {"image": [], "annotation": []}
    for seed in range(4):
        path = save_image(tmp_path / "images" / f"{seed}.png", seed, (64, 64))
        rows["image"].append({"bytes": path.read_bytes(), "path": None})
        label_map = io.BytesIO()
        Image.fromarray((np.arange(64) >= 24 + seed).astype(np.uint8)[None].repeat(64, 0)).save(label_map, "png")
        rows["annotation"].append({"bytes": label_map.getvalue(), "path": None})
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "classes.json").write_text('{"classes": ["Sky", "road"]}')
    capsys.readouterr()

    def run(*arguments, dataset="data.parquet", labels="classes.json"):
        code, out, err = san(
            *("fine-tune", "--dataset", tmp_path / dataset, "--labels-file", tmp_path / labels),
            *("--model", model_folder, "--output", tmp_path / "out", "--device", "cpu", *arguments),
        )
        return code, out, err[-1:]

    return run


def test_a_fine_tuned_model_segments_with_its_own_labels(fine_tune, san, image, tmp_path):
    code, out, _ = fine_tune("--steps", 1, "--batch-size", 2, "--validation", tmp_path / "data.parquet")
    assert code == 0
    assert any(line.startswith("mean IoU") for line in out)
    code, _, _ = san("segment", image, "--model", tmp_path / "out", "--output", tmp_path / "segmented")
    assert code == 0
    assert read_summary(tmp_path / "segmented")["labels"] == ["sky", "road"]


def test_fine_tuning_refuses_what_is_no_data_set(fine_tune, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert_refused(fine_tune(dataset="broken.parquet"), "broken.parquet", "cannot be read as a data set")
    assert_refused(fine_tune(dataset="missing.parquet"), "missing.parquet", "cannot be read as a data set")


def test_fine_tuning_refuses_labels_that_do_not_cover_the_maps(fine_tune, tmp_path):
    (tmp_path / "one.json").write_text('["sky"]')
    assert_refused(fine_tune(labels="one.json"), "holds [1]", "give every class a name")


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "fast"])
def test_fine_tuning_refuses_a_learning_rate_that_cannot_train(fine_tune, rate):
    assert_refused(fine_tune("--learning-rate", rate), "is not a number above 0")
