"""Deterministic weights for a checkpoint, from nothing but its keys and shapes.

Every tensor is drawn from numpy's legacy RandomState (whose stream is frozen by
NumPy's compatibility policy), seeded with the CRC-32 of the tensor's name, so the
same numbers come out on every machine and no checkpoint has to be stored.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch


def make_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 tensor of `shape`, a pure function of `name` and `shape`."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    noise = torch.from_numpy(np.asarray(random.standard_normal(shape), dtype=np.float32)).reshape(shape)
    if name.endswith("logit_scale"):
        return torch.tensor(math.log(100.0))
    if name.endswith("attn_mask"):  # the text encoder's causal mask
        return torch.full(shape, float("-inf")).triu(1)
    if name.endswith("empty_weight"):  # class weights of the loss, no-object last
        return torch.cat([torch.ones(shape[0] - 1), torch.tensor([0.1])])
    if name.endswith("bias_scaling.weight"):
        return 1.0 + 0.1 * noise
    is_norm = any(part in name for part in ("ln_", "norm", "input_proj.0"))
    if name.endswith("weight") and is_norm:
        return 1.0 + 0.1 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    if "token_embedding" in name:
        return noise
    if "embed" in name and "patch_embed" not in name:
        return 0.3 * noise
    if name.endswith(("proj", "text_projection")):  # stored (in, out), used as x @ proj
        return noise / math.sqrt(shape[0])
    gain = 1.0
    if "query_mlp.layers.2" in name:  # keeps mask logits and attention biases moderate
        gain = 0.1
    elif name.endswith("out_proj.weight"):  # lets the mask embeddings tell each other apart
        gain = 20.0
    elif name.endswith("in_proj_weight"):
        gain = 2.0
    fan_in = math.prod(shape[1:]) or 1
    return gain * noise / math.sqrt(fan_in)


def make_state_dict(shapes_json: str | Path) -> dict[str, torch.Tensor]:
    """State dict with every key of `shapes_json` (a {name: shape} object)."""
    shapes = json.loads(Path(shapes_json).read_text())
    return {name: make_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def make_image(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 RGB image (height, width, 3): smooth colour blobs plus a little noise."""
    random = np.random.RandomState(seed)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float64)
    image = np.zeros((height, width, 3))
    for _ in range(12):
        cy, cx = random.uniform(0, height), random.uniform(0, width)
        radius = random.uniform(0.1, 0.4) * max(height, width)
        colour = random.uniform(-120, 120, size=3)
        image += colour * np.exp(-((ys - cy) ** 2 + (xs - cx) ** 2) / (2 * radius**2))[..., None]
    image += 128 + random.normal(0, 6, size=image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def fixed_rand(*size, **_):
    """Stands in for torch.rand: uniform numbers that depend on the size alone, not on call order."""
    size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
    random = np.random.RandomState(zlib.crc32(str(tuple(int(n) for n in size)).encode()))
    return torch.from_numpy(random.random_sample(size).astype(np.float32))
