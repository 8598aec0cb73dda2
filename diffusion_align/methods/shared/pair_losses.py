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
    reference: Tensor | None  # None where the loss needs none, so that nobody computed it
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
        """The reference's, [2,b]. Raises ValueError where there is no reference."""
        if self.reference is None:
            raise ValueError("these pairs were given no reference's outputs")
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
    """A loss of the margin [b] -> [b]. With `keep` the loser's gradient is scaled down to where the winner's error does
    not rise (Diffusion-SDPO, `objectives.sdpo_scale` of the batch, whose share it keeps); the loss's value stays."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        if keep is None:
            return loss(margin_of(pairs))
        winner, loser = (widen(pairs.policy) - widen(pairs.target)).chunk(2)
        held = scale_gradient(pairs.errors[1], sdpo_scale(winner, loser, keep))
        return loss(diffusion_dpo_margin(pairs.errors[0], held, *pairs.reference_errors))

    return PairLoss(of_pairs)


def kto_of_pairs(beta: float) -> PairLoss:
    """`objectives.kto` on pairs: the winner as a liked and the loser as a disliked picture; the mean of the two.

    This is not how the authors train (that is `pictures.train_pictures`): both pictures of a pair share t and noise, as
    many are liked as disliked, and the baseline is the mean log-ratio of one micro-batch, at least 0, so the loss
    depends on how a batch is cut.
    """

    def of_pairs(pairs: PairOutputs) -> Tensor:
        ratio = pairs.reference_errors - pairs.errors
        baseline = ratio.detach().mean().clamp(min=0)
        liked = torch.tensor([True, False], device=ratio.device)[:, None].expand_as(ratio)
        return kto(ratio.flatten(), liked.flatten(), baseline, beta).view_as(ratio).mean(0)

    return PairLoss(of_pairs)


def mapo_of_pairs(beta: float, steps: int) -> PairLoss:
    """`objectives.mapo`, which knows no reference; errors as means over dims."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        return mapo(pairs.errors[0] / pairs.dims, pairs.errors[1] / pairs.dims, beta, steps)

    return PairLoss(of_pairs, needs_reference=False)


def dspo_of_pairs(beta: float, strength: float) -> PairLoss:
    """`objectives.dspo` as a mean over dims, so that a learning rate means what it means for a denoising loss."""

    def of_pairs(pairs: PairOutputs) -> Tensor:
        margin = margin_of(pairs)  # first: it says so where there is no reference
        assert pairs.reference is not None
        output, target, reference = (side.chunk(2)[0] for side in (pairs.policy, pairs.target, pairs.reference))
        return dspo(output, target, reference, margin, beta, strength) / pairs.dims

    return PairLoss(of_pairs)
