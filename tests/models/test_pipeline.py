"""The model against plain diffusers, each component and the whole."""

import json
import shutil
import socket

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers_machine import assert_rounded
from safetensors.torch import load_file, save_file

from diffusion_align.models import load_pipeline
from diffusion_align.rng import generator
from diffusion_align.samplers import sample, step_table

PROMPTS = ["a small red circle", "two blue squares above a cross on a gray background"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "test"))


@pytest.fixture(scope="module")
def plain(tiny_folder):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_text_encoding_is_diffusers_own(model, plain):
    text, empty = plain.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", ""])
    assert_rounded(model.encode_text(PROMPTS, chunk=1), text, depth=50)
    assert_rounded(model.empty_text.expand_as(empty), empty, depth=50)


def test_pictures_and_latents_are_diffusers_own(model, plain):
    images, noise = torch.rand(3, 3, 32, 32, generator=generator(1, "images")), draw(3, 4, 8, 8)
    posterior = plain.vae.encode(images * 2 - 1).latent_dist
    factor = plain.vae.config.scaling_factor
    assert_rounded(model.encode_images(images), posterior.mean * factor, depth=100)
    sampled = (posterior.mean + posterior.std * noise).detach() * factor
    assert_rounded(model.encode_images(images, noise, chunk=2), sampled, depth=100)
    decoded = (plain.vae.decode(sampled / factor).sample / 2 + 0.5).clamp(0, 1).detach()
    assert_rounded(model.decode(sampled, chunk=2), decoded, depth=200)
    assert decoded.min() >= 0 and decoded.max() <= 1


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_v_folder"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_whole_trajectory_equals_the_plain_pipelines(request, folder, solver, guidance):
    folder = request.getfixturevalue(folder)
    model, pipe = load_pipeline(folder, device="cpu"), StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    kind = DDIMScheduler if solver == "ddim" else DPMSolverMultistepScheduler
    config = {**pipe.scheduler.config, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = kind.from_config(config)
    x = draw(2, 4, 8, 8)
    theirs = pipe(
        PROMPTS, num_inference_steps=10, guidance_scale=guidance, latents=x, output_type="latent", height=32, width=32
    ).images
    table = step_table(model.schedule, 10, solver=solver, order=2, eta=0.0)
    with torch.no_grad():
        ours = sample(model.denoiser(model.encode_text(PROMPTS), guidance=guidance), table, x)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-3)


def test_predict_is_differentiable_float32_and_independent_of_the_batch(model):
    x, t, text = draw(2, 4, 8, 8), torch.tensor([3, 900]), model.encode_text(PROMPTS)
    x.requires_grad_()
    output = model.predict(x, t, text)
    assert output.dtype == torch.float32 and output.shape == x.shape
    assert_rounded(model.predict(x[1:], t[1:], text[1:]), output[1:], depth=200)
    output.square().sum().backward()
    assert x.grad is not None and bool(x.grad.any())


def test_half_precision_weights_give_float32_results(tiny_folder):
    half = load_pipeline(tiny_folder, device="cpu", dtype=torch.bfloat16)
    full = load_pipeline(tiny_folder, device="cpu")
    x, t = draw(1, 4, 8, 8), torch.tensor([500])
    text = half.encode_text(PROMPTS[:1])
    clean = half.denoiser(text, guidance=3.0)(x, t)
    assert clean.dtype == text.dtype == torch.float32
    expected = full.denoiser(full.encode_text(PROMPTS[:1]), guidance=3.0)(x, t)
    assert (clean - expected).square().mean() < 0.01 * expected.square().mean()


