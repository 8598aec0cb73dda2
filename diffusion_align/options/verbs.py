"""The verbs that take options: one record each, read by the command line, the presets and the tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .sample import Evaluate, Sample, check_evaluate, check_sample
from .train_dpo import TrainDpo, check_train_dpo, notes_train_dpo


def _no_notes(options: Any, given: Collection[str]) -> list[str]:
    return []


@dataclass(frozen=True)
class Verb:
    words: str
    options: type
    check: Callable[[Any], None]
    about: str
    positional: str = ""
    notes: Callable[[Any, Collection[str]], list[str]] = _no_notes


VERBS = {
    verb.words: verb
    for verb in (
        Verb(
            "train dpo",
            TrainDpo,
            check_train_dpo,
            "Diffusion-DPO: learn from pairs of pictures, one preferred.",
            notes=notes_train_dpo,
        ),
        Verb("sample", Sample, check_sample, "Draw pictures from a model, or from the result of a run."),
        Verb("evaluate", Evaluate, check_evaluate, "Compare a run with its base: same prompts and seeds.", "run"),
    )
}
