"""Early checks, before anything is loaded: devices, packages, models and memory that this machine lacks.

torch is imported only if the options name a device other than the CPU, or fp16.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_align.commands.adapters import require_lora
from diffusion_align.commands.footprint import require_memory
from diffusion_align.commands.model.base import names_options
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.commands.sources import present_model
from diffusion_align.models.hub import local_model, local_vae, on_hub
from diffusion_align.models.lora.rank import RankError, require_layers, require_rank
from diffusion_align.options import Evaluate, Sample, TrainCommon, TrainUnet, UsageError
from diffusion_align.options.model import ModelInspect

XFORMERS = "--enable_xformers_memory_efficient_attention"


def require_possible(o: Any) -> None:
    """Check that this machine has what the options of any verb need.

    Raises:
        UsageError: no such device, a missing package, or as `require_model`.
        FileNotFoundError: as `require_runs`.
    """
    require_device(getattr(o, "device", None))
    require_runs(o)
    require_lora(o)
    if isinstance(o, TrainCommon):
        require_packages(o)
    if isinstance(o, TrainCommon) and o.mixed_precision == "fp16":
        require_fp16(o.device)
    require_model(o)


def require_model(o: Any) -> None:
    """Check that the model exists, that the rank of the LoRA fits its layers, and that the batch fits the memory.

    A model on the hub is not checked before it is downloaded.

    Raises:
        FileNotFoundError, ValueError: as `models.hub.locate`. UsageError: the rank or the batch is too large.
    """
    if getattr(o, "pretrained_model_name_or_path", None) is None or isinstance(o, ModelInspect):
        return
    name = present_model(o.pretrained_model_name_or_path)
    with names_options():
        local_model(name)
        if vae := getattr(o, "pretrained_vae_model_name_or_path", None):
            local_vae(vae)
        facts = read_model_facts(name, getattr(o, "prediction_type", None))
    require_schedule(name, facts.scheduler)
    if not isinstance(o, TrainCommon):
        return
    if isinstance(o, TrainUnet) and (new := o.new_lora) is not None and facts.unet_shapes:
        try:
            require_layers(facts.unet_shapes, new.own_names)
            require_rank(facts.unet_shapes, new.rank, new.layers)
        except RankError as error:
            raise UsageError(f"adapter.rank: {error}: give --rank {error.largest} at most") from None
        except ValueError as error:
            raise UsageError(f"adapter.lora_targets: {error}") from None
    require_memory(o, facts)


def require_schedule(name: str, scheduler: dict[str, Any]) -> None:
    """Raise UsageError for noise levels that end in pure noise with a network that predicts that noise."""
    if scheduler.get("rescale_betas_zero_snr") and scheduler.get("prediction_type", "epsilon") == "epsilon":
        raise UsageError(
            f"{name} has zero terminal SNR (rescale_betas_zero_snr in its scheduler) and predicts epsilon, which says "
            "nothing of the picture at the last step, pure noise: give --prediction_type v_prediction if the network "
            "predicts v, else set rescale_betas_zero_snr to false in its scheduler_config.json"
        )


def require_runs(o: Any) -> None:
    """Raise FileNotFoundError for a run, a checkpoint or a file that is not there; a name on the hub may be."""
    given = getattr(o, "run", None) or ()
    for where in (given,) if isinstance(given, str) else given:
        path = Path(where).expanduser()
        if not path.exists() and not (isinstance(o, Evaluate) and (where == "tiny" or on_hub(where))):
            raise FileNotFoundError(f"{where}: no such run, checkpoint or model")
        if isinstance(o, Sample) and path.is_dir() and not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"{where} is not a run folder: it has no config.yaml")


def require_device(word: str | None) -> None:
    """Raise UsageError for a device that does not exist, or one device for several processes."""
    if word is None or word == "cpu":
        return
    kind, _, number = word.partition(":")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if number and processes > 1:
        raise UsageError(f"--device {word} is one device for {processes} processes: give {kind}, and each has its own")
    there = devices()
    if word not in there:
        cure = " (this build of torch has no CUDA)" if kind == "cuda" and not _cuda_is_built() else ""
        raise UsageError(
            f"--device {word} does not exist{cure}: this machine has {', '.join(there)}; "
            "without --device the best one is used"
        )


def devices() -> list[str]:
    """Every value of `--device` that works on this machine."""
    import torch

    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    return there


def _cuda_is_built() -> bool:
    import torch

    return torch.backends.cuda.is_built()


def require_fp16(device: str | None) -> None:
    """Raise UsageError unless there is a CUDA GPU: the loss scaling of fp16 has kernels for CUDA only."""
    if device in ("cpu", "mps") or "cuda" not in devices():
        raise UsageError("machine.mixed_precision fp16 needs a CUDA GPU and there is none here; use bf16 or no")


def require_packages(o: TrainCommon) -> None:
    """Raise UsageError for options whose package is not installed, without importing it."""
    if o.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise UsageError(
            "train.use_8bit_adam needs bitsandbytes: pip install 'diffusion_align[8bit]', or leave the option out"
        )
    if isinstance(o, TrainUnet) and o.enable_xformers_memory_efficient_attention:
        if find_spec("xformers") is None:
            raise UsageError(
                f"{XFORMERS} needs xformers: pip install 'diffusion_align[xformers]', or leave it out "
                "(PyTorch's own attention is as fast)"
            )
        if o.device in ("cpu", "mps") or "cuda" not in devices():
            raise UsageError(f"{XFORMERS} needs a CUDA GPU and there is none here: leave it out")
