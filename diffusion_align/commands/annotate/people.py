"""The reward "people": a person at this machine chooses between the pictures of each prompt while the run waits.

It shows the pictures that a round has just drawn, as `data annotate` shows those of a folder. Every choice is on the
disk at once, under the digest of the pictures: a resumed run draws the same pictures again, finds their choices, and
asks only for the rest.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from diffusion_align.commands.annotate.choices import key_of, read, standing
from diffusion_align.commands.annotate.command import CHOICES, serve, start_session
from diffusion_align.commands.annotate.questions import make_questions, read_pictures
from diffusion_align.commands.sample.folder import LISTING, listing
from diffusion_align.data.disk import digest, write_bytes
from diffusion_align.data.images import encode_png
from diffusion_align.rewards import Reward


def people(folder: Path, group: int, *, seed: int, port: int | None = None) -> Reward:
    """Scores from choices in a page, kept below `folder`; every `group` pictures in a row are of one prompt.

    A picture's score is minus its place in the order: 0 for the best; tied pictures share a place. A question that was
    skipped, or still open when Stop was pressed, gives nan, and the run learns nothing from it. Ctrl-C while the page
    waits raises KeyboardInterrupt; choices made so far are kept.
    """

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        content = [encode_png(image) for image in images.detach().cpu()]
        named = digest(json.dumps([prompts, *(digest(png) for png in content)]).encode())[:16]
        batch = folder / named
        batch.mkdir(parents=True, exist_ok=True)
        entries = listing(prompts[::group], group)
        for entry, png in zip(entries, content, strict=True):
            write_bytes(batch / entry["file"], png)
        write_bytes(batch / LISTING, json.dumps({"pictures": entries, "seed": seed}).encode())
        return _answers(batch, group, seed, port).flatten()

    return score


def _answers(batch: Path, group: int, seed: int, port: int | None) -> Tensor:
    """[G,K] scores of a folder's pictures; asks for the choices that are missing."""
    pictures = read_pictures(batch)
    rows, _ = read(batch / CHOICES, pictures)
    session = start_session(batch, pictures, rows, mode="rank", seed=seed)
    if session.decided() < len(session.questions):
        waiting = len(session.questions) - session.decided()
        print(f"\n{waiting} prompts wait for your choice; Stop on the page goes on with the training")
        if serve(session, pictures, port):
            raise KeyboardInterrupt(
                f"the choices made so far are kept in {batch.parent}; the same command with --resume_from_checkpoint "
                "auto goes on from the last checkpoint and asks for the rest"
            )
    answers = {key_of(row): row for row in standing(session.rows)}
    scores = torch.full((len(pictures) // group, group), torch.nan)
    for question in make_questions(pictures, "rank", seed):
        row = answers.get(question.key)
        if row is None or row["choice"] == "skip":
            continue
        places = {"winner": [[row.get("winner")]], "ranking": row.get("ranking"), "tie": []}[row["choice"]]
        place = {file: i for i, files in enumerate(places) for file in files}
        for picture in question.pictures:
            scores[question.prompt_number, picture.image] = -place.get(picture.file, len(places))
    return scores