def test_half_precision_files_load_as_float32(tiny_folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half")
    model = load_pipeline(tmp_path / "half", device="cpu")
    for part in (model.unet, model.vae, model.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_latent_shapes_and_wrong_resolutions(model):
    assert model.resolution == 32 and model.latent_shape() == (4, 8, 8) and model.latent_shape(64) == (4, 16, 16)
    assert model.latent_shape("64x32") == (4, 8, 16)  # width x height; latents are [C,h,w]
    for size, near in ((30, "use 24 or 32$"), ("32x30", "use 32x24 or 32$"), ("4x64", "use 8x64$"), (0, "use 8$")):
        with pytest.raises(ValueError, match=f"{size} is not a positive multiple of 8, .*{near}"):
            model.latent_shape(size)
    with pytest.raises(ValueError, match="multiple of 8"):
        model.latent_shape(30)


def test_fingerprint_depends_on_the_weights(tiny_folder, tiny_v_folder, tmp_path):
    first = load_pipeline(tiny_folder, device="cpu").fingerprint()
    shutil.copytree(tiny_folder, tmp_path / "copy")
    assert load_pipeline(tmp_path / "copy", device="cpu").fingerprint() == first
    assert load_pipeline(tiny_v_folder, device="cpu").fingerprint() != first
    weights = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert load_pipeline(tmp_path / "copy", device="cpu").fingerprint() != first


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_folders_that_are_no_model_are_refused_in_one_line(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline(tmp_path / "nowhere" / "at" / "all")
    one_line(error, "no model at", "diffusers format")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline(tmp_path / "empty")
    one_line(error, "model_index.json")

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pipeline(broken)
    one_line(error, str(broken / "unet"), "again")
    shutil.rmtree(broken / "unet")
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline(broken)
    one_line(error, str(broken / "unet"))


def test_moved_and_unreachable_hub_ids_name_the_cure(monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline("runwayml/stable-diffusion-v1-5")
    one_line(error, "moved", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline("somebody/something")
    one_line(error, "HF_HUB_OFFLINE", "somebody/something")


def test_a_local_folder_opens_no_connection(tiny_folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    load_pipeline(tiny_folder, device="cpu").encode_text(PROMPTS)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_refused(tiny_folder, tmp_path, part):
    shutil.copytree(tiny_folder, tmp_path / "gap")
    (path,) = (tmp_path / "gap" / part).glob("*.safetensors")
    tensors = load_file(path)
    key = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != key}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_pipeline(tmp_path / "gap", device="cpu")
    one_line(error, f"gap/{part}", key)


def test_an_empty_tokenizer_folder_is_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline(tmp_path / "mute")
    one_line(error, "tokenizer.json", "merges.txt")


def test_the_older_tokenizer_files_give_the_same_text(model, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "old")
    words = tmp_path / "old" / "tokenizer"
    tokenizer = json.loads((words / "tokenizer.json").read_text())["model"]
    (words / "tokenizer.json").unlink()
    (words / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (words / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer["merges"]))
    old = load_pipeline(tmp_path / "old", device="cpu")
    assert torch.equal(old.encode_text([*PROMPTS, "gray zebra!"]), model.encode_text([*PROMPTS, "gray zebra!"]))


def test_an_inpainting_model_is_refused(model, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "nine")
    with torch.random.fork_rng():
        network = UNet2DConditionModel.from_config({**model.unet.config, "in_channels": 9})
    network.save_pretrained(tmp_path / "nine" / "unet")
    with pytest.raises(ValueError) as error:
        load_pipeline(tmp_path / "nine", device="cpu")
    one_line(error, "9 channels", "inpainting")


def test_pictures_and_noise_of_the_wrong_kind_are_refused(model):
    image = torch.full((2, 3, 32, 32), 0.5)
    for wrong in (image * 255, image - 1, image.to(torch.uint8), image[0], image[:, :1]):
        with pytest.raises(ValueError, match="pictures are"):
            model.encode_images(wrong)
    with pytest.raises(ValueError, match="noise is"):
        model.encode_images(image, torch.zeros(1, 4, 8, 8))  # would broadcast: the same noise for every picture


def test_no_prompts_give_no_text(model):
    assert model.encode_text([]).shape == (0, 16, 32)


def test_an_empty_single_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_pipeline(tmp_path / "model.safetensors")
