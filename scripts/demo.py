"""The first five minutes: align the embedded model with its preference pairs, then measure it on unseen prompts.

    python scripts/demo.py             # or `make demo`
    python scripts/demo.py --seed 1    # another run of the same experiment

It runs the same two commands that a user would type: `train dpo --preset tiny` and `evaluate`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=None, help="default: runs/demo-SEED")
    parser.add_argument("--num_prompts", type=int, default=500, help="held-out prompts to measure on")
    args = parser.parse_args(argv)
    run = args.output_dir or Path("runs") / f"demo-{args.seed}"

    from diffusion_align.cli import main as command

    start = time.monotonic()
    train = f"train dpo --preset tiny --seed {args.seed} --overwrite_output_dir --output_dir".split()
    evaluate = f"evaluate --steps 10 --guidance 1 --num_prompts {args.num_prompts}".split()
    for verb in ([*train, str(run)], [*evaluate, str(run)]):
        print("$ diffusion-align", " ".join(verb), flush=True)
        code = command(verb)
        if code:
            raise SystemExit(code)
    report = json.loads((run / "report.json").read_text())
    print(f"\n{time.monotonic() - start:.0f} s in all. Look at {run / 'report.html'} and {run / 'pairs.png'}.")
    return report


if __name__ == "__main__":
    main()
