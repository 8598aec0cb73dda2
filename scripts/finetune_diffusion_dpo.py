"""The same as `finetune.py dpo`."""

import sys
from functools import partial

import finetune

main = partial(finetune.main, verb=("train", "dpo"))

if __name__ == "__main__":
    sys.exit(main())
