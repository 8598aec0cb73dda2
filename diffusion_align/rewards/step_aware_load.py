"""Load step-aware preference models, our folders and the files of SPO's authors (RockeyCoss/SPO), and score with them.

A published file is the state dict of the authors' `StepAwarePreferenceModel`, pickled by `torch.save`: a CLIPModel of
transformers under the prefix `model.`, with one more Linear in every block of the vision tower, one after its last
norm, and the embedding of time. The names are those in the authors' class; this module was not tried on a file of
theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..origins import STEP_AWARE
from ..system.plain_json import read_json
from .clip import require_plain_clip, untrained_clip
from .clip_keys import from_transformers
from .spec import CONFIG_FILE
from .step_aware_model import PLAIN_BICUBIC, WEIGHTS, StepAware, ready, start_step_aware
from .weight_files import hub_file, read_weights, require_fit

ARCHITECTURE = "ViT-H-14"  # of PickScore, which the authors start from
PREFIX = "model."
_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
_TIME = {
    "t_embedder.mlp.0": "embed.0",
    "t_embedder.mlp.2": "embed.2",
    "vision_model.adaLN_modulation.1": "final",
}
_BLOCK, _LINEAR = "vision_model.encoder.layers.", ".adaLN_modulation.1"

StepReward = Callable[[Tensor, list[str], Tensor], Tensor]
"""`(pictures [B,3,H,W] in [0, 1] or latents [B,C,h,w], B prompts, times [B]) -> [B]`, without gradient."""


def load_step_aware(source: str | os.PathLike[str], *, device: str | torch.device | None = None) -> StepAware:
    """A model in eval mode, from a folder of `save_step_aware`, a file of SPO's authors, or the name of one of theirs
    (`origins.STEP_AWARE`).

    Raises:
        FileNotFoundError: the folder lacks a file, or the hub does not give the published one.
        ValueError: weights are missing, unknown, of another shape or not finite; the configuration asks for code.
    """
    if is_published(source):
        return load_published(locate_published(source), device=device)
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
    except Exception as error:  # torch's messages for other weights are long
        raise ValueError(f"{home / WEIGHTS} does not fit: {' '.join(str(error).split())[:200]}") from error
    return ready(model, home / WEIGHTS, device)


def step_aware_weights(source: str | os.PathLike[str]) -> Path:
    """The file of weights that `load_step_aware` reads; raises FileNotFoundError as it does."""
    return locate_published(source) if is_published(source) else Path(source) / WEIGHTS


def step_aware_scorer(
    source: StepAware | str | Path, *, device: str | torch.device | None = None, chunk: int = 64
) -> StepReward:
    """A model as a reward of its inputs, pictures or latents, in float32, `chunk` at a time, without gradient.

    `source` is a source of `load_step_aware`, a model in memory (the scores follow its training), or "tiny-init", the
    untrained model of the embedded reward. An input that is not finite scores NaN. Scores are on the inputs' device.
    """
    model = _opened(source, device)

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str], t: Tensor) -> Tensor:
        scores = [torch.zeros(0, device=images.device)]
        with torch.autocast(model.clip.logit_scale.device.type, enabled=False):
            for i in range(0, max(len(images), len(prompts), len(t)), chunk):  # the model refuses unequal lengths
                scores.append(model(images[i : i + chunk], prompts[i : i + chunk], t[i : i + chunk]).to(images.device))
        finite = torch.isfinite(images).flatten(1).all(1)
        return torch.where(finite, torch.cat(scores), torch.nan)

    return score


def latent_scorer(
    source: StepAware | str | Path,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    device: str | torch.device | None = None,
    chunk: int = 64,
) -> StepReward:
    """`step_aware_scorer` of latents. For a model that reads pictures, `decode` turns the latents into pictures.

    Raises ValueError for a model that reads pictures if there is no `decode`.
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


def is_published(source: str | os.PathLike[str]) -> bool:
    """Whether a source is the name of a model of the authors, or a file of weights instead of a folder."""
    return not Path(source).is_dir() and (str(source) in STEP_AWARE or Path(source).suffix in _SUFFIXES)


def locate_published(source: str | os.PathLike[str]) -> Path:
    """The file itself, or that of a name, from the hub or its cache; raises FileNotFoundError with the known names."""
    if Path(source).is_file():
        return Path(source)
    if str(source) in STEP_AWARE:
        known = STEP_AWARE[str(source)]
        return hub_file(known.repo, known.files[0])
    raise FileNotFoundError(f"no step-aware preference model at {source}; known by name: {', '.join(STEP_AWARE)}")


def load_published(
    path: Path, *, device: str | torch.device | None = None, architecture: str | None = None
) -> StepAware:
    """A model in eval mode, from a published file or from `final_ckpt.bin` of the authors' training.

    Pictures are prepared as in their code: bicubic without antialiasing to 224 pixels, OpenAI's mean and deviation.
    `architecture` is open_clip's, by default that of PickScore.

    Raises:
        ValueError: keys or shapes are not the architecture's (with the first wrong one), weights are not finite, or the
            file contains anything but tensors.
    """
    import open_clip

    name = architecture or ARCHITECTURE
    weights = from_published(read_weights(path), path)
    clip, settings = untrained_clip(name)
    config = {
        "model_cfg": {**settings, "quick_gelu": bool(settings.get("quick_gelu")), "custom_text": False},
        "preprocess_cfg": {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD},
        "step_aware": {"resize": PLAIN_BICUBIC},
    }
    model = StepAware(clip, open_clip.get_tokenizer(name), config)
    require_fit(weights, {key: tuple(weight.shape) for key, weight in model.state_dict().items()}, path)
    model.load_state_dict(weights, strict=True)
    return ready(model, path, device)


def from_published(weights: Mapping[str, Tensor], source: object = "weights") -> dict[str, Tensor]:
    """The authors' weights under the names of `StepAware`.

    Raises:
        ValueError: a key that their class does not have.
    """
    clip: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for key, weight in weights.items():
        name = key.removeprefix(PREFIX)
        time = _time_name(name)
        if time is None:
            clip[name] = weight
        else:
            found[f"time.{time}"] = weight
    if not found:
        raise ValueError(
            f"{source}: no weights of time conditioning (t_embedder, adaLN_modulation): not a step-aware preference "
            "model as SPO's authors publish it"
        )
    return {f"clip.{key}": weight for key, weight in from_transformers(clip, source).items()} | found


def _time_name(name: str) -> str | None:
    """The name in `TimeConditioning` of a weight that the authors added to CLIP; None for one of CLIP's own."""
    stem, _, kind = name.rpartition(".")
    if stem in _TIME:
        return f"{_TIME[stem]}.{kind}"
    number = stem.removeprefix(_BLOCK).removesuffix(_LINEAR)
    if stem == f"{_BLOCK}{number}{_LINEAR}" and number.isdecimal():
        return f"blocks.{number}.{kind}"
    return None
