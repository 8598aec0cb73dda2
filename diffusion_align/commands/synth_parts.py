"""The pictures and scores of `data synth`, as files that are there whole or not at all.

    <out>/pictures/00000/000003-02.png    prompt's number, place among its pictures; 64 prompts a folder
          scores/<reward>-00000.json      what a reward said of those 64 prompts' pictures

Pictures are drawn, and scored, in batches that are cut within such parts, so an interruption, or another number of
shards, changes no bit. Another batch size may round a picture otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_align.commands.score import reward_by_name
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.trained_weights import base_of, load_tuned, run_config, weights_digest
from diffusion_align.data.images import ImageError, decode_image, encode_png, to_square
from diffusion_align.data.readers import digest
from diffusion_align.data.shards import write_bytes
from diffusion_align.models.hub import folder_digest, locate
from diffusion_align.options import Synth
from diffusion_align.rewards import Reward, RewardError, one_each
from diffusion_align.rng import draw_normal, generator
from diffusion_align.samplers import sample, step_table
from diffusion_align.system.progress import counted, progress_bar

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

PART = 64


@dataclass(frozen=True)
class Source:
    """A model to draw with: its base, the run that tuned it if there is one, and what its weights are."""

    name: str
    base: dict[str, Any]
    run: str | None
    fingerprint: str


def source_of(name: str) -> Source:
    """A model by name, or by the folder of a run; nothing is loaded."""
    run = name if (Path(name) / "config.yaml").is_file() else None
    plain = {"pretrained_model_name_or_path": present_model(name), "revision": None, "variant": None}
    base = base_of(run, run_config(run), cure="correct its config.yaml") if run else plain
    model = base["pretrained_model_name_or_path"]
    weights = folder_digest(locate(model, revision=base["revision"], variant=base["variant"]))
    return Source(name, base, run, f"{weights}+{weights_digest(run)}" if run else weights)


def sampler_of(o: Synth) -> dict[str, Any]:
    """The arguments of `step_table`, beside the schedule."""
    order = o.order if o.solver == "dpmpp" else 1
    return {"steps": o.steps, "solver": o.solver, "order": order, "eta": o.eta, "spacing": o.spacing}


def picture_path(out: Path, number: int, place: int) -> Path:
    """Where a picture lies: numbers, for a prompt may hold anything."""
    return out / "pictures" / f"{number // PART:05d}" / f"{number:06d}-{place:02d}.png"


def scores_path(out: Path, reward: str, part: int) -> Path:
    """Where a reward's scores of a part lie."""
    return out / "scores" / f"{digest(reward.encode())[:12]}-{part:05d}.json"


def parts_of(prompts: Sequence[str]) -> range:
    """The parts that the prompts are cut into."""
    return range(math.ceil(len(prompts) / PART))


def numbers_of(part: int, prompts: Sequence[str]) -> range:
    """The prompts of a part."""
    return range(part * PART, min((part + 1) * PART, len(prompts)))


def draw(o: Synth, out: Path, prompts: list[str], parts: Sequence[int], source: Source, m: int) -> None:
    """Draw the pictures of the m-th model for some parts of the prompts; those that are there stay.

    Models take turns: the i-th picture of the m-th of M has place m + i M. Its noise is at (seed, "synth", prompt, m,
    i), whatever the other prompts are, and a model that takes another's place starts from the same.
    """
    places = range(m, o.pictures, len(o.models))
    batches: list[list[tuple[int, int]]] = []
    for part in parts:
        wanted = [(number, place) for number in numbers_of(part, prompts) for place in places]
        batches += [wanted[i : i + o.batch_size] for i in range(0, len(wanted), o.batch_size)]
    left = [batch for batch in batches if not all(picture_path(out, *address).is_file() for address in batch)]
    if not left:
        return
    from diffusion_align.models import load_pipeline  # seconds, so after everything that can be refused

    name = source.base["pretrained_model_name_or_path"]
    model = load_pipeline(name, device=o.device, revision=source.base["revision"], variant=source.base["variant"])
    if source.run:
        load_tuned(model, source.run)
    with progress_bar(total=sum(map(len, left)), desc=f"draw {source.name}", unit="picture") as bar:
        for batch in left:
            addresses = [(prompts[n], m, places.index(place)) for n, place in batch]
            for (number, place), picture in zip(batch, _pictures(model, o, addresses, bar.update), strict=True):
                if not picture.isfinite().all():
                    raise ValueError(f"{source.name}: picture {place} of prompt {number} is not finite")
                path = picture_path(out, number, place)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, encode_png(picture))


