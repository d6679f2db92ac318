"""Training runs: they continue exactly, lose nothing, agree with `Trainer` and with themselves on two processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, TrainingArguments

from drawn_world.make_model import RECIPE
from drawn_world.pretrain_clip import demo_clip_config
from drawn_world.tokenizer import build_tokenizer
from modeling_san import SANForOpenVocabSegmentation, SANImageProcessor, SANProcessor
from modeling_san.commands.main import main
from modeling_san.commands.train import parse_recipe
from modeling_san.training import train as train_module
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.build import load_model
from modeling_san.training.callbacks import read_metrics
from modeling_san.training.data import Collator, EndlessOrder, TrainingImages, load_images
from modeling_san.training.evaluate import evaluate
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.metrics import ConfusionMatrix
from modeling_san.training.recipe import Recipe, read_recipe, recipe_names
from modeling_san.training.run import prepare_run
from modeling_san.training.train import NonFiniteLossError, compute_gradients, train
from modeling_san.training.trainer import SANTrainer, SeedEachStep, StreamingMeanIoU

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LABELS = ["dark", "light"]
SIZE = (48, 64)
AS_THEY_ARE = {"short_sides": [48], "crop_size": [48, 64], "photometric": False, "flip": 0.0}
"""Images without chance."""


def two_tone(seed):
    """An image that is dark on the left and light on the right of a random column, with its label map."""
    labels = np.zeros(SIZE, np.uint8)
    labels[:, int(np.random.default_rng(seed).integers(16, 48)) :] = 1
    image = np.where(labels[..., None] == 1, np.uint8(230), np.uint8(30)).repeat(3, axis=2)
    return Image.fromarray(image), Image.fromarray(labels)


def write_images(pairs, path):
    features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
    rows = [{"image": image, "annotation": labels} for image, labels in pairs]
    Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny untrained model, six images as parquet, and their label names."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = build_tokenizer(600)
    torch.manual_seed(0)
    clip = CLIPModel(demo_clip_config(tokenizer))
    shape = {**read_recipe(RECIPE)["config_overrides"], "num_queries": 4, "train_num_points": 64}
    SANForOpenVocabSegmentation.from_clip(clip, **shape).save_pretrained(folder / "model")
    image_processor = SANImageProcessor(size_divisor=16, mask_stride=8)
    SANProcessor(image_processor, tokenizer, templates=["a photo of a {}."]).save_pretrained(folder / "model")
    write_images([two_tone(seed) for seed in range(6)], folder / "data.parquet")
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


@pytest.fixture(scope="module")
def common(start):
    """Fields of a recipe for a tiny run on the CPU, but for the folder."""
    return {
        "model": str(start / "model"),
        "dataset": str(start / "data.parquet"),
        "labels": str(start / "labels.json"),
        "short_side": 48,
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "checkpoint_every": 3,
        "log_every": 1,
        "workers": 0,
        "cpu": True,
    }


@pytest.fixture
def options(common, tmp_path):
    return {**common, "output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="module")
def whole(common, tmp_path_factory):
    """A run from its beginning to its end; only to be read."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    changes = {"validation": common["dataset"], "overlays": 2, "evaluate_every": 3, "keep_checkpoints": 3}
    return run(common, output_dir=str(folder), **changes)


def run(options, **changes):
    recipe = Recipe(**{**options, **changes})
    train(recipe, progress=False)
    return Path(recipe.output_dir)


def weights(folder):
    return load_file(folder / "model.safetensors")


def optimizer_state(checkpoint):
    return torch.load(checkpoint / "optimizer.bin", weights_only=True)


def progress_of(checkpoint):
    return json.loads((checkpoint / "progress.json").read_text())


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def logged(folder):
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def logged_steps(folder):
    return [line["step"] for line in logged(folder)]


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


def cut_behind(whole, step, folder):
    """What a run that was cut behind a checkpoint leaves."""
    name = f"step-{step:08d}"
    shutil.copytree(whole / "checkpoints" / name, folder / "checkpoints" / name)
    return {"output_dir": str(folder), "resume": "auto"}


