"""A CLIP vision tower that knows the noise level or reads latents, run module by module from open_clip's tower.

The conditioning is adaptive layer norm, as in DiT (Peebles & Xie 2022, arXiv 2212.09748), added to a trained tower so
that at first it changes nothing. open_clip's modules are not replaced, so their weights keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_align import rng
from diffusion_align.tensors import widen

FREQUENCIES = 256
Module = TypeVar("Module", bound=nn.Module)


def sinusoid(t: Tensor, dims: int = FREQUENCIES) -> Tensor:
    """Times [B] as [B,dims]: cosines, then sines, of t at dims/2 frequencies from 1 down to nearly 1/10000 per step."""
    half = dims // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = widen(t)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimeConditioning(nn.Module):
    """The added weights: time [B] -> shift, scale and gate of every block's two branches, shift and scale at the end.

    sinusoid -> Linear -> SiLU -> Linear, then for each block SiLU -> Linear(6 width), and at the end Linear(2 width)
    (SPO, Liang et al. 2024, arXiv 2406.04314). These last Linears start with weights 0 and biases that leave the tower
    unchanged: shift 0, scale 0, gate 1. The embedding before them starts at random: if it were 0 too, no gradient would
    reach either.
    """

    def __init__(self, width: int, blocks: int, seed: int = 0):
        super().__init__()
        first, second = _bare(nn.Linear, FREQUENCIES, width), _bare(nn.Linear, width, width)
        last = [_bare(nn.Linear, width, 6 * width) for _ in range(blocks)]
        self.embed = nn.Sequential(first, nn.SiLU(), second)
        self.blocks = nn.ModuleList(last)
        self.final = _bare(nn.Linear, width, 2 * width)
        with torch.no_grad():
            for name, layer in (("first", first), ("second", second)):
                random = rng.normal(layer.weight.shape, seed, "time embedding", name)
                layer.weight.copy_(random / layer.in_features**0.5)
                layer.bias.zero_()
            for layer in (*last, self.final):
                layer.weight.zero_()
                layer.bias.zero_()
            for layer in last:
                layer.bias.view(2, 3, width)[:, 2] = 1.0  # the gates

    def forward(self, t: Tensor) -> Tensor:
        """Times [B] -> the activation [B,width] that the last Linears read."""
        return F.silu(self.embed(sinusoid(t).to(self.final.weight.dtype)))


def _bare(kind: type[Module], *settings: Any) -> Module:
    """A layer without initial values; torch would draw them from its global generator."""
    layer: Any = nn.utils.skip_init(kind, *settings)
    return layer


def require_vit(visual: Any) -> None:
    """Raise ValueError unless `visual` is a vision transformer with supported blocks and pooling."""
    from open_clip.transformer import VisionTransformer

    found = type(visual).__name__
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is None and visual.pool_type in ("tok", "avg"):
            return
        found += " with attentional pooling" if visual.attn_pool is not None else f" with pooling {visual.pool_type!r}"
    raise ValueError(
        f"the vision tower is a {found}; only open_clip's VisionTransformer with tok or avg pooling is supported"
    )


def encode(visual: Any, time: TimeConditioning, inputs: Tensor, t: Tensor) -> Tensor:
    """Features [B,E] of a tower's inputs [B,C,H,W] (normalised pixels, or latents) at times t [B]; differentiable.

    With untrained `time` these are `visual(inputs)`, bit for bit. The tower's patch dropout is not applied.
    """
    x = visual.conv1(inputs).flatten(2).transpose(1, 2)  # [B,patches,width]
    first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first, x], 1) + visual.positional_embedding.to(x.dtype))
    when = time(t)
    # Some towers want [tokens,B,width].
    batch_first = visual.transformer.batch_first
    tokens = 1 if batch_first else 0
    x = x if batch_first else x.transpose(0, 1).contiguous()
    for block, linear in zip(visual.transformer.resblocks, time.blocks, strict=True):
        modulation = linear(when).unsqueeze(tokens).chunk(6, -1)
        shift, scale, gate = modulation[:3]
        x = x + gate * block.ls_1(_attend(block, block.ln_1(x) * (1 + scale) + shift))
        shift, scale, gate = modulation[3:]
        x = x + gate * block.ls_2(block.mlp(block.ln_2(x) * (1 + scale) + shift))
    x = x if batch_first else x.transpose(0, 1)
    pooled = visual.ln_post(_pool(visual, x)) if visual.final_ln_after_pool else _pool(visual, visual.ln_post(x))
    shift, scale = time.final(when).chunk(2, -1)
    pooled = pooled * (1 + scale) + shift
    return pooled if visual.proj is None else pooled @ visual.proj


def picture_transform(size: tuple[int, int], preprocess: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """open_clip's own transform for evaluation (resize, crop, normalise), on tensors [B,3,H,W] in [0, 1].

    Differentiable. Without a resize it gives open_clip's pixels, but without rounding to 8 bits. Raises ValueError for
    towers that are not square and for `resize_mode` longest, which open_clip has for files only.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**{**preprocess, "size": size})
    if config.resize_mode == "longest" or size[0] != size[1]:
        raise ValueError(
            f"resize_mode {config.resize_mode!r} to {size}: only squares, by shortest or squash, are supported"
        )
    steps: Any = image_transform_v2(config, is_train=False)

    def transform(images: Tensor) -> Tensor:
        *geometry, normalise = steps.transforms
        for step in geometry:
            images = step(images)
        return normalise(images.clamp(0, 1))  # resampling overshoots at edges, which 8 bits would clip

    return transform


