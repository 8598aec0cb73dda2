"""Diffusion-DPO, the same as `diffusion-align train dpo`: for `accelerate launch scripts/finetune_diffusion_dpo.py
--flags`."""

import sys
from collections.abc import Sequence

from diffusion_align.cli import main as command


def main(argv: Sequence[str] | None = None) -> int:
    return command(["train", "dpo", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
