"""A model leaves PyTorch: what the exported program and the ONNX file say is what the model says."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_VISION
from PIL import Image
from torch._dynamo.exc import UserError, UserErrorType

import modeling_san.export as exporting
from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANForSemanticSegmentation, SANProcessor
from modeling_san.commands import export as command
from modeling_san.commands.export import draw_batch
from modeling_san.commands.main import main
from modeling_san.export import SegmentationProgram, export_program, write_onnx
from modeling_san.pooling import longest_window, pool_attention_bias, whole_scale

pytestmark = [pytest.mark.slow, pytest.mark.export]

# All of this file, what needs PyTorch alone included: tracing takes long
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOLERANCE = 1e-3
L14_SHAPE = {"clip_input_scale": 0.7, "vision_config": {**TINY_VISION, "image_size": 56, "patch_size": 14}}


@contextlib.contextmanager
def keep_all_output(path):
    """What is printed, and what libraries write past Python, goes to a file."""
    with path.open("w") as file:
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


class Exported:
    """The built-in model through `san export`, once for all tests."""

    def __init__(self, folder):
        self.path, self.int8_path = folder / "demo.onnx", folder / "demo.int8.onnx"
        write, programs, protos = torch.onnx.export, [], []

        def keep_program(*args, **kwargs):
            programs.append(export_program(*args, **kwargs))
            return programs[-1]

        def keep_proto(*args, **kwargs):
            protos.append(write(*args, **kwargs).model_proto)
            return SimpleNamespace(model_proto=protos[-1])

        with pytest.MonkeyPatch.context() as monkeypatch, keep_all_output(folder / "output.txt"):
            monkeypatch.setattr(exporting, "export_program", keep_program)
            monkeypatch.setattr(torch.onnx, "export", keep_proto)
            self.code = main(["export", "built-in", str(self.path), "--int8"])
        self.lines = (folder / "output.txt").read_text().splitlines()
        self.files = sorted(path.name for path in folder.iterdir())
        [self.program], [self.proto] = programs, protos

    def write_again(self, *args, **kwargs):
        """What `torch.onnx.export` gives for the program."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        del proto.metadata_props[:]
        return SimpleNamespace(model_proto=proto)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def builtin():
    return SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()


@pytest.fixture(scope="module")
def builtin_processor():
    return SANProcessor.from_pretrained(BUILTIN_MODEL)


def run_onnx(path, images, **others):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images, **others})]


def free_sizes(path):
    """The sizes of a file's inputs and outputs by their names, those that are free by theirs."""
    graph = onnx.load(path).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }


def segment(model, processor, images, **inputs):
    """Labels, winning scores and all scores of `images` (batch, 3, height, width), by the model itself."""
    with torch.no_grad():
        pixels = processor(images=list(images.transpose(0, 2, 3, 1)), do_resize=False, return_tensors="pt")
        outputs = model(**pixels, **inputs)
    labels, scores = processor.post_process_with_scores(outputs)
    full = processor.post_process_semantic_scores(outputs)
    return torch.stack(labels), torch.stack(scores), torch.stack(full)


def assert_same(result, expected):
    """Scores within the tolerance, labels equal where the best two are further apart than that."""
    (labels, scores, *others), (expected_labels, expected_scores, full) = result, expected
    assert labels.dtype == torch.int64
    assert scores.dtype == torch.float32
    assert labels.shape == scores.shape == expected_labels.shape
    assert (scores - expected_scores).abs().max() <= TOLERANCE
    best = full.topk(min(2, full.shape[1]), dim=1).values
    clear = best[:, 0] - best[:, -1] > TOLERANCE if full.shape[1] > 1 else torch.ones_like(labels, dtype=torch.bool)
    assert torch.equal(labels[clear], expected_labels[clear])
    if others:
        assert (others[0] - full).abs().max() <= TOLERANCE
    return clear.float().mean()


# The built-in model through the command


def test_the_command_leaves_only_its_files_and_says_what_it_measured(exported):
    assert exported.code == 0, exported.lines
    assert exported.files == ["demo.int8.onnx", "demo.onnx", "output.txt"]
    wrote, wrote_int8 = (line for line in exported.lines if line.startswith("wrote "))
    size, opset = re.search(r"demo\.onnx: ([\d.]+)MB, opset (\d+), 38 labels; ", wrote).groups()
    assert float(size) == pytest.approx(exported.path.stat().st_size / 1e6, abs=0.06)
    assert 18 <= int(opset) <= 25
    differences = re.findall(r"scores differ by (\S+) at most \(\S+ on average\) and \S+ of the labels", wrote)
    assert len(differences) == 2
    assert all(float(difference) <= TOLERANCE for difference in differences)
    assert "on 2 x 77 x 107" in wrote
    assert "on 1 x 128 x 170" in wrote
    share = int(re.search(r"\((\d+)%\)", wrote_int8)[1])
    assert share == round(100 * exported.int8_path.stat().st_size / exported.path.stat().st_size)


