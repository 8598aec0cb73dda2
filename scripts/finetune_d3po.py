"""`diffusion-align train d3po`, for `accelerate launch scripts/finetune_d3po.py --flags`."""

import sys
from collections.abc import Sequence

from diffusion_align.cli import main as command


def main(argv: Sequence[str] | None = None) -> int:
    return command(["train", "d3po", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
