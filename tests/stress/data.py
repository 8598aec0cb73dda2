"""Feeds the data readers rows that are broken in every way we could think of, and checks what became of each.

    python tests/stress/data.py [--rows 10000]

Five layouts; 30 kinds of pictures (intact, truncated, garbled, of odd modes and sizes, missing); wrong labels, prompts
and lines. The expected outcome of each row is known: used, a tie, reported, or, if random bytes were changed, used or
reported. The rows go through `data check` and through the cache of encodings, as in training. Printed are the outcomes,
the rows that differ from the expectation, seconds, and peak memory next to that of as many clean rows, each in a
separate process.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `stress` and of the tests' helpers

import torch

from diffusion_align.commands.data.check import checked_rows
from diffusion_align.data import EncodingSettings, build_cache, read_rankings
from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.pairs_and_rankings import is_tie
from diffusion_align.data.rows.recognise import recognise
from stress.dataset.rows import BAD, TIE, USED, Rows, archive, json_lines, parquet, votes


class MeanColour:
    """A cheap encoder: a picture's latent is its mean colour."""

    empty_text = torch.zeros(1, 1, 2)

    def fingerprint(self) -> str:
        return "mean colour"

    def latent_shape(self, resolution: int | str | None = None) -> tuple[int, int, int]:
        return (3, 1, 1)

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 1, 2)

    def encode_images(self, images: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return images.mean((2, 3), keepdim=True)


def run(rows_wanted: int, clean: bool, seed: int = 0) -> dict[str, Any]:
    """Make rows, read them and compare: counts by outcome, unexpected outcomes, seconds and MiB of memory."""
    found: Counter[str] = Counter()
    astray: list[str] = []
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        each = rows_wanted // 5
        makers = (
            (parquet, ()),
            (votes, ()),
            (archive, ()),
            (json_lines, (False,)),
            (json_lines, (True,)),
        )
        for number, (make, more) in enumerate(makers):
            rows = Rows(clean, seed + number)
            home = folder / str(number)
            if make is not json_lines:
                home.mkdir()
            path = make(home, rows, each, *more)  # pyright: ignore[reportCallIssue]
            outcomes: dict[str, str] = {}
            for row, _ in checked_rows(recognise(path)):
                where = row.row if isinstance(row, BadRow) else row.id
                astray += [f"{where}: twice"] if where in outcomes else []
                outcomes[where] = BAD if isinstance(row, BadRow) else TIE if is_tie(row) else USED
            for row in rows.expected | outcomes:
                said, may = outcomes.get(row, "lost"), rows.expected.get(row, set())
                found[said] += 1
                astray += [f"{row}: {said}, not {' or '.join(sorted(may)) or 'there'}"] if said not in may else []
            astray += train_on(path, outcomes, home)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows": sum(found.values()),
        "found": dict(found),
        "astray": astray,
        "seconds": time.perf_counter() - began,
        "peak_mib": after / 1024,
        "grown_mib": (after - before) / 1024,
    }


def train_on(path: Path, outcomes: dict[str, str], home: Path) -> list[str]:
    """Rows that training would treat otherwise than `data check` did."""
    rankings, counts = read_rankings(path, max_bad_fraction=1)
    cache = build_cache(
        MeanColour(),
        rankings,
        home / "cache",
        EncodingSettings(16),
        max_bad_fraction=1,
        known_bad=counts.bad_rows,
        progress=False,
    )
    kept = {rankings[place].id for place in cache.kept}
    listed = {json.loads(line)["row"] for line in (cache.folder / "bad_rows.jsonl").read_text().splitlines()}
    # Training drops a tie before it reads the pictures, so it does not report a broken one.
    wrong = kept ^ {row for row, outcome in outcomes.items() if outcome == USED}
    lost = {row for row, outcome in outcomes.items() if outcome == BAD} - listed
    ties = len(lost) + sum(outcome == TIE for outcome in outcomes.values()) - counts.ties
    return [f"{row}: check and training differ" for row in wrong] + ([f"{path.name}: {ties} rows lost"] if ties else [])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", choices=("clean", "broken"), help="one run in this process, as JSON")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(run(args.rows, args.one == "clean", args.seed)))
        return 0
    reports = {}
    for kind in ("clean", "broken"):
        command = [sys.executable, __file__, "--rows", str(args.rows), "--seed", str(args.seed), "--one", kind]
        reports[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        one = reports[kind]
        said = ", ".join(f"{count} {what}" for what, count in sorted(one["found"].items()))
        print(
            f"{kind:7}{one['rows']} rows: {said}; {len(one['astray'])} not as expected; {one['seconds']:.1f} s; "
            f"peak {one['peak_mib']:.0f} MiB, {one['grown_mib']:.0f} of them for the rows"
        )
        for row in one["astray"][:20]:
            print(f"       {row}")
    ratio = reports["broken"]["peak_mib"] / reports["clean"]["peak_mib"]
    grown = reports["broken"]["grown_mib"] / reports["clean"]["grown_mib"]
    print(f"peak of memory, broken over clean: {ratio:.2f}; of what the rows add: {grown:.2f}")
    return int(bool(reports["broken"]["astray"] or reports["clean"]["astray"]) or ratio > 1.5)


if __name__ == "__main__":
    sys.exit(main())
