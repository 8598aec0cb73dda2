"""Losses of pairs as functions of the networks' outputs.

Diffusion-DPO and similar losses need one number per pair, the margin. Others need the errors or the outputs. Here all
are functions of the same `PairOutputs`, so one loop trains them all.
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
    """The networks' outputs on b noised pairs and their target, [2b,...] each, winners first."""

    policy: Tensor
    reference: Tensor | None  # None if the loss needs none
    target: Tensor

    @property
    def dims(self) -> int:
        return self.target[0].numel()

    @cached_property
    def errors(self) -> Tensor:
        """The squared errors of the policy, summed over dims in float32 at least, [2,b]."""
        return sum_dims((widen(self.policy) - widen(self.target)).square()).view(2, -1)

    @cached_property
    def reference_errors(self) -> Tensor:
        """Those of the reference, [2,b]. Raises ValueError if there is no reference."""
        if self.reference is None:
            raise ValueError("this loss needs the outputs of a reference")
        return sum_dims((widen(self.reference) - widen(self.target)).square()).view(2, -1)


@dataclass(frozen=True)
class PairLoss:
    """`pairs -> [b]`, a loss of each pair with its constants bound, and whether it needs the frozen reference."""

    of_pairs: Callable[[PairOutputs], Tensor]
    needs_reference: bool = True

    def __call__(self, pairs: PairOutputs) -> Tensor:
        return self.of_pairs(pairs)


def margin_of(pairs: PairOutputs) -> Tensor:
    """`objectives.diffusion_dpo_margin` [b], squared errors summed over dims."""
    return diffusion_dpo_margin(*pairs.errors, *pairs.reference_errors)


def on_margin(loss: Callable[[Tensor], Tensor], *, keep: float | None = None) -> PairLoss:
    """A loss of the margin [b] -> [b]. With `keep` the loser's gradient is scaled so that the winner's error does not
    rise (Diffusion-SDPO, `objectives.sdpo_scale` over the batch); the value of the loss is the same."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        if keep is None:
            return loss(margin_of(pairs))
        winner, loser = (widen(pairs.policy) - widen(pairs.target)).chunk(2)
        held = scale_gradient(pairs.errors[1], sdpo_scale(winner, loser, keep))
        return loss(diffusion_dpo_margin(pairs.errors[0], held, *pairs.reference_errors))

    return PairLoss(of_pairs)


def kto_of_pairs(beta: float) -> PairLoss:
    """`objectives.kto` on pairs: the winner as a liked and the loser as a disliked picture; the mean of the two.

    The authors train differently (see `methods.kto`). Here both pictures of a pair share t and noise, half of the
    pictures are liked, and the baseline is the mean log-ratio of one micro-batch, at least 0, so the loss depends on
    the size of micro-batches.
    """

    def of_pairs(pairs: PairOutputs) -> Tensor:
        ratio = pairs.reference_errors - pairs.errors
        baseline = ratio.detach().mean().clamp(min=0)
        liked = torch.tensor([True, False], device=ratio.device)[:, None].expand_as(ratio)
        return kto(ratio.flatten(), liked.flatten(), baseline, beta).view_as(ratio).mean(0)

    return PairLoss(of_pairs)


def mapo_of_pairs(beta: float, steps: int) -> PairLoss:
    """`objectives.mapo`, which needs no reference; errors as means over dims."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        return mapo(pairs.errors[0] / pairs.dims, pairs.errors[1] / pairs.dims, beta, steps)

    return PairLoss(of_pairs, needs_reference=False)


def dspo_of_pairs(beta: float, strength: float) -> PairLoss:
    """`objectives.dspo` as a mean over dims, so that learning rates of denoising losses fit."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        margin = margin_of(pairs)  # first, because it raises if there is no reference
        assert pairs.reference is not None
        output, target, reference = (side.chunk(2)[0] for side in (pairs.policy, pairs.target, pairs.reference))
        return dspo(output, target, reference, margin, beta, strength) / pairs.dims

    return PairLoss(of_pairs)
