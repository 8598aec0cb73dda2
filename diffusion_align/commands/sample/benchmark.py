"""`sample --layout`: folders that the scorers of benchmarks read; an interrupted command goes on where it stopped."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.commands.trained_weights import run_config, trained_at, weights_digest
from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.benchmark_folders import DPG_COUNTS, TARGETS, Drawn, NotDrawn, arrange, read_drawn
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
    folder = Path(o.out) if o.layout == "geneval" else Path(o.out) / PICTURES
    per_prompt = o.num_images_per_prompt
    total = len(prompts) * per_prompt
    with progress_bar(desc="draw", unit="picture", total=total) as bar:

        def pictures(numbers: list[int]) -> Iterator[Batch]:
            for place, picture in draw([divmod(number, per_prompt) for number in numbers], bar.update):
                yield [place[0] * per_prompt + place[1]], picture[None]

        texts, extras = [prompt.text for prompt in prompts], [prompt.extra for prompt in prompts]
        facts = made_with(model, table, o)
        new = sum(map(len, fill(folder, texts, pictures, facts, per_prompt=per_prompt, extras=extras)))
    print(f"{total} pictures of {len(prompts)} prompts in {folder}, {new} of them new")
    return 0 if o.layout == "geneval" else hand_over(folder, o)


def check_layout(prompts: Sequence[Prompt], o: Sample) -> None:
    """Raise ValueError, before anything is drawn, for prompts that cannot be named, and pictures that cannot be joined,
    as the layout wants."""
    if o.layout == "dpg" and o.num_images_per_prompt > 1 and isinstance(side_of(o), str):
        raise ValueError(f"layout dpg joins the pictures of a prompt, which must be squares, not {side_of(o)} pixels")
    if o.layout in TARGETS:
        rows = [{**prompt.extra, "prompt": prompt.text} for prompt in prompts]
        TARGETS[o.layout](Drawn(Path(o.out), {}, rows, o.num_images_per_prompt))


def side_of(o: Sample) -> int | str | None:
    """The resolution that is asked for, or that the run was trained at; None: the model's own."""
    return o.resolution or (trained_at(run_config(o.run)) if o.run else None)


def made_with(model: TextToImage, table: StepTable, o: Sample) -> dict[str, Any]:
    """What decides the pictures; a folder made with anything else is refused."""
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
    """Arrange pictures that are drawn as another benchmark's scorers read them.

    Raises:
        ValueError: the folder is not drawn to its end, or its pictures cannot be arranged so.
    """
    try:
        drawn = read_drawn(folder)
    except NotDrawn as error:
        cure = "give a folder that evaluate or sample --layout geneval has drawn; the same command again completes it"
        raise ValueError(f"{error}: {cure}") from error
    if o.layout == "dpg" and drawn.per_prompt not in DPG_COUNTS:
        wanted = "DPG-Bench takes 4 or 1, so draw with --num_images_per_prompt 4"
        raise ValueError(f"{folder} has {drawn.per_prompt} pictures of each prompt: {wanted}")
    home = Path(o.out) / o.layout
    paths = list(progress_bar(arrange(drawn, o.out, o.layout), desc=o.layout, unit="file"))
    print(f"{len(paths)} files in {home}; for its scorer: {scorer(paths, drawn, home, o.layout)}")
    return 0


def scorer(paths: Sequence[Path], drawn: Drawn, home: Path, layout: str) -> str:
    """The arguments with which the benchmark's own scorer reads these files."""
    if layout == "compbench":
        folders = list(dict.fromkeys(str(path.parent.parent) for path in paths))
        others = f", and {len(folders) - 1} other folders" if folders[1:] else ""
        return f"--out_dir {shlex.quote(folders[0])}{others}"
    side = read_png(paths[0]).shape[-1] // (2 if drawn.per_prompt == 4 else 1)
    return f"PIC_NUM={drawn.per_prompt} bash dpg_bench/dist_eval.sh {shlex.quote(str(home))} {side}"
