"""LAION's aesthetic predictor v2: a small head on the image embedding of CLIP ViT-L/14; it does not read the prompt.

https://github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0), trained on ratings from 1 to 10. Its
head, which ImageReward shares, has five layers, 768 -> 1024 -> 128 -> 64 -> 16 -> 1, with dropout in training only: an
affine map in five factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import CATALOGUE
from .clip import Clip, open_clip_model
from .interface import Reward, of_levels
from .spec import CONFIG_FILE
from .weight_files import locate, read_weights, require_digest, require_fit, web_file

(FILE,) = CATALOGUE["aesthetic"].files
COMMIT = "6934dd81792f086e613a121dbce43082cb8be85e"
URL = f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/{COMMIT}/sac%2Blogos%2Bava1-l14-linearMSE.pth"
# Of the file in that repository (git blob 7c0d8aa2); kvablack/ddpo-pytorch carries the same bytes.
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
BACKBONE = "ViT-L-14-quickgelu:openai"
WIDTHS = (768, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the layers in their Sequential; the others were dropout


def load_aesthetic(path: str = "", *, device: str | torch.device | None = None, chunk: int = 64) -> Reward:
    """The predictor as a reward, about 1 to 10.

    Args:
        path: the head's file, or a folder with it under its published name. A folder may also hold the CLIP in
            open_clip's format. "" fetches what is missing.

    Raises:
        FileNotFoundError: a file is missing and cannot be fetched.
        ValueError: the published file with other bytes, or weights of another shape.
    """
    file = locate(path, (FILE,), "") if path else web_file(URL, SHA256)
    if file.name == FILE:
        require_digest(file, SHA256)
    head = read_weights(file)
    require_fit(head, head_shapes(), file)
    local = path and (Path(path).expanduser() / CONFIG_FILE).is_file()
    return aesthetic_scorer(open_clip_model(path if local else BACKBONE, device=device), head, chunk=chunk)


def aesthetic_scorer(clip: Clip, head: Mapping[str, Tensor], *, chunk: int = 64) -> Reward:
    """A head on the normalised image embeddings of a CLIP of its width; raises ValueError where they do not fit."""
    weights = {key: weight.to(clip.device, torch.float32) for key, weight in head.items()}
    width = clip.model.visual.output_dim
    if weights["layers.0.weight"].shape[1] != width:
        raise ValueError(f"the head reads {weights['layers.0.weight'].shape[1]} numbers, not the {width} of this CLIP")

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        return apply_head(weights, clip.embed_pictures(levels, chunk))

    return of_levels(score)


def head_shapes(widths: tuple[int, ...] = WIDTHS) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a head's weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place, narrow, wide in zip(PLACES, widths[1:], widths[:-1], strict=True):
        shapes |= {f"layers.{place}.weight": (narrow, wide), f"layers.{place}.bias": (narrow,)}
    return shapes


def apply_head(weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Features [B,768] -> scores [B]."""
    for place in PLACES:
        features = F.linear(features, weights[f"layers.{place}.weight"], weights[f"layers.{place}.bias"])
    return features.squeeze(-1)
