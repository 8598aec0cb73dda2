"""Evaluation: the same seeds for base and tuned model, rewards and judges, paired comparison, a report."""

from .breakdown import Measured, as_csv, by_category, comparisons, distances_to, order_of_models
from .compare import Comparison, RewardGap, compare, compare_metric, reward_gap, wilson
from .contact_sheet import pairs_picture
from .generate import Drawing, evaluation_table, generate, sampler_table, save_pictures
from .picture_folder import missing_pictures, read_picture, read_pictures
from .report import summarise, write_report
from .scoring import score

__all__ = [
    "Comparison",
    "Drawing",
    "Measured",
    "RewardGap",
    "as_csv",
    "by_category",
    "compare",
    "compare_metric",
    "comparisons",
    "distances_to",
    "evaluation_table",
    "generate",
    "missing_pictures",
    "order_of_models",
    "pairs_picture",
    "read_picture",
    "read_pictures",
    "reward_gap",
    "sampler_table",
    "save_pictures",
    "score",
    "summarise",
    "wilson",
    "write_report",
]
