"""`train dpo`: pairs and a model in, a run folder out. Builds, wires, loops, writes; what computes lies below."""

from __future__ import annotations

import logging
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from diffusion_align.commands import grids, run_folder
from diffusion_align.commands.interrupt import Interruptible
from diffusion_align.commands.plan import describe_steps, steps_of
from diffusion_align.commands.plan_dpo import read_training_pairs
from diffusion_align.commands.setup_dpo import identity_of, make_loss, make_optimizer, precision
from diffusion_align.commands.sources import present_model
from diffusion_align.data import build_cache
from diffusion_align.objectives import beta_per_squared_error
from diffusion_align.options import TrainDpo, to_yaml
from diffusion_align.train import Progress, checkpoint, record, train_pairs
from diffusion_align.train.checkpoint import CheckpointError
from diffusion_align.train.ema import start_ema
from diffusion_align.train.state import pack, restore

KEEP_ALL = sys.maxsize
logger = logging.getLogger(__name__)


def train_dpo(options: TrainDpo) -> int:
    """Train with Diffusion-DPO; see `TrainDpo` for what can be asked.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is saved; its text is the command that goes on.
    """
    o = options
    if o.cache_dir and "huggingface_hub" not in sys.modules:
        os.environ["HF_HUB_CACHE"] = o.cache_dir  # read once, when the hub's client is imported
    run = Path(o.output_dir)
    # What can be refused is refused before the seconds that importing diffusers takes.
    run_folder.require_free(run, resuming=o.resume_from_checkpoint is not None, overwrite=o.overwrite_output_dir)
    resumed = run_folder.find_checkpoint(run, o.resume_from_checkpoint)
    pairs, counts = read_training_pairs(o)
    pairs = pairs[: o.max_train_samples]

    from diffusion_align.models import (
        add_lora,
        load_pipeline,
        reference,
        save_lora,
        save_unet,
        set_attention,
        trainable,
    )
    from diffusion_align.models.adapters import TARGETS

    accelerator = Accelerator(mixed_precision=precision(o.mixed_precision), cpu=o.device == "cpu")
    accelerator.print(f"pairs: {counts}")
    if o.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    name = present_model(o.pretrained_model_name_or_path or "")
    gate = load_pipeline(name, device=accelerator.device, revision=o.revision, variant=o.variant)
    xformers = o.enable_xformers_memory_efficient_attention
    set_attention(gate.unet, xformers=xformers, gradient_checkpointing=o.gradient_checkpointing)
    resolution = o.resolution or gate.resolution
    with accelerator.main_process_first():
        cache = build_cache(
            gate,  # pyright: ignore[reportArgumentType]  (a cached property is a property)
            pairs,
            Path(o.cache_dir) / "encoded" if o.cache_dir else run / "cache",
            resolution=resolution,
            seed=o.seed,
            known_bad=counts.bad_rows,
            max_bad_fraction=o.max_bad_fraction,
            progress=accelerator.is_main_process,
        )

    if o.mode == "lora":
        add_lora(gate.unet, o.rank, o.network_alpha, TARGETS[o.lora_targets], seed=o.seed)
    parameters = trainable(gate.unet, o.mode)
    named = {key: value for key, value in gate.unet.named_parameters() if value.requires_grad}
    frozen = reference(gate, o.mode)
    beta = beta_per_squared_error(o.beta_dpo, math.prod(gate.latent_shape(resolution)), o.beta_convention)
    pieces = (o.train_batch_size, accelerator.num_processes, o.gradient_accumulation_steps)
    plan = steps_of(*pieces, o.num_train_epochs, o.max_train_steps, len(cache))
    batch, steps = plan.batch, plan.steps or 0  # known, as the pairs are
    accelerator.print("\n".join(describe_steps(plan)))
    rate = o.learning_rate * (batch if o.scale_lr else 1)
    optimizer, scheduler = make_optimizer(o, parameters, rate, steps)
    identity = identity_of(o, cache.identity, beta=beta, batch=batch, learning_rate=rate, steps=steps)
    if resumed is not None:
        checkpoint.require_same_identity(resumed.state["identity"], identity)

    prompts = grids.grid_prompts(o.validation_prompts, (pair.prompt for pair in pairs))
    look = {"seed": o.seed, "steps": o.validation_sampling_steps, "guidance": o.validation_guidance}
    base = torch.empty(0)
    if accelerator.is_main_process:
        step = resumed.step if resumed else 0
        run_folder.claim(run, to_yaml(o, "train dpo"), step=step, overwrite=o.overwrite_output_dir)
        with accelerator.autocast():  # before the checkpoint's weights are put in: now the policy is the base
            base = grids.base_pictures(gate, prompts, run / run_folder.SAMPLES / "base", **look)
    ema = start_ema(named, o.ema_decay) if o.use_ema else None
    progress = restore(resumed, named, optimizer, scheduler, ema) if resumed else Progress()
    if resumed:
        accelerator.print(f"resumed at step {progress.step} of {steps}")
    accelerator.wait_for_everyone()

    def save(progress: Progress) -> None:
        if accelerator.is_main_process:
            tensors, state = pack(named, optimizer, scheduler, progress, ema)
            state["identity"] = identity
            keep = o.checkpoints_total_limit or KEEP_ALL
            try:
                checkpoint.save(run / run_folder.CHECKPOINTS, progress.step, tensors, state, keep=keep)
            except CheckpointError as error:  # a full disk now is no reason to lose the run
                logger.warning("%s", error)
        accelerator.wait_for_everyone()

    def draw(step: int) -> None:
        if accelerator.is_main_process:
            with accelerator.autocast():
                grids.write_grid(gate, prompts, base, run / run_folder.SAMPLES / f"step-{step:08d}.png", **look)
        accelerator.wait_for_everyone()

    records = train_pairs(
        cache,
        gate.predict,
        frozen,
        schedule=gate.schedule,
        prediction_type=gate.prediction_type,
        loss=make_loss(o.loss_type, beta, o.label_smoothing),
        beta=beta,
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        accelerator=accelerator,
        batch_size=batch,
        seed=o.seed,
        max_steps=steps,
        accumulation=o.gradient_accumulation_steps,
        caption_dropout=o.proportion_empty_prompts,
        max_grad_norm=o.max_grad_norm,
        progress=progress,
    )
    bar = tqdm(
        total=steps,
        initial=progress.step,
        desc="train dpo",
        unit="step",
        disable=not accelerator.is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file gets a line now and then
    )
    with bar, Interruptible() as interrupt:
        for row in records:
            if ema is not None and row.updated:
                ema.update(named)
            if accelerator.is_main_process:
                record.append(run / run_folder.METRICS, row.row())
            bar.set_postfix(loss=f"{row.loss:.4f}", accuracy=f"{row.metrics['implicit_accuracy']:.2f}", refresh=False)
            bar.update()
            stop = _anywhere(interrupt.asked, accelerator)
            if stop or row.step % o.checkpointing_steps == 0 or row.step == steps:
                save(row.progress)
            if stop:
                raise KeyboardInterrupt(f"step {row.step} is saved; go on with: {run_folder.resume_line(run)}")
            if o.run_validation and row.step % o.validation_steps == 0 and row.step < steps:
                draw(row.step)
    with ema.applied(named) if ema is not None else nullcontext():
        draw(steps)
        if accelerator.is_main_process:
            written = (save_lora if o.mode == "lora" else save_unet)(gate.unet, run)
    if accelerator.is_main_process:
        print(f"trained weights: {written}\nnext: diffusion-align evaluate {run}")
    accelerator.wait_for_everyone()
    return 0


def _anywhere(asked: bool, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: all must agree on it, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return asked
    total = accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum")
    return float(total) > 0  # pyright: ignore[reportArgumentType]
