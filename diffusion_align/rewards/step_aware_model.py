"""SPO's step-aware preference model (Liang et al. 2024, arXiv 2406.04314): a CLIP reward that knows the noise level.

It scores a denoiser's prediction at any step, `exp(logit_scale) cosine(picture at t, prompt)`, so that two
children of one state can be compared. Its folder has open_clip_config.json, the tokenizer's files and
step_aware.safetensors; loading needs nothing else and unpickles nothing. `step_aware_load` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_align.system.file_modes import readable

from ..tensors import widen
from .clip import fetched, require_finite, require_plain_clip
from .interface import device_or_default
from .spec import CONFIG_FILE, resolve_source
from .time_conditioned import (
    TimeConditioning,
    encode,
    fit_patches,
    picture_transform,
    plain_bicubic,
    require_vit,
    take_latents,
)

WEIGHTS = "step_aware.safetensors"
PLAIN_BICUBIC = "bicubic"  # config["step_aware"]["resize"] of a model trained with SPO's own code

Shape = tuple[int, int, int]
Tokenizer = Callable[[list[str]], Tensor]


class StepAware(nn.Module):
    """A CLIP whose vision tower is conditioned on time. Before training it scores as the plain CLIP at every time.

    All weights train: the CLIP's own in `clip`, the added ones in `time`. `config` is the content of
    open_clip_config.json; its entry step_aware may name SPO's own resize. `latents` is the shape (C,h,w) of the latents
    that it reads, or None for pictures.
    """

    def __init__(
        self, clip: Any, tokenizer: Tokenizer, config: dict[str, Any], *, latents: Shape | None = None, seed: int = 0
    ):
        super().__init__()
        require_vit(clip.visual)
        self.clip, self.tokenizer, self.config, self.latents = clip, tokenizer, config, latents
        size, preprocess = clip.visual.image_size, config["preprocess_cfg"]
        plain = config.get("step_aware", {}).get("resize") == PLAIN_BICUBIC
        self.prepare = plain_bicubic(size[0], preprocess) if plain else picture_transform(size, preprocess)
        if latents is not None:
            take_latents(clip.visual, latents, seed)
        self.time = TimeConditioning(len(clip.visual.class_embedding), len(clip.visual.transformer.resblocks), seed)

    def forward(self, images: Tensor, prompts: list[str] | Tensor, t: Tensor) -> Tensor:
        """Scores [B] of pictures [B,3,H,W] in [0, 1], or latents [B,C,h,w], for prompts (or tokens [B,L]) at times [B].

        Raises ValueError for shapes that do not fit together, for pictures to a model of latents, and the reverse.
        """
        found, wanted = list(images.shape), self.latents or (3, "H", "W")
        fits = len(found) == 4 and (found[1:] == list(wanted) or (self.latents is None and found[1] == 3))
        if not fits or not found[:1] == list(t.shape) == [len(prompts)]:
            wanted = f"[B,{','.join(map(str, wanted))}], B prompts and times [B]"
            raise ValueError(f"expected {wanted}, not {found}, {len(prompts)} prompts and {list(t.shape)}")
        place = self.clip.logit_scale.device
        inputs = self.prepare(images.to(place)) if self.latents is None else images.to(place)
        picture = F.normalize(widen(encode(self.clip.visual, self.time, inputs, t.to(place))), dim=-1)
        if isinstance(prompts, Tensor):
            text = self.clip.encode_text(prompts.to(place))
        else:  # each distinct prompt is embedded once
            rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
            text = self.clip.encode_text(self.tokenizer(list(rows)).to(place))[[rows[prompt] for prompt in prompts]]
        cosine = (picture * F.normalize(widen(text), dim=-1)).sum(-1)
        return widen(self.clip.logit_scale).exp() * cosine


def start_step_aware(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    latents: Shape | None = None,
    examples: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> StepAware:
    """An untrained model from the CLIP of `source`; sources and errors are those of `clip_scorer`.

    With `latents` (C,h,w) it reads clean latents instead of pictures, so scoring needs no decoder (as in LPO). Its
    patch weights are random, or fitted by least squares to `examples`: latents [N,C,h,w], and the pictures [N,3,H,W] in
    [0, 1] that they decode to.
    """
    name, pretrained = resolve_source(source)
    require_plain_clip(name, pretrained)
    import open_clip  # takes four seconds, so it is imported only where it is used

    with torch.random.fork_rng(devices=[]):  # open_clip first draws random weights from the global generator
        loaded: Any = fetched(name, pretrained, partial(open_clip.create_model_from_pretrained, name, pretrained))
    clip = loaded[0]
    require_vit(clip.visual)
    config: dict[str, Any] = {"model_cfg": open_clip.get_model_config(name.replace("/", "-") if pretrained else name)}
    config["preprocess_cfg"] = dict(clip.visual.preprocess_cfg)
    # A name or a tag implies these settings; a folder must state them.
    gelu = type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__
    config["model_cfg"] |= {"quick_gelu": gelu == "QuickGELU", "custom_text": hasattr(clip, "text")}
    picture_patches = clip.visual.conv1
    model = StepAware(clip, open_clip.get_tokenizer(name), config, latents=latents, seed=seed)
    if latents is not None and examples is not None:
        with torch.no_grad():
            pixels = model.prepare(examples[1].to(picture_patches.weight))
            fit_patches(clip.visual.conv1, examples[0], picture_patches(pixels))
    return ready(model, source, device)


def save_step_aware(model: StepAware, folder: str | os.PathLike[str]) -> Path:
    """Write a folder for `load_step_aware` and return it. The weights are written last, and never partially."""
    home, config, tokenizer = Path(folder), json.loads(json.dumps(model.config)), model.tokenizer
    home.mkdir(parents=True, exist_ok=True)
    if hasattr(tokenizer, "tokenizer"):  # open_clip wraps a tokenizer that has files; its own has none
        tokenizer.save_pretrained(home)  # pyright: ignore[reportFunctionMemberAccess]
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "in this folder"  # any name will do
    config["step_aware"] = {**config.get("step_aware", {}), "format": 1, "latents": model.latents}
    (home / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial = home / f".{WEIGHTS}.partial"
    save_file({name: weight.detach().contiguous() for name, weight in model.state_dict().items()}, partial)
    readable(partial)
    os.replace(partial, home / WEIGHTS)
    return home


def ready(model: StepAware, source: object, device: str | torch.device | None) -> StepAware:
    """The model on its device in eval mode; raises ValueError unless all its weights are finite."""
    require_finite(model, source)
    return model.to(device_or_default(device)).eval()
