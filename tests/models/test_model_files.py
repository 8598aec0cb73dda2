"""Every form in which people have a model draws what the source draws; what is no model is refused with a cure that
works."""

import json
import re
import shutil
import struct
from functools import cache

import pytest
import torch
from helpers_model_files import (
    KINDS,
    halved,
    make_model,
    pickled,
    set_scheduler,
    single,
    states_of,
    weights,
)
from safetensors.torch import load_file, save_file

from diffusion_align import cli
from diffusion_align.models import load_pipeline
from diffusion_align.models.single_file.tokenizer import clip_tokenizer
from diffusion_align.samplers import sample, step_table

FORMS = ("fp32", "fp16 variant", "fp16 only", ".bin", "single fp16", "single bf16")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {kind: make_model(root / re.sub(r"\W", "-", kind), kind, seed=i) for i, kind in enumerate(KINDS)}


@torch.no_grad()
def drawn(model):
    """Latents of two steps, as one vector."""
    noise = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    text = model.encode_text(["a photo of a cat, twice!"])
    return sample(model.denoiser(text), step_table(model.schedule, 2, eta=0.0), noise).flatten()


@torch.no_grad()
def encoded(model):
    return model.encode_images(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))).flatten()


def in_form(form, source, kind, folder):
    if form == "fp32":
        return shutil.copytree(source, folder / "copy")
    if form.startswith("fp16"):
        return halved(source, folder / "half", plain_too="variant" in form)
    if form == ".bin":
        return pickled(source, folder / "pickled")
    dtype = torch.float16 if form.endswith("fp16") else torch.bfloat16
    return single(source, folder / "one.safetensors", kind, dtype, told=kind.startswith("SD 2"))


