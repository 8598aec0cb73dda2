"""The pictures and scores of `data synth`, in files that are complete or absent.

    <out>/pictures/00000/000003-02.png    the prompt's number, and the place among its pictures; 64 prompts a folder
          scores/<reward>-00000.json      a reward's scores of the pictures of those 64 prompts

Pictures are drawn, and scored, in batches within such a chunk of 64 prompts, so an interruption, or another number of
shards, changes no bit. Another batch size may round a picture differently.
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

from diffusion_align.commands.model.base import base_fields, load_base
from diffusion_align.commands.model.same_base import require_same_base
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.trained_weights import base_of, load_tuned, run_config, weights_digest
from diffusion_align.data.disk import digest, write_bytes
from diffusion_align.data.frames import Frame, fit
from diffusion_align.data.images import ImageError, decode_image, encode_png
from diffusion_align.models.hub import locate, model_digest
from diffusion_align.options import Synth
from diffusion_align.rewards import Reward, RewardError, load_reward, one_each
from diffusion_align.rng import draw_normal, generator
from diffusion_align.samplers import sample, step_table
from diffusion_align.system.progress import counted, progress_bar

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

PROMPTS_PER_CHUNK = 64


@dataclass(frozen=True)
class DrawingModel:
    """A model to draw with: its base, the run that tuned it if there is one, and a digest of its weights."""

    name: str
    base: dict[str, Any]
    run: str | None
    fingerprint: str


def drawing_model(name: str) -> DrawingModel:
    """A model by name, or by the folder of a run; nothing is loaded."""
    run = name if (Path(name) / "config.yaml").is_file() else None
    plain = base_fields({"pretrained_model_name_or_path": present_model(name)})
    base = base_of(run, run_config(run), cure="correct its config.yaml") if run else plain
    model = base["pretrained_model_name_or_path"]
    weights = model_digest(locate(model, revision=base["revision"], variant=base["variant"]))
    return DrawingModel(name, base, run, f"{weights}+{weights_digest(run)}" if run else weights)


def sampler_of(o: Synth) -> dict[str, Any]:
    """The arguments of `step_table`, beside the schedule."""
    order = o.order if o.solver == "dpmpp" else 1
    return {"steps": o.steps, "solver": o.solver, "order": order, "eta": o.eta, "spacing": o.spacing}


def synth_picture(out: Path, number: int, place: int) -> Path:
    """The file of a picture. It is named by numbers, as a prompt may hold any character."""
    return out / "pictures" / f"{number // PROMPTS_PER_CHUNK:05d}" / f"{number:06d}-{place:02d}.png"


def scores_path(out: Path, reward: str, chunk: int) -> Path:
    """The file with the scores that a reward gives to the pictures of a chunk."""
    return out / "scores" / f"{digest(reward.encode())[:12]}-{chunk:05d}.json"


def chunks_of(prompts: Sequence[str]) -> range:
    """The numbers of the chunks that the prompts make."""
    return range(math.ceil(len(prompts) / PROMPTS_PER_CHUNK))


def numbers_of(chunk: int, prompts: Sequence[str]) -> range:
    """The numbers of a chunk's prompts."""
    return range(chunk * PROMPTS_PER_CHUNK, min((chunk + 1) * PROMPTS_PER_CHUNK, len(prompts)))


def draw_pictures(o: Synth, out: Path, prompts: list[str], chunks: Sequence[int], drawer: DrawingModel, m: int) -> None:
    """Draw the pictures of the m-th model for some chunks of the prompts, unless they exist.

    Models take turns: the i-th picture of the m-th of M has place m + i M. The seed address of its noise is (seed,
    "synth", prompt, m, i), whatever the other prompts are. If another model is the m-th, it starts from the same noise.
    """
    places = range(m, o.pictures, len(o.models))
    batches: list[list[tuple[int, int]]] = []
    for chunk in chunks:
        wanted = [(number, place) for number in numbers_of(chunk, prompts) for place in places]
        batches += [wanted[i : i + o.batch_size] for i in range(0, len(wanted), o.batch_size)]
    left = [batch for batch in batches if not all(synth_picture(out, *address).is_file() for address in batch)]
    if not left:
        return
    model = load_base(drawer.base, o.device)
    if drawer.run:
        require_same_base(model, drawer.run, drawer.base["pretrained_model_name_or_path"], named=False)
        load_tuned(model, drawer.run)
    with progress_bar(total=sum(map(len, left)), desc=f"draw {drawer.name}", unit="picture") as bar:
        for batch in left:
            addresses = [(prompts[n], m, places.index(place)) for n, place in batch]
            for (number, place), picture in zip(batch, _pictures(model, o, addresses, bar.update), strict=True):
                if not picture.isfinite().all():
                    raise ValueError(f"{drawer.name}: picture {place} of prompt {number} is not finite")
                path = synth_picture(out, number, place)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, encode_png(picture))


