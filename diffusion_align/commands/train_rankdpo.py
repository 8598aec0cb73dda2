"""`train rankdpo`: rankings and a model in, a run folder out. Builds, wires and loops; what computes lies below."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusion_align.commands.course import describe_course, settle_warmup
from diffusion_align.commands.encode import encoded
from diffusion_align.commands.opening import claim_early, open_session, require_ahead
from diffusion_align.commands.plan import accumulation_of, processes_here, steps_of
from diffusion_align.commands.plan_rankdpo import describe_prompts, read_training_rankings
from diffusion_align.commands.setup import make_optimizer, optimizer_identity
from diffusion_align.data.disk import digest
from diffusion_align.objectives import beta_per_squared_error, gain_weights, rank_dpo
from diffusion_align.options import TrainRankdpo
from diffusion_align.train import train_rankings


def train_rankdpo(options: TrainRankdpo) -> int:
    """Train with RankDPO; see `TrainRankdpo` for what can be asked, and `Session.follow` for an interruption."""
    o = options
    accumulation = accumulation_of(o, processes_here())
    resumed = claim_early(o)
    rankings, counts = read_training_rankings(o)
    rankings = rankings[: o.max_train_samples]
    session = open_session(o, "train rankdpo", resumed)
    model, accelerator = session.model, session.accelerator
    accelerator.print(f"rankings: {counts}")
    cache = encoded(o, model, accelerator, rankings, counts.bad_rows)
    relevance = [rankings[place].relevance for place in cache.kept]
    beta = beta_per_squared_error(o.beta_dpo, math.prod(model.latent_shape(o.resolution)), o.beta_convention)
    pieces = (o.train_batch_size, accelerator.num_processes, accumulation)
    plan = steps_of(*pieces, o.num_train_epochs, o.max_train_steps, len(cache))
    batch, steps = plan.batch, plan.steps or 0  # known, as the rankings are
    require_ahead(resumed, steps)
    rate = o.learning_rate * (batch if o.scale_lr else 1)
    o = session.options = settle_warmup(o, steps)
    accelerator.print("\n".join(describe_prompts(plan) + describe_course(o, steps, rate)))
    optimizer, scheduler = make_optimizer(o, session.parameters, rate, steps)
    identity = {
        **cache.identity,
        **identity_of(o, relevance, beta=beta, batch=batch),
        **optimizer_identity(o, learning_rate=rate, steps=steps),
    }
    progress = session.start(optimizer, scheduler, identity, [ranking.prompt for ranking in rankings])
    records = train_rankings(
        cache,
        relevance,
        model.predict,
        session.reference,
        schedule=model.schedule,
        prediction_type=model.prediction_type,
        loss=partial(rank_dpo, beta=beta, pair_norm=o.pair_norm, discount=o.discount),
        pair_weights=partial(gain_weights, discount=o.discount),
        beta=beta,
        parameters=session.parameters,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        accelerator=accelerator,
        batch_size=batch,
        seed=o.seed,
        max_steps=steps,
        shared_noise=o.shared_noise,
        one_graph=o.one_picture_at_a_time,
        accumulation=accumulation,
        caption_dropout=o.proportion_empty_prompts,
        max_grad_norm=o.max_grad_norm,
        progress=progress,
        spike=o.skip_spikes,
    )
    return session.follow(records, progress, steps, shown=("implicit_accuracy",))


def identity_of(o: TrainRankdpo, relevance: Sequence[Sequence[float]], *, beta: float, batch: int) -> dict[str, Any]:
    """What a resumed run must share with the saved one, beside pictures, model and optimizer. How a batch is cut into
    pieces, processes and pictures may change."""
    same = ("pair_norm", "discount", "shared_noise", "proportion_empty_prompts")
    labels = digest(json.dumps(relevance).encode())  # the cache does not know them
    return {"beta": beta, "batch": batch, "relevance": labels, **{name: getattr(o, name) for name in same}}
