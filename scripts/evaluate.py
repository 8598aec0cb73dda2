"""A run against its base, the same as `diffusion-align evaluate`."""

import sys
from collections.abc import Sequence

from diffusion_align.cli import main as command


def main(argv: Sequence[str] | None = None) -> int:
    return command(["evaluate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
