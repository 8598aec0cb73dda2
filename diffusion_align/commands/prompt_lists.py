"""Prompts by the name of a list or from a file, and their categories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion_align.data.fetched_prompts import fetch_list, requested_list
from diffusion_align.data.prompts import Prompt, read_list
from diffusion_align.models.hub import asset
from diffusion_align.options.names import nearest
from diffusion_align.origins import PROMPT_LISTS, SHIPPED
from diffusion_align.shapes import Caption, parse, sample_captions

HELD_OUT = "held-out"
HELD_OUT_SEED = 0  # of the captions, so that another --seed draws the same prompts from other noise


def evaluation_prompts(source: str, n: int) -> list[Prompt]:
    """The first n prompts of a list, or n held-out captions of the embedded world.

    Held-out captions have the distribution of the training captions, so short ones repeat, each time with other noise.
    Their categories are GenEval's tasks.

    Raises:
        ValueError, FileNotFoundError: as `listed_prompts`.
    """
    if source == HELD_OUT:
        return [Prompt(text, kinds(parse(text))) for text in sample_captions(n, HELD_OUT_SEED, split="held-out")]
    return listed_prompts(source)[:n]


def listed_prompts(source: str) -> list[Prompt]:
    """The prompts of a file or folder, of an included list, or of a downloaded list, whose licence is printed.

    Raises:
        ValueError: the file does not have the format of its name, or holds no prompt.
        FileNotFoundError: there is no such file or list, or it cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        return [_in_world(prompt) for prompt in read_list(path)]
    if source in SHIPPED:
        return [_in_world(prompt) for prompt in read_list(asset(SHIPPED[source].file))]
    request = requested_list(source)
    if request is None:
        names = [*SHIPPED, *PROMPT_LISTS]
        match = nearest(source, names)
        cure = f"did you mean {match}?" if match else f"give a file, or one of {', '.join(names)}"
        raise FileNotFoundError(f"prompts {source}: no such file, nor a list of that name; {cure}")
    prompts, where = fetch_list(request)
    print(f"prompts          {source}: {len(prompts):,} from {where}; licence: {request.benchmark.licence}")
    return prompts


def _in_world(prompt: Prompt) -> Prompt:
    """The prompt; with categories if it is a caption of the embedded world and its list has none."""
    caption = caption_of(prompt.text)
    return prompt if prompt.categories or caption is None else Prompt(prompt.text, kinds(caption), prompt.extra)


def caption_of(text: str) -> Caption | None:
    """The text as a caption of the embedded world, or None."""
    try:
        return parse(text)
    except ValueError:
        return None


def kinds(caption: Caption) -> tuple[str, ...]:
    """The task of GenEval that a caption of the embedded world belongs to."""
    return ({"single": "task: single object", "count": "task: counting", "pair": "task: position"}[caption.kind],)


def by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The numbers of the prompts in each category; categories in the order of their first prompt."""
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        for category in prompt.categories:
            found.setdefault(category, []).append(number)
    return found
