"""What is trained and what it is compared with: LoRA or all weights, and the frozen reference beside them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from ..rng import normal
from .guidance import Predict
from .pipeline import TextToImage

MODES = ("lora", "full")
LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # the header key under which diffusers keeps rank and alpha

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The feed-forward and projection layers of attention blocks, and the convolutions of residual blocks.
WIDE = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
)
TARGETS = {"attention": ATTENTION, "wide": WIDE}


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    seed: int = 0,
) -> list[Parameter]:
    """Freeze the network and add a LoRA (Hu et al. 2021, arXiv 2106.09685) that changes nothing yet; returns its
    weights.

    The down-projections are normal with deviation 1/rank, drawn at the address (seed, "lora", layer), the
    up-projections 0.
    The weights are float32 whatever the network's precision. `alpha` (by default the rank) scales the update by
    alpha/rank.

    Raises:
        ValueError: a rank below 1, a LoRA is already there, or no layer has such a name.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA is at least 1, not {rank}")
    if getattr(unet, "peft_config", None):
        raise ValueError("this network already has a LoRA: load the model again before adding another")
    layers = [name for name, _ in unet.named_modules()]
    if not any(name == target or name.endswith("." + target) for name in layers for target in targets):
        raise ValueError(f"no layer of the network is named like any of {', '.join(targets)}")
    unet.requires_grad_(False)
    strength = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=strength, target_modules=list(targets))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # peft draws its first weights from the global generator
        unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            parameter.data.copy_(normal(parameter.shape, seed, "lora", name) / rank)
        else:
            parameter.data.zero_()
    return trainable(unet, "lora")


def trainable(unet: UNet2DConditionModel, mode: str) -> list[Parameter]:
    """The parameters that a mode trains, in the network's order: the LoRA's, or ("full") all, whose gradients are
    switched on.

    Raises ValueError for an unknown mode, and for "full" in half precision, where small updates would be rounded away.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "full":
        if unet.dtype != torch.float32:
            raise ValueError(
                f"full fine-tuning needs float32 weights, not {unet.dtype}: load the model with dtype=torch.float32"
            )
        unet.requires_grad_(True)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def reference(gate: TextToImage, mode: str) -> Predict:
    """The frozen model as `(x, t, text) -> output` float32, without gradients.

    With a LoRA it is the same network with the adapter switched off, so its precision path is the policy's and their
    difference at the start is exactly 0, at the cost of no memory. With full training it is a frozen copy, taken now.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "full":
        frozen = copy.copy(gate)
        frozen.unet = copy.deepcopy(gate.unet).requires_grad_(False)
        return torch.no_grad()(frozen.predict)

    @torch.no_grad()
    def without_adapter(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        gate.unet.disable_adapters()
        try:
            return gate.predict(x, t, text)
        finally:
            gate.unet.enable_adapters()

    return without_adapter


def save_lora(unet: UNet2DConditionModel, folder: str | os.PathLike[str]) -> Path:
    """Write `pytorch_lora_weights.safetensors` so that `pipe.load_lora_weights(folder)` needs nothing else typed.

    Rank, alpha and targets go into the file's header: without them diffusers takes alpha for the rank on reload.
    """
    config = unet.peft_config["default"]  # type: ignore[index]
    metadata = {
        "unet.r": config.r,
        "unet.lora_alpha": config.lora_alpha,
        "unet.target_modules": sorted(config.target_modules),
    }
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=dict(_lora_state(unet)), unet_lora_adapter_metadata=_unprefixed(metadata)
    )
    return Path(folder) / LORA_FILE


def load_lora(gate: TextToImage, folder: str | os.PathLike[str]) -> None:
    """Add the LoRA of a run folder (or of a file) to the gate's network, all of it or nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing, unknown, of another shape or not finite; the message names it.
    """
    path = Path(folder) / LORA_FILE if Path(folder).is_dir() else Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: give the folder of a finished LoRA run")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again") from error
    rank, alpha, targets = _lora_shape(path, header, tensors)
    add_lora(gate.unet, rank, alpha, targets)
    try:
        _fill_lora(gate.unet, path, tensors)
    except ValueError:
        gate.unet.delete_adapters("default")
        raise


