"""The same as `finetune.py spo`."""

import sys
from functools import partial

import finetune

main = partial(finetune.main, verb=("train", "spo"))

if __name__ == "__main__":
    sys.exit(main())
