"""The model on SDXL's format against plain diffusers: text, sizes, whole trajectories, the VAE, weights, refusals."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from helpers_machine import assert_rounded
from helpers_sdxl import PACKED_SHAPE, POOLED, TOKENS, make_tiny_sdxl_folder
from safetensors.torch import load_file, save_file

from diffusion_align.models import (
    add_lora,
    load_lora,
    load_pipeline,
    load_unet,
    reference,
    save_lora,
    save_unet,
    trainable,
)
from diffusion_align.rng import generator, normal
from diffusion_align.samplers import sample, step_table
from diffusion_align.vocabulary import LORA_TARGETS

PROMPTS = ["a small red circle", "two blue squares above a cross on a gray background"]
SIZES = (64, 48, 5, 3, 40, 32)  # original height, width, crop top, left, target height, width
FOLDERS = ["sdxl_folder", "sdxl_v_folder"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "test"))


def plain_pipeline(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(text):
    """Hidden states, pooled embeddings and sizes of packed text, split by hand."""
    return text[:, :TOKENS], text[:, TOKENS, :POOLED], text[:, TOKENS + 1, :6]


@pytest.fixture
def item(sdxl):
    return draw(3, 4, 8, 8), torch.tensor([1, 500, 999]), sdxl.encode_text([*PROMPTS, ""])


def disturb(parameters):
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(normal(parameter.shape, 0, "disturb", i) * 0.05)


@pytest.mark.parametrize("folder", FOLDERS)
def test_text_encoding_is_diffusers_own(request, folder):
    folder = request.getfixturevalue(folder)
    model, plain = load_pipeline(folder, device="cpu"), plain_pipeline(folder)
    with torch.no_grad():  # None is the pipeline's own empty prompt: zeros or an encoding, as model_index.json says
        text, empty, pooled, empty_pooled = plain.encode_prompt(PROMPTS, device="cpu", negative_prompt=None)
    ours = model.encode_text(PROMPTS)
    assert ours.shape[1:] == PACKED_SHAPE and ours.dtype == torch.float32
    assert_rounded(parts(ours)[0], text, depth=50)
    assert_rounded(parts(ours)[1], pooled, depth=50)
    assert not ours[:, TOKENS, POOLED:].any() and not ours[:, TOKENS + 1].any()
    ours = model.empty_text.expand(2, -1, -1)
    assert_rounded(parts(ours)[0], empty, depth=50)
    assert_rounded(parts(ours)[1], empty_pooled, depth=50)
    with torch.no_grad():  # an empty prompt that is given is encoded, whatever model_index.json says
        text, _, pooled, _ = plain.encode_prompt("", device="cpu")
    assert_rounded(parts(model.encode_text([""]))[0], text, depth=50)
    assert_rounded(parts(model.encode_text([""]))[1], pooled, depth=50)
    assert bool(text.any()) and bool(pooled.any())
    assert bool(model.empty_text.any()) == (not model.second.zero_empty) == bool(empty.any())
    assert_rounded(model.encode_text([*PROMPTS, ""], chunk=1), model.encode_text([*PROMPTS, ""]), depth=50)
    assert model.encode_text([]).shape == (0, *PACKED_SHAPE)


def test_both_tokenizers_pad_as_their_own_files_say(sdxl):
    ids = [t(["a"], padding="max_length").input_ids[0] for t in (sdxl.tokenizer, sdxl.second.tokenizer)]
    assert ids[0][:3] == ids[1][:3] and ids[0][3:] != ids[1][3:] == [0] * (TOKENS - 3)


def their_run(pipe, x, prompts=PROMPTS, **settings):
    height, width = (4 * side for side in x.shape[2:])
    return pipe(
        prompts, num_inference_steps=8, latents=x, output_type="latent", height=height, width=width, **settings
    ).images


def our_run(model, x, solver, **settings):
    text = model.encode_text(PROMPTS, sizes=settings.pop("sizes", None))
    table = step_table(model.schedule, 8, solver=solver, order=2, eta=0.0)
    with torch.no_grad():
        return sample(model.denoiser(text, **settings), table, x)


def with_scheduler(pipe, solver):
    kind = DDIMScheduler if solver == "ddim" else DPMSolverMultistepScheduler
    config = {**pipe.scheduler.config, "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    pipe.scheduler = kind.from_config(config)
    return pipe


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("guidance, side", [(1.0, 8), (5.0, 8), (5.0, 12)])
def test_a_whole_trajectory_equals_the_plain_pipelines(request, folder, solver, guidance, side):
    """Also at another resolution than the model's own, because the network gets the size of the picture."""
    folder = request.getfixturevalue(folder)
    model, pipe, x = (
        load_pipeline(folder, device="cpu"),
        with_scheduler(plain_pipeline(folder), solver),
        draw(2, 4, 8, side),
    )
    assert_same(our_run(model, x, solver, guidance=guidance), their_run(pipe, x, guidance_scale=guidance))