def _lora_shape(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> tuple[int, float, list[str]]:
    """Rank, alpha and target layers of a file: from its header, else read off its keys (alpha is then the rank)."""
    if not tensors:
        raise ValueError(f"{path} holds no tensors: the run that wrote it did not finish")
    foreign = next((key for key in tensors if not key.startswith("unet.") or ".lora" not in key), None)
    if foreign:
        raise ValueError(
            f"{path}: key {foreign} is not a UNet LoRA in diffusers format (unet.<layer>.lora.down.weight)"
        )
    if METADATA in header:
        known = json.loads(header[METADATA])
        missing = [key for key in ("unet.r", "unet.lora_alpha", "unet.target_modules") if key not in known]
        if missing:
            raise ValueError(f"{path}: its header lacks {missing[0]}")
        return int(known["unet.r"]), float(known["unet.lora_alpha"]), list(known["unet.target_modules"])
    down = {key: tensor for key, tensor in tensors.items() if key.endswith(("lora.down.weight", "lora_A.weight"))}
    ranks = {tensor.shape[0] for tensor in down.values()}
    if len(ranks) != 1:
        raise ValueError(f"{path}: its layers have ranks {sorted(ranks)}, and no header says what was meant")
    layers = sorted({key.removeprefix("unet.").rsplit(".lora", 1)[0] for key in tensors})
    return ranks.pop(), float(next(iter(down.values())).shape[0]), layers


def _fill_lora(unet: UNet2DConditionModel, path: Path, tensors: dict[str, Tensor]) -> None:
    wanted = {f"unet.{key}": parameter for key, parameter in _lora_state(unet).items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"{path}: the network has no layer for {len(extra)} tensors, the first is {extra[0]}")
    for key, parameter in wanted.items():
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{path}: {key} is {list(tensor.shape)}, the network wants {list(parameter.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {key} has values that are not finite")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


def _lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA's own tensors (not copies) under diffusers' names, for every kind of layer.

    diffusers' own converter renames attention layers only; a file of mixed names reloads in part, with a warning.
    """
    state = get_peft_model_state_dict(unet)
    return {
        key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value for key, value in state.items()
    }


def _unprefixed(metadata: dict[str, object]) -> dict[str, object]:
    return {key.removeprefix("unet."): value for key, value in metadata.items()}


def save_unet(unet: UNet2DConditionModel, folder: str | os.PathLike[str]) -> Path:
    """Write the whole network to `folder/unet`, loadable by `UNet2DConditionModel.from_pretrained(folder,
    subfolder="unet")`."""
    path = Path(folder) / "unet"
    unet.save_pretrained(path)
    return path


def load_unet(gate: TextToImage, folder: str | os.PathLike[str]) -> None:
    """Replace the gate's network by the one in `folder/unet`, in the gate's precision.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or takes other latents or text than the gate's.
    """
    path = Path(folder) / "unet"
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not there: give the folder of a finished run with full fine-tuning")
    try:
        unet = UNet2DConditionModel.from_pretrained(path, torch_dtype=gate.dtype)
    except Exception as error:
        raise ValueError(f"{path} could not be loaded ({str(error).splitlines()[0]}): copy it again") from error
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        if unet.config[key] != gate.unet.config[key]:
            raise ValueError(f"{path}: {key} is {unet.config[key]}, the base model has {gate.unet.config[key]}")
    if not all(bool(p.detach().isfinite().all()) for p in unet.parameters()):
        raise ValueError(f"{path} has weights that are not finite")
    torch.nn.Module.to(unet, gate.device)  # diffusers' own wrapper hides the signature
    gate.unet = unet.eval().requires_grad_(False)
