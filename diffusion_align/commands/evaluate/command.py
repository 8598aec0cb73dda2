"""`evaluate`: base and tuned pictures of the same prompts from the same noise, scored, compared and reported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_align.commands import threads
from diffusion_align.commands.data.long_captions import describe_long_captions
from diffusion_align.commands.evaluate.contenders import Contender, base_contender, contender
from diffusion_align.commands.evaluate.judging import Judging, check_judging, open_judging, settle_reward
from diffusion_align.commands.evaluate.results import report
from diffusion_align.commands.model.base import as_given
from diffusion_align.commands.prompt_lists import Prompt, caption_of, evaluation_prompts
from diffusion_align.commands.threads import Threads
from diffusion_align.commands.trained_weights import reading_of
from diffusion_align.evaluation import (
    Drawing,
    Measured,
    missing_pictures,
    read_pictures,
    sampler_table,
    save_pictures,
    score,
)
from diffusion_align.evaluation.report import versions
from diffusion_align.models.prompts.reading import Reading
from diffusion_align.options import Evaluate
from diffusion_align.options.names import shard_of
from diffusion_align.options.sample import check_evaluate
from diffusion_align.system.progress import progress_bar

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

# A new version of these may draw other pictures, so it draws all of them into a new folder.
DRAWN_BY = ("torch", "diffusers", "transformers", "peft")


def evaluate(options: Evaluate) -> int:
    """Evaluate models against their base; writes report.html, .json and .csv, and pairs.png."""
    o = options
    models = [contender(where, o.pretrained_model_name_or_path) for where in o.run]
    base = contender(o.base, o.pretrained_model_name_or_path) if o.base is not None else base_contender(models[0])
    base, *models = [dataclasses.replace(who, base=as_given(who.base, o)) for who in (base, *models)]
    prompts = evaluation_prompts(o.prompts, o.num_prompts)
    in_world = all(caption_of(prompt.text) for prompt in prompts)
    o = settle_reward(o, in_world)
    check_evaluate(o)  # again: a held-out reward may be the one that is now settled
    check_judging(o, in_world)
    names = ["tuned"] if len(models) == 1 else [_unused(model.name, i, models) for i, model in enumerate(models)]
    named = {"base": base, **dict(zip(names, models, strict=True))}
    out = Path(o.output_dir or _default_folder(models))

    resolution = _resolution(o, [*models, base])
    reading = _reading(o, models)
    facts: dict[str, Any] = _facts(o, prompts) | ({"resolution": resolution} if resolution else {})
    workers = threads.set_threads(o.threads)
    folders: dict[tuple[str, str], Path] = {}
    side = 0
    for name, who in named.items():
        model = who.load(o)
        model.reading = reading
        side = resolution or model.resolution
        about = {"model": who.base["pretrained_model_name_or_path"], "fingerprint": model.fingerprint()}
        about["weights"] = who.weights()
        key = _key({**facts, **about, "prompts": [prompt.text for prompt in prompts]})
        if "models" not in facts:
            facts |= _cut_prompts(model, prompts) | {"models": {}}
        facts["models"][name] = about
        for solver in o.sampler:
            folder = folders[name, solver] = out / "evaluation" / f"{'base' if who is base else 'tuned'}-{key}" / solver
            _draw(model, prompts, (name, solver), folder, o, about["weights"], workers, resolution)
        del model
    count = len(prompts) * o.num_images_per_prompt
    left = sum(len(missing_pictures(folder, count, o.num_images_per_prompt)) for folder in folders.values())
    if left:
        print(f"shard {o.shard} is drawn; the other shards draw {left} pictures, and the last one to end reports")
        return 0

    judging = open_judging(o, in_world, side)
    texts = [prompt.text for prompt in prompts for _ in range(o.num_images_per_prompt)]
    measured = {place: _measure(place, folder, texts, judging, o, workers) for place, folder in folders.items()}
    return report(o, out, named, prompts, texts, judging, measured, folders, facts)


def _reading(o: Evaluate, models: Sequence[Contender]) -> Reading:
    """How all models read prompts: as the options say, else as the runs were trained; ValueError if those differ."""
    readings = {reading_of(o, model.config) for model in models}
    if len(readings) > 1:
        raise ValueError(
            f"the runs were trained with prompts read in different ways ({'; '.join(sorted(map(str, readings)))}): "
            "choose one with --long_prompts, --prompt_chunks, --prompt_syntax and --clip_skip"
        )
    return readings.pop()


def _resolution(o: Evaluate, models: Sequence[Contender]) -> int | str | None:
    """The size of all pictures: --resolution, else that of the runs; None is the model's own.

    Raises:
        ValueError: the runs were trained at different resolutions.
    """
    sides = {model.resolution: model.name for model in models if model.trained is not None}
    if o.resolution is not None or not sides:
        return o.resolution
    if len(sides) > 1:
        each = ", ".join(f"{name}: {side or 'its own'}" for side, name in sides.items())
        raise ValueError(f"the runs were trained at different resolutions ({each}): choose one with --resolution")
    return next(iter(sides))


def _default_folder(models: Sequence[Contender]) -> Path:
    """The run's own folder where one run is evaluated, else a folder named after all models."""
    if len(models) == 1 and models[0].trained is not None and not models[0].is_checkpoint:
        return models[0].trained
    return Path("evaluations") / re.sub(r"[^\w.-]+", "-", " ".join(model.name for model in models))[:80]


