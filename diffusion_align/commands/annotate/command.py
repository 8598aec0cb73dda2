"""`data annotate`: a person chooses between pictures in a page on this machine; the choices become training data."""

from __future__ import annotations

import json
import secrets
import threading
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from diffusion_align.commands.annotate.asking import Session
from diffusion_align.commands.annotate.choices import Row, comparisons, key_of, read, relevance, standing
from diffusion_align.commands.annotate.questions import Picture, by_prompt, make_questions, picture_bytes, read_pictures
from diffusion_align.commands.annotate.server import Server
from diffusion_align.commands.interrupt import Interruptible
from diffusion_align.data import write_pairs_parquet
from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.disk import write_bytes
from diffusion_align.options import Annotate

CHOICES, PAIRS, RANKINGS = "choices.jsonl", "pairs.parquet", "rankings.jsonl"


def annotate(options: Annotate) -> int:
    """Serve the page until it is stopped, then export; or only export."""
    o = options
    assert o.folder is not None  # check_annotate requires it
    folder = Path(o.folder)
    pictures = read_pictures(folder)
    rows, torn = read(folder / CHOICES, pictures)
    if torn:
        print(f"{folder / CHOICES}: {torn} unfinished lines (of an interrupted write) are left out")
    if not o.export:
        session = start_session(folder, pictures, rows, mode=o.mode, seed=o.seed)
        serve(session, pictures, o.port)
        rows = session.rows
    elif not rows:
        raise DataError(f"{folder / CHOICES}: holds no choice to export; start without --export to make some")
    kept = standing(rows)
    written = export(folder, pictures, kept) if kept or (folder / PAIRS).exists() else ""
    print(summary(folder, kept) + written)
    return 0


def start_session(folder: Path, pictures: list[Picture], rows: list[Row], *, mode: str, seed: int) -> Session:
    """A session on a folder whose file of choices can be written.

    Raises:
        DataError: no prompt has two pictures, or the file cannot be written.
    """
    questions = make_questions(pictures, mode, seed)
    if not questions:
        raise DataError(
            f"{folder}: no prompt has two pictures to choose between; draw them with --num_images_per_prompt 2 or more"
        )
    alone = sum(len(group) == 1 for group in by_prompt(pictures).values())
    if alone:
        print(f"{alone} prompts have one picture and are left out")
    try:
        (folder / CHOICES).open("ab").close()
    except OSError as error:
        raise DataError(
            f"{folder / CHOICES}: cannot be written ({error.strerror}); copy the folder elsewhere"
        ) from error
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    return Session(folder / CHOICES, questions, rows, seed, name)


def serve(session: Session, pictures: list[Picture], port: int | None) -> bool:
    """Print the address and serve until the page's button, Ctrl-C or SIGTERM; True if a signal ended it.

    Raises:
        OSError: the port is taken.
    """
    try:
        server = Server(session, pictures, port or 0)
    except OSError as error:
        raise OSError(f"port {port} of 127.0.0.1 is not free ({error.strerror}); leave --port out") from error
    with server, Interruptible() as interrupt:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        print(f"{session.decided()} of {len(session.questions)} questions are decided; every choice is stored at once")
        print(f"open {server.address}  (Stop on the page, or Ctrl-C here, ends)", flush=True)
        while not (server.stopped.wait(0.1) or interrupt.signal_number):
            pass
        server.shutdown()
        thread.join()
        return interrupt.signal_number > 0


def summary(folder: Path, rows: list[Row]) -> str:
    """How many choices, ties and skips count, and in which file."""
    choices = [row["choice"] for row in {key_of(row): row for row in rows}.values()]
    ties, skips = choices.count("tie"), choices.count("skip")
    return f"choices {len(choices) - ties - skips}, ties {ties}, skips {skips} in {folder / CHOICES}"


def export(folder: Path, pictures: list[Picture], rows: list[Row]) -> str:
    """Write pairs.parquet (Pick-a-Pic's layout) and rankings.jsonl from the choices that count; returns what it wrote.

    Both files always follow choices.jsonl: where all choices were taken back, they are empty.
    """
    by_file = {picture.file: picture for picture in pictures}
    answers = {key_of(row): row for row in rows}
    by_number: dict[int, list[tuple[str, str, float]]] = {}
    for key in sorted(answers, key=lambda key: (key[1], key)):
        by_number.setdefault(key[1], []).extend(comparisons(answers[key]))
    pairs = [pair for compared in by_number.values() for pair in compared]
    content = cache(lambda file: picture_bytes(by_file[file]))
    write_pairs_parquet(
        folder / PAIRS,
        [by_file[first].prompt for first, _, _ in pairs],
        [content(first) for first, _, _ in pairs],
        [content(second) for _, second, _ in pairs],
        [label for _, _, label in pairs],
    )
    lists = []
    for number, group in by_prompt(pictures).items():
        relevant = relevance(by_number.get(number, []))
        if relevant is not None:
            files = [picture.file for picture in group if picture.file in relevant]
            lists.append({"prompt": group[0].prompt, "images": files, "relevance": [relevant[file] for file in files]})
    write_bytes(folder / RANKINGS, "".join(json.dumps(entry) + "\n" for entry in lists).encode())
    ties = sum(label == 0.5 for _, _, label in pairs)
    return f"; pairs {len(pairs)}, of them ties {ties}, in {folder / PAIRS}; lists {len(lists)} in {folder / RANKINGS}"
