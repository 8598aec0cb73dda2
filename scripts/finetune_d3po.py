"""The same as `finetune.py d3po`."""

import sys
from functools import partial

import finetune

main = partial(finetune.main, verb=("train", "d3po"))

if __name__ == "__main__":
    sys.exit(main())
