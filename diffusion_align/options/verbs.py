"""The verbs that take options: one record each, read by the command line, the presets and the tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .annotate import Annotate, check_annotate
from .data import DataCheck, DataConvert, DataInspect, check_data
from .reward import RewardScore, RewardServe, check_reward_score, check_reward_serve
from .sample import Evaluate, Sample, check_evaluate, check_sample
from .synth import Synth, check_synth
from .train_common import no_notes
from .train_dpo import TrainDpo, check_train_dpo, notes_train_dpo
from .train_online import TrainD3po, TrainDdpo, TrainPrdp, TrainSpo, check_online, check_spo, notes_online, notes_spo
from .train_rankdpo import TrainRankdpo, check_train_rankdpo, notes_train_rankdpo
from .train_spm import TrainSpm, check_train_spm, notes_train_spm


@dataclass(frozen=True)
class Verb:
    """`run` and `plan` are "module:function" in `diffusion_align.commands`, imported only when they are called."""

    words: str
    options: type
    check: Callable[[Any], None]
    about: str
    run: str
    plan: str = ""  # what --dry-run calls; without one it prints the options
    positional: str = ""
    notes: Callable[[Any, Collection[str]], list[str]] = no_notes

    def start(self, options: Any) -> int:
        return _function(self.run)(options)

    def dry_run(self, options: Any) -> int:
        if self.plan:
            return _function(self.plan)(options)
        from .files import to_yaml

        print(to_yaml(options, self.words), end="")
        return 0


def _function(where: str) -> Callable[[Any], int]:
    module, _, name = where.partition(":")
    return getattr(import_module(f"diffusion_align.commands.{module}"), name)


VERBS = {
    verb.words: verb
    for verb in (
        Verb(
            "train dpo",
            TrainDpo,
            check_train_dpo,
            "Diffusion-DPO: learn from pairs of pictures, one preferred.",
            run="train_dpo:train_dpo",
            plan="plan_dpo:dry_run",
            notes=notes_train_dpo,
        ),
        Verb(
            "train rankdpo",
            TrainRankdpo,
            check_train_rankdpo,
            "RankDPO: learn from rankings of several pictures, by how much each pair matters to the ranking.",
            run="train_rankdpo:train_rankdpo",
            plan="plan_rankdpo:dry_run",
            notes=notes_train_rankdpo,
        ),
        Verb(
            "train d3po",
            TrainD3po,
            check_online,
            "D3PO: learn from pairs of the model's own runs, the better one by a reward.",
            run="train_online:train_d3po",
            notes=notes_online,
            plan="plan_online:dry_run",
        ),
        Verb(
            "train spo",
            TrainSpo,
            check_spo,
            "SPO: learn at each step from continuations of one state, compared by a step-aware preference model.",
            run="train_online:train_spo",
            plan="plan_online:dry_run",
            notes=notes_spo,
        ),
        Verb(
            "train prdp",
            TrainPrdp,
            check_online,
            "PRDP: regress differences of log-ratios on differences of rewards.",
            run="train_online:train_prdp",
            notes=notes_online,
            plan="plan_online:dry_run",
        ),
        Verb(
            "train ddpo",
            TrainDdpo,
            check_online,
            "DDPO, GRPO, DPOK: policy gradients with a clipped surrogate; a baseline.",
            run="train_online:train_ddpo",
            notes=notes_online,
            plan="plan_online:dry_run",
        ),
        Verb(
            "data inspect",
            DataInspect,
            check_data,
            "What a file or folder of data holds, how it is read, and what it is good for.",
            run="data_inspect:data_inspect",
            positional="path",
        ),
        Verb(
            "data check",
            DataCheck,
            check_data,
            "Read everything that a training would, every picture whole, and list what is broken.",
            run="data_check:data_check",
            positional="path",
        ),
        Verb(
            "data convert",
            DataConvert,
            check_data,
            "Any layout as this project's own: parquet shards with pictures and preferences.",
            run="data_convert:data_convert",
            positional="path",
        ),
        Verb(
            "data synth",
            Synth,
            check_synth,
            "Draw pictures and let rewards rank them: rankings and pairs to train on.",
            run="synth:synth",
            plan="synth:dry_run",
        ),
        Verb(
            "reward train-spm",
            TrainSpm,
            check_train_spm,
            "Step-aware preference model of SPO: a CLIP reward that knows the noise level.",
            run="train_spm:train_spm",
            notes=notes_train_spm,
        ),
        Verb(
            "reward score",
            RewardScore,
            check_reward_score,
            "Score pictures that are there: one line each, the mean, pictures a second.",
            run="reward_score:reward_score",
        ),
        Verb(
            "reward serve",
            RewardServe,
            check_reward_serve,
            "Serve a reward over HTTP, for a training in another environment or on another machine.",
            run="reward_server:reward_serve",
        ),
        Verb(
            "sample",
            Sample,
            check_sample,
            "Draw pictures from a model, or from the result of a run.",
            run="sample.command:sample",
        ),
        Verb(
            "evaluate",
            Evaluate,
            check_evaluate,
            "Compare a run with its base: same prompts and seeds.",
            run="evaluate.command:evaluate",
            positional="run",
        ),
        Verb(
            "data annotate",
            Annotate,
            check_annotate,
            "Choose between pictures that sample drew, in a page on this machine: human feedback.",
            run="annotate.command:annotate",
            positional="folder",
        ),
    )
}
