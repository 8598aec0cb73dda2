"""Kills, errors, full disks and damaged files, tried on checkpoints; exits with 1 if any is not handled.

    python tests/stress/checkpoints.py [--kills 200] [--parameters 10000000] [--baseline]

Each line counts the cases and those that went wrong. --baseline also kills accelerate's save_state, to compare.
Full disks are tried only if the user may mount a small one.
"""

import argparse
import errno
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `stress` and of the tests' helpers

from stress.checkpoint.damage import cuts, flips, refused, silently_loaded, two_checkpoints
from stress.checkpoint.disks import full_disks, limited_files
from stress.checkpoint.faults import CODES, WAYS, deaths, errors
from stress.checkpoint.kills import accelerate_kills, kills


def say(what: str, found: Counter[str], begun: float) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in found.items())
    print(f"{what}: {counts}; {time.monotonic() - begun:.0f} s", flush=True)


def kill(folder: Path, count: int, parameters: int) -> int:
    begun = time.monotonic()
    found = kills(folder, count, parameters)
    say(f"SIGKILL while saving {parameters:,} weights and their moments", found, begun)
    return sum(found[name] for name in ("unloadable", "lost", "offered", "left"))


def fault(folder: Path) -> int:
    """Kill a save, or make it fail, at every file operation."""
    bad = 0
    for way in WAYS:
        begun = time.monotonic()
        found = deaths(folder / f"dead {way}", way)
        say(f"death before each file operation ({way})", found, begun)
        bad += found["broken"] + found["offered"] + found["left"]
        for lasting in (False, True):
            begun, total = time.monotonic(), Counter()
            for code in CODES:
                total.update(errors(folder / f"{way} {code} {lasting}", way, code, lasting))
            names = ", ".join(errno.errorcode[code] for code in CODES)
            say(f"{names} at each {'and all after it ' if lasting else ''}({way})", total, begun)
            bad += total["wrong"] + total["broken"] + total["offered"] + total["left"]
    return bad


def fill(folder: Path, points: int) -> int:
    begun = time.monotonic()
    found = limited_files(folder / "limited", points, 1_000_000)
    say("files that may not grow beyond a limit", found, begun)
    bad = found["wrong"] + found["broken"]
    for checked in (False, True):
        begun = time.monotonic()
        disk = full_disks(folder / f"disk {checked}", points, 1_000_000, checked)
        if disk is None:
            print("full disks: left out, because this user may not mount one")
            continue
        say(f"full disks, room {'looked at' if checked else 'not looked at'} before", disk, begun)
        bad += disk["wrong"] + disk["broken"]
    return bad


def damage(folder: Path, bits: int, lengths: int) -> int:
    """Flip bits in every file of a checkpoint, and truncate it."""
    bad, path = 0, two_checkpoints(folder, 100_000)
    for file in sorted(path.iterdir()):
        large = file.suffix == ".safetensors"
        for what, damages in (
            (f"{bits} flipped bits", lambda data: flips(data, bits)),
            ("cuts", lambda data, large=large: cuts(data, lengths if large else None)),
        ):
            begun, data = time.monotonic(), file.read_bytes()
            found = refused(file, damages(data))
            say(f"{what} of {file.name}, {len(data)} bytes", found, begun)
            bad += found["damages"] - found["refused"]
    data = (path / "model.safetensors").read_bytes()
    say("the same bits and safetensors alone", silently_loaded(flips(data, bits)), time.monotonic())
    # A small file of tensors, truncated to every length.
    file = two_checkpoints(folder / "small", 100) / "model.safetensors"
    begun = time.monotonic()
    found = refused(file, cuts(file.read_bytes()))
    say(f"all cuts of {file.name}, {file.stat().st_size} bytes", found, begun)
    return bad + found["damages"] - found["refused"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--parameters", type=int, default=10_000_000, help="weights of the model that is killed")
    parser.add_argument("--points", type=int, default=24, help="fill levels of a disk")
    parser.add_argument("--bits", type=int, default=500, help="flipped in each file, one at a time")
    parser.add_argument("--lengths", type=int, default=582, help="of a truncated large file; small ones get all")
    parser.add_argument("--baseline", action="store_true", help="also 60 kills of accelerate's save_state")
    args = parser.parse_args(argv)
    logging.getLogger("diffusion_align").addHandler(logging.NullHandler())  # keep its warnings off stderr
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bad = fault(folder) + fill(folder, args.points) + damage(folder / "damage", args.bits, args.lengths)
        bad += kill(folder / "kills", args.kills, args.parameters)
        if args.baseline:
            begun = time.monotonic()
            found = accelerate_kills(folder / "accelerate", 60, args.parameters)
            say("accelerate's save_state under the same kills", found, begun)
    print(f"{bad} went wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
