"""A random CLIP at toy size in open_clip's format, and pictures, for tests of rewards."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}


def make_clip_folder(path: Path, seed: int = 0) -> Path:
    """Write an open_clip folder of 32 x 32 pictures, embeddings of 16 and OpenAI's own tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = open_clip.CLIP(**CONFIG).state_dict()
    path.mkdir(parents=True, exist_ok=True)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, path / "open_clip_model.safetensors")
    preprocess = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}))
    return path


def pictures(n: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> torch.Tensor:
    """[n,3,H,W] uniform in [0, 1]."""
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))
