"""`diffusion-align train METHOD`, for what starts a file: `accelerate launch scripts/finetune.py METHOD --flags`."""

import sys
from collections.abc import Sequence

from diffusion_align.cli import main as command


def main(argv: Sequence[str] | None = None, verb: tuple[str, ...] = ("train",)) -> int:
    return command([*verb, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
