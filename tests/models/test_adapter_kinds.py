"""Adapters of every kind in the wild: merged exactly, or refused by their kind.

The files are made by hand after lycoris' formulas. lycoris-lora 4.1.3 itself was compared once: 25 variants of its
LoCon, LoHa, LoKr, DoRA, full, norm, IA3, GLoRA, OFT and BOFT modules for UNet and text encoder of both tiny models;
each layer gave lycoris' output within 1e-6, relative. (Its `get_merged_weight` of LoHa and LoKr applies alpha / rank
twice; its forward pass and this package apply it once.) The files of peft are made by peft.
"""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
)
from stress.lora.families import families
from stress.lora.faults import ALPHA, FORMATS, first_release, read, write
from stress.lora.kinds import KINDS, Dice

from diffusion_align.models import load_lora, merge_lora
from diffusion_align.models.lora.names import kind as kind_of_layer

UNET_LAYERS = ("attn1.to_q", "ff.net.2", "proj_in", "conv1")
TEXT_LAYERS = ("mlp.fc1", "self_attn.out_proj")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return families(tmp_path_factory.mktemp("families"))


def fresh(family):
    """A model whose text encoders may change too."""
    model = family.fresh()
    model.text_encoder = copy.deepcopy(model.text_encoder)
    model.second = copy.deepcopy(model.second)
    return model


def modules(model):
    found = {"unet": model.unet, "text_encoder": model.text_encoder}
    return found | ({"text_encoder_2": model.second.text_encoder} if model.second else {})


def weights(model):
    return {f"{n}.{key}": value.clone() for n, net in modules(model).items() for key, value in net.state_dict().items()}


