"""Every fault of a LoRA file, in every format, for both families of models; returns nonzero if one went unnoticed.

    python tests/stress/loras.py [--seeds 1] [--baseline]

A file may be refused, by its key and with the network as it was, or be loaded as what it was meant to be, with a
message wherever something had to be repaired. --baseline puts the same files into diffusers' own loader.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `stress` and of the tests' helpers

import torch

from diffusion_align.models import TextToImage
from stress.lora.doors import VERBS, by_diffusers, pictures_of_64, resumed, through
from stress.lora.families import Family, families, verdict
from stress.lora.faults import ALPHA, DAMAGES, FORMATS, RANK, damaged, in_half, read, without_alpha

Case = tuple[str, str, str]


def cases(
    family: Family, other: Family, folder: Path, seed: int, only: Collection[str] = tuple(FORMATS)
) -> Iterator[tuple[Case, set[str]]]:
    """((format, fault, verdict), the verdicts that are right) of a family's files."""
    for name in only:
        if name != "kohya for SDXL" or family.name == "SDXL":
            yield from of_format(name, family, other, folder / family.name / name, seed)


def of_format(name: str, family: Family, other: Family, folder: Path, seed: int) -> Iterator[tuple[Case, set[str]]]:
    writer, tells_alpha, renamed, targets = FORMATS[name]
    alpha = ALPHA if tells_alpha else float(RANK)
    tuned = family.tuned(seed, alpha, targets)
    truth = family.answer(tuned)
    layers = {layer for layer, _ in family.model.unet.named_modules() if "." in layer}
    layers |= set(read(writer(tuned.unet, folder / "names"))[0])

    def judged(
        what: str, path: Path, right: str, due: torch.Tensor | None = None, **options: Any
    ) -> tuple[Case, set[str]]:
        # Where no key is left, the file is to be named.
        unread = what in ("all keys missing", "empty file")
        names = {str(path)} if unread else layers | set(read(path)[0])
        return (name, what, verdict(family, path, due, names, **options)), {right}

    def fresh(what: str) -> Path:
        return writer(tuned.unet, folder / what)

    yield judged("none", fresh("whole"), "loaded" if tells_alpha and not renamed else "repaired", truth)
    for what, damage in DAMAGES.items():
        path = fresh(what)
        damaged(path, damage)
        yield judged(what, path, "refused")
        if what.startswith("text encoder"):
            yield judged(f"{what}, partly", path, "repaired", truth, allow_partial=True)
    path = fresh("float16")
    in_half(path)
    yield judged("float16", path, "repaired", _rounded(family, tuned))
    path = fresh("alpha missing")
    without_alpha(path)
    yield judged("alpha missing", path, "repaired", family.answer(family.tuned(seed, float(RANK), targets)))
    path = fresh("empty file")
    path.write_bytes(b"")
    yield judged("empty file", path, "refused")
    if name != "kohya for SDXL":
        path = writer(other.tuned(seed, alpha, targets).unet, folder / "other")
        yield judged(f"made for {other.name}", path, "refused")
        yield judged(f"made for {other.name}, partly", path, "refused", allow_partial=True)


def _rounded(family: Family, tuned: TextToImage) -> torch.Tensor:
    """What is meant by a file in half precision: the numbers as they were rounded."""
    model = copy.copy(tuned)
    model.unet = copy.deepcopy(tuned.unet)
    for key, parameter in model.unet.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(parameter.data.half().float())
    return family.answer(model)


def files(folder: Path, seeds: int, say: Callable[[str], None] = print) -> int:
    """All formats, faults and families; how many went wrong."""
    bad, both = 0, families(folder)
    for seed in range(seeds):
        for family, other in (both, both[::-1]):
            found: Counter[str] = Counter()
            begun = time.monotonic()
            for (name, what, got), right in cases(family, other, folder / str(seed), seed):
                found[got] += 1
                if got not in right:
                    bad += 1
                    say(f"WRONG {family.name} {name}, {what}: {got}, not {' or '.join(right)}")
            counts = ", ".join(f"{count} {got}" for got, count in sorted(found.items()))
            say(f"{family.name}, {found.total()} files: {counts}; {time.monotonic() - begun:.0f} s")
    return bad


def doors(folder: Path, say: Callable[[str], None] = print) -> int:
    """Run folders and checkpoints with the same faults; how many went wrong."""
    bad, model = 0, pictures_of_64(families(folder)[0].folder)
    ways = {f"{verb} RUN": through(verb, model, folder) for verb in VERBS}
    for way, found in {**ways, "resuming": resumed(model, folder / "resumed")}.items():
        begun, right = time.monotonic(), 0
        for what, well in found:
            right += well
            if not well:
                bad += 1
                say(f"WRONG {way}, {what}")
        say(f"{way}: {right} refused or repaired, and said; {time.monotonic() - begun:.0f} s")
    return bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="LoRAs of each kind")
    parser.add_argument("--baseline", action="store_true", help="also what diffusers' own loader makes of them")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        bad = files(Path(name) / "files", args.seeds) + doors(Path(name) / "doors")
        if args.baseline:
            model = families(Path(name) / "baseline")[0].folder
            print(f"diffusers, files that cannot be right: {dict(by_diffusers(model, Path(name) / 'theirs'))}")
    print(f"{bad} went wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
