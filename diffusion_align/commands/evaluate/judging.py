"""What judges the pictures: the trained reward, held-out rewards, the embedded world's judge, and features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_align.commands.prompt_lists import Prompt, caption_of
from diffusion_align.data.images import decode_image
from diffusion_align.evaluation.scoring import Judge
from diffusion_align.options import Evaluate, UsageError
from diffusion_align.rewards import Reward, load_reward, to_uint8
from diffusion_align.shapes import judge, render
from diffusion_align.shapes.render import PIXELS

REFERENCE_SEED = 7  # of the renderings that serve as real pictures
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Features = Callable[[Tensor], Tensor]
"""`images [B,3,H,W] in [0, 1] -> [B,D]`."""


@dataclass(frozen=True)
class Judging:
    """`rewards` by name, the trained one as "reward"; `judges` and `features` may be none."""

    rewards: dict[str, Reward]
    judges: dict[str, Judge]
    features: Features | None


def settle_reward(o: Evaluate, in_world: bool) -> Evaluate:
    """The options with reward "auto" replaced: the embedded one for captions that it knows, else none."""
    return dataclasses.replace(o, reward="tiny" if in_world else "none") if o.reward == "auto" else o


def check_judging(o: Evaluate, in_world: bool) -> None:
    """Check that everything can be scored; loads nothing.

    Raises:
        UsageError: no such reward, the embedded one for other prompts than its own, people, or no reference pictures.
    """
    for name in o.reward_specs:
        if name in ("tiny", "judge") and not in_world:
            raise UsageError(
                f"the embedded {'reward' if name == 'tiny' else 'judge'} knows captions of the embedded world only; "
                "give --reward NAME or none"
            )
        if name == "people":
            raise UsageError("people choose between a run's pictures in training; to compare models, data annotate")
    if o.reference_pictures is not None and not _pictures_in(Path(o.reference_pictures)):
        raise UsageError(f"score.reference_pictures: no .png, .jpg or .webp lies in {o.reference_pictures}")


def open_judging(o: Evaluate, in_world: bool, resolution: int | str) -> Judging:
    """Load the rewards, the judge and the features. Without any, pictures are only shown side by side."""
    place = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rewards = {
        "reward" if name == o.reward else name.split("/")[-1]: load_reward(spec, device=place, seed=o.seed)
        for name, spec in o.reward_specs.items()
    }
    judges: dict[str, Judge] = {"judge": judge} if in_world and resolution == PIXELS else {}
    known = o.features != "none" and (in_world or o.features != "tiny")
    return Judging(rewards, judges, _features(o.features, place) if known else None)


def _features(source: str, device: torch.device) -> Features:
    from diffusion_align.rewards.clip import open_clip_model

    clip = open_clip_model(source, device=device)

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        return clip.embed_pictures(to_uint8(images), chunk=64)

    return embed


def reference_features(o: Evaluate, judging: Judging, prompts: Sequence[Prompt]) -> Tensor | None:
    """Features [M,D] of real pictures: those of a folder, or the embedded world's renderings of the same captions."""
    if judging.features is None:
        return None
    if o.reference_pictures is not None:
        paths = _pictures_in(Path(o.reference_pictures))
        return torch.cat([judging.features(_as_tensor(decode_image(path.read_bytes()))).cpu() for path in paths])
    captions = [caption_of(prompt.text) for prompt in prompts]
    if not judging.judges:
        return None
    drawn = [
        _as_tensor(render(caption, np.random.default_rng([REFERENCE_SEED, number, which])))
        for number, caption in enumerate(captions)
        if caption is not None
        for which in range(o.num_images_per_prompt)
    ]
    return torch.cat([judging.features(torch.cat(drawn[i : i + 64])).cpu() for i in range(0, len(drawn), 64)])


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())


def _as_tensor(picture: object) -> Tensor:
    """[1,3,H,W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
