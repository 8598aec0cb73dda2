"""From a RewardSpec to the reward: the one module that knows how each is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .aesthetic import load_aesthetic
from .catalogue import CATALOGUE
from .clip import clip_of, clip_scorer, cosine_scorer
from .clip_keys import from_transformers
from .controls import jpeg_scorer, judged_share, random_reward
from .custom import python_reward
from .image_reward import load_image_reward
from .interface import Reward, smallest, standardised, weighted_sum
from .remote import http_reward
from .spec import RewardPart, RewardSpec, read_spec
from .weight_files import locate, read_weights

CLIP_H = "ViT-H-14"
CLIP_L = "ViT-L-14-quickgelu"  # OpenAI trained its weights with this activation


def load_reward(reward: RewardSpec | str, *, device: str | torch.device | None = None, seed: int = 0) -> Reward:
    """Load a reward, or several as one; docs/rewards.md says how to write its text.

    Args:
        device: where networks run; by default a GPU if there is one.
        seed: of the reward `random`.

    Raises:
        ValueError: the text is not a reward, weights are wrong, or the reward `people`, which has no function.
        FileNotFoundError: weights are missing and cannot be fetched.
        RewardError: a reward of your own cannot be loaded.
    """
    spec = read_spec(reward) if isinstance(reward, str) else reward
    rewards = [_load(part, device, seed) for part in spec.parts]
    weights = [part.weight for part in spec.parts]
    if spec.standardise:
        rewards = [standardised(reward) for reward in rewards]
    if spec.smallest:
        return smallest(rewards, weights)
    return rewards[0] if weights == [1.0] else weighted_sum(rewards, weights)


def _load(part: RewardPart, device: str | torch.device | None, seed: int) -> Reward:
    loaders: dict[str, Callable[[], Reward]] = {
        "tiny": lambda: clip_scorer("tiny", device=device),
        "clipscore": lambda: clipscore(part.at, device=device),
        "pickscore": lambda: pickscore(part.at, revision=part.revision, device=device),
        "hpsv2": lambda: hps(part.kind, part.at, revision=part.revision, device=device),
        "hpsv2.1": lambda: hps(part.kind, part.at, revision=part.revision, device=device),
        "aesthetic": lambda: load_aesthetic(part.at, device=device),
        "imagereward": lambda: load_image_reward(part.at, revision=part.revision, device=device),
        "jpeg-small": lambda: jpeg_scorer(-1.0),
        "jpeg-large": lambda: jpeg_scorer(1.0),
        "judge": lambda: judged_share,
        "random": lambda: random_reward(seed),
        "python": lambda: python_reward(part.at),
        "http": lambda: http_reward(part.at),
        "open_clip": lambda: clip_scorer(part.at, device=device),
    }
    if part.kind == "people":
        raise ValueError("reward people chooses between a prompt's pictures: it has no function that scores one alone")
    return loaders[part.kind]()


def clipscore(path: str = "", *, device: str | torch.device | None = None) -> Reward:
    """100 times the cosine under CLIP ViT-L/14 (Hessel et al. 2021, arXiv 2104.08718, take 2.5 times that of ViT-B/32).

    `path`: a folder in open_clip's format, or a file of open_clip's weights; "" fetches OpenAI's.
    """
    source = path if path and Path(path).is_dir() else f"{CLIP_L}:{path or 'openai'}"
    return clip_scorer(source, device=device, scale=100.0)


def pickscore(
    path: str = "",
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    architecture: str = CLIP_H,
) -> Reward:
    """PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569): `exp(logit_scale) cosine`, about 17 to 25.

    `path`: the file or folder of yuvalkirstain/PickScore_v1, a CLIPModel of transformers.
    """
    entry = CATALOGUE["pickscore"]
    file = locate(path, entry.files, entry.repo, revision)
    weights = from_transformers(read_weights(file), file)
    return cosine_scorer(clip_of(architecture, weights, source=file, device=device), scale=None)


def hps(
    version: str,
    path: str = "",
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    architecture: str = CLIP_H,
) -> Reward:
    """HPS v2 or v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine, about 0.2 to 0.35. `version`: hpsv2 or hpsv2.1.

    `path`: its .pt file, or a folder with it. As in the authors' code, pictures that are not square are padded black.
    """
    entry = CATALOGUE[version]
    file = locate(path, entry.files, entry.repo, revision)
    clip = clip_of(architecture, read_weights(file), source=file, resize_mode="longest", device=device)
    return cosine_scorer(clip)
