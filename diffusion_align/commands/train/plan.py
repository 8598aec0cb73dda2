"""The plan of a training, to check before it starts; --dry-run prints it without loading a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_align.commands.model_facts import ModelFacts, read_model_facts
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.train.course import describe_course
from diffusion_align.commands.train.items import items_on_disk, read_items, source_name
from diffusion_align.methods.entry import About, Entry, Length
from diffusion_align.methods.shared.plan import processes_here
from diffusion_align.options import TrainCommon, TrainUnet, to_yaml
from diffusion_align.schedule import Schedule


def dry_run(entry: Entry[Any], options: Any) -> int:
    """Print the resolved configuration and, as comments below it, the plan: the output is a valid file for --config."""
    o = options
    entry.require(o)
    name = present_model(o.pretrained_model_name_or_path or "")
    facts = read_model_facts(name, o.prediction_type)
    read = read_items(entry, o) if items_on_disk(entry, o) else None
    about = about_run(entry, o, read.items if read else None)
    assumed = "" if facts.known else f" (not on this disk: the numbers below are those of {facts.family})"
    lines = [
        f"model            {name}{assumed}",
        f"{entry.data:<16} {read.summary if read else f'{source_name(o)}, on the hub: not counted'}",
        *plan_lines(entry, o, about, entry.length(o, about)),
        *([f"trained          {_describe_trained(o, facts)}"] if entry.unet else []),
    ]
    print(to_yaml(o, entry.verb) + "\n" + "\n".join(f"# {line}" for line in lines))
    return 0


def about_run(entry: Entry[Any], o: Any, items: Sequence[Any] | None = None) -> About:
    """The input of a plan without loading the model: from its files or, without them, values typical of its family."""
    facts = read_model_facts(present_model(o.pretrained_model_name_or_path or ""), o.prediction_type)
    count = None if items is None else entry.count(o, items)
    schedule, shape = Schedule.from_config(facts.scheduler), facts.latent_shape(o.resolution)
    return About(schedule, shape, items, count, processes_here())


def plan_lines(entry: Entry[Any], o: Any, about: About, length: Length) -> list[str]:
    """Batch, steps, learning rate and the loss's constants."""
    factor = f" = {o.learning_rate:g} x {length.batch} (scale_lr)" if o.scale_lr else ""
    rate = effective_rate(o, length)
    return [
        *length.lines,
        f"learning rate    {rate:g}{factor}",
        *describe_course(o, length.steps, rate),
        *entry.constants(o, about),
    ]


def effective_rate(o: TrainCommon, length: Length) -> float:
    """The learning rate after warm-up."""
    return o.learning_rate * (length.batch if o.scale_lr else 1)


def _describe_trained(o: TrainUnet, facts: ModelFacts) -> str:
    """What is trained, and the number of its parameters."""
    if o.mode == "lora" and o.new_lora is None:
        return f"the LoRA of {o.lora}, with its rank, alpha and layers"
    kind = "DoRA" if o.use_dora else "rsLoRA" if o.use_rslora else "LoRA"
    what = "the whole UNet" if o.mode == "full" else f"{kind} of rank {o.rank}, alpha {o.network_alpha or o.rank:g}"
    what += f", after {o.lora} ({o.lora_mode})" if o.lora else ""
    if not facts.unet_shapes:
        return f"{what}: number of parameters unknown"
    number = facts.full_parameters() if o.mode == "full" else facts.lora_parameters(o.rank, o.lora_targets, o.use_dora)
    return f"{what}: {number:,} of {facts.full_parameters():,} parameters"
