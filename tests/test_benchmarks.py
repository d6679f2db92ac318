"""The benchmarks: what they record, how they compare two runs, and what they refuse. Nothing here asserts a time."""

import dataclasses
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_san import BUILTIN_MODEL, SANConfig
from modeling_san.processing import prompt_templates

# Not installed with the package: only the repository has them
sys.path.append(str(Path(__file__).resolve().parents[1]))
cli, compare, measure, others, profiling, report, stages, workload = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("__main__", "compare", "measure", "others", "profiling", "report", "stages", "workload")
)
Measurement, Report, Settings = (
    measure.Measurement,
    report.Report,
    importlib.import_module("benchmarks.settings").Settings,
)

MEGABYTE = 1_000_000
TINY = ("--model", str(BUILTIN_MODEL), "--size", "64", "--classes", "3", "--target", "48", "64", "--rounds", "1")
NETWORK_STAGES = ("text", "clip", "side_adapter", "recognition", "network")
OTHER_STAGES = ("cached_text", "preprocessing", "pil", "post_processing", "end_to_end", "full_scores")
MACHINE = {"processor": "A", "commit": "abc", "date": "today", "gpu": None, "load_average": 0.0}


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fixed_rate(monkeypatch):
    """A machine whose matrix product always runs at 10 GFLOP/s, and takes no time here."""
    monkeypatch.setattr(measure, "product_rates", lambda side, count: [10.0] * count)
    # Before each stage garbage is collected, which is not to look at everything that other tests have left
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(fixed_rate, tmp_path):
    """Runs the command on the built-in model; returns its exit code and the report it wrote."""

    def run(*arguments):
        output = tmp_path / "new.json"
        code = cli.main([*TINY, "--threads", "1", "--output", str(output), *arguments])
        return code, Report.load(output)

    return run


def make_report(settings=None, rates=(100.0,), **measured):
    return Report(settings or Settings(), dict(MACHINE), list(rates), measured)


def saved(tmp_path, name, made):
    path = tmp_path / name
    made.save(path)
    return str(path)


def test_a_run_has_time_cost_and_memory_of_every_stage(run, capsys):
    code, written = run("--stages", *NETWORK_STAGES, *OTHER_STAGES, "--flops")
    assert code == 0
    assert set(written.stages) == {*NETWORK_STAGES, *OTHER_STAGES}
    has_memory = sys.platform == "linux"
    for name, measured in written.stages.items():
        assert len(measured.seconds) == 1
        assert measured.cost == pytest.approx(10 * measured.seconds[0])
        assert (measured.peak_memory is not None) == (measured.added_memory is not None) == has_memory
        assert (measured.flops is not None) == (name in NETWORK_STAGES)
    parts = [written.stages[name].flops for name in ("clip", "side_adapter", "recognition")]
    # The rest of the network is the product of masks and classes
    assert sum(parts) < written.stages["network"].flops < 1.01 * sum(parts)
    printed = capsys.readouterr().out
    assert all(stages.STAGES[name].title in printed for name in written.stages)


def test_the_file_says_where_and_with_what_it_was_measured(run):
    _, written = run("--stages", "pil")
    machine = written.machine
    assert machine["libraries"]["torch"] == torch.__version__
    assert {"commit", "processor", "python", "date", "load_average"} <= set(machine)
    assert written.settings.threads == 1
    assert written.settings.target == (48, 64)
    assert written.rates == [10.0] * 6


def test_a_report_comes_back_from_its_file_as_it_was(tmp_path):
    measured = Measurement((0.5, 0.25, 1.0), 80.5, 300, 20, warmed_up=False, flops=7)
    made = make_report(network=measured)
    made.scaling = {"size": {"320": {"network": measured}}}
    made.others = {"CLIPSeg": {"20": dataclasses.replace(measured, gflops=None, peak_memory=None)}}
    made.load_average = 1.5
    assert Report.load(Path(saved(tmp_path, "report.json", made))) == made


def test_the_file_spells_out_median_spread_and_cost(tmp_path):
    path = saved(tmp_path, "report.json", make_report(network=Measurement((1.0, 4.0, 2.0), gflops=50.0)))
    network = json.loads(Path(path).read_text())["stages"]["network"]
    assert (network["median"], network["spread"], network["cost"]) == (2.0, 1.5, 100.0)


