"""Whether a resumed run is the one that was saved, and if not, what changed, by the names of the options.

Weights and data are compared by digests, which a reader cannot interpret. So a checkpoint also keeps facts (paths,
counts, the options that select data), and the error message says which of them changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_align.commands.adapters import KEPT
from diffusion_align.commands.model.base import FIELDS
from diffusion_align.commands.train.course import WARMUP
from diffusion_align.options import GivenPictures, TrainCommon, TrainOnline
from diffusion_align.options.reading.paths import absolute_paths, without_folders
from diffusion_align.options.schema import options_of
from diffusion_align.train.checkpoints.store import Checkpoint, require_same_identity

# Fields that hold digests, and the words for them in messages.
DIGESTS = {
    "model": "the model",
    KEPT: "the LoRA of --lora",
    "data": "the data (pictures, prompts, weights or their order)",
    "prompts": "the list of prompts",
    "preference_model": "the preference model",
    "relevance": "the relevance of the rankings' pictures",
    "labels": "the labels of the pairs",
}
# Numbers that depend on several options.
MADE_OF = {
    "batch": "--train_batch_size x --gradient_accumulation_steps x processes",
    "beta": "made of --beta_dpo, --beta_convention and --resolution",
}
# Options that may change when a run is resumed. All others may not, so a new option is compared by default.
FREE_SECTIONS = ("output", "validation", "hub")
FREE = frozenset(
    """
    threads device local_rank process_timeout prior_generation_precision gradient_checkpointing
    enable_xformers_memory_efficient_attention one_picture_at_a_time sample_chunk
    collapse_alarm collapse_winner_error collapse_diversity collapse_patience
    cache_dir cache_limit_gb max_bad_fraction vae_encode_batch_size no_hflip dataloader_num_workers
    """.split()
)
# Options whose effect the identity holds in another form: model and data by content; beta, batch, steps as numbers.
SETTLED = frozenset(
    """
    pretrained_model_name_or_path revision variant pretrained_vae_model_name_or_path prediction_type lora
    resolution encode_precision train_data_dir dataset_name dataset_config_name dataset_split_name max_train_samples
    columns encoding
    prompts num_prompts preference_model beta_dpo beta_convention scale_lr learning_rate
    train_batch_size gradient_accumulation_steps effective_batch_size max_train_steps num_train_epochs num_rounds
    """.split()
)
# Options that existed before checkpoints recorded them: their saved value may be unknown, and is then not compared.
ADDED = ("lr_num_cycles", "lr_power")
ROLLOUT_STEPS = "rollout.steps"
Facts = dict[str, dict[str, Any]]


def identity_of(o: TrainCommon, found: Mapping[str, Any], *, learning_rate: float, steps: int) -> dict[str, Any]:
    """The values that a resumed run must have in common with the saved one: every option except those above, and those
    `found` from data and model. `learning_rate` is the effective one."""
    names = [
        name
        for name, described in options_of(type(o)).items()
        if described.section not in FREE_SECTIONS and name not in FREE | SETTLED
    ]
    identity = {name: getattr(o, name) for name in names} | dict(found) | {"learning_rate": learning_rate}
    if o.lr_warmup_steps is None:
        identity["lr_warmup_steps"] = WARMUP  # as in older checkpoints of runs with a constant rate, which ignores it
    # "steps" is also an option, of the sampler; where the run's number of steps takes its place, it keeps another name.
    if "steps" in names:
        identity[ROLLOUT_STEPS] = identity["steps"]
    # The number of steps changes every learning-rate schedule except the constant one.
    return identity if o.lr_scheduler.startswith("constant") else identity | {"steps": steps}


def facts_of(o: TrainCommon, *, number: int) -> Facts:
    """Facts about model and data for a checkpoint; `number` of pairs, rankings or prompts."""

    def chosen(*names: str) -> dict[str, Any]:
        described = options_of(type(o))
        return {f"--{name}": absolute_paths(described[name], getattr(o, name)) for name in names if name in described}

    facts = {"model": chosen(*FIELDS, "lora"), KEPT: chosen("lora")}
    if isinstance(o, GivenPictures):
        names = ("train_data_dir", "dataset_name", "dataset_split_name", "max_train_samples")
        facts["data"] = {"their number": number, **chosen(*names)}
        facts["relevance"] = facts["data"]
    if isinstance(o, TrainOnline):
        facts["prompts"] = {"their number": number, **chosen("prompts", "num_prompts")}
        facts["preference_model"] = chosen("preference_model")
    return facts


def require_same_run(
    o: TrainCommon, resumed: Checkpoint, identity: Mapping[str, Any], facts: Facts, processes: int
) -> int | None:
    """Compare with the identity in a checkpoint. Returns the planned steps of the saved run if it is extended.

    An option that the saved version did not have may only have its default. Rewards are compared without the folders of
    their files.

    Raises:
        CheckpointError: what changed, field by field.
    """
    saved, now = dict(resumed.state["identity"]), dict(identity)
    described = options_of(type(o))
    for name in now.keys() - saved.keys() & described.keys():
        if now[name] == described[name].default or name in ADDED:
            del now[name]
    if ROLLOUT_STEPS not in saved:
        now.pop(ROLLOUT_STEPS, None)
    for name in saved.keys() - now.keys() & (FREE | SETTLED):  # what earlier versions compared, and need not have
        del saved[name]
    for fields in (saved, now):
        if isinstance(fields.get("reward"), str):
            fields["reward"] = without_folders(fields["reward"])
    was, steps, extended = saved.get("steps"), now.get("steps"), None
    if was is not None and steps is not None and steps > was and o.extend and not o.lr_scheduler.startswith("constant"):
        extended, saved["steps"] = was, steps
    require_same_identity(saved, now, _words(resumed, saved, now, facts, processes))
    return extended


def _words(
    resumed: Checkpoint, saved: Mapping[str, Any], now: Mapping[str, Any], facts: Facts, processes: int
) -> dict[str, str]:
    """A sentence for each field whose two values do not explain the difference."""

    def both(name: str) -> str:
        return f"{name} was {saved.get(name)!r} and is now {now.get(name)!r}"

    earlier: Facts = resumed.state.get("facts", {})
    words = {name: _changed(what, earlier.get(name), facts.get(name, {})) for name, what in DIGESTS.items()}
    words |= {name: f"{both(name)} ({made})" for name, made in MADE_OF.items()}
    drew = resumed.state.get("processes", processes)
    if drew != processes and saved.get("batch") != now.get("batch"):
        words["batch"] = f"{both('batch')} (it was saved by {drew} processes, and there are now {processes})"
    if isinstance(saved.get("steps"), int) and isinstance(now.get("steps"), int) and now["steps"] > saved["steps"]:
        words["steps"] = f"{both('steps')} (--extend continues, with the learning rate planned over {now['steps']})"
    return words


def _changed(what: str, was: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    if was is None:  # saved by a version that kept no facts
        return f"{what} changed"
    differ = [f"{key} was {was.get(key)} and is now {value}" for key, value in now.items() if was.get(key) != value]
    given = [f"{key} {value}" for key, value in now.items() if value is not None]
    return f"{what} changed: " + (", ".join(differ) or f"other content under {', '.join(given)}")
