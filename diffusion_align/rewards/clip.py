"""CLIP rewards through open_clip: how well a picture agrees with its prompt, as the cosine of their embeddings.

CLIPScore, PickScore and HPSv2 are this function with different weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..system.network import offline
from ..system.plain_json import read_json, require_modest, require_no_code
from .interface import Reward, device_or_default, of_levels, to_pil
from .spec import CONFIG_FILE, resolve_source
from .weight_files import fill, hub_file, require_container

T = TypeVar("T")
LOCAL = "local-dir:"
logger = logging.getLogger(__name__)


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
        chunks = levels.split(chunk)
        return torch.cat(
            [self.model.encode_image(self.prepare(some).to(self.device), normalize=True) for some in chunks]
        )

    def embed_prompts(self, prompts: list[str], chunk: int) -> Tensor:
        """Embeddings [B,E] of norm 1. Each distinct prompt is embedded once."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = list(rows)
        chunks = [self.tokenizer(texts[i : i + chunk]).to(self.device) for i in range(0, len(texts), chunk)]
        embedded = torch.cat([self.model.encode_text(tokens, normalize=True) for tokens in chunks])
        return embedded[[rows[prompt] for prompt in prompts]]


def open_clip_model(source: str | Path, *, device: str | torch.device | None = None) -> Clip:
    """A model that open_clip loads by itself, in float32; sources and errors are those of `clip_scorer`."""
    name, pretrained = resolve_source(source)
    require_plain_clip(name, pretrained)
    import open_clip  # takes four seconds, so it is imported only where a CLIP reward is used

    place = device_or_default(device)
    # With another activation than in their training the weights score a little wrong, and open_clip only warns.
    quick = bool(pretrained and open_clip.pretrained.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
    with torch.random.fork_rng(devices=[]):  # open_clip first draws random weights from the global generator
        make = partial(open_clip.create_model_from_pretrained, name, pretrained, device=place, force_quick_gelu=quick)
        loaded: Any = fetched(name, pretrained, make)
    model, transform = loaded
    tokenizer = fetched(name, pretrained, partial(open_clip.get_tokenizer, name))
    model.eval().requires_grad_(False)
    require_finite(model, source)
    if not _tells_colours(name, pretrained):
        logger.warning(
            "%s does not say with which mean and deviation of colours it was trained: those of OpenAI's CLIP are "
            "assumed; if others are right, write them into %s of a folder and name the folder", source, CONFIG_FILE,
        )  # fmt: skip
    return Clip(model, transform, tokenizer, place)


def _tells_colours(name: str, pretrained: str | None) -> bool:
    """Whether the source says how its pictures are normalised: a folder's configuration may, a bare file does not."""
    if pretrained is not None:
        return not Path(pretrained).is_file()
    if not name.startswith(LOCAL):
        return True  # the hub's repositories in open_clip's format do
    settings = read_json(Path(name.removeprefix(LOCAL)) / CONFIG_FILE).get("preprocess_cfg") or {}
    return {"mean", "std"} <= settings.keys()


def require_finite(model: torch.nn.Module, source: object) -> None:
    """Raise ValueError, with the first wrong key, unless all weights are finite."""
    broken = [key for key, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"{len(broken)} weights of {source} are not finite: {broken[0]} is the first")


def untrained_clip(architecture: str) -> tuple[Any, dict[str, Any]]:
    """open_clip's `architecture` with random weights, and its configuration; raises ValueError for an unknown name."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"open_clip has no architecture {architecture!r}")
    with torch.random.fork_rng(devices=[]):  # open_clip draws them from the global generator
        return open_clip.CLIP(**config), config


def clip_of(
    architecture: str,
    weights: Mapping[str, Tensor],
    *,
    source: object,
    resize_mode: str = "shortest",
    device: str | torch.device | None = None,
) -> Clip:
    """open_clip's `architecture` with the given weights, in float32; `source` names them in errors.

    `resize_mode` is open_clip's word for pictures that are not square: "shortest" crops, "longest" pads them black.

    Raises:
        ValueError: keys or shapes that are not the architecture's, with the first wrong one; weights not finite.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    place = device_or_default(device)
    model = fill(untrained_clip(architecture)[0], weights, source, place)
    settings: Any = {"size": model.visual.image_size, "resize_mode": resize_mode}
    transform: Any = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return Clip(model, transform, open_clip.get_tokenizer(architecture), place)


def cosine_scorer(clip: Clip, *, chunk: int = 64, scale: float | None = 1.0) -> Reward:
    """A CLIP as a reward: `scale * cosine(picture, prompt)`; None is the model's own `exp(logit_scale)`.

    One forward pass takes `chunk` pictures or prompts. `interface.of_levels` says what else holds.
    """
    factor = float(clip.model.logit_scale.exp()) if scale is None else scale

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        text = clip.embed_prompts(prompts, chunk)
        return factor * (clip.embed_pictures(levels, chunk) * text).sum(-1)

    return of_levels(score)


def clip_scorer(
    source: str | Path, *, device: str | torch.device | None = None, chunk: int = 64, scale: float | None = 1.0
) -> Reward:
    """The CLIP of `source` as a reward: `scale * cosine(picture, prompt)`, as in `cosine_scorer`.

    Args:
        source: "tiny" (the embedded reward), a local folder in open_clip's format, "hf-hub:owner/name", or an
            architecture with its weights, "ViT-H-14:laion2b_s32b_b79k" or "ViT-H-14:weights.pt".
        device: where the model runs; by default a GPU if there is one.
        chunk: pictures, or prompts, in one forward pass.

    Raises:
        ValueError: the source cannot be one, or its weights are not finite.
        FileNotFoundError: its weights cannot be fetched; with the command that fetches them.
    """
    return cosine_scorer(open_clip_model(source, device=device), chunk=chunk, scale=scale)


def require_plain_clip(name: str, pretrained: str | None) -> None:
    """Check what `open_clip.create_model_from_pretrained(name, pretrained)` is about to read.

    open_clip passes a configuration's `tokenizer_kwargs` to transformers, `trust_remote_code` included: an unchecked
    folder could run its own code.

    Raises:
        ValueError: it asks for code, is absurdly large, or a file of weights was not written by torch.
        FileNotFoundError: the hub does not give its configuration.
    """
    scheme, _, place = name.partition(":")
    folder = Path(place) if scheme == "local-dir" else None
    if scheme in ("local-dir", "hf-hub"):
        repo, _, revision = place.partition("@")
        from_hub = partial(hub_file, repo, CONFIG_FILE, revision or None)
        file = folder / CONFIG_FILE if folder else fetched(name, pretrained, from_hub)
        content = read_json(file)
        require_no_code(file, content)
        require_modest(file, content)
    for path in [*(folder.iterdir() if folder else ()), *([Path(pretrained)] if pretrained else ())]:
        if path.suffix in (".bin", ".pt", ".pth") and path.is_file():
            require_container(path)


def fetch_command(name: str, pretrained: str | None) -> str | None:
    """The command that fetches a model of open_clip's into the hub's cache; None for a model on this disk."""
    if name.startswith("hf-hub:"):
        repo, _, revision = name.removeprefix("hf-hub:").partition("@")
        return f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    if name.startswith("local-dir:"):
        return None
    import open_clip

    at = open_clip.pretrained.get_pretrained_cfg(name, pretrained or "").get("hf_hub")
    return "hf download " + at.rstrip("/").replace("/", " ").replace(" ", "/", 1) if at else None


def fetched(name: str, pretrained: str | None, load: Callable[[], T]) -> T:
    """The result of `load`, which may fetch the model from the hub.

    Raises:
        FileNotFoundError: it could not be fetched; errors of a model on this disk pass as they are.
    """
    command = fetch_command(name, pretrained)
    if command is None:
        return load()
    try:
        return load()
    except Exception as error:  # open_clip's own errors and the dozen kinds of the hub's client
        when = "with HF_HUB_OFFLINE unset" if offline() else "when the hub answers"
        what = name.removeprefix("hf-hub:") + (f":{pretrained}" if pretrained else "")
        raise FileNotFoundError(
            f"{what} is not in the hub's cache and could not be fetched ({type(error).__name__}); "
            f"{when}, run `{command}`, or give a folder in open_clip's format"
        ) from error
