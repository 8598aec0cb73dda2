"""Evaluation: the same seeds for base and tuned model, rewards and judges, paired comparison, a report."""

from .compare import Comparison, RewardGap, compare, compare_metric, reward_gap, wilson
from .escape import escape
from .generate import evaluation_table, generate, read_picture, read_pictures, save_pictures
from .report import write_report
from .score import score
from .sheet import pairs_picture

__all__ = [
    "Comparison",
    "RewardGap",
    "compare",
    "compare_metric",
    "escape",
    "evaluation_table",
    "generate",
    "pairs_picture",
    "read_picture",
    "read_pictures",
    "reward_gap",
    "save_pictures",
    "score",
    "wilson",
    "write_report",
]