@pytest.mark.parametrize(
    ("old", "new", "is_regression"),
    [
        pytest.param(Measurement((2.0,), 100.0), Measurement((1.0,), 200.0), False, id="same work, faster machine"),
        pytest.param(Measurement((1.0,), 100.0), Measurement((1.0,), 200.0), True, id="same time, faster machine"),
        pytest.param(Measurement((1.0,), 100.0), Measurement((1.1,), 100.0), False, id="within the tolerance"),
        pytest.param(Measurement((1.0,), 100.0), Measurement((1.3,), 100.0), True, id="beyond the tolerance"),
        pytest.param(Measurement((1.0,), None), Measurement((1.3,), None), True, id="without cost, by seconds"),
        pytest.param(
            Measurement((1.0,), 100.0, 900 * MEGABYTE, 200 * MEGABYTE),
            Measurement((1.0,), 100.0, 960 * MEGABYTE, 260 * MEGABYTE),
            True,
            id="more memory",
        ),
        pytest.param(
            Measurement((1.0,), 100.0, 900 * MEGABYTE, 1 * MEGABYTE),
            Measurement((1.0,), 100.0, 905 * MEGABYTE, 6 * MEGABYTE),
            False,
            id="a little more of hardly any memory",
        ),
        pytest.param(
            Measurement((1.0,), 100.0, 900 * MEGABYTE, 200 * MEGABYTE),
            Measurement((1.0,), 100.0),
            False,
            id="memory not known",
        ),
    ],
)
def test_growth_beyond_the_tolerance_is_a_regression(tmp_path, capsys, old, new, is_regression):
    before = saved(tmp_path, "old.json", make_report(network=old))
    after = saved(tmp_path, "new.json", make_report(network=new))
    assert cli.main(["--compare", before, after, "--tolerance", "0.2"]) == int(is_regression)
    printed = capsys.readouterr().out
    assert ("SLOWER" in printed or "LARGER" in printed) == is_regression


def test_a_stage_that_was_not_measured_again_is_shown_and_no_regression(tmp_path, capsys):
    measured = Measurement((1.0,), 100.0)
    before = saved(tmp_path, "old.json", make_report(network=measured, text=measured))
    after = saved(tmp_path, "new.json", make_report(network=measured))
    assert cli.main(["--compare", before, after]) == 0
    assert "not measured" in capsys.readouterr().out


