"""The first half of a round: its prompts are divided among the ranks, drawn a chunk at a time, and scored."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from diffusion_align.rewards import prefetch
from diffusion_align.system.memory import in_parts
from diffusion_align.train.method import Chunk, OnlineMethod, Round, Sample
from diffusion_align.train.processes.agree import max_over_ranks, on_any_rank
from diffusion_align.train.processes.watch import doing
from diffusion_align.train.run import Progress, Run

if TYPE_CHECKING:
    from accelerate import Accelerator


def draw_round(
    method: OnlineMethod[Chunk], run: Run, steps: list[list[Sample]], progress: Progress, prompts_per_chunk: int
) -> tuple[Round[Chunk], Progress] | None:
    """This rank's chunks of each step, and the progress with the chunk size that memory allowed.

    None where any rank was asked to stop meanwhile: nothing has been learnt from the round yet, so it starts again when
    the run is resumed.

    Raises:
        OutOfMemory: the pictures of one prompt do not fit together.
    """
    accelerator, first = run.accelerator, _size(prompts_per_chunk, progress.halvings)
    blocks = _blocks(method, [_share(step, accelerator) for step in steps], first, progress.samples)
    chunks: list[list[Chunk]] = [[] for _ in steps]
    smallest = first
    doing("drawing", progress.step + 1)
    for number, drawn, size in prefetch(blocks, 1) if method.ahead else blocks:
        doing("scoring")
        chunks[number] += [method.score(chunk) for chunk in drawn] if method.score else drawn
        smallest = min(smallest, size)
        if on_any_rank(accelerator, run.asked())[0]:
            return None
        doing("drawing")
    halvings = progress.halvings
    while _size(prompts_per_chunk, halvings) > smallest:
        halvings += 1
    (halvings,) = max_over_ranks(accelerator, halvings)
    return Round(chunks, halvings), replace(progress, halvings=halvings)


def _size(prompts_per_chunk: int, halvings: int) -> int:
    return -(-prompts_per_chunk // 2**halvings)


def _share(step: list[Sample], accelerator: "Accelerator") -> list[Sample]:
    """This process's prompts of a step."""
    share = len(step) // accelerator.num_processes
    return step[accelerator.process_index * share : (accelerator.process_index + 1) * share]


def _blocks(
    method: OnlineMethod[Chunk], shares: list[list[Sample]], size: int, round: int
) -> Iterator[tuple[int, list[Chunk], int]]:
    """(step, chunks, size) of every `size` prompts: as many on each process, however its memory makes it cut them."""
    block = size
    for number, share in enumerate(shares):
        for start in range(0, len(share), block):
            prompts = share[start : start + block]

            def draw(rows: slice, prompts: list[Sample] = prompts) -> Chunk:
                return method.collect(prompts[rows], round).to("cpu")

            drawn, size = in_parts(draw, len(prompts), size, "drawing, prompts")
            yield number, drawn, size
