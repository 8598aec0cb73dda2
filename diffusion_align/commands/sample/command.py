"""`sample`: pictures from prompts, and a JSON file that says how they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_align.commands import threads
from diffusion_align.commands.adapters import lora_identity, merge_given
from diffusion_align.commands.model.base import as_given, load_base
from diffusion_align.commands.model.same_base import require_same_base
from diffusion_align.commands.prompt_lists import listed_prompts
from diffusion_align.commands.sample.benchmark import check_layout, draw_folder, hand_over, side_of
from diffusion_align.commands.sample.drawing import Draw, draw
from diffusion_align.commands.sample.folder import LISTING, claim, listing
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.trained_weights import base_of, load_tuned, reading_of, run_config, weights_digest
from diffusion_align.data.images import encode_png
from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.report import versions
from diffusion_align.models.prompts.reading import DEFAULT
from diffusion_align.options import Sample
from diffusion_align.samplers import step_table
from diffusion_align.system.progress import progress_bar


def sample(options: Sample) -> int:
    """Draw and write pictures, or arrange pictures that an earlier command drew."""
    o = options
    if o.from_pictures is not None:
        return hand_over(o.from_pictures, o)
    prompts = [Prompt(text) for text in o.prompt]
    prompts += listed_prompts(o.prompts_file)[: o.num_prompts] if o.prompts_file else []
    check_layout(prompts, o)
    model_name = o.pretrained_model_name_or_path
    of_run = base_of(o.run, run_config(o.run), model_name) if o.run else {}
    name = of_run.get("pretrained_model_name_or_path") or present_model(model_name or "")
    base = as_given(of_run | {"pretrained_model_name_or_path": name}, o)

    resolution, reading = side_of(o), reading_of(o, run_config(o.run) if o.run else {})
    order = o.order if o.solver == "dpmpp" else 1
    about: dict[str, Any] = {
        "pictures": listing([prompt.text for prompt in prompts], o.num_images_per_prompt),
        "model": name,
        "run": o.run,
        "weights": "+".join([weights_digest(o.run) if o.run else "base", *lora_identity(o).values()]),
        "seed": o.seed,
        "guidance": o.guidance,
        "negative_prompt": o.negative_prompt,
        "sampler": {"solver": o.solver, "order": order, "steps": o.steps, "eta": o.eta, "spacing": o.spacing},
        "mixed_precision": o.mixed_precision,
    } | ({"resolution": resolution} if resolution else {})
    about |= {} if reading == DEFAULT else {"prompts": str(reading)}
    about |= {"lora": o.lora} if o.lora else {}
    if o.layout == "samples":
        claim(Path(o.out), about, overwrite=o.overwrite)

    threads.set_threads(o.threads)
    model = load_base(base, o.device)
    model.reading = reading
    if o.run:
        require_same_base(model, o.run, name, named=o.pretrained_model_name_or_path is not None)
    if o.lora:
        merge_given(model, o.lora, o)
    if o.run:
        load_tuned(model, o.run)
    table = step_table(model.schedule, o.steps, solver=o.solver, order=order, eta=o.eta, spacing=o.spacing)

    draw_places = partial(draw, model, [prompt.text for prompt in prompts], table, o, resolution)
    if o.layout != "samples":
        return draw_folder(model, prompts, table, draw_places, o)
    write_pictures(about["pictures"], draw_places, Path(o.out))
    about |= {"fingerprint": model.fingerprint(), "resolution": resolution or model.resolution, "versions": versions()}
    (Path(o.out) / LISTING).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{len(about['pictures'])} pictures and {LISTING} in {Path(o.out)}")
    return 0


def write_pictures(files: Sequence[dict[str, Any]], draw_places: Draw, out: Path) -> None:
    """Draw all pictures into one folder."""
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(total=len(files), desc="draw", unit="picture") as bar:
        drawn = draw_places([(entry["prompt_number"], entry["image"]) for entry in files], bar.update)
        for entry, (_, picture) in zip(files, drawn, strict=True):
            (out / entry["file"]).write_bytes(encode_png(picture))
