"""An exponential moving average (EMA) of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass
class Ema:
    """The averaged weights by name, and how often they were updated; a checkpoint needs both.

    Without the counter a resumed run would repeat the warm-up and overwrite the average with the raw weights.
    """

    decay: float
    average: dict[str, Tensor]
    updates: int = 0

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Parameter]) -> None:
        """Move towards the weights. In the first steps the decay is (1 + n) / (10 + n), to forget the start quickly."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.average.items():
            average.lerp_(parameters[name].detach().to(average), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, parameters: Mapping[str, Parameter]) -> Iterator[None]:
        """In this context the parameters hold the average, to sample or export; afterwards their own values again."""
        own = {name: parameters[name].detach().clone() for name in self.average}
        try:
            _copy(self.average, parameters)
            yield
        finally:
            _copy(own, parameters)


def start_ema(parameters: Mapping[str, Parameter], decay: float) -> Ema:
    """An average that starts at the current weights, in float32."""
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of an average must lie in [0, 1), got {decay}")
    return Ema(decay, {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()})


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, Parameter]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
