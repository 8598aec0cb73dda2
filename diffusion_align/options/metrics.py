"""The metrics that each method writes to metrics.jsonl: known before a run, so that `--keep_best` can be checked.

A test holds these lists equal to what the methods write.
"""

from __future__ import annotations

from .names import UsageError, nearest


def _quantiles(name: str) -> tuple[str, ...]:
    return (f"{name}_p05", f"{name}_p50", f"{name}_p95")


_ALWAYS = ("loss", "grad_norm", "lr", "samples", "skipped")
_PAIRS = ("implicit_accuracy", "winner_error_gap", "loser_error_gap", *_quantiles("margin"))
_REWARD = ("dims", "reward_mean", "reward_spread", "reward_failed", "diversity")
_RUNS = (*_quantiles("log_ratio"), "drift", "kl", "clamped", "items")
_SIDES = (*_quantiles("log_ratio_w"), *_quantiles("log_ratio_l"), "implicit_accuracy", "clamped_w", "clamped_l")
METRICS = {
    "TrainDpo": (*_ALWAYS, *_PAIRS),
    "TrainRankdpo": (*_ALWAYS, *_PAIRS, "pair_weight"),
    "TrainD3po": (*_ALWAYS, *_REWARD, *_SIDES, "kl_w", "kl_l", "drift", "items"),
    "TrainSpo": (*_ALWAYS, "dims", "score_mean", "kept", *_SIDES, "kl", "gap", "items"),
    "TrainPrdp": (*_ALWAYS, *_REWARD, *_RUNS),
    "TrainDdpo": (*_ALWAYS, *_REWARD, *_RUNS),
}


def check_metric(method: str, keep_best: str | None) -> None:
    """Refuse a metric that the method will never write. `method` is the name of its options.

    Raises:
        UsageError: with the nearest name, or all of them.
    """
    known = METRICS.get(method)
    name = (keep_best or "").removeprefix("-")
    if keep_best is None or known is None or name in known:
        return
    match = nearest(name, known)
    cure = f"did you mean {match}?" if match else f"there are {', '.join(known)}"
    raise UsageError(f"output.keep_best: this method writes no metric {name!r}; {cure}")
