"""The start of a training run: early checks of its folder, then the model and the weights to train."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_align.commands import run_folder, threads
from diffusion_align.commands.adapters import add_trained, start_from
from diffusion_align.commands.model.base import as_given, load_base
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.train.job import join
from diffusion_align.commands.train.launcher import overruled
from diffusion_align.commands.train.session import Session
from diffusion_align.commands.train.tracking import tracker_names
from diffusion_align.commands.trained_weights import reading_of
from diffusion_align.methods.entry import Entry, Trained
from diffusion_align.options import GivenPictures, TrainCommon, UsageError
from diffusion_align.train.checkpoints.store import Checkpoint
from diffusion_align.train.ema import start_ema
from diffusion_align.train.processes import watch


def claim_early(o: TrainCommon) -> Checkpoint | None:
    """Check launcher, trackers and run folder before diffusers is imported; the checkpoint to resume from."""
    if o.cache_dir and "huggingface_hub" not in sys.modules:
        os.environ["HF_HUB_CACHE"] = o.cache_dir  # the hub's client reads it when it is imported
    tracker_names(o.report_to)
    lines = overruled(o, os.environ)
    if lines and os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    run = Path(o.output_dir)
    run_folder.require_free(run, resuming=o.resume_from_checkpoint is not None, overwrite=o.overwrite_output_dir)
    found = run_folder.find_checkpoint(run, o.resume_from_checkpoint)
    if isinstance(o, GivenPictures) and o.max_train_steps is not None:
        require_ahead(found, o.max_train_steps)
    return found


def require_ahead(resumed: Checkpoint | None, steps: int) -> None:
    """Raise UsageError if the checkpoint is from a later step than the end of the run."""
    if resumed is not None and resumed.step > steps:
        raise UsageError(
            f"the checkpoint is at step {resumed.step} and the run ends at step {steps}: give a larger "
            "--max_train_steps, or an earlier checkpoint to --resume_from_checkpoint"
        )


@watch.names_failed_rank()
def open_session(o: Any, entry: Entry[Any], resumed: Checkpoint | None) -> Session:
    """Load the model, prepare the weights to train, and keep a frozen reference if the loss needs one."""
    if o.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision fp16 needs a CUDA GPU and there is none here; use bf16 or no")
    accelerator = join(o, log_folder(o))
    workers = threads.set_threads(o.threads, resumed.state.get("threads") if resumed else None, say=accelerator.print)
    set_tf32(o.allow_tf32)
    name = {"pretrained_model_name_or_path": present_model(o.pretrained_model_name_or_path or "")}
    model = load_base(as_given(name, o), accelerator.device)
    model.reading = reading_of(o, {})
    session = Session(o, entry.verb, Path(o.output_dir), resumed, accelerator, model, workers, entry.chunks)
    if entry.unet:
        _train_unet(session, entry.needs_reference(o))
    return session


def _train_unet(session: Session, needs_reference: bool) -> None:
    """Prepare a session to train the UNet, or a LoRA on it."""
    from diffusion_align.models import reference, save_lora, save_unet, save_with_start, set_attention, trainable

    o, model = session.options, session.model
    xformers = o.enable_xformers_memory_efficient_attention
    set_attention(model.unet, xformers=xformers, gradient_checkpointing=o.gradient_checkpointing)
    start = start_from(model, o, o.lora, o.lora_mode) if o.lora is not None else None
    if start is not None:
        session.accelerator.print(f"starts from      {o.lora} ({', '.join(start.kinds)}), --lora_mode {start.mode}")
    if o.mode == "lora":
        if o.new_lora is not None:
            add_trained(model, o.new_lora, o.seed)
    trainable(model.unet, o.mode)
    named = {key: value for key, value in model.unet.named_parameters() if value.requires_grad}
    write = partial(save_lora if o.mode == "lora" else save_unet, model.unet)
    if start is not None and start.lora is None and o.mode == "lora":
        write = partial(save_lora, model.unet, trained_on=model.merged)
    elif start is not None and start.lora is not None:
        write = partial(save_with_start, model.unet, start)
    session.trained = Trained(named, write)
    session.ema = start_ema(named, o.ema_decay) if o.use_ema else None
    session.reference = reference(model, o.mode) if needs_reference else None


def set_tf32(allow: bool) -> None:
    """Switch TF32 on or off, in matrix products and convolutions. torch's default is on in convolutions only."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def log_folder(o: TrainCommon) -> str:
    """The folder for trackers that write files; a relative --logging_dir is inside the run folder."""
    return str(Path(o.output_dir) / (o.logging_dir or "logs"))
