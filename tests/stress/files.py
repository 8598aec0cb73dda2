"""Reads untrusted files: damaged tables, decompression bombs, archives, and files that carry programs.

    python tests/stress/files.py [--places 200] [--only parquet bombs corpus archives]

- tables: a parquet file of pairs, with and without page checksums, is truncated or has a bit flipped at many places;
  each row is unchanged or reported, or the file is refused in one line that names it
- bombs: pictures that are small files but expensive to decode are refused within 50 ms and 20 MiB
- programs: files that carry code are given to the commands that read such files; no code runs, and each file is
  refused in one line or does no harm
- archives and metadata: tests/data/test_hostile.py
"""

import argparse
import io
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `stress` and of the tests' helpers

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.images import ImageError, decode_image
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.data.rows.recognise import recognise
from stress.hostile import (
    cases,
    clips,  # noqa: F401  (each of these enters its cases)
    inputs,  # noqa: F401
    models,  # noqa: F401
    runs,  # noqa: F401
    weights,  # noqa: F401
)
from stress.hostile.bombs import BOMBS, bomb, bomb_fault

CHECKS = ("parquet", "bombs", "corpus", "archives")
ROWS, GROUP = 60, 20
CORPUS_MIB = 400.0  # enough for the commands that go on to load the embedded model


def pairs(path: Path, checksums: bool) -> bytes:
    """A parquet file of pairs in three row groups; no two pictures are alike."""

    def shade(row: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (row, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    labels = [float(row % 2) for row in range(ROWS)]
    columns = {"caption": [f"red circle number {row}" for row in range(ROWS)], "label_0": labels}
    columns |= {"jpg_0": [shade(row) for row in range(ROWS)], "jpg_1": [shade(row + 100) for row in range(ROWS)]}
    columns |= {"label_1": [1 - label for label in labels]}
    pq.write_table(pa.table(columns), path, row_group_size=GROUP, write_page_checksum=checksums)
    return path.read_bytes()


def read_all(path: Path) -> list[tuple]:
    """Every row with its pixels, or only the reason if it is reported."""
    found = []
    for row in read_rows(recognise(path)):
        if isinstance(row, BadRow):
            found.append((row.reason,))
            continue
        try:
            found.append((row.prompt, row.relevance, [decode_image(read_bytes(p)).tobytes() for p in row.pictures]))
        except (DataError, ImageError) as error:
            found.append((str(error),))
    return found


def damaged_tables(places: int, checksums: bool, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Outcomes of damage at many places, half of it truncation; and the outcomes that are wrong."""
    draw, outcomes, wrong = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pairs.parquet"
        intact = pairs(path, checksums)
        expected = read_all(path)
        for number in range(places):
            data, place = bytearray(intact), draw.randrange(len(intact))
            if number % 2:
                del data[place:]
            else:
                data[place] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            outcome = _outcome(path, expected)
            outcomes[outcome] += 1
            if outcome not in ("as before", "refused", "rows reported"):
                wrong.append(f"{'cut' if number % 2 else 'bit'} at byte {place}: {outcome}")
    return outcomes, wrong


def _outcome(path: Path, expected: list[tuple]) -> str:
    try:
        found = read_all(path)
    except DataError as error:
        return "refused" if path.name in str(error) and str(error).isprintable() else f"unclear: {error}"
    except Exception as error:  # any other exception is a bug
        return f"{type(error).__name__}: {error}"
    if found == expected:
        return "as before"
    if len(found) != len(expected):
        return "rows lost"
    changed = [row for row, before in zip(found, expected, strict=True) if row != before and len(row) > 1]
    return "changed silently" if changed else "rows reported"


def corpus(names: list[str]) -> list[cases.Outcome]:
    """Run every case in its own folder and process."""
    cases.import_all()
    if not cases.traps_work():
        raise RuntimeError("the traps do not work here, so the result would mean nothing")
    with tempfile.TemporaryDirectory() as home:
        return [cases.run_case(name, Path(home) / str(number)) for number, name in enumerate(names)]


def archives() -> tuple[int, int]:
    """How many of the hostile archives and metadata passed their tests, and how many did not."""
    tests = Path(__file__).resolve().parents[1] / "data" / "test_hostile.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tests.parents[2]).stdout
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", said)}
    return counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=200, help="places at which a table is damaged")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS)
    args = parser.parse_args(argv)
    checks = {"parquet": lambda: report_tables(args.places), "bombs": report_bombs, "corpus": report_corpus,
              "archives": report_archives}  # fmt: skip
    return int(sum(checks[name]() for name in args.only) > 0)


def report_tables(places: int) -> int:
    """Without checksums a change inside a text cannot be noticed, so it is counted but no failure."""
    failed = 0
    for checksums in (True, False):
        outcomes, wrong = damaged_tables(places, checksums)
        said = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
        print(f"parquet with{'' if checksums else 'out'} checksums, {places} places: {said}")
        silent = [line for line in wrong if not checksums and line.endswith("changed silently")]
        failed += len(wrong) - len(silent)
        for line in wrong:
            print(f"       {line}")
    return failed


def report_bombs() -> int:
    answers = {name: bomb(name) for name in BOMBS}
    faults = {name: fault for name, answer in answers.items() if (fault := bomb_fault(*answer)) is not None}
    slowest, largest = (max(answer[place] for answer in answers.values()) for place in (1, 2))
    print(f"{len(answers)} bombs: {len(answers) - len(faults)} refused; at most {slowest:.1f} ms and {largest:.1f} MiB")
    for name, fault in faults.items():
        print(f"       {name}: {fault}")
    return len(faults)


def report_corpus() -> int:
    outcomes = corpus(list(cases.CASES))
    ran, refused = sum(outcome.ran for outcome in outcomes), sum(bool(outcome.code) for outcome in outcomes)
    faults = {outcome.name: fault for outcome in outcomes if (fault := outcome.fault(CORPUS_MIB)) is not None}
    harmless = len(outcomes) - refused
    print(
        f"{len(outcomes)} hostile files: {ran} ran, {refused} refused, {harmless} without effect; {len(faults)} faults"
    )
    for name, fault in faults.items():
        print(f"       {name}: {fault}")
    return len(faults)


def report_archives() -> int:
    passed, failed = archives()
    print(f"archives and metadata: {passed} passed, {failed} failed")
    return failed + (passed < 80)


if __name__ == "__main__":
    sys.exit(main())
