"""Caches, caption dropout, loops and the command with an SDXL-format model, which they do not know of."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from helpers_machine import assert_rounded
from helpers_sdxl import POOLED, TOKENS

from diffusion_align.data import EncodingSettings, build_cache, read_pairs, write_pairs_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.methods.shared.noising import drop_captions
from diffusion_align.models import add_lora, load_lora, load_pipeline
from diffusion_align.rng import generator, normal
from diffusion_align.samplers import path_gradient, replay, rollout, step_table
from diffusion_align.train import record

SIDE = 48  # not the model's own 32


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    captions = [f"a {word} circle" for word in "red green blue yellow gray white black large".split()]
    pictures = [[encode_png(normal((3, SIDE, SIDE), i, "x", j).sigmoid()) for j in range(8)] for i in range(2)]
    write_pairs_parquet(folder / "pairs.parquet", captions, *pictures, [1.0, 0.0] * 4)
    return folder / "pairs.parquet"


@pytest.fixture
def calls(sdxl, monkeypatch):
    """The UNet's inputs besides states and times, for each call."""
    seen, forward = [], sdxl.unet.forward

    def spy(x, t, hidden, added_cond_kwargs, return_dict):
        seen.append({"hidden": hidden, **added_cond_kwargs})
        return forward(x, t, hidden, added_cond_kwargs=added_cond_kwargs, return_dict=return_dict)

    monkeypatch.setattr(sdxl.unet, "forward", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropped_caption_keeps_only_its_size(sdxl, calls, pairs_file, tmp_path, dtype):
    pairs, _ = read_pairs(pairs_file)
    cache = build_cache(sdxl, pairs, tmp_path, EncodingSettings(SIDE, dtype=dtype), progress=False)
    latents, text = cache.batch(range(8))
    samples = [(0, index) for index in range(8)]
    text = drop_captions(text, cache.empty_text, samples, 0.5, 0)
    sdxl.predict(latents[:, 0], torch.full((8,), 500), text)
    (seen,) = calls
    # "" through both encoders, as in the public code of Diffusion-DPO, though this model's guidance has zeros.
    empty = sdxl.encode_text([""]).to(dtype).float()[0]
    assert empty.any() and not sdxl.empty_text.any()
    dropped = (seen["text_embeds"] == empty[TOKENS, :POOLED]).all(1)
    assert 0 < dropped.sum() < 8
    assert torch.equal(dropped, (seen["hidden"] == empty[:TOKENS]).flatten(1).all(1))
    assert seen["time_ids"].tolist() == [[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 8
    kept = sdxl.encode_text([pair.prompt for pair in pairs])[~dropped].to(dtype).float()
    assert torch.equal(seen["hidden"][~dropped], kept[:, :TOKENS])
    assert torch.equal(seen["text_embeds"][~dropped], kept[:, TOKENS, :POOLED])


def test_gradients_of_a_guided_trajectory_in_two_passes_equal_autograds(sdxl):
    parameters = add_lora(sdxl.unet, 2)
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(normal(parameter.shape, 0, "disturb", i) * 0.05)
    denoiser = sdxl.denoiser(sdxl.encode_text(["a red circle", "two blue squares"]), guidance=3.0)
    table = step_table(sdxl.schedule, 3, eta=1.0)
    trajectory = rollout(denoiser, table, normal((2, 4, 8, 8), 0, "x"), generator(0, "noise"))
    value = replay(denoiser, trajectory).sum()
    expected = torch.autograd.grad(value, parameters)
    assert_rounded(path_gradient(denoiser, trajectory, torch.sum), value, depth=400)
    whole = torch.cat([gradient.flatten() for gradient in expected])
    ours = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert whole.norm() > 1 and (ours - whole).norm() < 1e-4 * whole.norm()


@pytest.fixture
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_the_command_trains_it_and_the_pipeline_loads_the_run(sdxl_folder, pairs_file, tmp_path):
    path = Path(__file__).resolve().parents[2] / "scripts" / "finetune_diffusion_dpo.py"
    spec = importlib.util.spec_from_file_location("script_finetune_diffusion_dpo", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run = tmp_path / "run"
    argv = f"""--pretrained_model_name_or_path {sdxl_folder} --train_data_dir {pairs_file} --output_dir {run}
        --cache_dir {tmp_path} --resolution {SIDE} --proportion_empty_prompts 0.3 --max_train_steps 3
        --learning_rate 1e-2 --validation_prompt circle --validation_sampling_steps 2 --device cpu"""
    assert script.main(argv.split()) == 0
    rows = record.read(run / "metrics.jsonl")
    assert len(rows) == 3 and rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["margin_p95"] == 0

    model, x, t = load_pipeline(sdxl_folder, device="cpu"), normal((2, 4, 8, 8), 0, "x"), torch.tensor([100, 900])
    text = model.encode_text(["a red circle", ""])
    base = model.predict(x, t, text)
    load_lora(model, run)
    tuned = model.predict(x, t, text).detach()
    assert (tuned - base).abs().max() > 1e-3
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    pipe.load_lora_weights(run)
    added = {"text_embeds": text[:, TOKENS, :POOLED], "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    theirs = pipe.unet(x, t, text[:, :TOKENS], added_cond_kwargs=added).sample.detach()
    assert_rounded(theirs, tuned, depth=200)
