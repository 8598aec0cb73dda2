"""The parts of a Diffusion-DPO run, each built from what was asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusion_align.commands.setup import optimizer_identity
from diffusion_align.objectives import hinge, ipo, logistic, robust
from diffusion_align.options import TrainDpo
from diffusion_align.train.pair_losses import PairLoss, dspo_of_pairs, kto_of_pairs, mapo_of_pairs, on_margin


def make_loss(o: TrainDpo, beta: float, timesteps: int) -> PairLoss:
    """The objective of pairs that was asked for; beta is per squared error summed over dims (MaPO has its own).

    `kto` is none of them: it learns from single pictures (`train.pictures`).
    """
    of_margin = {
        "sigmoid": partial(logistic, beta=beta, label_smoothing=o.label_smoothing),
        "robust": partial(robust, beta=beta, flip=o.label_smoothing),
        "hinge": partial(hinge, beta=beta),
        # (beta margin - 1/2)^2: the same minimum as ipo's own, but free of the margin's unit, so that a learning rate
        # and a clip mean what they mean for the others. On errors summed over dims ipo's own scale is D^2.
        "ipo": lambda margin: beta**2 * ipo(margin, beta),
    }
    if o.loss_type in of_margin:
        return on_margin(of_margin[o.loss_type], keep=o.winner_share)
    return {
        "kto_pairs": lambda: kto_of_pairs(beta),
        "mapo": lambda: mapo_of_pairs(o.mapo_beta, timesteps),
        "dspo": lambda: dspo_of_pairs(beta, o.dspo_strength),
    }[o.loss_type]()


def needs_reference(o: TrainDpo) -> bool:
    """Whether the loss that was asked for compares with the frozen model. It says so itself, whatever its constants."""
    return o.loss_type == "kto" or make_loss(o, beta=1.0, timesteps=1).needs_reference


def describe_constants(o: TrainDpo) -> list[str]:
    """The constants of this loss beside beta, and whether there is a reference."""
    lines = {
        "kto": f"liked_share      {o.liked_share:g} of the visits show the winner, the others the loser",
        "mapo": f"mapo_beta        {o.mapo_beta:g}, weight of the preference beside the winner's error",
        "dspo": f"dspo_strength    {o.dspo_strength:g}, how far the winner's target is pushed from the reference",
    }
    frozen = "the model without its LoRA" if o.mode == "lora" else "a frozen copy of the UNet"
    share = o.winner_share
    none = "none: it is neither kept nor run, and what compares with it is not logged"
    return [
        *([lines[o.loss_type]] if o.loss_type in lines else []),
        *([] if share is None else [f"winner_share     {share:g} of the winner's fall is kept (Diffusion-SDPO)"]),
        f"reference        {frozen if needs_reference(o) else none}",
    ]


def identity_of(
    o: TrainDpo, data_and_model: dict[str, Any], *, beta: float, batch: int, learning_rate: float, steps: int
) -> dict[str, Any]:
    """What a resumed run must share with the saved one. How a batch is cut into pieces and processes may change."""
    same = (
        "loss_type", "label_smoothing", "winner_share", "mapo_beta", "dspo_strength", "proportion_empty_prompts"
    )  # fmt: skip
    own = {"beta": beta, "batch": batch, **{name: getattr(o, name) for name in same}}
    # Not in every run's: those saved before there was such an option must stay as they are.
    own |= {"liked_share": o.liked_share} if o.loss_type == "kto" else {}
    return {**data_and_model, **own, **optimizer_identity(o, learning_rate=learning_rate, steps=steps)}
