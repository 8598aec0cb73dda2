"""RankDPO, the same as `diffusion-align train rankdpo`: for `accelerate launch scripts/finetune_rankdpo.py --flags`."""

import sys
from collections.abc import Sequence

from diffusion_align.cli import main as command


def main(argv: Sequence[str] | None = None) -> int:
    return command(["train", "rankdpo", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