def test_sizes_and_a_negative_prompt_give_the_plain_pipelines_trajectory(sdxl, sdxl_folder):
    pipe, x = with_scheduler(plain_pipeline(sdxl_folder), "dpmpp"), draw(2, 4, 8, 8)
    told = {"original_size": SIZES[:2], "crops_coords_top_left": SIZES[2:4], "target_size": SIZES[4:]}
    ours = our_run(sdxl, x, "dpmpp", guidance=5.0, sizes=SIZES)
    assert_same(ours, their_run(pipe, x, guidance_scale=5.0, **told))
    assert not torch.allclose(ours, our_run(sdxl, x, "dpmpp", guidance=5.0), atol=0.01)

    words = ["green triangle"] * 2
    ours = our_run(sdxl, x, "dpmpp", guidance=5.0, sizes=SIZES, negative=sdxl.encode_text(words[:1]))
    assert_same(ours, their_run(pipe, x, guidance_scale=5.0, negative_prompt=words, **told))

    # One prompt at a time: for more, diffusers 0.42 gives negative sizes to every other row, whatever it is.
    other = {f"negative_{key}": value for key, value in told.items()}
    ours = our_run(sdxl, x, "dpmpp", guidance=5.0, negative=sdxl.encode_text(words[:1], sizes=SIZES))
    for i, prompt in enumerate(PROMPTS):
        theirs = their_run(pipe, x[i : i + 1], [prompt], guidance_scale=5.0, negative_prompt=words[:1], **other)
        assert_same(ours[i : i + 1], theirs)


def test_every_row_of_the_text_reaches_the_network(sdxl, item):
    x, t, text = item
    before = sdxl.predict(x, t, text).detach()
    for row, column in [(0, 0), (TOKENS - 1, 63), (TOKENS, 0), (TOKENS, POOLED - 1)]:
        changed = text.clone()
        changed[1, row, column] += 10
        moved = (sdxl.predict(x, t, changed).detach() - before).abs().amax((1, 2, 3))
        assert moved[1] > 1e-3 and not moved[0] and not moved[2], (row, column)
    own = [32, 32, 0, 0, 32, 32]
    assert torch.equal(sdxl.predict(x, t, sdxl.encode_text([*PROMPTS, ""], sizes=own)).detach(), before)
    for place in range(6):
        sizes = [size + 3 * (i == place) for i, size in enumerate(own)]
        changed = sdxl.predict(x, t, sdxl.encode_text([*PROMPTS, ""], sizes=sizes)).detach()
        assert (changed - before).abs().amax((1, 2, 3)).min() > 1e-3, place


def test_predict_is_the_networks_own_call_and_differentiable(sdxl, item):
    x, t, text = item
    x.requires_grad_()
    hidden, pooled, _ = parts(text)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 3)}
    expected = sdxl.unet(x, t, hidden, added_cond_kwargs=added).sample
    output = sdxl.predict(x, t, text)
    assert torch.equal(output, expected) and output.dtype == torch.float32
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    (ours,) = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(ours, theirs) and bool(ours.any())


def test_sizes_are_for_sdxl_only(model):
    with pytest.raises(ValueError, match="leave out sizes"):
        model.encode_text(PROMPTS, sizes=SIZES)


