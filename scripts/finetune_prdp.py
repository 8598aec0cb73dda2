"""The same as `finetune.py prdp`."""

import sys
from functools import partial

import finetune

main = partial(finetune.main, verb=("train", "prdp"))

if __name__ == "__main__":
    sys.exit(main())
