"""choices.jsonl: one JSON object for each choice, appended and never rewritten; and what follows from the choices.

| choice | further fields |
|---|---|
| winner | winner: the file that beats the others, which are not compared with one another |
| ranking | ranking: lists of files, the best first; files of one list are tied |
| tie | |
| skip | |
| undo | takes back the last choice about the same pictures that still counts |

Every row has mode, prompt_number, prompt, images (files, by image number), digest (of prompt and pictures) and session;
a choice also has shown (files from left to right) and seconds (from the pictures' appearance to the choice).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

from diffusion_align.commands.annotate.questions import Key, Picture, Question
from diffusion_align.data.bad_rows import DataError

Row = dict[str, Any]
KINDS = ("winner", "ranking", "tie", "skip", "undo")


def append(path: Path, row: Row) -> None:
    """Add one row, which is on the disk when this returns. Raises OSError when it could not be written completely."""
    line = json.dumps(row).encode() + b"\n"
    # One unbuffered write: a killed process leaves at most one unfinished line, and the next row starts on a new line.
    with open(path, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(f"{path}: the disk took only part of a row")
        os.fsync(file.fileno())


def read(path: Path, pictures: list[Picture]) -> tuple[list[Row], int]:
    """All rows, and how many unfinished lines (which are not JSON) were left out.

    Raises:
        DataError: naming the line, a row that is not a choice, or a choice between other pictures than these.
    """
    rows: list[Row] = []
    torn = 0
    by_file = {picture.file: picture for picture in pictures}
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            torn += 1
            continue
        if not _is_row(row):
            raise DataError(f"{path}: line {number} is not a choice; remove it, or move the file away")
        chosen = tuple(by_file[file] for file in row["images"] if file in by_file)
        same = len(chosen) == len(row["images"]) and {p.prompt_number for p in chosen} == {row["prompt_number"]}
        if not same or Question(row["mode"], chosen).digest != row["digest"]:
            raise DataError(
                f"{path}: line {number} is a choice between other pictures than the folder's; "
                "were they drawn again? move the file away to start afresh"
            )
        rows.append(row)
    return rows, torn


def _is_row(row: Any) -> bool:
    try:
        choice, images = row["choice"], row["images"]
        if choice == "winner":
            named = [row["winner"], *(file for file in images if file != row["winner"])]
        else:
            named = [file for place in row["ranking"] for file in place] if choice == "ranking" else images
        kinds = choice in KINDS and row["mode"] in ("best", "rank") and type(row["prompt_number"]) is int
        return kinds and len(set(images)) == len(images) > 1 and sorted(named) == sorted(images) and "digest" in row
    except (KeyError, TypeError):
        return False


def key_of(row: Row) -> Key:
    """The key of the question that a row answers, as `Question.key`."""
    return row["mode"], row["prompt_number"], tuple(row["images"])


def standing(rows: Iterable[Row]) -> list[Row]:
    """The choices that were not taken back, oldest first. A question may have several; the last one counts."""
    kept: list[Row] = []
    for row in rows:
        if row["choice"] != "undo":
            kept.append(row)
        else:
            last = next((i for i in reversed(range(len(kept))) if key_of(kept[i]) == key_of(row)), None)
            if last is not None:
                del kept[last]
    return kept


def comparisons(row: Row) -> list[tuple[str, str, float]]:
    """The pairs that an answer compares: (file, file, 1 if the first won, 0 if the second won, 0.5 for a tie)."""
    images, choice = row["images"], row["choice"]
    if choice == "skip":
        return []
    places = [[row["winner"]], [file for file in images if file != row["winner"]]] if choice == "winner" else [images]
    place = {file: i for i, files in enumerate(row.get("ranking", places)) for file in files}
    compared = []
    for first, second in combinations(images, 2):
        if choice != "winner" or row["winner"] in (first, second):
            gain = place[second] - place[first]
            compared.append((first, second, 0.5 if gain == 0 else float(gain > 0)))
    return compared


def relevance(compared: Iterable[tuple[str, str, float]]) -> dict[str, float] | None:
    """The fraction of its comparisons that each picture wins, in [0, 1]; nobody wins a tie.

    RankDPO's relevance (Karthik et al. 2024, arXiv 2410.18013, alg. 1) where every two pictures were compared. None
    where two pictures of different relevance never were, because nobody chose the better one.
    """
    scores: dict[str, list[bool]] = {}
    met = set()
    for first, second, label in compared:
        scores.setdefault(first, []).append(label == 1)
        scores.setdefault(second, []).append(label == 0)
        met.add(frozenset((first, second)))
    fractions = {file: sum(won) / len(won) for file, won in scores.items()}
    known = all(fractions[a] == fractions[b] or frozenset((a, b)) in met for a, b in combinations(fractions, 2))
    return fractions if fractions and known else None
