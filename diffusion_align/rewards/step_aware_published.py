"""SPO's step-aware preference models as their authors publish them (RockeyCoss/SPO; arXiv 2406.04314).

A published file is the state dict of the authors' `StepAwarePreferenceModel`, pickled by `torch.save`: a CLIPModel of
transformers, text tower and logit scale included, under the prefix `model.`, with one more Linear in every block of the
vision tower, one behind its last norm, and the embedding of time. The names here were read off the authors' class; no
file of theirs has been read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..origins import STEP_AWARE
from .clip_keys import from_transformers
from .step_aware import PLAIN_BICUBIC, StepAware, ready
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


def is_published(source: str | os.PathLike[str]) -> bool:
    """Whether a source names a model of the authors', or is a file of weights and not a folder of ours."""
    return not Path(source).is_dir() and (str(source) in STEP_AWARE or Path(source).suffix in _SUFFIXES)


def locate_published(source: str | os.PathLike[str]) -> Path:
    """The file itself, or that of a name, fetched or out of the hub's cache; FileNotFoundError with the way out."""
    if Path(source).is_file():
        return Path(source)
    if str(source) in STEP_AWARE:
        known = STEP_AWARE[str(source)]
        return hub_file(known.repo, known.files[0])
    raise FileNotFoundError(f"no step-aware preference model at {source}; known by name: {', '.join(STEP_AWARE)}")


def load_published(
    path: Path, *, device: str | torch.device | None = None, architecture: str | None = None
) -> StepAware:
    """A model from a published file, or from the `final_ckpt.bin` that the authors' training writes, in eval mode.

    Pictures are prepared as in their code: bicubic without antialiasing to 224 pixels, OpenAI's mean and deviation.
    `architecture` is open_clip's, by default that of PickScore.

    Raises:
        ValueError: keys or shapes that are not the architecture's, with the first wrong one; weights not finite; a file
            that holds anything but tensors.
    """
    import open_clip

    name = architecture or ARCHITECTURE
    settings = open_clip.get_model_config(name)
    if settings is None:
        raise ValueError(f"open_clip has no architecture {name!r}")
    weights = from_published(read_weights(path), path)
    with torch.random.fork_rng(devices=[]):  # open_clip draws random weights first, from the global generator
        clip = open_clip.CLIP(**settings)
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