def kohya(network, layer):
    """The names of kohya's sd-scripts for one and for two text encoders."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    return prefix[network] + layer.removeprefix("text_model.").replace(".", "_")


def kohya_xl(network, layer):
    """The same for SDXL, whose blocks have the numbers of its first release."""
    name = kohya(network, layer).replace("lora_te_", "lora_te1_")
    return first_release(name + ".").removesuffix(".")


def lycoris(network, layer):
    return kohya(network, layer).replace("lora_unet_", "lycoris_")


def dotted(network, layer):
    return f"{network}.{layer}"


def comfy(network, layer):
    prefix = {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer.text_model."}
    return prefix[network] + layer.removeprefix("text_model.")


def make_file(path, model, kind, name=kohya, dtype=torch.float32, networks=("unet", "text_encoder")):
    """Write a file of a kind; returns the weights that it stands for, of all networks."""
    tensors, due = {}, weights(model)
    for network in networks:
        wanted = UNET_LAYERS if network == "unet" else TEXT_LAYERS
        for layer, module in modules(model)[network].named_modules():
            if kind_of_layer(layer) not in wanted:
                continue
            made = kind.make(module.weight.detach(), Dice(network, layer))
            parts = {key: v.to(dtype) if v.is_floating_point() else v for key, v in made.items()}
            tensors |= {f"{name(network, layer)}.{key}": value for key, value in parts.items()}
            exact = {key: value.double() for key, value in parts.items()}
            due[f"{network}.{layer}.weight"] = kind.due(module.weight.detach().double(), exact)
    write(path, tensors)
    return due


def assert_merged(family, model, due):
    found, base = weights(model), weights(family.model)
    for key, value in due.items():
        assert torch.allclose(found[key].double(), value.double(), rtol=0, atol=TOLERANCE), key
    assert any(not torch.allclose(found[key], base[key], rtol=0, atol=1e-3) for key in due)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_merged_exactly(both, tmp_path, name):
    model = fresh(both[0])
    due = make_file(tmp_path / "file.safetensors", model, KINDS[name])
    assert KINDS[name].title in merge_lora(model, tmp_path / "file.safetensors")
    assert_merged(both[0], model, due)


XL = ("LoRA", "LoCon, Tucker", "LoHa", "LoKr", "DoRA", "IA3", "GLoRA", "OFT", "full")


@pytest.mark.parametrize("name", XL)
def test_each_kind_is_merged_exactly_into_sdxl_and_both_its_encoders(both, tmp_path, name):
    model = fresh(both[1])
    networks = ("unet", "text_encoder", "text_encoder_2")
    due = make_file(tmp_path / "file.safetensors", model, KINDS[name], kohya_xl, networks=networks)
    merge_lora(model, tmp_path / "file.safetensors")
    assert_merged(both[1], model, due)


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_precision_is_read_alpha_too(both, tmp_path, caplog, name, dtype):
    model = fresh(both[0])
    due = make_file(tmp_path / "file.safetensors", model, KINDS[name], dtype=dtype)
    merge_lora(model, tmp_path / "file.safetensors")
    assert_merged(both[0], model, due)
    assert f"{str(dtype).removeprefix('torch.')} cast to float32" in caplog.text


@pytest.mark.parametrize("naming", [lycoris, dotted, comfy])
@pytest.mark.parametrize("name", ["LoRA", "LoHa", "DoRA"])
def test_every_kind_has_the_names_of_several_programs(both, tmp_path, naming, name):
    model = fresh(both[0])
    due = make_file(tmp_path / "file.safetensors", model, KINDS[name], naming)
    merge_lora(model, tmp_path / "file.safetensors")
    assert_merged(both[0], model, due)


def test_norms_and_biases_are_moved(both, tmp_path):
    model = fresh(both[0])
    due, tensors = weights(model), {}
    for layer, module in model.unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            for part, target in (("w_norm", "weight"), ("b_norm", "bias")):
                tensors[f"{kohya('unet', layer)}.{part}"] = value = Dice(layer, part)(module.weight.numel())
                due[f"unet.{layer}.{target}"] = due[f"unet.{layer}.{target}"] + value
        if kind_of_layer(layer) == "conv1":
            tensors[f"{kohya('unet', layer)}.diff_b"] = value = Dice(layer)(module.bias.numel())
            due[f"unet.{layer}.bias"] = due[f"unet.{layer}.bias"] + value
    assert merge_lora(model, write(tmp_path / "norms.safetensors", tensors)) == ["full difference", "norm difference"]
    assert_merged(both[0], model, due)


def test_linear_halves_stored_as_convolutions_are_reshaped_and_noted(both, tmp_path, caplog):
    family = both[1]  # whose proj_in is linear, and a 1x1 convolution in other models
    model = fresh(family)
    due = make_file(tmp_path / "file.safetensors", model, KINDS["LoRA"], networks=("unet",))
    tensors, _ = read(tmp_path / "file.safetensors")
    stored = {key: value[..., None, None] if value.ndim == 2 else value for key, value in tensors.items()}
    path = write(tmp_path / "file.safetensors", stored)
    merge_lora(model, path)
    assert_merged(family, model, due)
    assert caplog.text.count("stored as convolutions of 1x1 pixels reshaped") == 1
    other = fresh(both[0])
    due = make_file(path, other, KINDS["LoRA"], networks=("unet",))
    flat = {key: v[..., 0, 0] if v.shape[2:] == (1, 1) and "proj_in" in key else v for key, v in read(path)[0].items()}
    merge_lora(other, write(path, flat))
    assert_merged(both[0], other, due)


def test_text_encoders_of_a_lora_change_the_text_and_the_fingerprint(both, tmp_path, caplog):
    model = fresh(both[0])
    path = tmp_path / "file.safetensors"
    due = make_file(path, model, KINDS["LoRA"])
    before, empty = model.encode_text(["a red circle"]), model.empty_text
    model.unet.requires_grad_(False)
    load_lora(model, path)
    for key, value in due.items():
        if key.startswith("text_encoder."):
            assert torch.allclose(weights(model)[key].double(), value.double(), atol=TOLERANCE), key
    assert not torch.allclose(model.encode_text(["a red circle"]), before, atol=1e-3)
    assert not torch.allclose(model.empty_text, empty, atol=1e-3)
    assert "its layers for text_encoder merged" in caplog.text
    assert model.fingerprint().startswith(both[0].model.fingerprint() + "+")


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("LoRA", "DoRA")])
def test_kinds_that_can_only_be_merged_are_refused_as_a_lora_by_name(both, tmp_path, name):
    model = fresh(both[0])
    make_file(tmp_path / "file.safetensors", model, KINDS[name])
    words = "a magnitude for each input" if name == "DoRA per input" else r"is of .*can be merged into the model"
    with pytest.raises(ValueError, match=words):
        load_lora(model, tmp_path / "file.safetensors")
    assert torch.equal(both[0].answer(model), both[0].plain) and model.merged == ()


PEFT = {
    "plain": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"]),
    "rsLoRA": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], use_rslora=True),
    "DoRA": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], use_dora=True),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern={"to_q": 2, "mid_block.*to_k": 3},
        alpha_pattern={"attn2.to_q": 9, "to_k": 1},
    ),
    "patterns, rsLoRA": LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 1},
        use_rslora=True,
    ),
    "all-linear": LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"),
    "a pattern": LoraConfig(r=2, lora_alpha=6, target_modules=r".*attn[12]\.to_(q|k)"),
    "exclude_modules": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], exclude_modules=r"mid_block.*"),
    "layers_to_transform": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], layers_to_transform=[0],
                                      layers_pattern="up_blocks"),
    "LoHa": LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv1", "proj_in"]),
    "LoHa, effective": LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv1"], use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=5, target_modules=["to_q", "conv1", "proj_in"], decompose_factor=4),
    "LoKr, both": LoKrConfig(r=1, alpha=3, target_modules=["to_q", "conv1"], decompose_both=True, decompose_factor=8),
    "LoKr, full": LoKrConfig(r=64, alpha=5, target_modules=["to_q", "conv1"]),
}  # fmt: skip


def save_by_peft(network, config, folder):
    config = copy.deepcopy(config)
    for name in ("init_lora_weights", "init_weights"):
        if hasattr(config, name):
            setattr(config, name, False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(network, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)


@pytest.mark.parametrize("name", PEFT)
def test_a_folder_of_peft_is_merged_as_peft_merges_it(both, tmp_path, name):
    save_by_peft(fresh(both[0]).unet, PEFT[name], tmp_path)
    model, theirs = fresh(both[0]), fresh(both[0])
    merge_lora(model, tmp_path)
    with torch.random.fork_rng():
        theirs.unet = PeftModel.from_pretrained(theirs.unet, tmp_path).merge_and_unload()
    assert_merged(both[0], model, weights(theirs))
    if name.startswith("LoRA") or "LoKr" in name or "LoHa" in name:
        return
    loaded = fresh(both[0])
    load_lora(loaded, tmp_path)
    assert torch.allclose(both[0].answer(loaded), both[0].answer(theirs), atol=TOLERANCE)


def test_a_folder_of_peft_for_a_text_encoder_is_merged(both, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"])
    save_by_peft(fresh(both[0]).text_encoder, config, tmp_path)
    model, theirs = fresh(both[0]), fresh(both[0])
    merge_lora(model, tmp_path)
    with torch.random.fork_rng():
        theirs.text_encoder = PeftModel.from_pretrained(theirs.text_encoder, tmp_path).merge_and_unload()
    assert_merged(both[0], model, weights(theirs))
    with pytest.raises(ValueError, match="not of this model"):  # of which of SDXL's two encoders?
        merge_lora(fresh(both[1]), tmp_path)


OTHERS = {
    "AdaLoRA": (AdaLoraConfig(target_modules=["to_q"], total_step=10, tinit=1, tfinal=1), "ADALORA"),
    "IA3": (IA3Config(target_modules=["to_q", "ff.net.2"], feedforward_modules=["ff.net.2"]), "IA3"),
    "OFT": (OFTConfig(oft_block_size=4, target_modules=["to_q"]), "OFT"),
    "modules_to_save": (LoraConfig(target_modules=["to_q"], modules_to_save=["conv_in"]), "conv_in"),
    "PiSSA": (LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "pissa.*path_initial_model"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_peft_are_refused_by_name_with_and_without_their_settings(both, tmp_path, name):
    config, words = OTHERS[name]
    with torch.random.fork_rng():
        get_peft_model(fresh(both[0]).unet, copy.deepcopy(config)).save_pretrained(tmp_path)
    model = fresh(both[0])
    with pytest.raises(ValueError, match=words):
        merge_lora(model, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="alpha is unknown|of peft|modules_to_save|biases|no known kind"):
        merge_lora(model, tmp_path)
    assert torch.equal(both[0].answer(model), both[0].plain)


@pytest.mark.parametrize("name", ["plain", "LoHa"])
def test_peft_without_its_settings_has_an_unknown_alpha_that_can_be_given(both, tmp_path, name):
    save_by_peft(fresh(both[0]).unet, PEFT[name], tmp_path)
    due = fresh(both[0])
    merge_lora(due, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"alpha is unknown.*no adapter_config.json.*load_lora\(\.\.\., alpha="):
        merge_lora(fresh(both[0]), tmp_path)
    model = fresh(both[0])
    merge_lora(model, tmp_path, alpha=6 if name == "plain" else 5)
    assert_merged(both[0], model, weights(due))


@pytest.mark.parametrize(
    "keys, words",
    [
        (["lora_unet_mid_block_attentions_0_proj_in.oft_diag"], "OFT of an old kohya"),
        (["unet.down_blocks.0.ia3_l"], "IA3 of peft"),
        (["base_model.model.mid_block.attentions.0.proj_in.boft_R"], "BOFT of peft"),
        (["base_model.model.mid_block.attentions.0.proj_in.lora_B.bias"], "a LoRA with biases"),
        (["base_model.model.mid_block.attentions.0.proj_in.vera_lambda_b"], "VeRA"),
        (["lora_transformer_single_transformer_blocks_0_proj_out.lora_down.weight"], "none of its layers"),
        (["transformer.single_transformer_blocks.0.norm.linear.weight"], "transformer such as Flux"),
        (["model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.weight"], "a whole model"),
        (["emb_params"], "textual inversion"),
        (["down_blocks.0.to_k_ip.weight"], "IP-Adapter"),
        (["lora_unet_mid_block_attentions_0_proj_in.lokr_t1"], "LoKr with lokr_t1"),
        (["lora_unet_mid_block_attentions_0_proj_in.set_weight"], "a patch of ComfyUI"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
          "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "of no known kind of LoRA, or of several"),
    ],
)  # fmt: skip
def test_keys_of_other_kinds_are_refused_by_their_kind(both, tmp_path, keys, words):
    path = write(tmp_path / "other.safetensors", {key: torch.ones(4, 4) for key in keys})
    with pytest.raises(ValueError, match=words) as error:
        merge_lora(fresh(both[0]), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "GLoRA", "OFT", "BOFT", "full", "DoRA", "LoCon, Tucker", "IA3"])
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(both, tmp_path, name):
    model = fresh(both[0])
    make_file(tmp_path / "file.safetensors", model, KINDS[name])
    tensors, _ = read(tmp_path / "file.safetensors")
    part = {"DoRA": "dora_scale", "LoCon, Tucker": "lora_mid.weight"}.get(name, "")
    key = next(key for key in sorted(tensors) if part in key and "alpha" not in key and tensors[key].ndim)
    half = tensors[key].chunk(2, dim=1 if name == "BOFT" else 0)[0].clone()
    spoilt = tensors[key].clone().fill_(float("nan"))
    for wrong, words in ((half, "do not fit the layer's weight"), (spoilt, "not finite")):
        path = write(tmp_path / "wrong.safetensors", tensors | {key: wrong})
        with pytest.raises(ValueError, match=words) as error:
            merge_lora(model, path)
        assert key.partition(".")[0] in str(error.value)
    assert torch.equal(both[0].answer(model), both[0].plain)


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "LoKr", "GLoRA", "IA3", "OFT"])
def test_a_missing_tensor_is_refused(both, tmp_path, name):
    model = fresh(both[0])
    make_file(tmp_path / "file.safetensors", model, KINDS[name])
    tensors, _ = read(tmp_path / "file.safetensors")
    key = next(key for key in sorted(tensors) if "alpha" not in key and tensors[key].ndim)
    del tensors[key]
    with pytest.raises(ValueError, match="halves of layers are missing|layers are missing|no known kind"):
        merge_lora(model, write(tmp_path / "wrong.safetensors", tensors))
    assert torch.equal(both[0].answer(model), both[0].plain)


def test_a_lora_is_not_merged_beside_a_loaded_one(both, tmp_path):
    model = both[0].tuned(1, ALPHA)
    with pytest.raises(ValueError, match="already has a LoRA"):
        merge_lora(model, FORMATS["diffusers"][0](both[0].tuned(2, ALPHA).unet, tmp_path))
