"""A reward of your own: a function in a Python file, `python:FILE.py:FUNCTION`.

    def darkness(images, prompts):            # images [B,3,H,W] float in [0, 1], B prompts
        return 1 - images.mean((1, 2, 3))     # a tensor [B], or a list of B numbers

The file runs with the rights of whoever starts the command.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .interface import Reward, RewardError, one_each


def python_reward(where: str) -> Reward:
    """The function of `FILE.py:FUNCTION` as a reward; it must return one number for each picture.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no such function.
        RewardError: the file raises when it runs; later, the function raises or returns something else.
    """
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"reward python:{where}: no file {file}")
    # A module name of its own: neither another reward's file nor a module that this file imports can replace it.
    own = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(f"reward_{own}", path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of the file look themselves up there
    try:
        with _as_reward_error(where):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward python:{where}: no function {name} in {file}")

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        with _as_reward_error(where):
            values: Any = function(images, prompts)
            values = values if isinstance(values, Tensor) else torch.tensor([float(value) for value in values])
        return one_each(values, len(prompts), f"reward python:{where}").to(images.device)

    return reward


@contextlib.contextmanager
def _as_reward_error(where: str) -> Iterator[None]:
    """Turn whatever the file raises into a RewardError, SystemExit too: sys.exit() would end the command as a success.

    A KeyboardInterrupt in the main thread is the user's Ctrl-C and passes. In another thread the file itself raised it.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise RewardError(f"reward python:{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
