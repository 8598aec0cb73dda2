"""The verbs that take options: those of training, each declared in its own file of `train`, and the others."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from . import train
from .annotate import Annotate, check_annotate
from .cache import CacheLs, CacheRm, check_cache_ls, check_cache_rm
from .data import DataCheck, DataConvert, DataInspect, check_data
from .export import Export, check_export
from .model import ModelConvert, ModelInspect, ModelMerge, check_model
from .reward import RewardScore, RewardServe, check_reward_score, check_reward_serve
from .sample import Evaluate, Sample, check_evaluate, check_sample
from .synth import Synth, check_synth
from .verb import Verb


def _training() -> list[Verb]:
    """The verb of every file of `train` that declares one, by its words."""
    names = [found.name for found in iter_modules(train.__path__)]
    verbs = (getattr(import_module(f"diffusion_align.options.train.{name}"), "VERB", None) for name in names)
    return sorted((verb for verb in verbs if verb is not None), key=lambda verb: verb.words)


VERBS = {
    verb.words: verb
    for verb in (
        *_training(),
        Verb(
            "data inspect",
            DataInspect,
            check_data,
            "Print what a file or folder of data holds, how it is read, and which methods can use it.",
            run="data.inspect:data_inspect",
            positional="path",
        ),
        Verb(
            "data check",
            DataCheck,
            check_data,
            "Read all data as a training would, decode every picture, and list bad rows.",
            run="data.check:data_check",
            positional="path",
        ),
        Verb(
            "data convert",
            DataConvert,
            check_data,
            "Convert any layout to parquet shards with pictures and preferences.",
            run="data.convert:data_convert",
            positional="path",
        ),
        Verb(
            "model inspect",
            ModelInspect,
            check_model,
            "Print what a model's file or folder is: family, precision, what it predicts, what is missing.",
            run="model.inspect:model_inspect",
            positional="pretrained_model_name_or_path",
        ),
        Verb(
            "model convert",
            ModelConvert,
            check_model,
            "Write a model as a folder in diffusers format, or as a single file.",
            run="model.convert:model_convert",
            positional="pretrained_model_name_or_path",
        ),
        Verb(
            "model merge",
            ModelMerge,
            check_model,
            "Add a LoRA to the weights of a model, and write the model.",
            run="model.convert:model_convert",
            positional="pretrained_model_name_or_path",
        ),
        Verb(
            "data synth",
            Synth,
            check_synth,
            "Draw pictures and let rewards rank them: rankings and pairs to train on.",
            run="data.synth:synth",
            plan="data.synth:dry_run",
        ),
        Verb(
            "cache ls",
            CacheLs,
            check_cache_ls,
            "List the encoded pictures that trainings keep on disk: size, last use, and which are in use.",
            run="data.caches:cache_ls",
            positional="folder",
        ),
        Verb(
            "cache rm",
            CacheRm,
            check_cache_rm,
            "Remove encoded pictures, by key, by last use, or all. Those that a process uses stay.",
            run="data.caches:cache_rm",
            positional="folder",
        ),
        Verb(
            "reward score",
            RewardScore,
            check_reward_score,
            "Score existing pictures: one line each, the mean, pictures per second.",
            run="reward.score:reward_score",
        ),
        Verb(
            "reward serve",
            RewardServe,
            check_reward_serve,
            "Serve a reward over HTTP, for a training in another environment or on another machine.",
            run="reward.serve:reward_serve",
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
            "export",
            Export,
            check_export,
            "Write the result of a run in the format of another program: ComfyUI, A1111, kohya, peft, diffusers.",
            run="export.command:export",
            positional="run",
        ),
        Verb(
            "data annotate",
            Annotate,
            check_annotate,
            "Choose between pictures that sample drew, in a browser page on this machine: human feedback.",
            run="annotate.command:annotate",
            positional="folder",
        ),
    )
}
