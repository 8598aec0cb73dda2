"""SPO's step-aware preference model (Liang et al. 2024, arXiv 2406.04314): a CLIP reward that knows the noise level.

It scores what a denoiser predicts half-way, `exp(logit_scale) cosine(picture at t, prompt)`, so that two children of
one state can be compared at any step. Its folder holds open_clip_config.json, the tokenizer's files and
step_aware.safetensors: nothing else is needed to load it, and nothing in it is pickled. Files as SPO's authors publish
them are read by `step_aware_published`.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_align.system.file_modes import readable

from ..system.plain_json import read_json
from ..tensors import widen
from .clip import fetched, require_plain_clip
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
PLAIN_BICUBIC = "bicubic"  # config["step_aware"]["resize"] of a model that was trained with SPO's own code

Shape = tuple[int, int, int]
Tokenizer = Callable[[list[str]], Tensor]
StepReward = Callable[[Tensor, list[str], Tensor], Tensor]
"""`(pictures [B,3,H,W] in [0, 1] or latents [B,C,h,w], B prompts, times [B]) -> [B]`, without gradient."""


class StepAware(nn.Module):
    """A CLIP whose vision tower is conditioned on time; at its start it scores as the plain CLIP at every time.

    All weights train: the CLIP's own in `clip`, the added ones in `time`. `config` is the content of
    open_clip_config.json, and its entry step_aware may name SPO's own resize; `latents` is the shape (C,h,w) of what it
    reads, or None for pictures.
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

        Raises ValueError for shapes that do not fit together, and for pictures where latents are read or the reverse.
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
        else:  # K pictures of one prompt share its text embedding
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
    """A model at its start, from a CLIP reward named as for `clip_scorer`, and with its errors.

    With `latents` (C,h,w) it reads clean latents instead of pictures, so that scoring needs no decoder (the idea of
    LPO). Its patches start at random, or fitted by least squares to `examples`: latents [N,C,h,w], and the pictures
    [N,3,H,W] in [0, 1] they decode to.
    """
    name, pretrained = resolve_source(source)
    require_plain_clip(name, pretrained)
    import open_clip  # four seconds, so only where it is really used

    with torch.random.fork_rng(devices=[]):  # open_clip draws random weights first, from the global generator
        loaded: Any = fetched(name, pretrained, partial(open_clip.create_model_from_pretrained, name, pretrained))
    clip = loaded[0]
    require_vit(clip.visual)
    config: dict[str, Any] = {"model_cfg": open_clip.get_model_config(name.replace("/", "-") if pretrained else name)}
    config["preprocess_cfg"] = dict(clip.visual.preprocess_cfg)
    # What a name or a tag implies, a folder has to say.
    gelu = type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__
    config["model_cfg"] |= {"quick_gelu": gelu == "QuickGELU", "custom_text": hasattr(clip, "text")}
    of_pictures = clip.visual.conv1
    model = StepAware(clip, open_clip.get_tokenizer(name), config, latents=latents, seed=seed)
    if latents is not None and examples is not None:
        with torch.no_grad():
            fit_patches(clip.visual.conv1, examples[0], of_pictures(model.prepare(examples[1].to(of_pictures.weight))))
    return ready(model, source, device)