def _unused(name: str, i: int, models: Sequence[Contender]) -> str:
    """The name of a model in tables, with a number where another model has the name, or where it is "base"."""
    return name if name != "base" and sum(m.name == name for m in models) == 1 else f"{name} ({i + 1})"


def _cut_prompts(model: TextToImage, prompts: Sequence[Prompt]) -> dict[str, str]:
    """How many prompts the text encoder truncates, printed and for the report; nothing if it truncates none."""
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    cut, limit = model.cut_captions(texts)
    if not cut:
        return {}
    print(describe_long_captions(cut, len(texts), limit))
    return {"prompts_cut": f"{cut} of {len(texts)}, after {limit} tokens"}


def _facts(o: Evaluate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides the pictures, whichever model draws them."""
    return {
        "prompts_from": o.prompts,
        "distinct_prompts": len({prompt.text for prompt in prompts}),
        "pictures_per_prompt": o.num_images_per_prompt,
        "seed": o.seed,
        "steps": o.steps,
        "spacing": "trailing",
        "guidance": o.guidance,
        "mixed_precision": o.mixed_precision,
        "drawn_by": {name: versions()[name] for name in DRAWN_BY},
    }


def _key(facts: dict[str, Any]) -> str:
    """A folder's key: another seed, guidance, training or library gets another folder."""
    own = {name: value for name, value in facts.items() if name != "models"}
    return hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=6).hexdigest()


def _draw(
    model: TextToImage, prompts: Sequence[Prompt], place: tuple[str, str], folder: Path, o: Evaluate, weights: str,
    workers: Threads, resolution: int | str | None,
) -> None:  # fmt: skip
    """Draw the missing pictures of one model by one sampler; `place` names both."""
    table = sampler_table(model.schedule, place[1], o.steps)
    drawing = Drawing(table, o.guidance, o.seed, o.batch_size, o.num_images_per_prompt, resolution)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(o.mixed_precision)
    shard = shard_of(o.shard)
    total = len(range(shard[0], len(prompts), shard[1])) * o.num_images_per_prompt
    made = {"weights": weights, "solver": place[1], "timesteps": table.timesteps.tolist(), "versions": versions()}
    with (
        torch.autocast(model.device.type, dtype=half, enabled=half is not None),
        progress_bar(total=total, desc=" ".join(place), unit="picture") as bar,
    ):
        drawn = save_pictures(
            model, [prompt.text for prompt in prompts], folder, drawing,
            shard=shard, facts=made, extras=[prompt.extra for prompt in prompts], progress=bar.update,
        )  # fmt: skip
        for _ in drawn:
            workers.adjust()


def _measure(
    place: tuple[str, str], folder: Path, texts: list[str], judging: Judging, o: Evaluate, workers: Threads
) -> Measured:
    """The scores and features of a folder's pictures, which are read once."""
    embedded: list[Tensor] = []
    features = judging.features

    def pictures() -> Iterator[tuple[list[int], Tensor]]:
        batches = read_pictures(folder, len(texts), per_prompt=o.num_images_per_prompt)
        with progress_bar(total=len(texts), desc=f"score {' '.join(place)}", unit="picture") as bar:
            for numbers, images in batches:
                if features is not None:
                    embedded.append(features(images).float().cpu())
                yield numbers, images
                bar.update(len(numbers))
                workers.adjust()

    scores = score(pictures(), texts, judging.rewards, judges=judging.judges)
    return Measured(*place, scores, torch.cat(embedded) if embedded else None)
