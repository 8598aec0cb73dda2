"""The same as `finetune.py ddpo`."""

import sys
from functools import partial

import finetune

main = partial(finetune.main, verb=("train", "ddpo"))

if __name__ == "__main__":
    sys.exit(main())