def plain_bicubic(side: int, preprocess: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The transform of SPO's own code on tensors [B,3,H,W] in [0, 1]: the shorter side to `side` by bicubic
    interpolation without antialiasing, centre crop, clamp, normalise by `mean` and `std`. Differentiable.

    Its pixels differ from those of `picture_transform`, so a model must keep the transform that it was trained with.
    """
    mean, std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))

    def transform(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        scale = side / min(height, width)
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        top, left = (round((length - side) / 2) for length in size)
        images = images[..., top : top + side, left : left + side]
        return (images.clamp(0, 1) - mean.to(images)) / std.to(images)

    return transform


def _attend(block: Any, x: Tensor) -> Tensor:
    """The attention branch of open_clip's default block, or of its custom one (norms inside the attention)."""
    return block.ln_attn(block.attn(x)) if hasattr(block, "ln_attn") else block.attention(x)


def _pool(visual: Any, x: Tensor) -> Tensor:
    return x[:, 1:].mean(1) if visual.pool_type == "avg" else x[:, 0]


def take_latents(visual: Any, shape: tuple[int, int, int], seed: int = 0) -> None:
    """Change a tower for pictures, in place, to read latents of `shape` (C,h,w), with nearly its own grid of patches.

    A convolution over latents, with a bias and random weights, replaces its first one. If the grid changes, the
    position embedding is resampled (bicubic).
    """
    channels, *sides = shape
    patch = tuple(_patch(side, grid) for side, grid in zip(sides, visual.grid_size, strict=True))
    grid = tuple(side // p for side, p in zip(sides, patch, strict=True))
    like = visual.conv1.weight
    conv = _bare(nn.Conv2d, channels, like.shape[0], patch, patch).to(like)
    with torch.no_grad():
        conv.weight.copy_(rng.normal(conv.weight.shape, seed, "latent patches") / conv.weight[0].numel() ** 0.5)
        assert conv.bias is not None
        conv.bias.zero_()
        if grid != tuple(visual.grid_size):
            positions = visual.positional_embedding
            field = positions[1:].T.reshape(1, -1, *visual.grid_size)
            field = F.interpolate(field, size=grid, mode="bicubic", antialias=True).flatten(2)[0].T
            visual.positional_embedding = nn.Parameter(torch.cat([positions[:1], field]), positions.requires_grad)
    visual.conv1, visual.grid_size, visual.patch_size = conv, grid, patch


def _patch(side: int, grid: int) -> int:
    """The divisor of `side` that gives nearly `grid` patches; of two equally near, the smaller."""
    return min((p for p in range(1, side + 1) if side % p == 0), key=lambda p: abs(side / p - grid))


@torch.no_grad()
def fit_patches(conv: nn.Conv2d, latents: Tensor, embeddings: Tensor) -> None:
    """Fit a convolution over patches, by least squares, to map latents [N,C,h,w] to embeddings [N,width,g,g'].

    A VAE's decoder is nearly linear at the scale of a patch, so a fit to a picture tower's patch embeddings lets a
    latent tower start close to it. Raises ValueError for fewer patches than unknowns.
    """
    # On the CPU, whose solver also handles latents of deficient rank.
    latents, embeddings = latents.cpu().double(), embeddings.cpu().double()
    patch = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
    grid = [side // p for side, p in zip(latents.shape[2:], patch, strict=True)]
    rows = F.unfold(latents, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    wanted = F.interpolate(embeddings, size=grid, mode="bilinear")
    if len(rows) <= rows.shape[1]:
        raise ValueError(f"{len(rows)} patches cannot determine {rows.shape[1] + 1} weights each: give more examples")
    design = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    solution = torch.linalg.lstsq(design, wanted.flatten(2).transpose(1, 2).flatten(0, 1)).solution
    assert conv.bias is not None
    conv.weight.copy_(solution[:-1].T.view_as(conv.weight))
    conv.bias.copy_(solution[-1])
