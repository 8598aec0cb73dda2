"""`train METHOD` and `reward train-spm`: a run of any method, from its options to its folder."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusion_align.commands.adapters import lora_identity
from diffusion_align.commands.annotate.people import people
from diffusion_align.commands.train.course import make_optimizer, settle_warmup
from diffusion_align.commands.train.encode import encoded
from diffusion_align.commands.train.follower import follow
from diffusion_align.commands.train.identity import identity_of
from diffusion_align.commands.train.items import read_items
from diffusion_align.commands.train.opening import claim_early, open_session, require_ahead
from diffusion_align.commands.train.plan import effective_rate, plan_lines
from diffusion_align.commands.train.session import Session
from diffusion_align.methods.entry import About, Entry, Opened
from diffusion_align.methods.shared.noising import Networks
from diffusion_align.options import TrainOffline
from diffusion_align.rewards import Reward, load_reward
from diffusion_align.rewards.spec import RewardSpec


def train(entry: Entry[Any], options: Any) -> int:
    """Run a method from its options to its trained weights; see `follow` for interruptions."""
    o = options
    entry.require(o)
    resumed = claim_early(o)
    read = read_items(entry, o)
    session = open_session(o, entry, resumed)
    model, accelerator = session.model, session.accelerator
    accelerator.print(f"{entry.data:<16} {read.summary}")
    shape = model.latent_shape(o.resolution)
    opened = Opened(
        model=model,
        networks=Networks(
            model.predict, session.reference, model.schedule, model.prediction_type, told_sizes=_tells_sizes(o)
        ),
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
    assert length.steps is not None  # the data are counted
    require_ahead(resumed, length.steps)
    rate = effective_rate(o, length)
    o = session.options = settle_warmup(o, length.steps)
    accelerator.print("\n".join(plan_lines(entry, o, about, length)))
    session.trains(started.trained)
    optimizer, scheduler = make_optimizer(o, session.parameters, rate, length.steps)
    found = started.identity | length.identity | _micro_batch(o) | lora_identity(o)
    identity = identity_of(o, found, learning_rate=rate, steps=length.steps)
    prompts = [item if isinstance(item, str) else item.prompt for item in read.items]
    run = session.start(optimizer, scheduler, identity, prompts, length.steps)
    return follow(session, started.loop(run, length), run, entry.shown, started.report)


def _reward(session: Session, spec: RewardSpec) -> Reward:
    """A reward on the device of the model, or the choices of people at this machine."""
    o = session.options
    if str(spec) != "people":
        return load_reward(spec, device=session.model.device, seed=o.seed)
    if session.accelerator.num_processes > 1:
        raise ValueError("reward people has one page for its questions; train with one process")
    return people(session.run / "choices", o.group_size, seed=o.seed)


def _micro_batch(o: Any) -> dict[str, int]:
    """What the stream of samples depends on beside the batch: with buckets a micro-batch holds one shape."""
    return {"micro_batch": o.train_batch_size} if isinstance(o, TrainOffline) and o.aspect_buckets else {}


def _tells_sizes(o: Any) -> bool:
    return isinstance(o, TrainOffline) and o.size_conditioning == "pictures"
