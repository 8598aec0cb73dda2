"""`train METHOD` and `reward train-spm`: a run of any method from its options to its folder, and its --dry-run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusion_align.commands.annotate.people import people
from diffusion_align.commands.model_facts import ModelFacts, read_model_facts
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.train.course import describe_course, make_optimizer, settle_warmup
from diffusion_align.commands.train.encode import encoded
from diffusion_align.commands.train.follower import follow
from diffusion_align.commands.train.identity import identity_of
from diffusion_align.commands.train.items import items_on_disk, read_items, source_name
from diffusion_align.commands.train.opening import claim_early, open_session, require_ahead
from diffusion_align.commands.train.session import Session
from diffusion_align.methods.entry import About, Entry, Length, Opened
from diffusion_align.methods.shared.noising import Networks
from diffusion_align.methods.shared.plan import processes_here
from diffusion_align.options import TrainUnet, to_yaml
from diffusion_align.rewards import Reward, load_reward
from diffusion_align.rewards.spec import RewardSpec
from diffusion_align.schedule import Schedule


def train(entry: Entry[Any], options: Any) -> int:
    """Run a method from its options to its trained weights; see `follow` for interruptions."""
    o = options
    entry.require(o)
    resumed = claim_early(o)
    read = read_items(entry, o)
    session = open_session(o, entry, resumed)
    model, accelerator = session.model, session.accelerator
    accelerator.print(f"{entry.data:<16} {read.said}")
    shape = model.latent_shape(o.resolution)
    opened = Opened(
        model=model,
        networks=Networks(model.predict, session.reference, model.schedule, model.prediction_type),
        accelerator=accelerator,
        shape=shape,
        items=read.items,
        bad_rows=read.bad_rows,
        folder=session.run,
        encode=partial(encoded, o, model, accelerator),
        reward=partial(_reward, session),
    )
    started = entry.start(o, opened)
    about = About(model.schedule, shape, read.items, started.count, accelerator.num_processes)
    length = entry.length(o, about)
    assert length.steps is not None  # known, as the data are
    require_ahead(resumed, length.steps)
    rate = o.learning_rate * (length.batch if o.scale_lr else 1)
    o = session.options = settle_warmup(o, length.steps)
    accelerator.print("\n".join(plan_lines(entry, o, about, length)))
    session.trains(started.trained)
    optimizer, scheduler = make_optimizer(o, session.parameters, rate, length.steps)
    identity = identity_of(o, started.identity | length.identity, learning_rate=rate, steps=length.steps)
    prompts = [item if isinstance(item, str) else item.prompt for item in read.items]
    run = session.start(optimizer, scheduler, identity, prompts, length.steps)
    return follow(session, started.loop(run, length), run, entry.shown, started.report)


def dry_run(entry: Entry[Any], options: Any) -> int:
    """Print the resolved configuration and, as comments under it, the plan: the output is a file for --config."""
    o = options
    entry.require(o)
    name = present_model(o.pretrained_model_name_or_path or "")
    facts = read_model_facts(name)
    read = read_items(entry, o) if items_on_disk(entry, o) else None
    about = about_run(entry, o, read.items if read else None)
    assumed = "" if facts.known else f" (not on this disk: figures are those of {facts.family})"
    lines = [
        f"model            {name}{assumed}",
        f"{entry.data:<16} {read.said if read else f'{source_name(o)}, on the hub: not counted'}",
        *plan_lines(entry, o, about, entry.length(o, about)),
        *([f"trained          {_describe_trained(o, facts)}"] if entry.unet else []),
    ]
    print(to_yaml(o, entry.verb) + "\n" + "\n".join(f"# {line}" for line in lines))
    return 0


def about_run(entry: Entry[Any], o: Any, items: Sequence[Any] | None = None) -> About:
    """What a plan is counted from, of a model that is not loaded: its files or, without them, its family's figures."""
    facts = read_model_facts(present_model(o.pretrained_model_name_or_path or ""))
    count = None if items is None else entry.count(o, items)
    schedule, shape = Schedule.from_config(facts.scheduler), facts.latent_shape(o.resolution)
    return About(schedule, shape, items, count, processes_here())


def plan_lines(entry: Entry[Any], o: Any, about: About, length: Length) -> list[str]:
    """Batch, steps, learning rate and the loss's constants."""
    factor = f" = {o.learning_rate:g} x {length.batch} (scale_lr)" if o.scale_lr else ""
    rate = o.learning_rate * (length.batch if o.scale_lr else 1)
    return [
        *length.lines,
        f"learning rate    {rate:g}{factor}",
        *describe_course(o, length.steps, rate),
        *entry.constants(o, about),
    ]


def _describe_trained(o: TrainUnet, facts: ModelFacts) -> str:
    """What is trained, and how many weights that is."""
    what = "the whole UNet" if o.mode == "full" else f"LoRA of rank {o.rank}, alpha {o.network_alpha or o.rank:g}"
    if not facts.unet_shapes:
        return f"{what}: number of parameters unknown"
    number = facts.full_parameters() if o.mode == "full" else facts.lora_parameters(o.rank, o.lora_targets)
    return f"{what}: {number:,} of {facts.full_parameters():,} parameters"


def _reward(session: Session, spec: RewardSpec) -> Reward:
    """A reward on the model's device, or the people at this machine."""
    o = session.options
    if str(spec) != "people":
        return load_reward(spec, device=session.model.device, seed=o.seed)
    if session.accelerator.num_processes > 1:
        raise ValueError("reward people asks at one page; train with one process")
    return people(session.run / "choices", o.group_size, seed=o.seed)