def rounded(source, dtype, folder):
    """The source with its weights rounded: what a half precision file holds, loaded in a known way."""
    shutil.copytree(source, folder)
    for file in weights(folder).values():
        save_file({key: tensor.to(dtype).float() for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory):
    """(kind, precision) -> what the source draws and encodes with its weights rounded to that precision."""

    @cache
    def results(kind, dtype):
        model = load_pipeline(rounded(sources[kind], dtype, tmp_path_factory.mktemp("rounded") / "m"), device="cpu")
        return drawn(model), encoded(model)

    return results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_a_model_draws_what_its_source_draws(kind, form, sources, tmp_path, offline, expected):
    """Equal bits, beside a source whose weights were rounded in the same way."""
    place = in_form(form, sources[kind], kind, tmp_path)
    variant = "fp16" if form == "fp16 variant" else None
    model = load_pipeline(place, device="cpu", variant=variant)
    half = torch.bfloat16 if form == "single bf16" else torch.float16 if "fp16" in form else torch.float32
    due = expected(kind, half)
    assert torch.equal(drawn(model), due[0])
    assert torch.equal(encoded(model), due[1])
    assert model.schedule.zero_terminal == kind.endswith("zero")
    assert model.prediction_type == ("v_prediction" if " v" in kind else "epsilon")
    assert model.resolution == 64


@pytest.fixture
def offline(monkeypatch):
    """Any connection raises."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(capsys, *argv):
    """(exit code, output, the error line)."""
    code = cli.main([str(word) for word in argv])
    said = capsys.readouterr()
    return code, said.out, said.err.strip()


def drawing(model, out, *more):
    few = ("--prompt", "a cat", "--steps", 2, "--guidance", 1, "--device", "cpu", "--threads", 1)
    return ("sample", "--model", model, *few, "--out", out, *more)


def test_clip_numbers_of_known_words():
    """From the published examples of CLIP's tokenizer."""
    tokens = clip_tokenizer(77, pad_with_zero=False)("a photo of a cat").input_ids
    assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = clip_tokenizer(77, pad_with_zero=True)("cat", padding="max_length").input_ids
    assert padded == [49406, 2368, 49407] + [0] * 74


@pytest.mark.parametrize("text", ["A photo  of a CAT, 3 dogs' bowls!", "naïve café 数学 🙂", "they're\tx2", ""])
def test_the_tokenizer_is_open_clips(text):
    from open_clip.tokenizer import SimpleTokenizer

    expected = [49406, *SimpleTokenizer().encode(text), 49407]
    assert clip_tokenizer(77, pad_with_zero=False)(text).input_ids == expected


def test_older_files_leave_out_text_model_and_hold_tables_and_averages(sources, tmp_path):
    """Keys as the first checkpoints have them, in a pickled file, as one is found on model sites."""
    file = single(sources["SD 1.x"], tmp_path / "new.safetensors", "SD 1.x", torch.float32)
    tensors = {key.replace("transformer.text_model.", "transformer."): value for key, value in load_file(file).items()}
    tensors |= {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(1)}
    tensors["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save({"state_dict": tensors, "global_step": 5}, tmp_path / "old.ckpt")
    old = load_pipeline(tmp_path / "old.ckpt", device="cpu")
    assert old.resolution == 512  # a pickled file tells none
    wanted = load_pipeline(sources["SD 1.x"], device="cpu").text_encoder.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in old.text_encoder.state_dict().items())


@pytest.mark.parametrize("only", [("unet",), ("unet", "text_encoder_2"), ("vae",)])
def test_mixed_folders_load_without_a_flag_and_with_it(only, sources, tmp_path):
    place = halved(sources["SDXL"], tmp_path / "mixed", plain_too=False, only=only)
    for variant in (None, "fp16"):
        found = load_pipeline(place, device="cpu", variant=variant).unet.state_dict()
        for key, tensor in states_of(sources["SDXL"])["unet"].items():
            assert torch.equal(found[key], tensor.half().float() if "unet" in only else tensor)


def test_a_variant_that_is_another_network_is_named_and_then_taken(sources, tmp_path, capsys):
    shutil.copytree(sources["SD 1.x"], tmp_path / "m")
    file = weights(tmp_path / "m")["unet"]
    file.rename(file.with_name(file.name.replace(".safetensors", ".non_ema.safetensors")))
    code, _, error = run(capsys, *drawing(tmp_path / "m", tmp_path / "out"))
    assert code == 1 and error.endswith("which must be given: --variant non_ema"), error
    assert run(capsys, *drawing(tmp_path / "m", tmp_path / "out", "--variant", "non_ema"))[0] == 0
    code, _, error = run(capsys, *drawing(tmp_path / "m", tmp_path / "new", "--variant", "fp17"))
    assert code == 1 and "no weights in the variant fp17; there are non_ema" in error


class Harm:
    def __reduce__(self):
        return print, ("harm was done",)


def test_code_in_pickled_weights_does_not_run(sources, tmp_path, capsys):
    pickled(sources["SD 1.x"], tmp_path / "m")
    torch.save({"x": Harm()}, tmp_path / "m" / "unet" / "diffusion_pytorch_model.bin")
    torch.save({"state_dict": {"x": Harm()}}, tmp_path / "m.ckpt")
    for place in ("m", "m.ckpt"):
        code, output, error = run(capsys, *drawing(tmp_path / place, tmp_path / "out"))
        assert code == 1 and "harm was done" not in output + error and "Python objects" in error, error


# What is no model: {name: (tensors, metadata or None, a pattern of the message)}
UNET = "model.diffusion_model.input_blocks.0.0.weight"
OTHERS = {
    "a LoRA by kohya": ({"lora_unet_mid_block_attentions_0.lora_down.weight": (4, 8)}, "is a LoRA .*model merge"),
    "a LoRA by diffusers": ({"unet.mid_block.attentions.0.lora.down.weight": (4, 8)}, "is a LoRA .*model merge"),
    "a LoKr": ({"lora_unet_mid_block.lokr_w1": (4, 8)}, "a relative of one.*model merge"),
    "a VAE": ({"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)}, "is a VAE alone"),
    "a VAE in diffusers' names": ({"encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "is a VAE alone"),
    "a UNet in diffusers' names": ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "is a UNet alone"),
    "a UNet without prefix": ({"input_blocks.0.0.weight": (8, 4, 3, 3)}, "is a UNet alone"),
    "a text encoder": ({"text_model.embeddings.token_embedding.weight": (8, 8)}, "is a text encoder alone"),
    "inpainting": ({UNET: (32, 9, 3, 3)}, "is an inpainting model.*use the text-to-image model"),
    "edits": ({UNET: (32, 8, 3, 3)}, "InstructPix2Pix"),
    "depth": ({UNET: (32, 5, 3, 3)}, "is a depth model"),
    "a refiner": ({UNET: (32, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (8,)}, "is an SDXL refiner"),
    "no text encoder": ({UNET: (32, 4, 3, 3)}, "has no text encoder"),
    "SD3": ({"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (8, 8)}, "Stable Diffusion 3"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux family"),
    "another transformer": ({"model.diffusion_model.layers.0.adaLN_modulation.0.weight": (8, 8)}, "a transformer"),
    "a ControlNet": ({"control_model.input_hint_block.0.weight": (8, 3, 3, 3)}, "is a ControlNet"),
    "an embedding": ({"clip_l": (2, 8), "clip_g": (2, 8)}, "textual inversion"),
    "nf4": ({UNET: (32, 4, 3, 3), f"{UNET}.absmax": (4,)}, "is quantized .nf4"),
    "unknown": ({"something": (3,)}, "unknown kind"),
    "nothing": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_model_is_refused_by_its_kind(name, tmp_path, capsys):
    shapes, words = OTHERS[name]
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    for verb in (("model", "inspect", tmp_path / "x.safetensors"), drawing(tmp_path / "x.safetensors", tmp_path / "o")):
        code, _, error = run(capsys, *verb)
        assert code == 1 and re.search(words, error) and "\n" not in error, error


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF" + bytes(20), "quantized model .GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"", "not a complete safetensors file"),
        (struct.pack("<Q", 2**40), "not a complete safetensors file"),
        (struct.pack("<Q", 4) + b"{x:}", "not a safetensors file"),
        (b"PK\x03\x04" + bytes(20), "pickled checkpoint: rename it to x.ckpt"),
    ],
)
def test_damaged_files_are_refused_in_one_line(data, words, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(data)
    code, _, error = run(capsys, "model", "inspect", tmp_path / "x.safetensors")
    assert code == 1 and re.search(words, error) and "\n" not in error


def test_a_file_that_is_cut_off_is_refused(sources, tmp_path, capsys):
    file = single(sources["SD 1.x"], tmp_path / "m.safetensors", "SD 1.x", torch.float16)
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut off" in run(capsys, "model", "inspect", file)[2]


def test_fp8_is_refused_and_the_fp16_file_loads(sources, tmp_path, capsys):
    good = single(sources["SD 1.x"], tmp_path / "m.safetensors", "SD 1.x", torch.float16)
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(good).items()}
    save_file(tensors, tmp_path / "fp8.safetensors")
    code, _, error = run(capsys, *drawing(tmp_path / "fp8.safetensors", tmp_path / "out"))
    assert code == 1 and "quantized (fp8)" in error and "use the model's fp16" in error
    assert run(capsys, *drawing(good, tmp_path / "out"))[0] == 0


def test_stable_diffusion_2_asks_what_it_predicts_and_takes_the_answer(sources, expected, tmp_path, capsys):
    file = single(sources["SD 2.x v"], tmp_path / "m.safetensors", "SD 2.x v", torch.float32, told=False)
    code, _, error = run(capsys, *drawing(file, tmp_path / "out"))
    assert code == 1 and "--prediction_type v_prediction" in error
    assert run(capsys, *drawing(file, tmp_path / "out", "--prediction_type", "v_prediction"))[0] == 0
    told = load_pipeline(file, device="cpu", prediction_type="v_prediction")
    assert torch.equal(drawn(told), expected("SD 2.x v", torch.float32)[0])
    assert "not told: give --prediction_type" in run(capsys, "model", "inspect", file)[1]


def test_a_file_without_a_vae_takes_one_in_every_form(sources, expected, tmp_path, capsys):
    source, whole = sources["SD 1.x"], expected("SD 1.x", torch.float32)[1]
    tensors = load_file(single(source, tmp_path / "m.safetensors", "SD 1.x", torch.float32))
    vae = {key: tensor for key, tensor in tensors.items() if key.startswith("first_stage_model.")}
    spec = {"modelspec.resolution": "64x64"}
    save_file({key: tensor for key, tensor in tensors.items() if key not in vae}, tmp_path / "bare.safetensors", spec)
    code, _, error = run(capsys, *drawing(tmp_path / "bare.safetensors", tmp_path / "out"))
    assert code == 1 and "has no VAE" in error and "--pretrained_vae_model_name_or_path" in error
    save_file(
        {key.removeprefix("first_stage_model."): tensor for key, tensor in vae.items()}, tmp_path / "vae.safetensors"
    )
    save_file(states_of(source)["vae"], tmp_path / "theirs.safetensors")
    given = (tmp_path / "vae.safetensors", tmp_path / "theirs.safetensors", source / "vae", source)
    for place in given:
        assert torch.equal(encoded(load_pipeline(tmp_path / "bare.safetensors", device="cpu", vae=place)), whole), place
    few = ("--pretrained_vae_model_name_or_path", given[0])
    assert run(capsys, *drawing(tmp_path / "bare.safetensors", tmp_path / "out", *few))[0] == 0


def test_another_vae_takes_effect_and_changes_the_fingerprint(sources, tmp_path, capsys):
    other = make_model(tmp_path / "other", "SD 1.x", seed=9)
    plain, changed = (load_pipeline(sources["SD 1.x"], device="cpu", vae=vae) for vae in (None, other))
    assert torch.equal(encoded(changed), encoded(load_pipeline(other, device="cpu")))
    assert torch.equal(drawn(changed), drawn(plain))
    assert changed.fingerprint() != plain.fingerprint()
    code, _, error = run(capsys, *drawing("tiny", tmp_path / "o", "--pretrained_vae_model_name_or_path", "/no/vae"))
    assert code == 1 and "no VAE at /no/vae" in error


def test_a_given_prediction_type_is_the_models_and_changes_the_fingerprint(sources):
    model = load_pipeline(sources["SD 1.x"], device="cpu", prediction_type="v_prediction")
    plain = load_pipeline(sources["SD 1.x"], device="cpu", prediction_type="epsilon")
    assert model.prediction_type == "v_prediction" and not torch.equal(drawn(model), drawn(plain))
    assert model.fingerprint() != plain.fingerprint()
    assert plain.fingerprint() == load_pipeline(sources["SD 1.x"], device="cpu").fingerprint()


def test_epsilon_with_zero_terminal_snr_is_refused_by_name_and_both_cures_work(sources, tmp_path, capsys):
    place = shutil.copytree(sources["SD 1.x"], tmp_path / "m")
    set_scheduler(place, rescale_betas_zero_snr=True)
    code, _, error = run(capsys, *drawing(place, tmp_path / "o"))
    assert code == 2 and "zero terminal SNR" in error and "--prediction_type v_prediction" in error
    assert run(capsys, *drawing(place, tmp_path / "o", "--prediction_type", "v_prediction"))[0] == 0
    with pytest.raises(ValueError, match="zero terminal SNR"):
        load_pipeline(place, device="cpu")
    set_scheduler(place, rescale_betas_zero_snr=False)
    assert run(capsys, *drawing(place, tmp_path / "p"))[0] == 0


def test_inspect_tells_what_a_folder_lacks(sources, tmp_path, capsys):
    place = halved(sources["SDXL v zero"], tmp_path / "m", plain_too=False)
    (place / "README.md").write_text("---\nlicense: openrail++\n---\n")
    shutil.rmtree(place / "tokenizer_2")
    next((place / "vae").glob("*.safetensors")).unlink()
    code, output, _ = run(capsys, "model", "inspect", place)
    told = dict(re.findall(r"^(\w+) +(.+)$", output, re.M))
    assert code == 0 and told["family"] == "SDXL" and told["parts"].endswith("fp16")
    assert told["missing"] == "tokenizer_2, weights of vae" and told["licence"] == "openrail++"
    assert "v_prediction" in told["predicts"] and "zero terminal" in told["noise"] and "use" not in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_becomes_a_file_and_a_folder_again(kind, sources, expected, tmp_path, capsys):
    few = ("--dtype", "fp32", "--output_dir")
    assert run(capsys, "model", "convert", sources[kind], "--to", "single-file", *few, tmp_path)[0] == 0
    (file,) = tmp_path.glob("*.safetensors")
    assert run(capsys, "model", "convert", file, *few, tmp_path / "back")[0] == 0
    back = load_pipeline(tmp_path / "back", device="cpu")
    assert torch.equal(drawn(back), expected(kind, torch.float32)[0])
    assert back.schedule.zero_terminal == kind.endswith("zero")
    code, output, _ = run(capsys, "model", "inspect", file)
    assert code == 0 and f"family     {kind.split(' v')[0]}" in output
    code, _, error = run(capsys, "model", "convert", file, *few, tmp_path / "back")
    assert code == 2 and "is there already" in error


def test_merge_adds_a_lora_times_its_scale(sources, tmp_path, capsys):
    source = sources["SD 1.x"]
    states = states_of(source)["unet"]
    names = [key.removesuffix(".weight") for key in states if re.search(r"attn\d\.to_[qkv]\.weight", key)]
    draw, tensors, deltas = torch.Generator().manual_seed(3), {}, {}
    for name in names:
        rows, columns = states[f"{name}.weight"].shape
        down, up = (torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw))
        tensors |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
        deltas[name] = up.double() @ down.double()
    save_file(tensors, tmp_path / "lora.safetensors")
    argv = ("model", "merge", source, "--lora", tmp_path / "lora.safetensors", "--scale", 0.5, "--dtype", "fp32")
    assert run(capsys, *argv, "--output_dir", tmp_path / "merged")[0] == 0
    merged = states_of(tmp_path / "merged")["unet"]
    assert merged.keys() == states.keys()
    for key, tensor in merged.items():
        due = states[key].double() + 0.5 * deltas.get(key.removesuffix(".weight"), torch.zeros(1))
        torch.testing.assert_close(tensor.double(), due, rtol=1e-6, atol=1e-6)


def test_a_relative_with_other_layers_is_refused(sources, tmp_path, capsys):
    tensors = load_file(single(sources["SDXL"], tmp_path / "m.safetensors", "SDXL", torch.float16))
    more = {"model.diffusion_model.input_blocks.1.1.extra.weight": torch.zeros(2)}
    save_file(tensors | more, tmp_path / "more.safetensors", {"modelspec.resolution": "64x64"})
    with pytest.raises(ValueError, match=r"1 tensors for layers .*relative with another structure"):
        load_pipeline(tmp_path / "more.safetensors", device="cpu")
    gone = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=f"lacks 1 tensors, the first is {re.escape(gone)}"):
        load_pipeline(tmp_path / "less.safetensors", device="cpu")
    with pytest.raises(ValueError, match="EDM noise levels"):
        save_file(tensors | {"edm_mean": torch.zeros(4)}, tmp_path / "edm.safetensors")
        load_pipeline(tmp_path / "edm.safetensors", device="cpu")


def test_index_json_of_the_written_folder_is_plain(sources, tmp_path, capsys):
    file = single(sources["SDXL"], tmp_path / "m.safetensors", "SDXL", torch.float16)
    assert run(capsys, "model", "convert", file, "--output_dir", tmp_path / "f")[0] == 0
    index = json.loads((tmp_path / "f" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is True
