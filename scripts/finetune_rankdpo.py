"""The same as `finetune.py rankdpo`."""

import sys
from functools import partial

import finetune

main = partial(finetune.main, verb=("train", "rankdpo"))

if __name__ == "__main__":
    sys.exit(main())
