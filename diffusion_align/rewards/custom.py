"""A reward of your own: a function in a Python file, `python:FILE.py:FUNCTION`.

    def darkness(images, prompts):            # images [B,3,H,W] float in [0, 1], B prompts
        return 1 - images.mean((1, 2, 3))     # a tensor [B], or a list of B numbers

The file is run as it is, with the rights of whoever starts the command.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .answer import RewardError, one_each
from .pictures import Reward


def python_reward(where: str) -> Reward:
    """The function of `FILE.py:FUNCTION` as a reward; its answer must be one number for each picture.

    Raises:
        FileNotFoundError, ValueError: no such file, or nothing callable of that name in it.
        RewardError: the file raises when it is run; later, of a reward that raises or answers wrongly.
    """
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"reward python:{where}: no file {file}")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit would end the command as if its work were done
        raise RewardError(f"reward python:{where}: {_said(error)}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward python:{where}: no function {name} in {file}")

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        try:
            values: Any = function(images, prompts)
            values = values if isinstance(values, Tensor) else torch.tensor([float(value) for value in values])
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward python:{where}: {_said(error)}") from error
        return one_each(values, len(prompts), f"reward python:{where}").to(images.device)

    return reward


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
