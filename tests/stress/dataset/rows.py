"""Data sets of clean or bad rows, each with its expected outcome."""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stress.dataset.pictures import PICTURES, garbled

USED, TIE, BAD, EITHER = "used", "tie", "reported", "used or reported"
GOOD = [name for name, (_, good) in PICTURES.items() if good]
LABELS = [((1.0, 0.0), USED), ((0.0, 1.0), USED), ((0.5, 0.5), TIE)] + [
    (labels, BAD)
    for labels in (
        (float("nan"),) * 2,
        (2.0, -1.0),
        (None, None),
        (1.0, 1.0),
        (0.7, 0.3),
        (float("inf"), 0.0),
        (1.0, None),
    )
]
PROMPTS = [("a red circle", USED), ("", USED), ("x" * 100_000, USED), ("é\u202e\n\0🦊", USED)]
JSON_PROMPTS = [*PROMPTS, (None, BAD), ("\ud800", BAD), (3, BAD), (["a"], BAD)]
RELEVANCE = [([1, 0], USED), ([0.2, 0.4], USED), ([0.5, 0.5], TIE)] + [
    (values, BAD)
    for values in ([1], [1, 0, 0], [float("nan"), 0], [2, 0], ["1", 0], [None, 0], "1, 0", {}, True, [True, False])
]
LINES = [
    "{not json",
    "[1, 2]",
    "3",
    "null",
    "[" * 5000,
    '{"prompt": "a"}',
    '"text"',
    '{"prompt": "a", "chosen": "0.png"}',
]


class Rows:
    """Draws rows, clean ones only or all kinds, and records the expected outcome of each."""

    def __init__(self, clean: bool, seed: int):
        self.clean, self.draw = clean, random.Random(seed)
        self.expected: dict[str, set[str]] = {}

    def one(self, choices: list) -> tuple[Any, str]:
        """A random choice, or the first, good one: always if clean, else mostly, so that most rows have one fault."""
        return choices[0] if self.clean or self.draw.random() < 0.6 else self.draw.choice(choices)

    def picture(self) -> tuple[bytes | None, str]:
        """A picture, and the outcome that it deserves."""
        if self.clean or self.draw.random() < 0.6:
            return PICTURES[self.draw.choice(GOOD)][0], USED
        name = self.draw.choice([*PICTURES, "garbled"])
        if name == "garbled":
            return garbled(self.draw), EITHER
        data, good = PICTURES[name]
        return data, USED if good else BAD

    def expect(self, row: str, *outcomes: str) -> None:
        """Record the possible outcomes of a row, from the outcomes that its fields deserve."""
        good = TIE if TIE in outcomes else USED
        self.expected[row] = {BAD} if BAD in outcomes else {good, BAD} if EITHER in outcomes else {good}


def parquet(folder: Path, rows: Rows, count: int) -> Path:
    """Pick-a-Pic's columns; some prompts are not UTF-8, some cells are null."""
    prompts = [(text.encode(), outcome) for text, outcome in PROMPTS] + [(None, BAD), (b"\xff\xfe", BAD)]
    columns: dict[str, list] = {name: [] for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")}
    for row in range(count):
        (prompt, said), (labels, told) = rows.one(prompts), rows.one(LABELS)
        pictures = [rows.picture() for _ in range(2)]
        for name, value in zip(columns, (prompt, pictures[0][0], pictures[1][0], *labels), strict=True):
            columns[name].append(value)
        # A tie's second label is not read, but its pictures are.
        rows.expect(f"pick.parquet:{row}", said, told, *(good for _, good in pictures))
    caption = pa.array(columns.pop("caption"), pa.binary()).view(pa.string())
    path = folder / "pick.parquet"
    pq.write_table(pa.table({"caption": caption, **columns}), path, row_group_size=256)
    return path


def names(folder: Path, rows: Rows, count: int) -> list[tuple[Any, str]]:
    """Picture files in a folder, and names of files that do not exist."""
    files = []
    for number in range(count):
        data, good = rows.picture()
        if data is None:
            files.append((rows.draw.choice([None, 3, "", "none.png", "a\0b", "x" * 5000, "\ud800", ["0.png"]]), BAD))
        else:
            (folder / f"{number}.png").write_bytes(data)
            files.append((f"{number}.png", good))
    return files


def json_lines(folder: Path, rows: Rows, count: int, ranked: bool) -> Path:
    """Pairs or rankings of picture files; some lines are not JSON, or of another form."""
    folder.mkdir()
    files, lines = names(folder, rows, max(1, count // 4)), []
    for row in range(1, count + 1):
        where = f"set.jsonl:{row}"
        if not rows.clean and rows.draw.random() < 0.1:
            lines.append(rows.draw.choice(LINES))
            rows.expect(where, BAD)
            continue
        (prompt, said), (relevance, told) = rows.one(JSON_PROMPTS), rows.one(RELEVANCE)
        (first, good_0), (second, good_1) = rows.draw.choice(files), rows.draw.choice(files)
        if ranked:
            values = {"images": [first, second], "relevance": relevance}
        else:
            values, told = {"chosen": first, "rejected": second}, USED
        lines.append(json.dumps({"prompt": prompt} | values))
        rows.expect(where, said, told, good_0, good_1)
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "set.jsonl"


def archive(folder: Path, rows: Rows, count: int) -> Path:
    """Pick-a-Pic's tar archives; some samples lack a member."""
    texts = [
        ("1", "0", USED),
        ("0", "1", USED),
        ("0.5", "0.5", TIE),
        ("nan", "0", BAD),
        ("", "", BAD),
        ("one", "no", BAD),
    ]
    path = folder / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for row in range(count):
            first, second, told = texts[0] if rows.clean else rows.draw.choice(texts)
            (prompt, said), pictures = rows.one(PROMPTS), [rows.picture() for _ in range(2)]
            members = {
                "label_0.txt": first.encode(),
                "label_1.txt": second.encode(),
                "original_prompt.txt": prompt.encode(),
            }
            members |= {f"jpg_{side}.jpg": data for side, (data, _) in enumerate(pictures) if data is not None}
            if not rows.clean and rows.draw.random() < 0.05:
                members["original_prompt.txt"], said = b"\xff", BAD
            for name, data in sorted(members.items()):
                info = tarfile.TarInfo(f"{row:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            rows.expect(f"{path.name}:{row:06d}", said, told, *(good for _, good in pictures))
    return path


def votes(folder: Path, rows: Rows, count: int) -> Path:
    """Rapidata's columns."""
    kinds = [((0.75, 0.25), USED), ((0.0, 1.0), USED), ((0.5, 0.5), TIE)] + [
        (pair, BAD) for pair in ((float("nan"), 1.0), (None, 1.0), (-1.0, 2.0), (0.0, 0.0), (float("inf"), 1.0))
    ]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures: tuple[list, list] = ([], [])
    said: tuple[list, list] = ([], [])
    for row in range(count):
        pair, told = rows.one(kinds)
        goods = []
        for side in (0, 1):
            data, good = rows.picture()
            pictures[side].append({"bytes": data, "path": "elsewhere.png"})
            said[side].append(pair[side])
            goods.append(good)
        rows.expect(f"votes.parquet:{row}", told, *goods)
    columns = {f"image{side + 1}": pa.array(pictures[side], struct) for side in (0, 1)}
    columns |= {f"weighted_results_image{side + 1}_preference": pa.array(said[side], pa.float64()) for side in (0, 1)}
    path = folder / "votes.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * count, **columns}), path, row_group_size=256)
    return path
