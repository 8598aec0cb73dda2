"""`sample --layout`: pictures in the folders that scorers of benchmarks read, drawn on where a run was cut off."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_align.commands.trained_weights import run_config, trained_at, weights_digest
from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.benchmark_folders import TARGETS, Drawn, arrange, read_drawn
from diffusion_align.evaluation.generate import table_digest
from diffusion_align.evaluation.picture_folder import Batch, fill, read_png
from diffusion_align.evaluation.report import versions
from diffusion_align.options import Sample
from diffusion_align.system.progress import progress_bar

if TYPE_CHECKING:
    from diffusion_align.commands.sample.drawing import Draw
    from diffusion_align.models import TextToImage
    from diffusion_align.samplers import StepTable

PICTURES = "pictures"


def draw_folder(model: TextToImage, prompts: Sequence[Prompt], table: StepTable, draw: Draw, o: Sample) -> int:
    """Draw what is missing in GenEval's layout, and arrange it as `o.layout` says."""
    out = Path(o.out)
    folder = out if o.layout == "geneval" else out / PICTURES
    k = o.num_images_per_prompt

    bar = progress_bar(desc="draw", unit="picture", total=len(prompts) * k)

    def batches(numbers: list[int]) -> Iterator[Batch]:
        part, pictures = [], []
        for (prompt, image), picture in draw([divmod(number, k) for number in numbers], bar.update):
            part.append(prompt * k + image)
            pictures.append(picture)
            if len(part) == o.batch_size:
                yield part, torch.stack(pictures)
                part, pictures = [], []
        if part:
            yield part, torch.stack(pictures)

    drawn = fill(
        folder, [prompt.text for prompt in prompts], batches, made_with(model, table, o),
        per_prompt=k, extras=[prompt.extra for prompt in prompts],
    )  # fmt: skip
    new = 0
    with bar:
        for numbers in drawn:
            new += len(numbers)
    print(f"{len(prompts) * k} pictures of {len(prompts)} prompts in {folder}, {new} of them new")
    return 0 if o.layout == "geneval" else hand_over(folder, o)


def check_layout(prompts: Sequence[Prompt], o: Sample) -> None:
    """Raise ValueError, before anything is drawn, for prompts that cannot be named as the layout wants."""
    if o.layout in TARGETS:
        rows = [{**prompt.extra, "prompt": prompt.text} for prompt in prompts]
        TARGETS[o.layout](Drawn(Path(o.out), {}, rows, o.num_images_per_prompt))


def side_of(o: Sample) -> int | None:
    """The resolution that is asked for, or that the run was trained at; None: the model's own."""
    return o.resolution or (trained_at(run_config(o.run)) if o.run else None)


def made_with(model: TextToImage, table: StepTable, o: Sample) -> dict[str, Any]:
    """What decides the pictures: a folder made with anything else is not gone on with."""
    return {
        "drawn_by": "sample",
        "model": model.fingerprint(),
        "weights": weights_digest(o.run) if o.run else "base",
        "seed": o.seed,
        "guidance": o.guidance,
        "negative_prompt": o.negative_prompt,
        "steps": len(table),
        "sampler": table_digest(table),
        "resolution": side_of(o) or model.resolution,
        "mixed_precision": o.mixed_precision,
        "versions": versions(),
    }


def hand_over(folder: str | Path, o: Sample) -> int:
    """Arrange pictures that are drawn as another benchmark's scorers read them."""
    drawn = read_drawn(folder)
    home = Path(o.out) / o.layout
    with progress_bar(desc=o.layout, unit="file") as bar:
        paths = []
        for path in arrange(drawn, o.out, o.layout):
            paths.append(path)
            bar.update()
    print(f"{len(paths)} files in {home}; for its scorer: {scorer(paths, drawn, home, o.layout)}")
    return 0


def scorer(paths: Sequence[Path], drawn: Drawn, home: Path, layout: str) -> str:
    """How the benchmark's own repository takes these files."""
    if layout == "compbench":
        folders = list(dict.fromkeys(str(path.parent.parent) for path in paths))
        return f"--out_dir {shlex.quote(folders[0])}" + (
            f", and {len(folders) - 1} other folders" if folders[1:] else ""
        )
    side = read_png(paths[0]).shape[-1] // (2 if drawn.per_prompt == 4 else 1)
    return f"PIC_NUM={drawn.per_prompt} bash dpg_bench/dist_eval.sh {shlex.quote(str(home))} {side}"
