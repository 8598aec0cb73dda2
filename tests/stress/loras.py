"""Every fault of a LoRA file, in every format, for two families of models; exits with 1 if one goes unnoticed.

    python tests/stress/loras.py [--seeds 1] [--baseline]

A file must be refused by the key at fault, with the network unchanged, or be loaded as it was meant, with a message if
anything was repaired. --baseline gives the same files to diffusers' own loader.
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
from stress.lora.families import Family, families, verdict
from stress.lora.faults import ALPHA, DAMAGES, FORMATS, RANK, damaged, in_half, read, without_alpha
from stress.lora.loaders import VERBS, by_command, by_diffusers, pictures_of_64, resumed

Case = tuple[str, str, str]


def cases(
    family: Family, other: Family, folder: Path, seed: int, only: Collection[str] = tuple(FORMATS)
) -> Iterator[tuple[Case, set[str]]]:
    """((format, fault, verdict), correct verdicts) of a family's files."""
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
        # If no key is left, the error must name the file.
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
    if name == "peft":  # whose own loader needs the configuration, so nobody knows the strength without it
        yield judged("alpha missing", path, "refused")
    else:
        yield judged("alpha missing", path, "repaired", family.answer(family.tuned(seed, float(RANK), targets)))
    path = fresh("empty file")
    path.write_bytes(b"")
    yield judged("empty file", path, "refused")
    if name != "kohya for SDXL":
        path = writer(other.tuned(seed, alpha, targets).unet, folder / "other")
        yield judged(f"made for {other.name}", path, "refused")
        yield judged(f"made for {other.name}, partly", path, "refused", allow_partial=True)


def _rounded(family: Family, tuned: TextToImage) -> torch.Tensor:
    """The output that a file in half precision stands for: that of the rounded weights."""
    model = copy.copy(tuned)
    model.unet = copy.deepcopy(tuned.unet)
    for key, parameter in model.unet.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(parameter.data.half().float())
    return family.answer(model)


def files(folder: Path, seeds: int, say: Callable[[str], None] = print) -> int:
    """All formats, faults and families; returns how many went wrong."""
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


def other_loaders(folder: Path, say: Callable[[str], None] = print) -> int:
    """The same faults in run folders and checkpoints; returns how many went wrong."""
    bad, model = 0, pictures_of_64(families(folder)[0].folder)
    ways = {f"{verb} RUN": by_command(verb, model, folder) for verb in VERBS}
    for way, found in {**ways, "resuming": resumed(model, folder / "resumed")}.items():
        begun, right = time.monotonic(), 0
        for what, well in found:
            right += well
            if not well:
                bad += 1
                say(f"WRONG {way}, {what}")
        say(f"{way}: {right} refused or repaired, with a message; {time.monotonic() - begun:.0f} s")
    return bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="LoRAs of each kind")
    parser.add_argument("--baseline", action="store_true", help="also what diffusers' own loader makes of them")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        bad = files(Path(name) / "files", args.seeds) + other_loaders(Path(name) / "others")
        if args.baseline:
            model = families(Path(name) / "baseline")[0].folder
            print(f"diffusers, files that cannot be right: {dict(by_diffusers(model, Path(name) / 'theirs'))}")
    print(f"{bad} went wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