@pytest.mark.parametrize("shape", [(2, 128, 128), (3, 64, 64), (2, 151, 98), (1, 20, 33), (1, 1, 1)])
def test_the_file_takes_any_batch_and_size(exported, builtin, builtin_processor, shape):
    images = draw_batch(*shape)
    clear = assert_same(run_onnx(exported.path, images), segment(builtin, builtin_processor, images))
    assert clear > 0.95 or min(shape[1:]) < 128


def test_an_image_that_is_resized_first_is_segmented_as_by_the_processor(exported, builtin, builtin_processor):
    image = Image.fromarray(draw_batch(1, 200, 300)[0].transpose(1, 2, 0))
    with torch.no_grad():
        outputs = builtin(**builtin_processor(images=image, return_tensors="pt"))
    [expected] = builtin_processor.post_process_semantic_segmentation(outputs)
    small = np.asarray(image.resize((192, 128), Image.Resampling.BILINEAR)).transpose(2, 0, 1)[None]
    labels, _ = run_onnx(exported.path, np.ascontiguousarray(small))
    assert (labels[0] == expected).float().mean() > 0.999


def test_the_file_tells_its_labels_and_sizes(exported, builtin):
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    assert json.loads(metadata["labels"]) == [builtin.config.id2label[index] for index in range(38)]
    assert json.loads(metadata["size"]) == {"shortest_edge": 128, "longest_edge": 512}
    assert metadata["model"] == "built-in"
    assert free_sizes(exported.path) == {
        "images": ["batch", 3, "height", "width"],
        "labels": ["batch", "height", "width"],
        "scores": ["batch", "height", "width"],
    }


def test_the_file_holds_no_paths_of_the_machine_that_wrote_it(exported):
    assert os.path.dirname(torch.__file__).encode() not in exported.path.read_bytes()


def test_int8_is_smaller_and_agrees_on_most_pixels(exported, builtin, builtin_processor):
    images = draw_batch(2, 128, 128)
    labels, scores = run_onnx(exported.int8_path, images)
    expected_labels, expected_scores, _ = segment(builtin, builtin_processor, images)
    assert exported.int8_path.stat().st_size < 0.5 * exported.path.stat().st_size
    assert (labels == expected_labels).float().mean() > 0.98
    assert (scores - expected_scores).abs().mean() < 0.02


# Programs


VARIANTS = {
    "vit_l_14": L14_SHAPE,
    "avg": {**L14_SHAPE, "attention_bias_pooling": "avg", "attention_bias_layers": 2, "num_clip_prompts": 2},
    "bilinear": {"attention_bias_pooling": "bilinear", "asymmetric_input": False},
    "bicubic": {"attention_bias_pooling": "bicubic", "sls_token_format": "pos_embedding"},
    "nearest": {"attention_bias_pooling": "nearest", "clip_input_scale": 0.75, "attention_bias_heads": 1},
}


def shallow(name, recognition_layers=1):
    """A variant with as few layers as there can be: tracing takes its time layer by layer."""
    vision = {**TINY_VISION, **VARIANTS[name].get("vision_config", {}), "num_hidden_layers": 1 + recognition_layers}
    layers = {"sls_start_layer": 1, "fusion_map": [[1, 1]], "side_num_layers": 1, "deep_supervision_layers": [1]}
    return {**VARIANTS[name], **layers, "vision_config": vision}


SHAPES = [(2, 157, 219), (1, 70, 256), (1, 33, 64)]


def make_noise(batch, height, width):
    return np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), dtype=np.uint8)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_program_does_what_every_shape_of_model_does(make_model, processor, class_embeds, changes, shape):
    model, images = make_model(**changes), make_noise(*shape)
    expected = segment(model, processor, images, class_embeds=class_embeds)
    with torch.no_grad():
        program = SegmentationProgram(model, class_embeds, all_scores=True)
        assert_same(program(torch.from_numpy(images)), expected)
        # A score for all labels is a probability-weighted sum over queries, and a single label is always the best
        only = segment(model, processor, images, class_embeds=class_embeds[:1])
        assert_same(SegmentationProgram(model)(torch.from_numpy(images), class_embeds[:1]), only)


