"""`reward train-spm`: pairs, a base model and a CLIP reward in, a step-aware preference model out."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from diffusion_align import rng
from diffusion_align.commands import threads
from diffusion_align.commands.course import describe_course, settle_warmup, warmup_of
from diffusion_align.commands.encode import encoded
from diffusion_align.commands.interrupt import Interruptible
from diffusion_align.commands.plan import describe_steps, steps_of
from diffusion_align.commands.plan_dpo import read_training_pairs
from diffusion_align.commands.processes import join
from diffusion_align.commands.relabel import describe_labels, labels_of_scores, own_labels, scores_of_pairs
from diffusion_align.commands.run_folder import CONFIG, METRICS
from diffusion_align.commands.sources import present_model
from diffusion_align.data import Pair, PairCache
from diffusion_align.data.readers import BadRow
from diffusion_align.options import to_yaml
from diffusion_align.options.train_spm import TrainSpm
from diffusion_align.rewards import load_reward
from diffusion_align.rewards.step_aware_load import step_aware_scorer
from diffusion_align.rewards.step_aware_model import WEIGHTS, save_step_aware, start_step_aware
from diffusion_align.system.progress import progress_bar
from diffusion_align.train import NonFiniteError, record
from diffusion_align.train.optimizer import adamw, lr_schedule
from diffusion_align.train.processes import watch
from diffusion_align.train.processes.agree import meet, most
from diffusion_align.train.step_aware import TIMESTEPS, accuracy_by_noise, train_step_aware

VERB = "reward train-spm"
ACCURACY = "accuracy.json"
EXAMPLES = 64  # pairs whose latents and pictures fit the patches of a model that reads latents


@watch.named(NonFiniteError)
def train_spm(options: TrainSpm) -> int:
    """Train a step-aware preference model; its folder also gets accuracy.json, metrics.jsonl and config.yaml.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the model as it is then is saved.
    """
    o, home = options, Path(options.output_dir)
    if (home / WEIGHTS).exists() and not o.overwrite_output_dir:
        raise ValueError(f"{home} holds a model already: --overwrite_output_dir replaces it, or give --output_dir")
    if o.cache_dir and "huggingface_hub" not in sys.modules:
        os.environ["HF_HUB_CACHE"] = o.cache_dir  # read once, when the hub's client is imported
    pairs, counts = read_training_pairs(o)
    training, held = hold_out(pairs[: o.max_train_samples], o.held_out, o.seed)

    from diffusion_align.models import load_pipeline  # seconds, so after everything that can be refused

    accelerator = join(o)
    threads.settle(o.threads, say=accelerator.print)
    accelerator.print(f"pairs: {counts}; {len(training)} to train on, {len(held)} held out")
    name = present_model(o.pretrained_model_name_or_path or "")
    model = load_pipeline(name, device=accelerator.device, revision=o.revision, variant=o.variant)
    main = accelerator.is_main_process

    def cached(pairs: Sequence[Pair], known_bad: Sequence[BadRow] = ()) -> tuple[PairCache, list[str]]:
        cache = encoded(o, model, accelerator, pairs, known_bad)
        return cache, [pairs[place].prompt for place in cache.kept]

    cache, prompts = cached(training, counts.bad_rows)
    aside = cached(held) if held else None
    labels = labels_of([training[place] for place in cache.kept], o, accelerator)
    aside_labels = labels_of([held[place] for place in aside[0].kept], o, accelerator) if aside else None
    latents, examples, decode = None, None, model.decode
    if o.inputs == "latents":
        latents, decode = model.latent_shape(o.resolution), as_they_are
        known = cache.batch(range(min(EXAMPLES, len(cache))))[0].flatten(0, 1)
        examples = known, model.decode(known).cpu()
    # Alike on every process, as every draw has an address.
    scorer = start_step_aware(o.reward, device=accelerator.device, latents=latents, examples=examples, seed=o.seed)

    def predict_clean(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return model.denoiser(text, o.guidance)(x, t)

    def accuracy() -> dict[int, float]:
        times = [t for t in TIMESTEPS if t < model.schedule.num_timesteps]
        if aside is None:
            return {}
        return accuracy_by_noise(
            *aside, step_aware_scorer(scorer), predict_clean, decode,
            schedule=model.schedule, timesteps=times, seed=o.seed, labels=aside_labels, device=model.device,
        )  # fmt: skip

    plan = steps_of(
        o.train_batch_size, accelerator.num_processes, o.gradient_accumulation_steps, o.num_train_epochs,
        o.max_train_steps, len(cache),
    )  # fmt: skip
    steps = plan.steps or 0  # known, as the pairs are
    o = settle_warmup(o, steps)
    accelerator.print("\n".join(describe_steps(plan) + describe_course(o, steps, o.learning_rate)))
    parameters = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    optimizer = adamw(parameters, o.learning_rate, weight_decay=o.adam_weight_decay)
    records = train_step_aware(
        cache,
        prompts,
        scorer,
        predict_clean,
        decode,
        schedule=model.schedule,
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=lr_schedule(optimizer, o.lr_scheduler, warmup=warmup_of(o), total=steps),
        accelerator=accelerator,
        batch_size=plan.batch,
        seed=o.seed,
        max_steps=steps,
        accumulation=o.gradient_accumulation_steps,
        labels=labels,
        max_grad_norm=o.max_grad_norm,
    )
    before = accuracy() if main else {}
    if main:
        home.mkdir(parents=True, exist_ok=True)
        (home / CONFIG).write_text(to_yaml(o, VERB, settle=True), encoding="utf-8")
        (home / METRICS).unlink(missing_ok=True)
    step, asked, write = 0, False, record.recorder(home / METRICS)
    bar = progress_bar(records, total=steps, desc=VERB, unit="step", hidden=not main)
    with Interruptible() as interrupt:
        for row in bar:
            step = row.step
            if main:
                write(row.row())
            bar.set_postfix(loss=f"{row.loss:.4f}", accuracy=f"{row.metrics['accuracy']:.2f}", refresh=False)
            asked = most(accelerator, interrupt.asked)[0] > 0
            if asked:
                break
    watch.doing("measuring accuracy", step)
    if main:
        after = accuracy()
        report = {"steps": step, "guidance": o.guidance, "held_out": len(aside[1]) if aside else 0}
        report |= {"labels": o.relabel or "data", "tie_margin": o.tie_margin if o.relabel else None}
        report |= {"before": before, "after": after}
        (home / ACCURACY).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        save_step_aware(scorer, home)
        print("\n".join([*accuracy_table(before, after), f"model: {home}"]))
    meet(accelerator)
    watch.stop()
    if asked:
        raise KeyboardInterrupt(f"the model as it was after step {step} is in {home}")
    return 0


@watch.named()
def labels_of(pairs: Sequence[Pair], o: TrainSpm, accelerator: Accelerator) -> Tensor:
    """The probability [N] that the first picture of each pair is better, by the data or by --relabel."""
    own = own_labels(pairs)
    if o.relabel is None:
        if o.keep_ties:
            accelerator.print(f"labels: the data's on {len(pairs)} pairs, of which {int((own == 0.5).sum())} are ties")
        return own
    watch.doing("relabelling")
    folder = Path(o.cache_dir or o.output_dir) / "labels"
    load = partial(load_reward, o.relabel, device=accelerator.device, seed=o.seed)
    main = accelerator.is_main_process
    if not main:
        meet(accelerator)  # the main process scores, the others read its file
    scores = scores_of_pairs(o.relabel, pairs, folder, load, progress=main)
    if main:
        meet(accelerator)
    labels = labels_of_scores(scores, o.tie_margin)
    accelerator.print(describe_labels(o.relabel, own, labels, o.tie_margin))
    return labels


def as_they_are(latents: Tensor) -> Tensor:
    """The decoder of a model that reads latents: none."""
    return latents


def hold_out(pairs: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and at least `count` others; all pairs of a prompt are on one side, each side in its order.

    Raises:
        ValueError: nothing would be left to train on.
    """
    sizes = Counter(pair.prompt for pair in pairs)
    prompts, held, total = list(sizes), set(), 0
    for place in rng.permutation(len(prompts), seed, "held out").tolist():
        if total >= count:
            break
        held.add(prompts[place])
        total += sizes[prompts[place]]
    training = [pair for pair in pairs if pair.prompt not in held]
    if not training:
        raise ValueError(f"held_out {count} leaves none of {len(pairs)} pairs to train on")
    return training, [pair for pair in pairs if pair.prompt in held]


def accuracy_table(before: dict[int, float], after: dict[int, float]) -> list[str]:
    """Lines for a terminal; none where no pair was held out."""
    rows = [f"{t:8d} {before[t]:8.3f} {after[t]:8.3f} {after[t] - before[t]:+8.3f}" for t in before]
    return [f"{'timestep':>8} {'before':>8} {'after':>8} {'change':>8}", *rows] if rows else []
