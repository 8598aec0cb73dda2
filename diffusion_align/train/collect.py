"""The first half of a round: divide its prompts among the ranks, draw them a chunk at a time, and score them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from diffusion_align.rewards import prefetch
from diffusion_align.system.memory import in_parts
from diffusion_align.train.method import Chunk, OnlineMethod, Round, Sample
from diffusion_align.train.processes.agree import max_over_ranks, on_any_rank
from diffusion_align.train.processes.watch import record_activity
from diffusion_align.train.run import Progress, Run

if TYPE_CHECKING:
    from accelerate import Accelerator


def draw_round(
    method: OnlineMethod[Chunk], run: Run, steps: list[list[Sample]], progress: Progress, prompts_per_chunk: int
) -> tuple[Round[Chunk], Progress] | None:
    """The chunks of this rank for each step, and the progress with the number of halvings that memory required.

    None if a stop is requested on any rank while drawing: nothing has been learned from the round yet, so a resumed
    run draws it again.

    Raises:
        OutOfMemory: the pictures of one prompt do not fit together.
    """
    accelerator, first = run.accelerator, _size(prompts_per_chunk, progress.halvings)
    blocks = _blocks(method, [_prompts_of_rank(step, accelerator) for step in steps], first, progress.samples)
    chunks: list[list[Chunk]] = [[] for _ in steps]
    smallest = first
    record_activity("drawing", progress.step + 1)
    for number, drawn, size in prefetch(blocks, 1) if method.score_ahead else blocks:
        record_activity("scoring")
        chunks[number] += [method.score(chunk) for chunk in drawn] if method.score else drawn
        smallest = min(smallest, size)
        if on_any_rank(accelerator, run.stop_requested())[0]:
            return None
        record_activity("drawing")
    halvings = progress.halvings
    while _size(prompts_per_chunk, halvings) > smallest:
        halvings += 1
    (halvings,) = max_over_ranks(accelerator, halvings)
    return Round(chunks, halvings), replace(progress, halvings=halvings)


def _size(prompts_per_chunk: int, halvings: int) -> int:
    return -(-prompts_per_chunk // 2**halvings)


def _prompts_of_rank(step: list[Sample], accelerator: "Accelerator") -> list[Sample]:
    """The prompts of a step that this rank draws."""
    count = len(step) // accelerator.num_processes
    return step[accelerator.process_index * count : (accelerator.process_index + 1) * count]


def _blocks(
    method: OnlineMethod[Chunk], steps: list[list[Sample]], size: int, round: int
) -> Iterator[tuple[int, list[Chunk], int]]:
    """(step, chunks, size) of each block of `size` prompts. Every rank has as many blocks, even if it halves chunks."""
    block = size
    for number, step in enumerate(steps):
        for start in range(0, len(step), block):
            prompts = step[start : start + block]

            def draw(rows: slice, prompts: list[Sample] = prompts) -> Chunk:
                return method.collect(prompts[rows], round).to("cpu")

            drawn, size = in_parts(draw, len(prompts), size, "drawing, prompts")
            yield number, drawn, size