@torch.no_grad()
def _pictures(
    model: TextToImage, o: Synth, addresses: list[tuple[str, int, int]], drawn: Callable[[float], object]
) -> Tensor:
    """[B,3,H,W] in [0, 1] on the CPU, one for each (prompt, m, i). `drawn` is told what fraction of a picture each step
    has drawn, over the batch."""
    table = step_table(model.schedule, **sampler_of(o))
    generators = [generator(o.seed, "synth", *address) for address in addresses]
    noise = torch.stack([draw_normal(model.latent_shape(o.resolution), one) for one in generators])
    denoiser = model.denoiser(model.encode_text([prompt for prompt, _, _ in addresses]), o.guidance)
    denoiser = counted(denoiser, partial(drawn, len(addresses) / len(table)))
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(o.mixed_precision)
    with torch.autocast(model.device.type, dtype=half, enabled=half is not None):
        latents = sample(denoiser, table, noise.to(model.device), generators)
    return model.decode(latents).cpu()


def score_pictures(o: Synth, out: Path, prompts: list[str], chunks: Sequence[int], name: str) -> None:
    """Let a reward score the stored pictures of some chunks, unless their scores exist.

    Raises:
        RewardError: the reward answers with another shape, or with no number for any picture of a chunk.
    """
    left = [chunk for chunk in chunks if not scores_path(out, name, chunk).is_file()]
    if not left:
        return
    (out / "scores").mkdir(exist_ok=True)
    device = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reward = load_reward(o.reward_specs[name], device=device, seed=o.seed)
    for chunk in progress_bar(left, desc=f"score {name}", unit="chunk"):
        addresses = [(number, place) for number in numbers_of(chunk, prompts) for place in range(o.pictures)]
        values: list[float] = []
        faults: list[str] = []
        for i in range(0, len(addresses), o.batch_size):
            batch = addresses[i : i + o.batch_size]
            images = [_stored(synth_picture(out, *address)) for address in batch]
            values += _by_size(name, reward, images, [prompts[number] for number, _ in batch], faults)
        if all(map(math.isnan, values)):
            first = f": {faults[0]}" if faults else ""
            raise RewardError(f"reward {name} has no finite number for any of {len(values)} pictures{first}")
        plain = [None if math.isnan(value) else value for value in values]
        rows = [plain[i : i + o.pictures] for i in range(0, len(plain), o.pictures)]
        facts = {"reward": name, "scores": rows, "errors": faults[:1]}
        write_bytes(scores_path(out, name, chunk), json.dumps(facts).encode())


def _by_size(name: str, reward: Reward, images: list[Tensor], prompts: list[str], faults: list[str]) -> list[float]:
    """`_scores`, for pictures of one size at a time: models may draw in sizes of their own."""
    scores = [math.nan] * len(images)
    for side in sorted({image.shape[-1] for image in images}):
        rows = [row for row, image in enumerate(images) if image.shape[-1] == side]
        some = torch.stack([images[row] for row in rows])
        for row, value in zip(rows, _scores(name, reward, some, [prompts[row] for row in rows], faults), strict=True):
            scores[row] = value
    return scores


def _scores(name: str, reward: Reward, images: Tensor, prompts: list[str], faults: list[str]) -> list[float]:
    """One score for each picture, nan if the reward has none. If the reward raises for several pictures, it is asked
    about each alone, so that one bad picture does not cost the others; what it raises then is appended to `faults`."""
    try:
        values = reward(images, prompts)
    except Exception as error:
        if len(prompts) == 1:
            faults.append(f"{type(error).__name__}: {error}")
            return [math.nan]
        return [_scores(name, reward, images[i : i + 1], prompts[i : i + 1], faults)[0] for i in range(len(prompts))]
    values = one_each(values, len(prompts), f"reward {name}").double()
    return torch.where(values.isfinite(), values, torch.nan).tolist()


def read_scores(out: Path, o: Synth, prompts: int, chunks: range) -> Tensor | None:
    """[M,P,K] float64 of all chunks, nan where a reward had no score; None while pictures or scores are missing."""
    pictures = (synth_picture(out, number, place) for number in range(prompts) for place in range(o.pictures))
    files = [[scores_path(out, name, chunk) for chunk in chunks] for name in o.rewards]
    if not all(path.is_file() for path in (*pictures, *(file for some in files for file in some))):
        return None
    scores = torch.empty(len(files), prompts, o.pictures, dtype=torch.float64)
    for of_reward, some in zip(scores, files, strict=True):
        rows = [row for file in some for row in json.loads(file.read_text(encoding="utf-8"))["scores"]]
        of_reward.copy_(torch.tensor([[math.nan if value is None else value for value in row] for row in rows]))
    return scores


def _stored(path: Path) -> Tensor:
    """A picture as it was written, [3,H,W] in [0, 1]."""
    try:
        image = decode_image(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} {error}; delete it to draw it again") from error
    return fit(image, Frame(image.width, image.width))
