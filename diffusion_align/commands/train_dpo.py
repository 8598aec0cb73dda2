"""`train dpo`: pairs and a model in, a run folder out. Builds, wires, loops, writes; what computes lies below."""

from __future__ import annotations

import math
from functools import partial

from diffusion_align.commands.course import describe_course, settle_warmup
from diffusion_align.commands.encode import encoded
from diffusion_align.commands.opening import claim_early, open_session, require_ahead
from diffusion_align.commands.plan import accumulation_of, describe_loss, processes_here, steps_of
from diffusion_align.commands.plan_dpo import describe_batch, read_training_pairs
from diffusion_align.commands.setup import make_optimizer
from diffusion_align.commands.setup_dpo import describe_constants, identity_of, make_loss, needs_reference
from diffusion_align.objectives import beta_per_squared_error
from diffusion_align.options import TrainDpo
from diffusion_align.train import train_pairs, train_pictures


def train_dpo(options: TrainDpo) -> int:
    """Train with Diffusion-DPO; see `TrainDpo` for what can be asked, and `Session.follow` for an interruption."""
    o = options
    accumulation = accumulation_of(o, processes_here())
    resumed = claim_early(o)
    pairs, counts = read_training_pairs(o)
    pairs = pairs[: o.max_train_samples]
    session = open_session(o, "train dpo", resumed, needs_reference=needs_reference(o))
    model, accelerator = session.model, session.accelerator
    accelerator.print(f"pairs: {counts}")
    cache = encoded(o, model, accelerator, pairs, counts.bad_rows)
    beta = beta_per_squared_error(o.beta_dpo, math.prod(model.latent_shape(o.resolution)), o.beta_convention)
    pieces = (o.train_batch_size, accelerator.num_processes, accumulation)
    plan = steps_of(*pieces, o.num_train_epochs, o.max_train_steps, len(cache))
    batch, steps = plan.batch, plan.steps or 0  # known, as the pairs are
    require_ahead(resumed, steps)
    rate = o.learning_rate * (batch if o.scale_lr else 1)
    o = session.options = settle_warmup(o, steps)
    unit = f"beta             {o.beta_dpo:g} in the unit of {o.beta_convention}"
    said = [unit] if needs_reference(o) else []
    said += [describe_loss(o.loss_type, o.label_smoothing), *describe_constants(o)]
    accelerator.print("\n".join([*describe_batch(o, plan), *describe_course(o, steps, rate), *said]))
    optimizer, scheduler = make_optimizer(o, session.parameters, rate, steps)
    identity = identity_of(o, cache.identity, beta=beta, batch=batch, learning_rate=rate, steps=steps)
    progress = session.start(optimizer, scheduler, identity, [pair.prompt for pair in pairs])
    if o.loss_type == "kto":
        train = partial(train_pictures, liked_share=o.liked_share)
    else:
        train = partial(train_pairs, loss=make_loss(o, beta, model.schedule.num_timesteps))
    records = train(
        cache,
        model.predict,
        session.reference,
        schedule=model.schedule,
        prediction_type=model.prediction_type,
        beta=beta,
        parameters=session.parameters,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        accelerator=accelerator,
        batch_size=batch,
        seed=o.seed,
        max_steps=steps,
        accumulation=accumulation,
        caption_dropout=o.proportion_empty_prompts,
        max_grad_norm=o.max_grad_norm,
        progress=progress,
        spike=o.skip_spikes,
        weights=[pairs[place].weight for place in cache.kept],
    )
    return session.follow(records, progress, steps, shown=("implicit_accuracy",))