def test_pictures_and_latents_are_diffusers_own(sdxl, sdxl_folder):
    vae = plain_pipeline(sdxl_folder).vae
    images, noise = torch.rand(3, 3, 32, 32, generator=generator(1, "images")), draw(3, 4, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(images * 2 - 1).latent_dist
        sampled = (posterior.mean + posterior.std * noise) * 0.13025
        decoded = (vae.decode(sampled / 0.13025).sample / 2 + 0.5).clamp(0, 1)
    assert_rounded(sdxl.encode_images(images, noise, chunk=2), sampled, depth=100)
    assert_rounded(sdxl.decode(sampled, chunk=2), decoded, depth=200)


def change_config(folder, part, **values):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_vae_with_means_and_deviations(sdxl_folder, tmp_path):
    shutil.copytree(sdxl_folder, tmp_path / "model")
    means, stds = [-1.0, 0.5, 2.0, 0.0], [4.0, 5.0, 6.0, 7.0]
    change_config(tmp_path / "model", "vae", latents_mean=means, latents_std=stds)
    model, pipe, x = (
        load_pipeline(tmp_path / "model", device="cpu"),
        plain_pipeline(tmp_path / "model"),
        draw(2, 4, 8, 8),
    )
    theirs = with_scheduler(pipe, "dpmpp")(
        PROMPTS, num_inference_steps=4, latents=x, output_type="pt", height=32, width=32, guidance_scale=1.0
    ).images
    table = step_table(model.schedule, 4, solver="dpmpp", order=2, eta=0.0)
    with torch.no_grad():
        latents = sample(model.denoiser(model.encode_text(PROMPTS)), table, x)
    torch.testing.assert_close(model.decode(latents), theirs, rtol=1e-3, atol=1e-3)
    images = torch.rand(2, 3, 32, 32, generator=generator(1, "images"))
    z = model.vae.encode(images * 2 - 1).latent_dist.mean.detach()
    by_hand = (z - torch.tensor(means).view(4, 1, 1)) / torch.tensor(stds).view(4, 1, 1) * 0.13025
    assert_rounded(model.encode_images(images), by_hand, depth=100)


@pytest.fixture(scope="module")
def loud_folder(sdxl_folder, tmp_path_factory):
    """A VAE whose first activations are far beyond float16's 65504, as some of SDXL's own are."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(sdxl_folder, folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for key in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        tensors[key] *= 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_vae_that_overflows_in_float16_stays_in_float32(loud_folder):
    full, half = (load_pipeline(loud_folder, device="cpu", dtype=d) for d in (torch.float32, torch.float16))
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for m in (half.unet, half.second.text_encoder) for p in m.parameters()} == {torch.float16}
    images, latents = torch.rand(1, 3, 32, 32, generator=generator(1, "images")), draw(1, 4, 8, 8)
    with torch.autocast("cpu", torch.float16):
        assert not full.vae.decode(latents).sample.isfinite().all()  # or this test shows nothing
        made = [(model.decode(latents), model.encode_images(images)) for model in (full, half)]
    for decoded, encoded in made:
        assert torch.equal(decoded, full.decode(latents)) and torch.equal(encoded, full.encode_images(images))


def test_other_vaes_take_the_precision_that_was_asked_for(sdxl_folder, tiny_folder, tmp_path):
    shutil.copytree(sdxl_folder, tmp_path / "fixed")
    change_config(tmp_path / "fixed", "vae", force_upcast=False)  # as in sdxl-vae-fp16-fix
    assert load_pipeline(tmp_path / "fixed", device="cpu", dtype=torch.float16).vae.dtype == torch.float16
    assert load_pipeline(sdxl_folder, device="cpu", dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert load_pipeline(tiny_folder, device="cpu", dtype=torch.float16).vae.dtype == torch.float16


def test_half_precision_weights_do_not_round_sizes(sdxl_folder, monkeypatch):
    half, x = load_pipeline(sdxl_folder, device="cpu", dtype=torch.bfloat16), draw(1, 4, 25, 27)
    seen, forward = [], half.unet.forward
    monkeypatch.setattr(half.unet, "forward", lambda *a, **k: seen.append(k["added_cond_kwargs"]) or forward(*a, **k))
    output = half.predict(x, torch.tensor([500]), half.encode_text(PROMPTS[:1], sizes=(1001, 1003, 0, 0, 515, 517)))
    assert output.dtype == torch.float32 and seen[0]["time_ids"].tolist() == [[1001, 1003, 0, 0, 515, 517]]
    half.predict(x, torch.tensor([500]), half.encode_text(PROMPTS[:1]))
    assert seen[1]["time_ids"].tolist() == [[100, 108, 0, 0, 100, 108]]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_policy_equals_reference_exactly_before_training(sdxl, item, mode, half):
    parameters = add_lora(sdxl.unet, 4, 8.0) if mode == "lora" else trainable(sdxl.unet, "full")
    frozen = reference(sdxl, mode)
    before = frozen(*item)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
        assert torch.equal(frozen(*item), sdxl.predict(*item))
    # Where gradients flow torch may take another kernel for the same product of matrices.
    assert_rounded(sdxl.predict(*item), before, depth=200)
    disturb(parameters)
    assert torch.equal(frozen(*item), before)
    assert not torch.allclose(sdxl.predict(*item), before, atol=1e-3)


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_plain_diffusers_reloads_the_same_function(sdxl, item, sdxl_folder, tmp_path, targets):
    base = sdxl.predict(*item).detach()
    disturb(add_lora(sdxl.unet, 4, 16.0, LORA_TARGETS[targets]))
    expected = sdxl.predict(*item).detach()
    assert not torch.allclose(expected, base, atol=1e-3)
    save_lora(sdxl.unet, tmp_path)
    ours = load_pipeline(sdxl_folder, device="cpu")
    load_lora(ours, tmp_path)
    assert torch.equal(ours.predict(*item).detach(), expected)

    pipe = plain_pipeline(sdxl_folder)
    pipe.load_lora_weights(tmp_path)
    hidden, pooled, _ = parts(item[2])
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 3)}
    theirs = pipe.unet(*item[:2], hidden, added_cond_kwargs=added).sample
    assert_rounded(theirs, expected, depth=200)


def test_full_weights_round_trip(sdxl, item, model, sdxl_folder, tmp_path):
    disturb(trainable(sdxl.unet, "full"))
    save_unet(sdxl.unet, tmp_path)
    fresh = load_pipeline(sdxl_folder, device="cpu")
    load_unet(fresh, tmp_path)
    sdxl.unet.requires_grad_(False)  # as the other's: torch takes another kernel for weights that require gradients
    with torch.no_grad():
        assert torch.equal(fresh.predict(*item), sdxl.predict(*item))
    plain = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, sdxl.unet.state_dict()[name])
    with pytest.raises(ValueError, match="cross_attention_dim is 64, the base model has 32"):
        load_unet(model, tmp_path)


def test_fingerprint_covers_the_second_encoder_and_the_empty_prompt(sdxl, sdxl_folder, tmp_path):
    shutil.copytree(sdxl_folder, tmp_path / "model")
    seen = {sdxl.fingerprint()}
    assert load_pipeline(tmp_path / "model", device="cpu").fingerprint() in seen
    for part in ("text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json", "model_index.json"):
        path = tmp_path / "model" / part
        if part == "model_index.json":
            path.write_text(json.dumps(json.loads(path.read_text()) | {"force_zeros_for_empty_prompt": False}))
        elif part.endswith("json"):
            path.write_text(path.read_text() + "\n")
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"\x07")
        seen.add(load_pipeline(tmp_path / "model", device="cpu").fingerprint())
    assert len(seen) == 4


def refused(folder, kind, *words):
    with pytest.raises(kind) as error:
        load_pipeline(folder, device="cpu")
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.fixture
def broken(sdxl_folder, tmp_path):
    return shutil.copytree(sdxl_folder, tmp_path / "broken")


@pytest.mark.parametrize("key", ["text_projection.weight", "text_model.encoder.layers.1.mlp.fc1.bias"])
def test_a_weight_missing_from_the_second_encoder_is_refused(broken, key):
    path = broken / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith(key))
    save_file({other: value for other, value in tensors.items() if other != name}, path, metadata={"format": "pt"})
    refused(broken, ValueError, str(broken / "text_encoder_2"), "1 weights are missing", key)


def test_missing_components_are_refused(broken):
    (broken / "tokenizer_2" / "tokenizer.json").unlink()
    refused(broken, FileNotFoundError, str(broken / "tokenizer_2"), "merges.txt")
    shutil.rmtree(broken / "tokenizer_2")
    refused(broken, FileNotFoundError, str(broken / "tokenizer_2"), "again")
    (broken / "text_encoder_2" / "model.safetensors").unlink()
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"tokenizer_2": [None, None]}))
    refused(broken, ValueError, "names None as its tokenizer_2", "SDXL has a CLIPTokenizer")


def test_relatives_of_sdxl_are_refused(broken, sdxl):
    change_config(broken, "unet", addition_time_embed_dim=4)
    refused(broken, ValueError, str(broken / "unet"), "96 numbers", "72", "not supported")
    index = json.loads((broken / "model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (broken / "model_index.json").write_text(json.dumps(index))
    refused(broken, ValueError, "SDXL refiner", "use the base model")
    sd3 = {"text_encoder_2": index["text_encoder_2"], "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (broken / "model_index.json").write_text(json.dumps(sd3))
    refused(broken, ValueError, "names None as its unet")


def test_the_helpers_weights_are_reproducible(sdxl, tmp_path):
    again = load_pipeline(make_tiny_sdxl_folder(tmp_path / "again"), device="cpu")
    for theirs, ours in [
        (again.unet, sdxl.unet),
        (again.vae, sdxl.vae),
        (again.text_encoder, sdxl.text_encoder),
        (again.second.text_encoder, sdxl.second.text_encoder),
    ]:
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
