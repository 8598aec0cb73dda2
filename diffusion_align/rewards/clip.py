"""CLIP-family rewards through open_clip: how well a picture agrees with its prompt, as the cosine of their embeddings.

CLIPScore, PickScore and HPSv2 are this one function with different weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

Reward = Callable[[torch.Tensor, list[str]], torch.Tensor]

TINY_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "tiny_clip"
CONFIG_FILE = "open_clip_config.json"


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [0, 1] as 8-bit levels, rounded as a saved PNG is; what is out of range is clamped, NaN is black.

    Raises:
        ValueError: `images` is not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"pictures are floating point in [0, 1], not {images.dtype}")
    # In float64, as in the PNG writer: in float32 a product can land on a half that the exact product misses.
    return (images.detach().double().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


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


def clip_scorer(
    source: str | Path, *, device: str | torch.device | None = None, chunk: int = 64, scale: float = 1.0
) -> Reward:
    """A frozen open_clip model as a reward: `scale * cosine(picture, prompt)`, without the model's learned logit scale.

    The scale is 1, a plain cosine, unless it is given: 100 is the habit of CLIPScore and HPSv2, and the model's own
    `exp(logit_scale)` (about 100) that of PickScore. Runs in float32 whatever autocast surrounds it. Pictures are
    rounded to 8 bits first, so a picture scores the same in memory as after being saved as PNG, and pass through
    open_clip's own transform for evaluation.

    Args:
        source: "tiny" (the embedded reward), a local folder in open_clip's format, "hf-hub:owner/name", or an
            architecture with its weights, "ViT-H-14:laion2b_s32b_b79k" or "ViT-H-14:HPS_v2.1_compressed.pt".
        device: where to run; a GPU if there is one, unless it is given.
        chunk: pictures, and prompts, in one forward pass.
        scale: factor on the cosine.

    Returns:
        A reward `(images [B,3,H,W] in [0, 1], B prompts) -> [B]` float32 on the pictures' device, without gradient. A
        picture that is not finite scores NaN.

    Raises:
        ValueError: the source cannot be one, or its weights are not finite.
    """
    name, pretrained = resolve_source(source)
    import open_clip  # four seconds, so only where a CLIP reward is really used

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.random.fork_rng(devices=[]):  # open_clip draws random weights first, from the global generator
        loaded: Any = open_clip.create_model_from_pretrained(name, pretrained, device=place)
    model, transform = loaded
    tokenizer = open_clip.get_tokenizer(name)
    model.eval().requires_grad_(False)
    broken = [key for key, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"{len(broken)} weights of {source} are not finite: {broken[0]} is the first")

    def embed_prompts(prompts: list[str]) -> torch.Tensor:
        parts = [prompts[i : i + chunk] for i in range(0, len(prompts), chunk)]
        return torch.cat([model.encode_text(tokenizer(part).to(place), normalize=True) for part in parts])

    def embed_pictures(levels: torch.Tensor) -> torch.Tensor:
        features = []
        for part in levels.permute(0, 2, 3, 1).cpu().split(chunk):
            pixels = torch.stack([transform(Image.fromarray(picture)) for picture in part.numpy()])
            features.append(model.encode_image(pixels.to(place), normalize=True))
        return torch.cat(features)

    @torch.no_grad()
    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or len(prompts) != len(images):
            raise ValueError(f"expected [B,3,H,W] and B prompts, not {list(images.shape)} and {len(prompts)} prompts")
        if not prompts:
            return torch.zeros(0, device=images.device)
        # K pictures of one prompt share its text embedding.
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        with torch.autocast(place.type, enabled=False):
            text = embed_prompts(list(rows))[[rows[prompt] for prompt in prompts]]
            cosine = (embed_pictures(to_uint8(images)) * text).sum(-1)
        finite = torch.isfinite(images).flatten(1).all(1)
        return torch.where(finite, (scale * cosine).to(images.device), torch.nan)

    return score
