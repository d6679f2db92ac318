"""Parameters that are spread over processes train, are saved and resumed as whole ones."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from test_train import common, free_port, join_group, options, progress_of, start, weights  # noqa: F401 - fixtures
from torch.distributed.fsdp import FSDPModule

from modeling_san import SANForOpenVocabSegmentation
from modeling_san.training import run as run_module
from modeling_san.training import train as train_module
from modeling_san.training.build import make_accelerator
from modeling_san.training.recipe import Recipe
from modeling_san.training.train import compute_gradients

pytestmark = pytest.mark.slow


def spread(policy, recipe, *trackers):
    """Accelerate with FSDP on a CPU, which it takes for a GPU's business until it is told otherwise."""
    accelerator = make_accelerator(recipe, *trackers)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=policy, state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False, transformer_cls_names_to_wrap=["CLIPEncoderLayer", "SideAdapterLayer"],
    )  # fmt: skip
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def train_spread(rank, port, policy, recipes):
    def checked_gradients(run):
        assert sum(isinstance(module, FSDPModule) for module in run.unwrapped.modules()) > 0
        return compute_gradients(run)

    run_module.make_accelerator = partial(spread, policy)
    train_module.compute_gradients = checked_gradients
    for recipe in recipes:
        join_group(rank, 1, port)
        train_module.train(Recipe(**recipe), progress=False)


@pytest.mark.parametrize(
    ("policy", "trainable"), [("no_wrap", "everything"), ("transformer_based_wrap", "paper")], ids=["model", "layers"]
)
def test_a_run_with_spread_parameters_equals_one_with_whole_ones(options, tmp_path, policy, trainable):  # noqa: F811
    options = {**options, "steps": 2, "checkpoint_every": 1, "trainable": trainable, "validation": options["dataset"]}
    together = {**options, "output_dir": str(tmp_path / "spread")}
    runs = [{**together, "steps": 2}, {**together, "steps": 3, "resume": "auto"}]
    mp.spawn(train_spread, args=(free_port(), policy, runs), nprocs=1)
    torch.set_num_threads(1)
    for run in runs:
        train_module.train(Recipe(**{**run, "output_dir": options["output_dir"]}), progress=False)
    expected, found = weights(Path(options["output_dir"])), weights(tmp_path / "spread")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)
    checkpoint = tmp_path / "spread" / "checkpoints" / "step-00000003"
    assert progress_of(checkpoint)["step"] == 3
    SANForOpenVocabSegmentation.from_pretrained(checkpoint)