def save_step_aware(model: StepAware, folder: str | os.PathLike[str]) -> Path:
    """Write a folder for `load_step_aware` and return it. The weights come last, whole or not at all."""
    home, config, tokenizer = Path(folder), json.loads(json.dumps(model.config)), model.tokenizer
    home.mkdir(parents=True, exist_ok=True)
    if hasattr(tokenizer, "tokenizer"):  # open_clip's wrapper of a tokenizer with files; its other one has none
        tokenizer.save_pretrained(home)  # pyright: ignore[reportFunctionMemberAccess]
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "in this folder"  # any name makes open_clip look there
    config["step_aware"] = {**config.get("step_aware", {}), "format": 1, "latents": model.latents}
    (home / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial = home / f".{WEIGHTS}.partial"
    save_file({name: weight.detach().contiguous() for name, weight in model.state_dict().items()}, partial)
    readable(partial)
    os.replace(partial, home / WEIGHTS)
    return home


def load_step_aware(source: str | os.PathLike[str], *, device: str | torch.device | None = None) -> StepAware:
    """A model in eval mode, from the folder that `save_step_aware` wrote, from a file as SPO's authors publish it, or
    from the name of one of theirs (`origins.STEP_AWARE`).

    Raises:
        FileNotFoundError: the folder lacks one of its files, or the hub does not give the published one.
        ValueError: weights that are missing, too many, of another shape, or not finite; a configuration that asks for
            code.
    """
    from . import step_aware_published as published

    if published.is_published(source):
        return published.load_published(published.locate_published(source), device=device)
    home = Path(source)
    for name in (CONFIG_FILE, WEIGHTS):
        if not (home / name).is_file():
            raise FileNotFoundError(f"{home} is not a step-aware preference model: it has no {name}")
    require_plain_clip(f"local-dir:{home}", None)
    import open_clip

    config = read_json(home / CONFIG_FILE)
    latents = config["step_aware"]["latents"]
    settings = {key: value for key, value in config["model_cfg"].items() if key != "custom_text"}
    with torch.random.fork_rng(devices=[]):
        clip = (open_clip.CustomTextCLIP if config["model_cfg"]["custom_text"] else open_clip.CLIP)(**settings)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{home}")
    model = StepAware(clip, tokenizer, config, latents=tuple(latents) if latents else None)
    try:
        model.load_state_dict(load_file(home / WEIGHTS), strict=True)
    except Exception as error:  # a damaged file, and weights of another model, are told in many words
        raise ValueError(f"{home / WEIGHTS} does not fit: {' '.join(str(error).split())[:200]}") from error
    return ready(model, home / WEIGHTS, device)


def step_aware_weights(source: str | os.PathLike[str]) -> Path:
    """The file of weights that `load_step_aware` reads for a source; raises FileNotFoundError as it does."""
    from . import step_aware_published as published

    return published.locate_published(source) if published.is_published(source) else Path(source) / WEIGHTS


def step_aware_scorer(
    source: StepAware | str | Path, *, device: str | torch.device | None = None, chunk: int = 64
) -> StepReward:
    """A model as a reward of what it reads, pictures or latents, in float32 and `chunk` at a time; no gradient.

    `source` is one of `load_step_aware`, a model in memory, which goes on scoring as it trains, or "tiny-init", the
    embedded reward at its start. An input that is not finite scores NaN. Scores are on the inputs' device.
    """
    model = _opened(source, device)

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str], t: Tensor) -> Tensor:
        parts = [torch.zeros(0, device=images.device)]
        with torch.autocast(model.clip.logit_scale.device.type, enabled=False):
            for i in range(0, max(len(images), len(prompts), len(t)), chunk):  # unequal ones are refused by the model
                parts.append(model(images[i : i + chunk], prompts[i : i + chunk], t[i : i + chunk]).to(images.device))
        finite = torch.isfinite(images).flatten(1).all(1)
        return torch.where(finite, torch.cat(parts), torch.nan)

    return score


def latent_scorer(
    source: StepAware | str | Path,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    device: str | torch.device | None = None,
    chunk: int = 64,
) -> StepReward:
    """`step_aware_scorer` of latents, whatever the model reads: one of pictures gets them through `decode` first.

    Raises ValueError for a model of pictures without `decode`.
    """
    model = _opened(source, device)
    score = step_aware_scorer(model, chunk=chunk)
    if model.latents is None and decode is None:
        raise ValueError(f"{source} reads pictures: give decode, latents [B,C,h,w] -> pictures [B,3,H,W] in [0, 1]")
    return score if model.latents or not decode else lambda latents, *rest: score(decode(latents), *rest)


def _opened(source: StepAware | str | Path, device: str | torch.device | None) -> StepAware:
    if isinstance(source, StepAware):
        return source
    return start_step_aware("tiny", device=device) if source == "tiny-init" else load_step_aware(source, device=device)


def ready(model: StepAware, source: object, device: str | torch.device | None) -> StepAware:
    """The model on its device in eval mode; ValueError unless all its weights are finite."""
    broken = [name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"{len(broken)} weights of {source} are not finite: {broken[0]} is the first")
    return model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))).eval()
