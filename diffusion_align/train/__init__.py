"""Training loops and what they leave behind. A loop is a generator that yields after each optimizer step."""

from diffusion_align.train.offline import train_pairs
from diffusion_align.train.pair_losses import on_margin
from diffusion_align.train.pictures import train_pictures
from diffusion_align.train.rankings import train_rankings
from diffusion_align.train.steps import NonFiniteError, Progress, StepRecord

__all__ = ["NonFiniteError", "Progress", "StepRecord", "on_margin", "train_pairs", "train_pictures", "train_rankings"]
