"""An online run with a loaded model: prompts, step tables, networks with guidance, and the reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.disk import digest
from diffusion_align.methods.entry import About, Length, Opened, Started
from diffusion_align.methods.shared.noising import Predict
from diffusion_align.methods.shared.rollout_plan import (
    RoundPlan,
    RunTables,
    describe_rounds,
    describe_sampler,
    evaluations_of_runs,
    plan_prompts,
    run_tables,
)
from diffusion_align.methods.shared.rollouts import Rollouts, reward_of_latents
from diffusion_align.methods.shared.runs import Bind, Prompted, Runs, Score, binder, draw_runs, scored
from diffusion_align.methods.shared.start_checks import along_runs, arithmetic
from diffusion_align.objectives import stepwise_range
from diffusion_align.options import TrainOnline
from diffusion_align.samplers import StepTable
from diffusion_align.train.method import OnlineMethod, Sample
from diffusion_align.train.rounds import RoundSizes, run_rounds


class OnlineSetup:
    """Everything that the online methods have in common."""

    def __init__(self, o: TrainOnline, opened: Opened):
        model = opened.model
        self.opened, self.prompts = opened, opened.items
        self.options: Any = o  # of one method, so with more than those that all have
        self.shape, self.dims = opened.shape, math.prod(opened.shape)
        self.tables = run_tables(o, model.schedule)

        def bind(predict: Predict) -> Bind:
            def in_precision(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
                with opened.accelerator.autocast():
                    return predict(x, t, text)

            return binder(in_precision, model.schedule, model.prediction_type, model.empty_text, o.guidance)

        assert opened.networks.reference is not None  # every online method compares with one
        self.policy, self.reference = bind(opened.networks.policy), bind(opened.networks.reference)
        self.allowed = along_runs(
            arithmetic(opened.accelerator), self.tables.whole, self.dims, o.guidance, model.prediction_type
        )  # fmt: skip

    @property
    def per_dim(self) -> bool:
        """Whether beta and clip are for log-ratios averaged over dims."""
        return self.options.log_ratio_unit == "mean"

    def table_of(self, round: int) -> StepTable:
        """The step table of a round; with a noise window, its place is drawn for each round."""
        tables = self.tables.of_rounds
        return tables[int(rng.integers_batch(0, len(tables), self.options.seed, "window", [round]))]

    def prompted(self, samples: list[Sample]) -> Prompted:
        """The prompts of these samples and their encodings."""
        prompts = [self.prompts[index] for _, index in samples]
        return Prompted(prompts, self.opened.model.encode_text(prompts), samples)

    def rollouts(self, *, renewed: bool = False) -> Rollouts[Runs]:
        """Trajectories of the prompts of a round. `renewed`: the reference is the policy that drew them.

        They are scored while the next chunk is drawn, if drawing and scoring use different processors.
        """
        o, score = self.options, self.picture_score()
        reference = None if renewed else self.reference

        def draw(samples: list[Sample], round: int) -> Runs:
            return draw_runs(
                self.policy, reference, self.table_of(round), self.prompted(samples), group=o.group_size,
                share_noise=o.share_initial_noise, shape=self.shape, seed=o.seed, learn_steps=o.learn_steps,
            )  # fmt: skip

        elsewhere = any(part.kind == "http" for part in o.reward_spec.parts)
        ahead = elsewhere or self.opened.model.device.type != "cpu"
        return Rollouts(draw, self.policy, reference, self.dims, self.allowed, partial(scored, score=score), ahead)

    def picture_score(self) -> Score:
        """(final latents, prompts) -> rewards of the pictures."""
        o = self.options
        return reward_of_latents(self.opened.model, self.opened.reward(o.reward_spec), o.sample_chunk)


def start_with(build: Callable[[Any, OnlineSetup], OnlineMethod[Any]], o: TrainOnline, opened: Opened) -> Started:
    """The rounds of the method that `build` makes from options and setup."""
    setup = OnlineSetup(o, opened)
    identity = {
        "model": opened.model.fingerprint(),
        "prompts": digest("\n".join(setup.prompts).encode()),
        "preference_model": None,
        "resolution": list(setup.shape),
    }
    return Started(
        count=len(setup.prompts),
        identity=identity,
        loop=lambda run, length: run_rounds(build(o, setup), run, length.sizes),
    )


def online_length(
    o: TrainOnline,
    about: About,
    *,
    plan: RoundPlan | None = None,
    evaluations: Callable[[Any, RunTables], dict[str, float]] = evaluations_of_runs,
) -> Length:
    """Rounds, steps and evaluations; by default of a method whose steps take all pictures of some prompts."""
    tables = run_tables(o, about.schedule)
    plan = plan or plan_prompts(o, about.processes)
    per_prompt = evaluations(o, tables)
    counts = " + ".join(f"{n:g} {word}" for word, n in per_prompt.items())
    in_all = round(sum(per_prompt.values()) * o.prompts_per_round) * plan.rounds
    chunk = max(1, o.sample_chunk // plan.pictures_per_prompt)
    sizes = RoundSizes(
        about.count or 0, o.prompts_per_round, plan.prompts_per_step, chunk, o.passes, plan.pairs_per_step,
        plan.max_rounds,
    )  # fmt: skip
    lines = [describe_sampler(o, tables), *describe_rounds(plan), f"evaluations      a prompt and round: {counts}"]
    return Length(plan.steps, plan.batch, [*lines, f"latent dims D    {about.dims}"], sizes=sizes, evaluations=in_all)


def describe_clamp(o: Any, about: About) -> list[str]:
    """beta and clip of a stepwise logistic loss in nats, and the values that the loss can reach."""
    unit = about.dims if o.log_ratio_unit == "mean" else 1
    low, high = stepwise_range(o.beta, o.clip)
    nats = "none" if o.clip is None else f"{math.log1p(-o.clip) * unit:.4g} .. {math.log1p(o.clip) * unit:.4g} nats"
    return [
        f"beta             {o.beta:g} on {o.log_ratio_unit} log-ratios = {o.beta / unit:.4g} per nat of a step",
        f"clamp            {nats} a step",
        f"loss             starts at log 2 = 0.6931, reaches [{low:.4f}, {high:.4f}]",
    ]
