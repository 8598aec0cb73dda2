"""A lower bound for the memory of a training, so that a run that cannot fit is refused before it starts.

It counts the UNet's weights in half precision, and with --mode full also float32 weights, gradients and AdamW's
moments. For every picture in the network it counts latents, noise, noised latents, target and two outputs. Of the
activations it counts the skip connections, which every forward pass holds. In offline training without gradient
checkpointing it counts instead two tensors of each residual block of the upward path and four of each attention block.
The real need is several times that. torch is imported only if the device may be a GPU and the need is large.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusion_align.commands.model_facts import ModelFacts
from diffusion_align.options import (
    TrainCommon,
    TrainOffline,
    TrainOnline,
    UsageError,
)

SMALL = 1 << 30  # bytes that fit everywhere
COPIES = 6  # tensors of the size of a picture's latents: latents, noise, noised latents, target, two outputs


def require_memory(o: Any, facts: ModelFacts) -> None:
    """Check that model and batch fit the memory of the device by the lower bound.

    Raises:
        UsageError: they do not fit; the message names the largest batch that would.
    """
    if not facts.known:
        return
    batch = o.network_batch
    fixed, each, count = weights_bytes(o, facts), picture_bytes(o, facts) * batch.rows, batch.count
    if fixed + count * each < SMALL:
        return
    there, where = memory_of(o.device)
    if fixed > there:
        cure = "--mode lora needs less" if getattr(o, "mode", "lora") == "full" else "use a smaller model"
        raise UsageError(f"this model needs {_gb(fixed)} for its weights alone and {where} has {_gb(there)}; {cure}")
    if fixed + count * each > there:
        fits = max(1, (there - fixed) // each)
        more = "" if isinstance(o, TrainOnline) else "; for a larger batch use --gradient_accumulation_steps"
        raise UsageError(
            f"--{batch.option} {count} needs at least {_gb(fixed + count * each)} and {where} has {_gb(there)}: "
            f"{fits} {batch.unit} at most, and likely far fewer{more}"
        )


def weights_bytes(o: TrainCommon, facts: ModelFacts) -> int:
    """Bytes of the UNet's weights in half precision. With --mode full also float32 weights, gradients and moments."""
    if getattr(o, "mode", "lora") != "full":
        return 2 * facts.full_parameters()
    moments = 2 if getattr(o, "use_8bit_adam", False) else 8
    return (2 + 4 + 4 + moments) * facts.full_parameters()


def picture_bytes(o: TrainCommon, facts: ModelFacts) -> int:
    """Bytes that one picture of the network's batch needs: its latents and activations."""
    channels, height, width = facts.latent_shape(o.resolution)
    size = 4 if o.mixed_precision == "no" else 2
    graph = isinstance(o, TrainOffline) and not o.gradient_checkpointing
    return COPIES * 4 * channels * height * width + size * activations(facts.unet, height, width, graph=graph)


def activations(unet: dict[str, Any], height: int, width: int | None = None, *, graph: bool) -> int:
    """A lower bound for the activations of one picture that are in memory at once, with or without an autograd graph.

    `unet` is the content of the UNet's config.json; height and width are those of the latents.
    """
    channels, layers = unet["block_out_channels"], unet.get("layers_per_block", 2)
    per = layers if isinstance(layers, list) else [layers] * len(channels)
    kinds = unet.get("down_block_types", [])
    total, before = 0, channels[0]  # input channels of a level, at its resolution
    for level, (wide, count) in enumerate(zip(channels, per, strict=True)):
        size = (height >> level) * ((width or height) >> level)
        attends = level < len(kinds) and "Attn" in kinds[level]
        if graph:
            total += size * wide * (2 * (count + 1) + 4 * (2 * count + 1) * attends)
        else:
            total += size * (wide * count + before)
        before = wide
    return total


def memory_of(device: str | None) -> tuple[int, str]:
    """The memory of the device in bytes (for the CPU: what this process may use), and the device in words."""
    if device != "cpu":
        import torch

        if torch.cuda.is_available() and device != "mps":
            return torch.cuda.mem_get_info(torch.device(device or "cuda"))[1], device or "cuda"
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # not here, or "max"
            pass
    return min(limits, default=1 << 62), "this machine"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