def as_arguments(options):
    return [f"--{name}={value}" for name, value in options.items()]


def start_process(options):
    return subprocess.Popen(
        [sys.executable, "-m", "modeling_san.commands.main", "train", *as_arguments(options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=300):
    """Poll until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---------------------------------------- a whole run


def test_a_run_leaves_a_model_that_loads_with_its_labels(whole):
    model = SANForOpenVocabSegmentation.from_pretrained(whole)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert SANProcessor.from_pretrained(whole).image_processor.size["shortest_edge"] == 48
    assert set(json.loads((whole / "results.json").read_text())["per_class_iou"]) == set(LABELS)
    with Image.open(whole / "curves.png") as curves:
        assert min(curves.size) > 300
    drawn = [sorted(path.name for path in step.iterdir()) for step in sorted((whole / "overlays").iterdir())]
    assert drawn[0] == drawn[1]
    assert (len(drawn), len(drawn[0])) == (2, 2)
    assert not list(whole.rglob("*unfinished*"))
    # Whoever may read the folder may read the weights
    assert (whole / "model.safetensors").stat().st_mode == (whole / "config.json").stat().st_mode


def test_each_term_of_each_output_is_logged_by_name(whole):
    lines = logged(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    terms = ["loss_cross_entropy", "loss_mask", "loss_dice"]
    for line in lines:
        named = [line[name] for term in terms for name in (term, f"{term}_0")]
        assert line["loss"] == pytest.approx(sum(named), rel=1e-5)
        assert line["images_per_second"] > 0
        assert 0.05 < line["peak_memory_gb"] < 100
        assert line["grad_norm"] > 0
    # Polynomial decay of power 0.9 to 0 at step 6, after the step that the line is of
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (1 - k / 6) ** 0.9 for k in range(1, 7)])


def test_accumulated_batches_are_one_batch(options):
    """Mask terms are divided by each part's own number of masks, which is the same here: two in every image."""
    found = []
    for parts in (1, 2):
        recipe = Recipe(**{**options, **AS_THEY_ARE, "batch_size": 4, "gradient_accumulation_steps": parts})
        one = prepare_run(recipe)
        # Accelerate counts the parts in a place that all its objects share
        one.accelerator.gradient_state.plugin_kwargs["num_steps"] = parts
        found.append(found_gradients(one))
    (whole, _, expected), (parted, _, gradients) = found
    assert whole["loss_cross_entropy"] == pytest.approx(parted["loss_cross_entropy"], rel=1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


def test_mixed_precision_ends_with_training(options):
    """What is measured at the end is what is saved, not that under autocast."""
    folder = run(options, steps=2, mixed_precision="bf16", validation=options["dataset"])
    model = SANForOpenVocabSegmentation.from_pretrained(folder).eval()
    images, label_set = load_images(options["dataset"]), load_label_set(options["labels"])
    again = evaluate(model, SANProcessor.from_pretrained(folder), images, label_set, progress=False)
    assert again["per_class_iou"] == json.loads((folder / "results.json").read_text())["per_class_iou"]


def test_a_tracker_gets_the_figures(options):
    pytest.importorskip("tensorboard")
    assert list(run(options, steps=1, trackers=["tensorboard"]).rglob("events.out.tfevents*"))


def test_curves_can_be_drawn_while_a_run_goes_on(whole, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + '{"step": 7, "lo')
    assert main(["train", "--plot", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").is_file()
    assert main(["train", "--plot", str(tmp_path / "nothing")]) == 2


# ---------------------------------------- resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uncut_one_bit_for_bit(options, whole, tmp_path, workers):
    resumed = run(options, **cut_behind(whole, 3, tmp_path / "cut"), workers=workers)
    assert_same(weights(whole), weights(resumed))
    first, second = (optimizer_state(folder / "checkpoints" / "step-00000006")["state"] for folder in (whole, resumed))
    assert first.keys() == second.keys()
    for index in first:
        assert_same(first[index], second[index])
    # The schedule went on, too: the last three steps had the same losses at the same rates.
    timeless = ("step", "loss", "learning_rate", "grad_norm")
    before, after = (
        [[line[name] for name in timeless] for line in logged(folder)[-3:]] for folder in (whole, resumed)
    )
    assert before == after


def test_streamed_data_trains_and_continues(options, tmp_path):
    streamed = {**options, "streaming": True, "steps": 4, "checkpoint_every": 2}
    whole = run(streamed)
    assert_same(weights(whole), weights(run(streamed, **cut_behind(whole, 2, tmp_path / "cut"))))


def test_resuming_a_finished_run_changes_nothing(options, whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    run(options, output_dir=str(folder), resume="auto")
    assert_same(weights(whole), weights(folder))
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_run_can_go_on_for_more_steps_at_another_decay_but_not_for_fewer(options, capsys):
    # Without a checkpoint "auto" begins
    folder = run(options, steps=3, resume="auto")
    for changes, said in (
        ({}, "already holds a run"),
        ({"steps": 2, "resume": "auto"}, "3 steps already"),
        ({"steps": 5, "resume": "auto", "trainable": "everything"}, "`trainable`"),
    ):
        with pytest.raises(ValueError, match=said):
            run(options, **changes)
    capsys.readouterr()
    run(options, steps=5, weight_decay=0.5, resume="auto", checkpoint_every=5)
    assert "steps 3 -> 5" in capsys.readouterr().err
    assert logged_steps(folder) == [1, 2, 3, 4, 5]
    groups = optimizer_state(folder / "checkpoints" / "step-00000005")["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_going_back_to_an_older_checkpoint_leaves_the_other_course_behind(options):
    options = {**options, "steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3}
    folder = run(options)
    abandoned = weights(folder / "checkpoints" / "step-00000003")
    run(options, seed=1, resume=str(folder / "checkpoints" / "step-00000001"))
    later = ["step-00000002", "step-00000003"]
    assert checkpoints_of(folder) == [*(f"abandoned-{name}" for name in later), "step-00000001", *later]
    assert_same(abandoned, weights(folder / "checkpoints" / "abandoned-step-00000003"))
    assert_same(weights(folder), weights(folder / "checkpoints" / "step-00000003"))
    assert logged_steps(folder) == [1, 2, 3]


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle", "no progress"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(options, whole, tmp_path, damage):
    resume = cut_behind(whole, 3, tmp_path / "cut")
    checkpoint = tmp_path / "cut" / "checkpoints" / "step-00000003"
    state = checkpoint / "optimizer.bin"
    if damage == "missing":
        state.unlink()
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:1000])
    elif damage == "pickle":
        torch.save({"optimizer": subprocess.Popen}, state)
    else:
        (checkpoint / "progress.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be resumed from"):
        run(options, **resume)


# ---------------------------------------- nothing lost


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_as_if_it_had_not_been(options, whole):
    folder = Path(options["output_dir"])
    process = start_process({**options, "checkpoint_every": 1, "keep_checkpoints": 10})

    def writes_the_third():
        found = [path.name for path in (folder / "checkpoints").glob("step-*")]
        return sum("unfinished" not in name for name in found) >= 2 and any("unfinished" in name for name in found)

    wait_for(writes_the_third, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [path for path in (folder / "checkpoints").iterdir() if "unfinished" not in path.name]
    assert left
    for checkpoint in left:
        optimizer_state(checkpoint)
        SANForOpenVocabSegmentation.from_pretrained(checkpoint)
    run(options, resume="auto", checkpoint_every=1)
    assert not list(folder.rglob("*unfinished*"))
    assert_same(weights(whole), weights(folder))
    assert logged_steps(folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("to_group", [False, True], ids=["the process", "its group"])
def test_sigterm_saves_a_checkpoint_and_exits_with_0(options, to_group):
    """Schedulers and terminals send it to the whole group: the processes that prepare images get it, too."""
    options = {**options, "steps": 400, "checkpoint_every": 1000, "workers": 2 if to_group else 0}
    folder = Path(options["output_dir"])
    process = start_process(options)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "a checkpoint is saved" in said
    [checkpoint] = (folder / "checkpoints").iterdir()
    step = progress_of(checkpoint)["step"]
    assert 2 <= step < 400
    assert not (folder / "model.safetensors").exists()
    # It is the state after the step, which a run that goes on begins with
    run(options, resume="auto", steps=step + 1)
    assert logged_steps(folder) == list(range(1, step + 2))


@pytest.mark.parametrize(
    ("error", "said"), [(RuntimeError, "out of memory"), (NonFiniteLossError, r"step 3 .*grad_norm inf")]
)
def test_what_breaks_the_third_step_leaves_a_sound_checkpoint_of_the_second(options, monkeypatch, error, said):
    def break_the_third(run):
        terms, indices = compute_gradients(run)
        if run.progress.step == 2:
            if error is RuntimeError:
                raise RuntimeError(said)
            run.unwrapped.background_embedding.grad.fill_(float("inf"))
            terms["grad_norm"] = float("inf")
        return terms, indices

    monkeypatch.setattr(train_module, "compute_gradients", break_the_third)
    with pytest.raises(error, match=said):
        run(options, checkpoint_every=1000)
    [checkpoint] = (Path(options["output_dir"]) / "checkpoints").iterdir()
    assert progress_of(checkpoint)["step"] == 2
    assert all(value.isfinite().all() for value in weights(checkpoint).values())


def test_a_loss_that_is_not_finite_stops_the_run_after_saving(options):
    with pytest.raises(NonFiniteLossError) as caught:
        run(options, learning_rate=1e30, max_grad_norm=1e30)
    folder = Path(options["output_dir"])
    report = json.loads((folder / "non_finite.json").read_text())
    assert f"step {report['step']} " in str(caught.value)
    assert "nan" in str(caught.value)
    assert len(report["images"]) == 2
    assert str(report["images"]) in str(caught.value)
    assert progress_of(folder / "checkpoints" / checkpoints_of(folder)[-1])["step"] == report["step"] - 1


@pytest.fixture
def make_small_disk(tmp_path):
    """Makes a folder on a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size)}", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
        return folder

    yield make
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def size_of(folder):
    # In pages, as file systems count
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


def test_a_full_disk_costs_checkpoints_but_not_the_run(options, whole, make_small_disk, capsys):
    saved = whole / "checkpoints" / "step-00000006"
    checkpoint = size_of(saved)
    model = checkpoint - (saved / "optimizer.bin").stat().st_size
    # Room for a checkpoint and the model, not for two checkpoints
    disk = make_small_disk((checkpoint + model + 2 * checkpoint) / 2 + 2**16)
    folder = run(options, output_dir=str(disk / "run"), checkpoint_every=2, keep_checkpoints=1)
    assert_same(weights(whole), weights(folder))
    assert checkpoints_of(folder) == ["step-00000002"]
    said = capsys.readouterr().err
    assert said.count("Training goes on") == 2
    assert "step 4 cannot be written" in said


def test_a_model_that_does_not_fit_on_the_disk_can_be_saved_later(options, whole, make_small_disk, tmp_path):
    disk = make_small_disk(size_of(whole / "checkpoints" / "step-00000006") + 2**17)
    with pytest.raises(OSError, match="cannot be saved"):
        run(options, output_dir=str(disk / "run"), checkpoint_every=6, keep_checkpoints=1)
    assert not (disk / "run" / "model.safetensors").exists()
    shutil.copytree(disk / "run", tmp_path / "larger")
    assert_same(weights(whole), weights(run(options, output_dir=str(tmp_path / "larger"), resume="auto")))


def test_the_best_is_kept_whenever_it_was_measured(options, monkeypatch):
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5])
    figures = {"mean_accuracy": 0.0, "overall_accuracy": 0.0, "per_class_iou": {}}
    monkeypatch.setattr(train_module, "evaluate", lambda *args, **kwargs: {"mean_iou": next(scores), **figures})
    changes = {"evaluate_every": 1, "checkpoint_every": 4, "keep_checkpoints": 1, "overlays": 0}
    folder = run(options, validation=options["dataset"], **changes)
    assert checkpoints_of(folder) == ["step-00000002", "step-00000006"]
    assert progress_of(folder / "checkpoints" / "step-00000006")["best_step"] == 2


# ---------------------------------------- many processes


@contextmanager
def fixed_points():
    """Chance without chance: the same points for every mask, whatever is drawn together."""
    rand = torch.rand

    def fixed(*size, device=None, dtype=None, **kwargs):
        size = tuple(size[0]) if isinstance(size[0], (tuple, list, torch.Size)) else size
        values = rand(*size[1:], generator=torch.Generator().manual_seed(size[-2]))
        return values.expand(size).clone().to(device=device, dtype=dtype)

    with patch.object(torch, "rand", fixed):
        yield


def found_gradients(run):
    """Terms of the loss, which images they are of, and gradients by name."""
    with fixed_points():
        terms, indices = compute_gradients(run)
    named = run.unwrapped.named_parameters()
    return terms, indices, {name: value.grad for name, value in named if value.grad is not None}


def join_group(rank, world_size, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)


def save_gradients(rank, world_size, options, port, results):
    join_group(rank, world_size, port)
    terms, indices, gradients = found_gradients(prepare_run(Recipe(**options)))
    torch.save({"indices": indices, "norm": terms["grad_norm"], "gradients": gradients}, f"{results}-{rank}")


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(options, tmp_path):
    # Images with one and with two labels, so that processes hold different numbers of masks
    pairs = [two_tone(seed) for seed in range(4)]
    pairs[1] = (pairs[1][0], Image.new("L", SIZE[::-1], 1))
    options = {
        **options, **AS_THEY_ARE, "dataset": write_images(pairs, tmp_path / "uneven.parquet"), "batch_size": 4,
        "trainable": "everything", "flip": 0.5, "max_grad_norm": 1e9,
    }  # fmt: skip
    results = str(tmp_path / "result")
    together = {**options, "output_dir": str(tmp_path / "two")}
    mp.spawn(save_gradients, args=(2, together, free_port(), results), nprocs=2)
    both = [torch.load(f"{results}-{rank}", weights_only=True) for rank in range(2)]
    terms, indices, gradients = found_gradients(prepare_run(Recipe(**options)))
    assert sorted(both[0]["indices"] + both[1]["indices"]) == sorted(indices)
    assert both[0]["norm"] == pytest.approx(terms["grad_norm"], rel=1e-4)
    assert len(gradients) > 50
    for one in both:
        found = {name: one["gradients"][name] for name in gradients}
        torch.testing.assert_close(found, gradients, atol=1e-5, rtol=1e-4)


def test_launched_on_two_processes_it_is_the_same_program(options):
    # `accelerate launch` starts several processes on GPUs only; on a CPU it hands over to torchrun or mpirun
    launch = ["--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "modeling_san.commands.main", "train"]
    arguments = as_arguments({**options, "validation": options["dataset"]})
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *arguments],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, cpu" in done.stderr
    folder = Path(options["output_dir"])
    assert logged_steps(folder) == [1, 2, 3, 4, 5, 6]
    assert done.stdout.count("overall accuracy") == 1
    assert progress_of(folder / "checkpoints" / "step-00000006")["processes"] == 2
    SANForOpenVocabSegmentation.from_pretrained(folder)


# ---------------------------------------- recipes


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_can_be_read(name):
    recipe, _ = parse_recipe(["--config", name, "--dataset", "x", "--output-dir", "y"])
    assert Recipe(**vars(recipe)) == recipe


def test_the_papers_recipe_is_the_papers():
    recipe, _ = parse_recipe(["--config", "coco_stuff_vit_b_16"])
    assert (recipe.steps, recipe.batch_size, recipe.power, recipe.warmup_steps) == (60_000, 32, 0.9, 0)
    assert (recipe.weight_decay, recipe.crop_size, recipe.max_long_side) == (1e-4, [640, 640], 2560)
    assert recipe.short_sides == [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960]
    large, _ = parse_recipe(["--config", "coco_stuff_vit_l_14"])
    assert (large.new_config["clip_input_scale"], large.new_config["sls_start_layer"]) == (0.7, 18)


def test_options_win_over_the_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 10\nlearning_rate: 1e-3\ncrop_size: [32, 64]\nsan: {}\n")
    recipe, _ = parse_recipe(["--config", str(tmp_path / "recipe.yaml"), "--steps", "20", "--no_photometric"])
    # 1e-3 without a dot is a text to YAML
    assert (recipe.steps, recipe.learning_rate, recipe.crop_size) == (20, 1e-3, [32, 64])
    assert not recipe.photometric


def test_a_recipe_that_calls_the_fields_of_a_new_model_san_is_still_read(tmp_path):
    (tmp_path / "old.yaml").write_text("clip: folder\nsan: {num_queries: 7}\n")
    recipe, _ = parse_recipe(["--config", str(tmp_path / "old.yaml"), "--dataset", "x", "--output_dir", "y"])
    assert recipe.new_config == {"num_queries": 7}


def test_the_recipe_of_a_run_starts_it_again(whole, common):
    recipe, _ = parse_recipe(["--config", str(whole / "recipe.yaml")])
    assert common.items() <= vars(recipe).items()
    assert recipe.output_dir == str(whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--config missing.yaml", "missing.yaml"),
        ("--steps 0", "steps is 0"),
        ("--steps many", "many"),
        ("--learning_rate nan", "learning_rate"),
        ("--learning_rate -1", "learning_rate"),
        ("--batch_size 3 --gradient_accumulation_steps 2", "batch_size 3"),
        ("--mixed_precision int4", "mixed_precision"),
        ("--config_overrides [1] --clip x", "JSON object"),
        ("--config_overrides { --clip x", "JSON"),
        ("--model a --clip b", "both model and clip"),
        ("--dataset x", "output_dir"),
        ("--output_dir x", "dataset"),
        ("--nonsense", "nonsense"),
        ("--config cut.yaml", "YAML"),
        ("--config list.yaml", "key: value"),
        ("--config typo.yaml", "did you mean learning_rate"),
        ("--config code.yaml", "YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("cut.yaml").write_text("steps: [")
    Path("list.yaml").write_text("- 1")
    Path("typo.yaml").write_text("lerning_rate: 1")
    Path("code.yaml").write_text("!!python/object/apply:os.system ['touch ran']")
    try:
        code = main(["train", *arguments.split()])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("templates", ["vildd"], "vildd"),
        ("trainable", "visual_projektion", "visual_projektion"),
        ("crop_size", [50], "multiples of 8"),
        ("trackers", ["nonsense"], "nonsense"),
        ("model", "no-such-folder", "no-such-folder"),
    ],
)
def test_what_does_not_fit_the_model_or_the_machine_is_named(options, field, value, named):
    with pytest.raises(ValueError, match=named):
        run(options, **{field: value})


@pytest.mark.parametrize(("templates", "number"), [(["a photo of a {}."], 1), (["vild"], 14), (["templates.txt"], 1)])
def test_templates_are_given_by_name_by_file_or_themselves(options, tmp_path, monkeypatch, templates, number):
    monkeypatch.chdir(tmp_path)
    Path("templates.txt").write_text("a photo of a {}.\n")
    _, processor = load_model(Recipe(**{**options, "templates": templates}), checkpoint=None)
    assert len(processor.templates) == number


@pytest.mark.parametrize(
    ("trainable", "trained", "frozen"),
    [
        ("paper", "vision_model.embeddings.position_embedding.weight", "visual_projection.weight"),
        ("side-adapter", "side_adapter.", "vision_model.embeddings.position_embedding.weight"),
        ("prompts", "prompt_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("everything", "text_model.", "nothing"),
        ("visual_projection", "visual_projection.weight", "vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_the_recipe_chooses_what_trains(options, start, trainable, trained, frozen):
    folder = run(options, steps=1, trainable=trainable, num_clip_prompts=3)
    before, after = weights(start / "model"), weights(folder)
    changed = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    assert any(name.startswith(trained) for name in changed)
    assert not any(name.startswith(frozen) for name in changed)
    assert any(name.startswith("side_adapter.") for name in changed)
    SANForOpenVocabSegmentation.from_pretrained(folder)


# ---------------------------------------- transformers' Trainer


@pytest.fixture
def trainer_parts(options, start):
    """Model, processor and images, as a user of `Trainer` makes them."""
    model = SANForOpenVocabSegmentation.from_pretrained(start / "model")
    processor = SANProcessor.from_pretrained(start / "model")
    processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 192}
    model.set_labels(LABELS, processor)
    images, label_set = load_images(options["dataset"]), load_label_set(options["labels"])
    views = Augmentation.for_size(48, (48, 64))
    dataset = TrainingImages(images, label_set, processor.image_processor, views, seed=0)
    return model, processor, dataset


def make_arguments(folder, **changes):
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
        "label_names": ["labels"], "remove_unused_columns": False, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "seed": 0,
    }  # fmt: skip
    return TrainingArguments(**{**common, **changes})


def test_trainer_and_san_train_have_the_same_losses_which_fall(options, trainer_parts, tmp_path):
    steps = 20
    ours = [line["loss"] for line in logged(run(options, steps=steps, checkpoint_every=steps))]
    model, _, dataset = trainer_parts
    order = list(islice(EndlessOrder(len(dataset), seed=0, batch_size=2), 2 * steps))
    trainer = SANTrainer(
        model=model,
        args=make_arguments(
            tmp_path / "trainer", max_steps=steps, learning_rate=options["learning_rate"], weight_decay=1e-4,
            lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 0.9, "lr_end": 0.0}, max_grad_norm=1.0,
            logging_steps=1, logging_first_step=True, train_sampling_strategy="sequential",
        ),
        train_dataset=[dataset[number] for number in order],
        data_collator=Collator(),
        callbacks=[SeedEachStep()],
    )  # fmt: skip
    trainer.train()
    theirs = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    assert len(theirs) == steps
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert np.mean(ours[-5:]) < 0.8 * np.mean(ours[:5])


def test_trainer_evaluates_batch_by_batch_and_predicts_label_maps(trainer_parts, tmp_path):
    model, processor, dataset = trainer_parts
    metrics = StreamingMeanIoU(processor, len(LABELS))
    trainer = SANTrainer(
        model=model,
        args=make_arguments(tmp_path, batch_eval_metrics=True),
        eval_dataset=dataset,
        data_collator=Collator(),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.to_label_map,
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_mean_iou"] == second["eval_mean_iou"]
    assert np.isfinite(first["eval_loss"])
    confusion = ConfusionMatrix(len(LABELS))
    with torch.no_grad():
        for number in range(len(dataset)):
            item = dataset[number]
            outputs = model.eval()(pixel_values=item["pixel_values"][None])
            [predicted] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 64)])
            confusion.update(predicted, item["labels"])
    assert first["eval_mean_iou"] == pytest.approx(confusion.mean_iou(), abs=1e-6)
    trainer.args.batch_eval_metrics, trainer.compute_metrics = False, None
    assert trainer.predict(dataset).predictions.shape == (6, 48, 64)


def test_the_streaming_metric_reads_logits_of_semantic_segmentation_too(trainer_parts):
    _, processor, dataset = trainer_parts
    metrics = StreamingMeanIoU(processor, len(LABELS))
    labels = dataset[0]["labels"][None]
    one_hot = torch.nn.functional.one_hot(labels.where(labels != 255, 0), len(LABELS)).movedim(-1, 1).float()
    found = metrics.to_label_map(one_hot, labels)
    assert torch.equal(found[labels != 255], labels[labels != 255])
