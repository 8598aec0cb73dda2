"""The names of the metrics in metrics.jsonl, so that `--keep_best` can be checked before a run.

A test compares them with what the methods write.
"""

from __future__ import annotations

from ..names import UsageError, nearest


def quantiles_of(name: str) -> tuple[str, ...]:
    return (f"{name}_p05", f"{name}_p50", f"{name}_p95")


ALWAYS = ("loss", "grad_norm", "lr", "samples", "skipped")
PAIRS = (*ALWAYS, "implicit_accuracy", "winner_error_gap", "loser_error_gap", *quantiles_of("margin"))
REWARD = (*ALWAYS, "dims", "reward_mean", "reward_spread", "reward_failed", "diversity")
RUNS = (*REWARD, *quantiles_of("log_ratio"), "drift", "kl", "clamped", "items")
SIDES = (*quantiles_of("log_ratio_w"), *quantiles_of("log_ratio_l"), "implicit_accuracy", "clamped_w", "clamped_l")


def check_metric(keep_best: str | None, known: tuple[str, ...]) -> None:
    """Raise UsageError, with the nearest name or all names, for a metric that the method does not write."""
    name = (keep_best or "").removeprefix("-")
    if keep_best is None or name in known:
        return
    match = nearest(name, known)
    cure = f"did you mean {match}?" if match else f"there are {', '.join(known)}"
    raise UsageError(f"output.keep_best: this method writes no metric {name!r}; {cure}")