@torch.no_grad()
def _pictures(
    model: TextToImage, o: Synth, addresses: list[tuple[str, int, int]], drawn: Callable[[float], object]
) -> Tensor:
    """[B,3,H,W] in [0, 1] on the CPU, one for each (prompt, m, i). `drawn` is told what share a step has drawn."""
    table = step_table(model.schedule, **sampler_of(o))
    sources = [generator(o.seed, "synth", *address) for address in addresses]
    noise = torch.stack([draw_normal(model.latent_shape(o.resolution), source) for source in sources])
    denoiser = model.denoiser(model.encode_text([prompt for prompt, _, _ in addresses]), o.guidance)
    denoiser = counted(denoiser, partial(drawn, len(addresses) / len(table)))
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(o.mixed_precision)
    with torch.autocast(model.device.type, dtype=half, enabled=half is not None):
        latents = sample(denoiser, table, noise.to(model.device), sources)
    return model.decode(latents).cpu()


def score(o: Synth, out: Path, prompts: list[str], parts: Sequence[int], name: str) -> None:
    """Let a reward score the pictures of some parts, as they are stored; scores that are there stay.

    Raises:
        RewardError: the reward answers with another shape, or with no number for any picture of a part.
    """
    left = [part for part in parts if not scores_path(out, name, part).is_file()]
    if not left:
        return
    (out / "scores").mkdir(exist_ok=True)
    device = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reward = reward_by_name(name, device=device, seed=o.seed)
    for part in progress_bar(left, desc=f"score {name}", unit="part"):
        addresses = [(number, place) for number in numbers_of(part, prompts) for place in range(o.pictures)]
        values: list[float] = []
        faults: list[str] = []
        for i in range(0, len(addresses), o.batch_size):
            batch = addresses[i : i + o.batch_size]
            images = [_stored(picture_path(out, *address)) for address in batch]
            values += _by_size(name, reward, images, [prompts[number] for number, _ in batch], faults)
        if all(map(math.isnan, values)):
            first = f": {faults[0]}" if faults else ""
            raise RewardError(f"reward {name} has no finite number for any of {len(values)} pictures{first}")
        plain = [None if math.isnan(value) else value for value in values]
        rows = [plain[i : i + o.pictures] for i in range(0, len(plain), o.pictures)]
        facts = {"reward": name, "scores": rows, "errors": faults[:1]}
        write_bytes(scores_path(out, name, part), json.dumps(facts).encode())


def _by_size(name: str, reward: Reward, images: list[Tensor], prompts: list[str], faults: list[str]) -> list[float]:
    """`ask`, for pictures of one size at a time: models may draw in sizes of their own."""
    said = [math.nan] * len(images)
    for side in sorted({image.shape[-1] for image in images}):
        rows = [row for row, image in enumerate(images) if image.shape[-1] == side]
        some = torch.stack([images[row] for row in rows])
        for row, value in zip(rows, ask(name, reward, some, [prompts[row] for row in rows], faults), strict=True):
            said[row] = value
    return said


def ask(name: str, reward: Reward, images: Tensor, prompts: list[str], faults: list[str]) -> list[float]:
    """One score a picture, nan where the reward has none. Where it raises for several, each is asked about alone, so
    that one bad picture does not cost the others; what it raises then is appended to `faults`."""
    try:
        values = reward(images, prompts)
    except Exception as error:
        if len(prompts) == 1:
            faults.append(f"{type(error).__name__}: {error}")
            return [math.nan]
        return [ask(name, reward, images[i : i + 1], prompts[i : i + 1], faults)[0] for i in range(len(prompts))]
    values = one_each(values, len(prompts), f"reward {name}").double()
    return torch.where(values.isfinite(), values, torch.nan).tolist()


def read_scores(out: Path, o: Synth, prompts: int, parts: range) -> Tensor | None:
    """[M,P,K] float64 of all parts, nan where a reward had none; None while pictures or scores are missing."""
    pictures = (picture_path(out, number, place) for number in range(prompts) for place in range(o.pictures))
    files = [[scores_path(out, name, part) for part in parts] for name in o.rewards]
    if not all(path.is_file() for path in (*pictures, *(file for some in files for file in some))):
        return None
    scores = torch.empty(len(files), prompts, o.pictures, dtype=torch.float64)
    for said, some in zip(scores, files, strict=True):
        rows = [row for file in some for row in json.loads(file.read_text(encoding="utf-8"))["scores"]]
        said.copy_(torch.tensor([[math.nan if value is None else value for value in row] for row in rows]))
    return scores


def _stored(path: Path) -> Tensor:
    """A picture as it was written, [3,H,W] in [0, 1]."""
    try:
        image = decode_image(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} {error}; delete it to draw it again") from error
    return to_square(image, image.width)
