"""Exports read back by diffusers, by peft, by plain arithmetic, and by the key rules of ComfyUI, A1111 and kohya."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from helpers_export import (
    RANK,
    a1111,
    comfyui,
    kohya,
    make_run,
    original_layers,
    read_file,
    sd15,
    sdxl,
    update_of,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from diffusion_align import cli

ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # of one number, relative
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAIN = {"SD1.5": StableDiffusionPipeline, "SDXL": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=["SD1.5", "SDXL"])
def family(request, tmp_path_factory):
    return {"SD1.5": sd15, "SDXL": sdxl}[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def pipe(family):
    """diffusers' own pipeline of the base."""
    return PLAIN[family.name].from_pretrained(family.folder)


def export(run, to, dtype="fp32", *more):
    name = "out.safetensors" if to in ("kohya", "comfyui", "diffusers", "single-file") else "out"
    path = run.parent / f"{to}-{dtype}-{name}"
    assert cli.main(["export", str(run), "--to", to, "--dtype", dtype, "--output", str(path), *more]) == 0
    return path


def assert_same_updates(found, pairs, alpha, dtype="fp32"):
    """Every layer has the update of the LoRA rounded to `dtype`, exactly."""
    assert found.keys() == pairs.keys()
    for layer, (down, up) in pairs.items():
        wanted = update_of(down.to(DTYPES[dtype]), up.to(DTYPES[dtype]), alpha / RANK)
        assert torch.equal(found[layer], wanted), layer


def loaded_by_diffusers(pipe, path):
    """The updates of a LoRA's file in diffusers' pipeline, which is left as it was."""
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    try:
        return updates_in(pipe.unet)
    finally:
        pipe.unload_lora_weights()


def updates_in(network, prefix=""):
    """The updates of the adapters in a network that diffusers or peft loaded."""
    return {
        name.removeprefix(prefix): update_of(
            module.lora_A[adapter].weight.data, module.lora_B[adapter].weight.data, module.scaling[adapter]
        )
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
        for adapter in module.lora_A
    }


def test_the_list_of_blocks_is_that_of_diffusers_own_conversion(family):
    names, weights = original_layers(family), family.unet().state_dict()
    checkpoint = {
        f"model.diffusion_model.{original}.{part}": weights[f"{layer}.{part}"]
        for original, layer in {**names, "out.0": "conv_norm_out"}.items()
        for part in ("weight", "bias")
        if f"{layer}.{part}" in weights
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, family.unet().config)
    assert len(converted) == len(checkpoint)
    assert all(tensor is weights[key] for key, tensor in converted.items())
    assert {key for key, value in weights.items() if value.ndim > 1} == {f"{layer}.weight" for layer in names.values()}


@pytest.mark.parametrize("alpha", [RANK / 4, RANK, 4.0 * RANK])
def test_every_format_has_the_updates_of_the_run(family, pipe, tmp_path, alpha):
    pairs = make_run(family, tmp_path / "run", alpha)
    for to in ("kohya", "comfyui"):
        tensors, _ = read_file(export(tmp_path / "run", to))
        assert_same_updates(comfyui(family, tensors), pairs, alpha)
        assert_same_updates(a1111(family, tensors), pairs, alpha)
        if to == "kohya":
            assert_same_updates(kohya(family, tensors), pairs, alpha)
    for to in ("diffusers", "kohya") if alpha > RANK else ("diffusers",):
        assert_same_updates(
            loaded_by_diffusers(pipe, export(tmp_path / "run", to, "fp32", "--overwrite")), pairs, alpha
        )
    assert_peft(export(tmp_path / "run", "peft"), family, pairs, alpha)
    assert_merged(tmp_path / "run", family, pipe, pairs, alpha, "fp32")


def test_half_precision_is_the_rounding_of_each_number(family, pipe, tmp_path):
    dtype = "fp16" if family.name == "SD1.5" else "bf16"
    pairs = make_run(family, tmp_path / "run", 2.5)
    for to in ("kohya", "comfyui"):
        tensors, _ = read_file(export(tmp_path / "run", to, dtype))
        assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith("alpha")} == {DTYPES[dtype]}
        assert_same_updates(comfyui(family, tensors), pairs, 2.5, dtype)
    assert_same_updates(loaded_by_diffusers(pipe, export(tmp_path / "run", "diffusers", dtype)), pairs, 2.5, dtype)
    assert_peft(export(tmp_path / "run", "peft", dtype), family, pairs, 2.5, dtype)
    assert_merged(tmp_path / "run", family, pipe, pairs, 2.5, dtype)


def assert_peft(folder, family, pairs, alpha, dtype="fp32"):
    """The folder has the halves of every layer, rounded, and peft makes of them the updates of the run."""
    tensors, _ = read_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, alpha) and len(tensors) == 2 * len(pairs)
    for layer, pair in pairs.items():
        for half, tensor in zip("AB", pair, strict=True):
            assert torch.equal(tensors[f"base_model.model.{layer}.lora_{half}.weight"], tensor.to(DTYPES[dtype]))
    if alpha > RANK:  # peft takes long to build a network
        with torch.random.fork_rng():
            theirs = PeftModel.from_pretrained(copy.deepcopy(family.unet()), folder)
        assert_same_updates(updates_in(theirs, "base_model.model."), pairs, alpha, dtype)


def assert_merged(run, family, base, pairs, alpha, dtype):
    """The folder that diffusers loads, and the single file, hold the base's weights plus the updates, rounded."""
    texts = ["text_encoder", *(["text_encoder_2"] if family.name == "SDXL" else [])]
    theirs = PLAIN[family.name].from_pretrained(export(run, "merged", dtype), torch_dtype=DTYPES[dtype])
    for name in ("vae", *texts):
        wanted, found = getattr(base, name).state_dict(), getattr(theirs, name).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key].to(DTYPES[dtype])) for key in found)
    before, merged = base.unet.state_dict(), theirs.unet.state_dict()
    assert before.keys() == merged.keys()
    tiny = torch.finfo(DTYPES[dtype]).smallest_normal
    for key, value in merged.items():
        layer, exact = key.removesuffix(".weight"), before[key].double()
        if layer in pairs:
            exact = exact + update_of(*pairs[layer], alpha / RANK)
        bound = ROUNDING[dtype] * (1 + 1e-3) * (exact.abs() + tiny)
        assert bool(((value.double() - exact).abs() <= bound).all()), key
    single, header = read_file(export(run, "single-file", dtype))
    assert header["modelspec.title"] == "model from model, by train dpo"
    for original, layer in original_layers(family).items():
        assert torch.equal(single[f"model.diffusion_model.{original}.weight"], merged[f"{layer}.weight"]), layer
    converted = convert_ldm_unet_checkpoint(single, theirs.unet.config)
    assert converted.keys() == merged.keys() and all(torch.equal(converted[key], merged[key]) for key in merged)