@pytest.fixture(scope="module")
def variant(make_model, tmp_path_factory):
    """A tiny model with most options, its program that takes embeddings and returns all scores, and its file."""
    model = make_model(**shallow("avg", recognition_layers=2))
    program = export_program(model, all_scores=True)
    path = tmp_path_factory.mktemp("variant") / "tiny.onnx"
    return SimpleNamespace(model=model, program=program, path=path, opset=write_onnx(program, path, {}, opset=18))


@pytest.mark.parametrize(("shape", "classes"), list(zip(SHAPES, (5, 1, 3), strict=True)), ids=str)
def test_a_file_takes_any_labels_as_its_second_input(variant, processor, class_embeds, shape, classes):
    images, embeds = make_noise(*shape), class_embeds[:classes]
    expected = segment(variant.model, processor, images, class_embeds=embeds)
    with torch.no_grad():
        assert_same(variant.program.module()(torch.from_numpy(images), embeds), expected)
    result = run_onnx(variant.path, images, class_embeds=embeds.numpy())
    assert len(result) == 3
    assert_same(result, expected)


def test_a_file_has_the_opset_that_was_asked_for_and_takes_any_number_of_labels(variant):
    assert variant.opset == 18
    assert {entry.domain: entry.version for entry in onnx.load(variant.path).opset_import}[""] == 18
    sizes = free_sizes(variant.path)
    assert sizes["class_embeds"] == ["classes", 16]
    assert sizes["all_scores"] == ["batch", "classes", "height", "width"]


