"""`train d3po|spo|prdp|ddpo`: prompts, a model and a reward in, a run folder out."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from diffusion_align import rng
from diffusion_align.commands.annotate.people import people
from diffusion_align.commands.course import describe_course, settle_warmup
from diffusion_align.commands.opening import claim_early, open_session, require_ahead
from diffusion_align.commands.plan_online import describe_constants, describe_rounds, rounds_of, training_prompts
from diffusion_align.commands.run_tables import fresh, run_tables
from diffusion_align.commands.score import decoded, require_reward, reward_by_name
from diffusion_align.commands.session import Session
from diffusion_align.commands.setup import make_optimizer, optimizer_identity
from diffusion_align.data.readers import digest
from diffusion_align.options import TrainCommon, TrainD3po, TrainDdpo, TrainOnline, TrainPrdp, TrainSpo
from diffusion_align.options.train_online import compared_from
from diffusion_align.origins import STEP_AWARE
from diffusion_align.rewards.spec import read_spec
from diffusion_align.rewards.step_aware import latent_scorer, step_aware_weights
from diffusion_align.samplers import StepTable
from diffusion_align.train.branches import Comparisons, StepScore, resample
from diffusion_align.train.method import Method
from diffusion_align.train.online import Later, d3po_method, policy_gradient_method, prdp_method, spo_method
from diffusion_align.train.rounding import along_runs, arithmetic
from diffusion_align.train.rounds import run_rounds
from diffusion_align.train.runs import Bind, Runs, Score, binder, draw_runs, scored
from diffusion_align.train.steps import Sample


class Rollout:
    """What all online methods are built from: the table, policy and reference waiting for prompts, and the prompts."""

    def __init__(self, session: Session, prompts: list[str]):
        o: TrainOnline = session.options
        model, accelerator = session.model, session.accelerator
        self.session, self.options, self.prompts = session, o, prompts
        self.shape = model.latent_shape(o.resolution)
        self.dims = math.prod(self.shape)
        self.tables = run_tables(o, model.schedule)

        def in_precision(predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Bind:
            def run(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
                with accelerator.autocast():
                    return predict(x, t, text)

            return binder(run, model.schedule, model.prediction_type, model.empty_text, o.guidance)

        self.policy, self.reference = in_precision(model.predict), in_precision(session.reference)
        self.allowed = along_runs(
            arithmetic(accelerator), self.tables.whole, self.dims, o.guidance, model.prediction_type
        )  # fmt: skip
        self.per_dim = getattr(o, "log_ratio_unit", "mean") == "mean"

    def table_of(self, round: int) -> StepTable:
        """The sampler of a round: with a noise window, one of the places where that may be."""
        tables = self.tables.of_rounds
        return tables[int(rng.integers_batch(0, len(tables), self.options.seed, "window", [round]))]

    def draw(self, renewed: bool = False) -> Callable[[list[Sample], int], Runs]:
        """samples -> runs of their prompts; with a `renewed` reference against the policy that drew them."""
        o = self.options
        reference = None if renewed else self.reference

        def runs(samples: list[Sample], round: int) -> Runs:
            prompts, text = self.texts(samples)
            return draw_runs(
                self.policy, reference, self.table_of(round), text, prompts, samples, None,
                group=o.group_size, share_noise=o.share_initial_noise, shape=self.shape, seed=o.seed,
                learn_steps=o.learn_steps,
            )  # fmt: skip

        return runs

    def texts(self, samples: list[Sample]) -> tuple[list[str], Tensor]:
        prompts = [self.prompts[index] for _, index in samples]
        return prompts, self.session.model.encode_text(prompts)

    def picture_reward(self) -> Score:
        o, model = self.options, self.session.model
        if o.reward == "people" and not isinstance(o, TrainSpo):
            if self.session.accelerator.num_processes > 1:
                raise ValueError("reward people asks at one page; train with one process")
            reward = people(self.session.run / "choices", o.group_size, seed=o.seed)
        else:
            reward = reward_by_name(o.reward or "", device=model.device, seed=o.seed)
        return decoded(model, reward, o.sample_chunk)

    def later(self) -> Later:
        """Scoring, while the next pictures are drawn where the two do not want the same processor."""
        score, spec = self.picture_reward(), read_spec(self.options.reward or "")
        elsewhere = any(part.kind == "http" for part in spec.parts)
        return Later(partial(scored, score=score), elsewhere or self.session.model.device.type != "cpu")


def train_d3po(o: TrainD3po) -> int:
    def method(r: Rollout) -> Method[Any]:
        return d3po_method(
            r.draw(o.reference == "round"), r.policy, None if o.reference == "round" else r.reference, r.dims,
            beta=o.beta, clip=o.clip, per_dim=r.per_dim, allowed=r.allowed, later=r.later(),
        )  # fmt: skip

    return train_online(o, "train d3po", method, shown=("reward_mean", "implicit_accuracy"))


def train_prdp(o: TrainPrdp) -> int:
    def method(r: Rollout) -> Method[Any]:
        return prdp_method(
            r.draw(), r.policy, r.reference, r.dims,
            beta=o.beta, clip=o.clip, mean=r.per_dim, fresh=fresh(o), allowed=r.allowed, later=r.later(),
        )  # fmt: skip

    return train_online(o, "train prdp", method, shown=("reward_mean", "kl"))


def train_ddpo(o: TrainDdpo) -> int:
    def method(r: Rollout) -> Method[Any]:
        return policy_gradient_method(
            r.draw(), r.policy, r.reference, r.dims,
            clip=o.clip, std=o.advantage_std, kl_weight=o.kl_weight, per_dim=r.per_dim, allowed=r.allowed,
            later=r.later(),
        )  # fmt: skip

    return train_online(o, "train ddpo", method, shown=("reward_mean", "kl"))


def train_spo(o: TrainSpo) -> int:
    def method(r: Rollout) -> Method[Any]:
        score = step_score(r)

        def branches(samples: list[Sample], round: int) -> Comparisons:
            prompts, text = r.texts(samples)
            return resample(
                r.policy, r.table_of(round), text, prompts, samples, score,
                children=o.children, start=compared_from(o), threshold=o.threshold, segment=o.segment,
                all_pairs=o.pairs == "all", shape=r.shape, seed=o.seed, quiet=r.tables.quiet, lookahead=o.lookahead,
            )  # fmt: skip

        return spo_method(
            branches, r.policy, r.reference, r.tables.whole, r.dims,
            beta=o.beta, clip=o.clip, per_dim=r.per_dim, at_once=o.sample_chunk, allowed=r.allowed,
        )  # fmt: skip

    return train_online(o, "train spo", method, shown=("score_mean", "kept"))


def step_score(r: Rollout) -> StepScore:
    """The preference model of SPO: step-aware where one is given, else the plain reward whatever the step."""
    o = r.options
    assert isinstance(o, TrainSpo)
    if o.preference_model is None:
        plain = r.picture_reward()
        return lambda clean, prompts, t: plain(clean, prompts)
    model = r.session.model
    return latent_scorer(o.preference_model, decode=model.decode, device=model.device, chunk=o.sample_chunk)


def require_preference_model(source: str | None) -> None:
    """Raise FileNotFoundError where a preference model is not to be had, before the base is loaded."""
    if source is not None and not step_aware_weights(source).is_file():
        raise FileNotFoundError(
            f"preference model {source}: {step_aware_weights(source)} is not there; give a folder of "
            f"`reward train-spm`, a file as SPO's authors publish it, or one of {', '.join(STEP_AWARE)}"
        )


def train_online(o: TrainOnline, verb: str, method: Callable[[Rollout], Method[Any]], shown: tuple[str, ...]) -> int:
    """Open the session, build the method on its rollouts, and follow its rounds to the end."""
    resumed = claim_early(o)
    prompts = training_prompts(o)
    require_reward(o.reward)
    if isinstance(o, TrainSpo):
        require_preference_model(o.preference_model)
    session = open_session(o, verb, resumed)
    rollout = Rollout(session, prompts)
    plan = rounds_of(o, session.accelerator.num_processes, rollout.tables)
    require_ahead(resumed, plan.steps)
    rate = o.learning_rate * (plan.batch if o.scale_lr else 1)
    o = session.options = settle_warmup(o, plan.steps)
    said = describe_rounds(plan) + describe_course(o, plan.steps, rate)
    session.accelerator.print("\n".join(said + describe_constants(o, rollout.dims, rollout.tables)))
    optimizer, scheduler = make_optimizer(o, session.parameters, rate, plan.steps)
    progress = session.start(optimizer, scheduler, online_identity(o, rollout, rate, plan.steps), prompts)
    records = run_rounds(
        method(rollout),
        n=len(prompts),
        prompts_per_round=o.prompts_per_round,
        prompts_per_step=plan.prompts_per_step,
        prompts_per_chunk=max(1, o.sample_chunk // plan.pictures_per_prompt),
        passes=o.passes,
        parameters=session.parameters,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        accelerator=session.accelerator,
        seed=o.seed,
        max_steps=plan.steps,
        items_per_step=plan.pairs_per_step,
        max_rounds=plan.max_rounds,
        max_grad_norm=o.max_grad_norm,
        progress=progress,
        round=session.round,
        spike=o.skip_spikes,
        asked=session.asked,
    )
    return session.follow(records, progress, plan.steps, shown)


def online_identity(o: TrainOnline, rollout: Rollout, rate: float, steps: int) -> dict[str, Any]:
    """What a resumed run must share with the saved one: all that decides what is drawn and what is learnt of it."""
    own = {field.name for field in dataclasses.fields(o)} - {field.name for field in dataclasses.fields(TrainCommon)}
    # The files behind these two count, not their names; the others may change.
    apart = {"prompts", "preference_model", "num_rounds", "sample_chunk"}
    return {
        "model": rollout.session.model.fingerprint(),
        "prompts": digest("\n".join(rollout.prompts).encode()),
        "preference_model": _weights(getattr(o, "preference_model", None)),
        "resolution": list(rollout.shape),
        **{name: getattr(o, name) for name in sorted(own - apart)},
        **optimizer_identity(o, learning_rate=rate, steps=steps),
    }


def _weights(source: str | None) -> str | None:
    """A preference model by the content of its weights."""
    if source is None:
        return None
    with step_aware_weights(source).open("rb") as file:  # a published one has 5 GB: never whole in memory
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
