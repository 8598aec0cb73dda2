"""What a loss may ask of a batch of pairs, and the losses that ask for more than the margin.

Diffusion-DPO and its siblings need one number of a pair, the margin. Others need the errors themselves or the
network's outputs; here each becomes a function of the same `PairOutputs`, so that one loop trains them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusion_align.objectives import diffusion_dpo_margin, dspo, kto, mapo, scale_gradient, sdpo_scale
from diffusion_align.tensors import sum_dims, widen


@dataclass(frozen=True, eq=False)
class PairOutputs:
    """The networks' outputs on b noised pairs and what they were to be, [2b,...] each, winners first."""

    policy: Tensor
    reference: Tensor
    target: Tensor

    @property
    def dims(self) -> int:
        return self.target[0].numel()

    @cached_property
    def errors(self) -> Tensor:
        """The policy's squared errors, summed over dims in float32 at least, [2,b]."""
        return sum_dims((widen(self.policy) - widen(self.target)).square()).view(2, -1)

    @cached_property
    def reference_errors(self) -> Tensor:
        """The reference's, [2,b]."""
        return sum_dims((widen(self.reference) - widen(self.target)).square()).view(2, -1)


PairLoss = Callable[[PairOutputs], Tensor]
"""`pairs -> [b]`, a loss of each pair with its constants bound."""


def margin_of(pairs: PairOutputs) -> Tensor:
    """`objectives.diffusion_dpo_margin` [b], squared errors summed over dims."""
    return diffusion_dpo_margin(*pairs.errors, *pairs.reference_errors)


def on_margin(loss: Callable[[Tensor], Tensor], *, keep: float | None = None) -> PairLoss:
    """A loss of the margin [b] -> [b]. With `keep` the loser's gradient is scaled down to where the winner's error does
    not rise (Diffusion-SDPO, `objectives.sdpo_scale` of the batch, whose share it keeps); the loss's value stays."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        if keep is None:
            return loss(margin_of(pairs))
        winner, loser = (widen(pairs.policy) - widen(pairs.target)).chunk(2)
        held = scale_gradient(pairs.errors[1], sdpo_scale(winner, loser, keep))
        return loss(diffusion_dpo_margin(pairs.errors[0], held, *pairs.reference_errors))

    return of_pairs


def kto_of_pairs(beta: float) -> PairLoss:
    """`objectives.kto`, the winner as a desirable and the loser as an undesirable picture; the mean of the two.

    The baseline is the mean log-ratio of the batch in the network, at least 0, as in the authors' code: it depends on
    how a batch is cut into pieces.
    """

    def of_pairs(pairs: PairOutputs) -> Tensor:
        ratio = pairs.reference_errors - pairs.errors
        baseline = ratio.detach().mean().clamp(min=0)
        liked = torch.tensor([True, False], device=ratio.device)[:, None].expand_as(ratio)
        return kto(ratio.flatten(), liked.flatten(), baseline, beta).view_as(ratio).mean(0)

    return of_pairs


def mapo_of_pairs(beta: float, steps: int) -> PairLoss:
    """`objectives.mapo`, which knows no reference; errors as means over dims."""
    return lambda pairs: mapo(pairs.errors[0] / pairs.dims, pairs.errors[1] / pairs.dims, beta, steps)


def dspo_of_pairs(beta: float, strength: float) -> PairLoss:
    """`objectives.dspo` as a mean over dims, so that a learning rate means what it means for a denoising loss."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        output, target, reference = (side.chunk(2)[0] for side in (pairs.policy, pairs.target, pairs.reference))
        return dspo(output, target, reference, margin_of(pairs), beta, strength) / pairs.dims

    return of_pairs