def test_ten_thousand_labels_fit(variant, processor):
    embeds = torch.nn.functional.normalize(torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    images = draw_batch(1, 96, 64)
    expected = segment(variant.model, processor, images, class_embeds=embeds)
    assert_same(run_onnx(variant.path, images, class_embeds=embeds.numpy()), expected)


@pytest.fixture(scope="module")
def interpolating(make_model):
    """A tiny model whose biases are interpolated, embeddings of three labels, and the program of both."""
    model = make_model(**shallow("bicubic"))
    embeds = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    return SimpleNamespace(model=model, embeds=embeds, program=export_program(model, embeds))


def test_biases_that_are_interpolated_can_be_traced(interpolating, processor):
    module = interpolating.program.module()
    for shape in SHAPES:
        images = make_noise(*shape)
        with torch.no_grad():
            result = module(torch.from_numpy(images))
        assert_same(result, segment(interpolating.model, processor, images, class_embeds=interpolating.embeds))


@pytest.mark.skipif("SAN_TEST_AOTI" not in os.environ, reason="compiles C++ for minutes: set SAN_TEST_AOTI=1")
def test_a_program_compiled_ahead_of_time_runs_without_the_model(interpolating, processor, tmp_path):
    package = torch._inductor.aoti_compile_and_package(interpolating.program, package_path=str(tmp_path / "san.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for shape in SHAPES:
        images = make_noise(*shape)
        expected = segment(interpolating.model, processor, images, class_embeds=interpolating.embeds)
        assert_same(compiled(torch.from_numpy(images)), expected)


@pytest.mark.parametrize("scale", [0.5, 0.7, 0.75])
@pytest.mark.parametrize("method", ["max", "avg"])
def test_pooling_takes_the_windows_of_adaptive_pooling(scale, method):
    any_size = longest_window(whole_scale(scale), 14, 16, 32)
    adaptive = {"max": torch.nn.functional.adaptive_max_pool2d, "avg": torch.nn.functional.adaptive_avg_pool2d}[method]
    for height, width in [(32, 64), (96, 160), (416, 640), (640, 864), (608, 1024)]:
        bias = torch.randn(1, 2, height // 16, width // 16, generator=torch.Generator().manual_seed(height))
        size = int(height * scale) // 14, int(width * scale) // 14
        for window in (any_size, None):
            pooled = pool_attention_bias(bias[None], size, method, window)[0]
            torch.testing.assert_close(pooled.unflatten(-1, size), adaptive(bias, size))


def test_a_training_model_is_refused(model, class_embeds):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        export_program(model.train(), class_embeds)


def test_what_the_tracer_refuses_is_one_line(model, class_embeds, monkeypatch):
    def refuse(*args, **kwargs):
        raise UserError(UserErrorType.CONSTRAINT_VIOLATION, "\nConstraints violated (batch)!\n  - pages\n  - of text")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(ValueError, match=r"cannot trace this model .*: Constraints violated \(batch\)!$"):
        export_program(model, class_embeds)


def test_what_onnx_cannot_say_is_one_line(interpolating, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise torch.onnx.OnnxExporterError("No translation for aten.something\nand a report")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ValueError, match=r"as ONNX: No translation for aten\.something$"):
        write_onnx(interpolating.program, tmp_path / "a.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_a_scale_without_whole_sizes_is_refused(make_model, class_embeds):
    with pytest.raises(ValueError, match=r"clip_input_scale is 0\.33333"):
        export_program(make_model(clip_input_scale=0.33333), class_embeds)


# What can go wrong


@pytest.fixture
def san(exported, builtin, monkeypatch, capsys):
    """Runs `san export` with a program that was traced before; returns exit code, standard output and error."""
    monkeypatch.setattr(exporting, "export_program", lambda *args, **kwargs: exported.program)
    monkeypatch.setattr(torch.onnx, "export", exported.write_again)

    def run(*arguments):
        try:
            code = main(["export", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


def assert_refused(result, *words):
    """Exit code 2 and one line that holds the words."""
    code, _, err = result
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("san: error: ")
    for word in words:
        assert str(word) in err


def test_a_file_that_fails_its_check_is_not_written_and_an_older_one_stays(san, exported, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "TOLERANCE", -1.0)
    output = tmp_path / "demo.onnx"
    output.write_bytes(older := exported.path.read_bytes())
    assert_refused(san("built-in", output), "does not do what the model does", "Nothing was written")
    assert output.read_bytes() == older
    assert list(tmp_path.iterdir()) == [output]


def test_a_file_of_another_model_fails_the_check(san, tmp_path):
    # The program has the 38 labels stored in the model, in their order; the command expects two others
    assert_refused(san("built-in", tmp_path / "a.onnx", "--labels", "sand, water"), "does not do what the model does")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["demo.onnx", "demo.int8.onnx"])
def test_a_file_of_another_origin_is_left_alone(san, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    assert_refused(san("built-in", tmp_path / "demo.onnx", "--int8"), f"{name} is there already")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_an_older_export_is_replaced(san, exported, tmp_path):
    output = tmp_path / "demo.onnx"
    output.write_bytes(exported.path.read_bytes())
    code, out, err = san("built-in", output, "--size", 64)
    assert (code, err) == (0, "")
    assert "on 1 x 64 x 85" in out
    metadata = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert json.loads(metadata["size"]) == {"shortest_edge": 64, "longest_edge": 256}


def test_labels_of_any_letters_come_back_from_the_metadata(exported, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.onnx, "export", exported.write_again)
    names = ['the "quoted"', "süß|甜", "🦊", "a\nb", "\ud800", "\x00", *map(str, range(10_000))]
    write_onnx(exported.program, tmp_path / "odd.onnx", {"labels": names})
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "odd.onnx").metadata_props}
    assert json.loads(metadata["labels"]) == names


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        *((["built-in", name], [name, "end with .onnx"]) for name in ("model.pt", "model", ".onnx", "model.onnx.zip")),
        (["built-in", "folder.onnx"], ["is a folder"]),
        (["built-in", "file/a.onnx"], ["cannot be written to"]),
        (["unlabelled", "a.onnx"], ["no labels of its own", "--labels"]),
        *((["built-in", "a.onnx", "--labels", labels], ["label"]) for labels in ("", ",", "sky, sky")),
        (["built-in", "a.onnx", "--class-embeds-input", "--labels", "sky"], ["--class-embeds-input", "--labels"]),
        *((["built-in", "a.onnx", "--opset", opset], ["from 18 to 25"]) for opset in ("17", "26", "latest")),
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_used_are_refused(
    san, make_model, processor, tmp_path, monkeypatch, arguments, facts
):
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    Path("file").touch()
    if "unlabelled" in arguments:
        make_model().save_pretrained("unlabelled")
        processor.save_pretrained("unlabelled")
    assert_refused(san(*arguments), *facts)


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_library_is_named_with_the_command_that_helps(san, monkeypatch, tmp_path, library):
    monkeypatch.setitem(sys.modules, library, None)
    assert_refused(san("built-in", tmp_path / "a.onnx"), library, 'pip install "modeling-san[onnx]"')


def test_weights_beyond_one_file_are_refused(exported, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "MAX_ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match="less than 2 GiB"):
        write_onnx(exported.program, tmp_path / "a.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_exports_to_onnx_with_gradients_on(tmp_path):
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    labels = {0: "grass", 1: "red plain"}
    model = SANForSemanticSegmentation.from_pretrained(BUILTIN_MODEL, id2label=labels).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    images = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(Logits(), (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images).logits, atol=1e-3, rtol=1e-3)
