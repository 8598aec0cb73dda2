"""CLIP-family rewards through open_clip: how well a picture agrees with its prompt, as the cosine of their embeddings.

CLIPScore, PickScore and HPSv2 are this one function with different weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .clip_config import CONFIG_FILE, require_plain_clip
from .clip_fetch import fetched
from .pictures import Reward, of_levels, to_pil, to_uint8
from .weights import fill, place_of

__all__ = ["Clip", "Reward", "clip_of", "clip_scorer", "cosine_scorer", "open_clip_model", "resolve_source", "to_uint8"]

TINY_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "tiny_clip"


@dataclass(frozen=True)
class Clip:
    """A frozen open_clip model with the transform and the tokenizer that belong to it."""

    model: Any
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device

    def prepare(self, levels: Tensor) -> Tensor:
        """8-bit levels [B,3,H,W] -> the tower's pixels [B,3,S,S] on the CPU, by open_clip's own transform."""
        return torch.stack([self.transform(picture) for picture in to_pil(levels)])

    def embed_pictures(self, levels: Tensor, chunk: int) -> Tensor:
        """8-bit levels [B,3,H,W] -> embeddings [B,E] of norm 1."""
        parts = levels.split(chunk)
        return torch.cat(
            [self.model.encode_image(self.prepare(part).to(self.device), normalize=True) for part in parts]
        )

    def embed_prompts(self, prompts: list[str], chunk: int) -> Tensor:
        """Embeddings [B,E] of norm 1. Each prompt is embedded once: K pictures of one share it."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = list(rows)
        parts = [self.tokenizer(texts[i : i + chunk]).to(self.device) for i in range(0, len(texts), chunk)]
        embedded = torch.cat([self.model.encode_text(part, normalize=True) for part in parts])
        return embedded[[rows[prompt] for prompt in prompts]]


def resolve_source(source: str | Path) -> tuple[str, str | None]:
    """open_clip's own (model name, pretrained tag or file) for a source; nothing is loaded or downloaded.

    Raises:
        ValueError: a folder that is not in open_clip's format, or a name without weights.
    """
    text = str(source)
    if text.startswith(("hf-hub:", "local-dir:")):
        return text, None
    folder = TINY_FOLDER if text == "tiny" else Path(text)
    if text == "tiny" or folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            build = " (scripts/build_tiny.py writes it)" if text == "tiny" else ""
            raise ValueError(f"no {CONFIG_FILE} in {folder}: not an open_clip folder{build}")
        return f"local-dir:{folder}", None
    name, _, pretrained = text.partition(":")
    if not pretrained:
        # Without a tag open_clip would start from random weights with no more than a warning in the log.
        raise ValueError(
            f'{text!r} is neither a folder nor "hf-hub:owner/name"; an architecture needs weights, '
            f'such as "{name}:laion2b_s32b_b79k" or "{name}:weights.pt"'
        )
    return name, pretrained


def open_clip_model(source: str | Path, *, device: str | torch.device | None = None) -> Clip:
    """A model that open_clip finds by itself, in float32; sources and errors are those of `clip_scorer`."""
    name, pretrained = resolve_source(source)
    require_plain_clip(name, pretrained)
    import open_clip  # four seconds, so only where a CLIP reward is really used

    place = place_of(device)
    # Under an activation they were not trained with, weights score a little wrong and open_clip only warns.
    quick = bool(pretrained and open_clip.pretrained.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
    with torch.random.fork_rng(devices=[]):  # open_clip draws random weights first, from the global generator
        make = partial(open_clip.create_model_from_pretrained, name, pretrained, device=place, force_quick_gelu=quick)
        loaded: Any = fetched(name, pretrained, make)
    model, transform = loaded
    tokenizer = fetched(name, pretrained, partial(open_clip.get_tokenizer, name))
    model.eval().requires_grad_(False)
    broken = [key for key, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"{len(broken)} weights of {source} are not finite: {broken[0]} is the first")
    return Clip(model, transform, tokenizer, place)


def clip_of(
    architecture: str,
    weights: Mapping[str, Tensor],
    *,
    source: object,
    resize_mode: str = "shortest",
    device: str | torch.device | None = None,
) -> Clip:
    """open_clip's `architecture` with these very weights, in float32; `source` names them in errors.

    `resize_mode` is open_clip's word for pictures that are not square: "shortest" crops, "longest" pads them black.

    Raises:
        ValueError: keys or shapes that are not the architecture's, with the first wrong one; weights not finite.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"open_clip has no architecture {architecture!r}")
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(**config)
    model = fill(model, weights, source, place_of(device))
    settings: Any = {"size": model.visual.image_size, "resize_mode": resize_mode}
    transform: Any = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return Clip(model, transform, open_clip.get_tokenizer(architecture), place_of(device))


def cosine_scorer(clip: Clip, *, chunk: int = 64, scale: float | None = 1.0) -> Reward:
    """A CLIP as a reward: `scale * cosine(picture, prompt)`; None is the model's own `exp(logit_scale)`.

    Runs in float32 whatever autocast surrounds it, `chunk` pictures, and prompts, in one forward pass. What it promises
    besides is in `pictures.of_levels`.
    """
    factor = float(clip.model.logit_scale.exp()) if scale is None else scale

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        text = clip.embed_prompts(prompts, chunk)
        return factor * (clip.embed_pictures(levels, chunk) * text).sum(-1)

    return of_levels(score)


def clip_scorer(
    source: str | Path, *, device: str | torch.device | None = None, chunk: int = 64, scale: float | None = 1.0
) -> Reward:
    """A frozen open_clip model as a reward: `scale * cosine(picture, prompt)`, without the model's learned logit scale.

    The scale is 1, a plain cosine, unless it is given: 100 is the habit of CLIPScore, and the model's own
    `exp(logit_scale)` (about 100; None here) that of PickScore. Pictures are rounded to 8 bits first, so a picture
    scores the same in memory as after being saved as PNG, and pass through open_clip's own transform for evaluation.

    Args:
        source: "tiny" (the embedded reward), a local folder in open_clip's format, "hf-hub:owner/name", or an
            architecture with its weights, "ViT-H-14:laion2b_s32b_b79k" or "ViT-H-14:weights.pt".
        device: where to run; a GPU if there is one, unless it is given.
        chunk: pictures, and prompts, in one forward pass.
        scale: factor on the cosine.

    Returns:
        A reward `(images [B,3,H,W] in [0, 1], B prompts) -> [B]` float32 on the pictures' device, without gradient. A
        picture that is not finite scores NaN.

    Raises:
        ValueError: the source cannot be one, or its weights are not finite.
        FileNotFoundError: its weights cannot be fetched; with the command that fetches them.
    """
    return cosine_scorer(open_clip_model(source, device=device), chunk=chunk, scale=scale)
