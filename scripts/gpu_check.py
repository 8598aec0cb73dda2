"""Checks that need a GPU, the most valuable first, within a time limit; or all of them at tiny size.

    python scripts/gpu_check.py --minutes 9            # or `make gpu`; the same command again continues
    python scripts/gpu_check.py --smoke                # on a CPU with tiny models, to test the checks
    python scripts/gpu_check.py --only sd15-dpo --device cpu --resolution 256 --batch 1

Writes OUT/gpu_check.json and OUT/gpu_check.md after each check: versions and card, the peak of a matrix product,
CPU/GPU parity and start checks of each method and precision on the embedded model, resumed runs, memory that runs out,
and a measured step of each method on the architectures of Stable Diffusion 1.5 and SDXL with random weights. Exit
code 1: a check failed, see the table.

It needs no network. A machine with torch only also needs the wheels of torchvision, diffusers, transformers,
accelerate, peft, open_clip_torch, datasets and psutil, and their dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gpu.checks import Facts, Setting, about, matrix_peak, out_of_memory, parity, resume, step
from gpu.commands import METHODS, Scale

Check = Callable[[], Facts]
ONLINE = METHODS[2:]


def checks(s: Setting, rate: Callable[[], float]) -> dict[str, tuple[float, Check]]:
    """{name: (most minutes on a GPU, check)}, the most valuable first."""

    def steps(family: str, *methods: str) -> dict[str, tuple[float, Check]]:
        minutes = 1.0 if family == "sd15" else 2.0
        return {f"{family}-{m}": (minutes, lambda m=m: step(s, family, m, rate())) for m in methods}

    return {
        "versions": (0.1, partial(about, s)),
        "peak": (0.2, partial(matrix_peak, s)),
        **{f"parity-{method}": (0.7, partial(parity, s, method)) for method in METHODS},
        **steps("sd15", "dpo"),
        **steps("sdxl", "dpo"),
        **{f"resume-{method}": (0.5, partial(resume, s, method)) for method in ("dpo", "d3po")},
        **{f"memory-{method}": (0.5, partial(out_of_memory, s, method)) for method in ("dpo", "prdp")},
        **steps("sd15", *ONLINE, "rankdpo"),
        **steps("sdxl", *ONLINE, "rankdpo"),
        **steps("sd15", "dpo-full"),
        **steps("sdxl", "dpo-full"),
    }


def table(done: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| check | result | s a step | peak GB | TFLOP a step | of peak |", "|---|---|---|---|---|---|"]
    for name, facts in done.items():
        numbers = [facts.get(key) for key in ("seconds", "peak_gb", "tflop", "share")]
        forms = ("{:.3g}", "{:.2f}", "{:.3g}", "{:.1%}")
        shown = ["" if value is None else form.format(value) for value, form in zip(numbers, forms, strict=True)]
        lines.append(f"| {name} | {facts.get('error') or facts['result']} | {' | '.join(shown)} |")
    about = done.get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    return "\n".join([*lines, "", f"{about.get('result', '')}; {named}", ""])


def setting(args: argparse.Namespace, work: Path) -> Setting:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sides = {"sd15": args.resolution or 512, "sdxl": args.resolution or 1024}
    batches = {"sd15": args.batch or 8, "sdxl": args.batch or 4}
    models = {family: (family, sides[family], batches[family]) for family in sides}
    if args.smoke:
        models = {"sd15": ("small-sd15", 64, 4), "sdxl": ("small-sdxl", 64, 4)}
    half = ("bf16", "fp16") if device.startswith("cuda") else ("bf16",)  # fp16 training is for GPUs
    return Setting(device, work, args.smoke, models, half, Scale(2, 1, 3) if args.smoke else Scale())


def main(argv: list[str] | None = None) -> dict[str, Facts]:
    """Run the checks that are not done yet, and return all results by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="start no check that may end later")
    parser.add_argument("--smoke", action="store_true", help="tiny models, so that it runs on a CPU in minutes")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="run only these, even if done before")
    parser.add_argument("--resolution", type=int, help="of the large models (default: 512 and 1024)")
    parser.add_argument("--batch", type=int, help="of the large models: pairs or pictures in the network at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    args = parser.parse_args(argv)
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "gpu_check.json"
    done: dict[str, Facts] = json.loads(results.read_text()) if results.exists() else {}
    names = checks(setting(args, args.out), float)
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"no check is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        s = setting(args, Path(work))
        precision = s.half[0] if s.cuda else "no"
        every = checks(s, lambda: done.get("peak", {}).get("rates", {}).get(precision, 0.0))
        for name, (minutes, check) in every.items():
            if args.only is None and name in done and "error" not in done[name]:
                continue
            if args.only is not None and name not in args.only:
                continue
            left = args.minutes - (time.monotonic() - begun) / 60
            if args.only is None and left < (0 if args.smoke else minutes):
                print(f"{name}: no time left; the same command continues here", flush=True)
                break
            started = time.monotonic()
            try:
                done[name] = check()
            except Exception as error:  # the next checks may still be useful
                done[name] = {"error": " ".join(f"FAILED: {type(error).__name__}: {error}".split())[:500]}
            done[name]["took_s"] = took = time.monotonic() - started
            print(f"{name}: {done[name].get('error') or done[name]['result']} ({took:.0f} s)", flush=True)
            results.write_text(json.dumps(done, indent=1) + "\n")
            (args.out / "gpu_check.md").write_text(table(done))
    print(f"{len(done)} of {len(every)} checks done: {args.out / 'gpu_check.md'}")
    return done


if __name__ == "__main__":
    raise SystemExit(any("error" in facts for facts in main().values()))