def test_a_comparison_measures_as_the_older_run_did(run, tmp_path):
    _, first = run("--stages", "pil", "post_processing")
    slow = {name: dataclasses.replace(measured, seconds=(1e3,)) for name, measured in first.stages.items()}
    before = saved(tmp_path, "old.json", dataclasses.replace(first, stages=slow))
    again = tmp_path / "again.json"
    # No setting is given: all come from the file
    assert cli.main(["--compare", before, "--rounds", "1", "--output", str(again)]) == 0
    assert Report.load(again).settings == first.settings
    assert list(Report.load(again).stages) == ["pil", "post_processing"]
    fast = {name: dataclasses.replace(measured, seconds=(1e-9,)) for name, measured in first.stages.items()}
    before = saved(tmp_path, "old.json", dataclasses.replace(first, stages=fast))
    assert cli.main(["--compare", before, "--rounds", "1", "--output", str(again)]) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (make_report(Settings(size=320), network=Measurement((1.0,))), None, "size 320 and 640"),
        (make_report(text=Measurement((1.0,))), None, "no stage in common"),
        (make_report(), None, "the older one has none"),
        (
            dataclasses.replace(make_report(network=Measurement((1.0,))), machine={**MACHINE, "gpu": "B"}),
            None,
            "same GPU",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys, old, new, message):
    new = make_report(network=Measurement((1.0,)))
    code = cli.main(["--compare", saved(tmp_path, "old.json", old), saved(tmp_path, "new.json", new)])
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"format": 99}',
        '{"format": 1, "settings": {}}',
        '{"format": 1, "settings": {"size": 3}, "machine": {}, "rates": [], "stages": {}}',
        "[" * 100_000,
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, capsys, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    assert cli.main(["--compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is not a file that python -m benchmarks wrote" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("seconds", [[], "1", [0.0], ["1"], None])
def test_a_measurement_without_times_is_refused(seconds):
    with pytest.raises(ValueError, match="expected a list of seconds"):
        Measurement.from_json({"seconds": seconds})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "100 is not a multiple of 32"),
        (["--size", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "x"], "'x' is not a whole number"),
        (["--dtype", "float16"], "invalid choice"),
        (["--rounds", "-1"], "'-1' is not a whole number"),
        (["--tolerance", "nan"], "'nan' is not a number above 0"),
        (["--nonsense"], "unrecognized arguments"),
        (["--stages", "networks"], "--stages networks: there is no such stage"),
        (["--scaling", "width"], "--scaling width: there is no such axis"),
        (["--scaling", "size=33"], "33 is not a multiple of 32"),
        (["--scaling", "classes=0"], "'0' is not a whole number"),
        (["--model", "nowhere", "--stages", "clip"], "model nowhere: there is no such folder"),
        (["--tokenizer", "nowhere", "--stages", "text"], "tokenizer nowhere: there is no such folder"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--compare", "nowhere.json"], "nowhere.json"),
        (["--compare", "a", "b", "c"], "--compare got 3 files"),
        (["--output", "nowhere/new.json"], "there is no folder nowhere"),
        (["--output", "."], "is a folder"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(fixed_rate, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main([*TINY, "--stages", "none", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_setting_that_the_older_run_did_not_have_is_refused(tmp_path, capsys):
    old = saved(tmp_path, "old.json", make_report(network=Measurement((1.0,))))
    assert cli.main(["--compare", old, "--size", "320"]) == 2
    assert "--size 320" in capsys.readouterr().err


def test_the_file_to_compare_with_is_never_written_over(tmp_path, capsys):
    old = saved(tmp_path, "old.json", make_report(network=Measurement((1.0,))))
    before = Path(old).read_bytes()
    assert cli.main(["--compare", old, "--output", old]) == 2
    assert Path(old).read_bytes() == before


def test_the_help_names_every_stage_and_shows_an_example():
    help_text = " ".join(cli.make_parser().format_help().split())
    assert "python -m benchmarks --compare" in help_text
    assert f"some of {', '.join(stages.STAGES)};" in help_text


def test_the_peak_counts_memory_that_was_freed_again():
    memory = measure.PeakMemory(torch.device("cpu"))
    memory.start()
    torch.ones(16 * 2**20).sum()
    peak, added = memory.read()
    if peak is None:
        pytest.skip("this system keeps no mark of the largest memory that can be reset")
    assert peak > added > 60 * MEGABYTE
    memory.start()
    assert memory.read()[1] < 30 * MEGABYTE


def test_a_first_run_beyond_the_budget_is_the_only_one(fixed_rate):
    calls = []

    def run():
        calls.append(None)
        time.sleep(0.002)

    measured = measure.Meter(torch.device("cpu"), rounds=5, budget=1e-3).measure(run)
    assert len(calls) == len(measured.seconds) == 1
    assert not measured.warmed_up
    measured = measure.Meter(torch.device("cpu"), rounds=3, budget=60).measure(run)
    assert len(calls) == 1 + 1 + 3
    assert measured.warmed_up


def test_the_rate_of_the_matrix_product_is_positive():
    rates = measure.product_rates(side=32, count=4)
    assert len(rates) == 4
    assert min(rates) > 0


def test_operations_of_products_and_attention_are_counted():
    assert profiling.count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7
    tokens = torch.ones(1, 2, 11, 4)
    attention = profiling.count_flops(lambda: nn.functional.scaled_dot_product_attention(tokens, tokens, tokens))
    assert attention == 2 * (2 * 2 * 11 * 11 * 4)


def test_profiling_shows_operators_and_writes_a_trace(run, tmp_path, capsys):
    run("--stages", "recognition", "--profile")
    assert "aten::" in capsys.readouterr().out
    trace = json.loads((tmp_path / "new_recognition.trace.json").read_text())
    assert any(event.get("name", "").startswith("aten::") for event in trace["traceEvents"])


def test_scaling_measures_each_value_and_explains_the_axis(run, capsys):
    _, written = run("--stages", "none", "--scaling", "classes=2,4", "queries=3", "size=32")
    assert set(written.scaling["classes"]) == {"2", "4"}
    assert set(written.scaling["classes"]["2"]) == {"network", "post_processing", "text"}
    assert set(written.scaling["queries"]["3"]) == {"network", "post_processing"}
    assert set(written.scaling["size"]) == {"32"}
    assert "grows linearly" in capsys.readouterr().out


def test_others_are_measured_beside_san(run, monkeypatch, capsys):
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    vision = {**layers, "num_hidden_layers": 2, "patch_size": 16, "image_size": 32}
    monkeypatch.setattr(
        others,
        "CLIPSEG",
        {
            "vision_config": vision,
            "text_config": layers,
            "projection_dim": 16,
            "reduce_dim": 8,
            "extract_layers": [0],
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
    )
    eomt = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "num_blocks": 1}
    monkeypatch.setattr(others, "EOMT", eomt)
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
    swin["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "decoder_layers": 2, "encoder_layers": 1}
    monkeypatch.setattr(others, "MASK2FORMER", {**sizes, "backbone_config": swin, "num_attention_heads": 2})
    monkeypatch.setattr(others, "MASK2FORMER_SIDE", 64)
    _, written = run("--stages", "none", "--others", "1", "2")
    assert list(written.others) == ["SAN", "SAN's text, once", "CLIPSeg", "EoMT-B", "Mask2Former"]
    assert all(list(by_labels) == ["1", "2"] for by_labels in written.others.values())
    assert "CLIPSeg's work grows with each label" in capsys.readouterr().out


def test_full_scores_give_the_segmentation_that_post_processing_gives(tmp_path):
    settings = Settings(model=str(BUILTIN_MODEL), size=128, classes=7, target=(96, 150))
    work = workload.Workload(settings, tmp_path)
    outputs = work.outputs(classes=7, size=128)
    [plain] = stages.label_maps_from_full_scores(outputs, (96, 150))
    [ours] = work.image_processor.post_process_semantic_segmentation(outputs, target_sizes=[(96, 150)])
    assert plain.shape == ours.shape == (96, 150)
    # Rounding may decide between two classes whose scores are equal
    assert (plain == ours).float().mean() > 0.999
    assert len(ours.unique()) > 2


def test_labels_do_not_repeat_however_many_are_asked_for():
    labels = workload.make_labels(10_000)
    assert len(set(labels)) == 10_000
    assert labels[:2] == ["person", "bicycle"]


def test_made_up_prompts_look_like_a_tokenizers():
    config = SANConfig().text_config
    labels, templates = workload.make_labels(171), prompt_templates("vild")
    prompts = workload.made_up_prompts(labels, templates, config)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    assert ids.shape[:2] == (171, 14)
    assert ids.min() >= 0
    assert ids.max() < config.vocab_size
    # "a photo of a {}." is start, four words, the label, a full stop, end
    person = ids[labels.index("person"), 0]
    bicycle = ids[labels.index("bicycle"), 0]
    assert person[:5].tolist() == bicycle[:5].tolist()
    assert person[5] != bicycle[5]
    assert (person == config.eos_token_id).nonzero()[0].item() == 7
    assert mask[labels.index("person"), 0].sum() == 8
    lengths = mask.sum(-1)
    assert torch.equal((ids == config.eos_token_id).int().argmax(-1) + 1, lengths)


def test_made_up_prompts_are_about_as_long_as_clips(clip_processor):
    labels = workload.make_labels(171)
    real = clip_processor.tokenize_labels(labels)["attention_mask"].sum(-1)
    made_up = workload.made_up_prompts(labels, prompt_templates("vild"), SANConfig().text_config)
    lengths = made_up["attention_mask"].sum(-1)
    assert lengths.float().mean().item() == pytest.approx(real.float().mean().item(), rel=0.02)
    assert lengths.max() == real.max()


def test_prompts_fit_a_text_encoder_of_few_positions():
    text = SANConfig.from_pretrained(BUILTIN_MODEL).text_config
    prompts = workload.made_up_prompts(["word " * 100], ["a {}"], text)
    assert prompts["input_ids"].shape[-1] == text.max_position_embeddings


def test_labels_known_from_disk_are_not_encoded(tmp_path, monkeypatch):
    settings = Settings(model=str(BUILTIN_MODEL), size=64, classes=300)
    work = workload.Workload(settings, tmp_path)
    encoded = []
    work.model.text_projection.register_forward_hook(lambda *_: encoded.append(1))
    # A hook on the text encoder itself would make it one whose embeddings are not kept
    monkeypatch.setattr(importlib.import_module("modeling_san.text_cache_san"), "_is_plain", lambda model: True)
    run = stages.STAGES["cached_text"].prepare(work)
    with torch.inference_mode():
        run()
        first = len(encoded)
        run()
    assert first >= 1
    assert len(encoded) == first
    assert list(tmp_path.glob("*.sqlite3"))


def test_agreement_is_the_share_of_pixels_with_the_same_label(run, tmp_path, capsys):
    image = tmp_path / "drawn.png"
    workload.make_image(64, 96).save(image)
    code, written = run("--stages", "none", "--dtype", "bfloat16", "--agreement", str(image), str(image))
    assert code == 0
    [share] = written.agreement.values()
    assert 0.9 < share <= 1
    assert f"same label in bfloat16 as in float32: {share:.2%} of 1 images" in capsys.readouterr().out
    _, exact = run("--stages", "none", "--dtype", "float32", "--agreement", str(image))
    assert list(exact.agreement.values()) == [1.0]


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        ("vit_b_16", "there.png", "pass a trained model's folder"),
        (str(BUILTIN_MODEL), "missing.png", "there is no file"),
    ],
)
def test_agreement_without_a_model_or_a_image_says_so(tmp_path, capsys, model, image, message):
    workload.make_image(32, 32).save(tmp_path / "there.png")
    arguments = ["--model", model, "--stages", "none", "--agreement", str(tmp_path / image)]
    assert cli.main([*arguments, "--output", str(tmp_path / "new.json")]) == 2
    assert message in capsys.readouterr().err
