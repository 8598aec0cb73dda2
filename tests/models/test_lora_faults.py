"""LoRA files of other programs, and faulty ones: loaded as meant, with a message, or refused by the key at fault."""

import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from helpers_machine import assert_rounded
from peft import LoraConfig, PeftModel, get_peft_model
from stress.lora.families import families, logged, verdict
from stress.lora.faults import ALPHA, FORMATS, RANK, read, without_alpha, write
from stress.lora.loaders import by_command, make_run, pictures_of_64, resumed
from stress.loras import cases

from diffusion_align.models import load_lora, load_pipeline, save_lora
from diffusion_align.models.lora.names import flat, layer_names, of_text_encoder
from diffusion_align.rng import normal

TE = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight"
TE2 = TE.replace("text_encoder.", "text_encoder_2.")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return families(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("which, formats", [(0, ("diffusers",)), (1, ("kohya for SDXL",))])
def test_every_fault_is_refused_or_repaired_and_none_is_silent(both, tmp_path, which, formats):
    found = list(cases(both[which], both[1 - which], tmp_path, 0, formats))
    assert len(found) >= 21 * len(formats)
    assert [case for case, right in found if case[2] not in right] == []


def load_theirs(family, path):
    kind = StableDiffusionXLPipeline if family.name == "SDXL" else StableDiffusionPipeline
    pipe = kind.from_pretrained(family.folder)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    model = family.fresh()
    model.unet = pipe.unet
    return family.answer(model)


# Those that diffusers' own loader reads right; peft's have their own test, and names without a prefix it does not know.
@pytest.mark.parametrize("which", [0, 1], ids=["SD", "SDXL"])
@pytest.mark.parametrize("name", ["diffusers", "diffusers, no header", "old diffusers", "kohya", "kohya for SDXL"])
def test_a_file_is_the_same_function_here_and_in_diffusers(both, tmp_path, which, name):
    family = both[which]
    if name == "kohya for SDXL" and which == 0:
        return
    writer, tells_alpha, _, targets = FORMATS[name]
    path = writer(family.tuned(1, ALPHA if tells_alpha else RANK, targets).unet, tmp_path)
    model = family.fresh()
    load_lora(model, path)
    theirs = load_theirs(family, path)
    assert (theirs - family.plain).abs().max() > 1e-2
    assert_rounded(family.answer(model), theirs, depth=200)


def test_a_folder_written_by_peft_loads_with_its_alpha(both, tmp_path):
    family = both[0]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False)
    with torch.random.fork_rng():
        get_peft_model(family.fresh().unet, config).save_pretrained(tmp_path)
    model, theirs = family.fresh(), family.fresh()
    with logged() as messages:
        load_lora(model, tmp_path)
    with torch.random.fork_rng():
        theirs.unet = PeftModel.from_pretrained(theirs.unet, tmp_path)
    assert "peft names read, such as base_model.model." in messages[0] and "alpha" not in messages[0]
    assert_rounded(family.answer(model), family.answer(theirs), depth=200)


def merged(model, tensors):
    """The plain network with `alpha / rank * up @ down` (kohya's own definition) added to its weights."""
    layers = {"lora_unet_" + name.replace(".", "_"): module for name, module in model.unet.named_modules()}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[stem + ".lora_up.weight"], tensors[stem + ".alpha"]
            update = (up.flatten(1) @ down.flatten(1)).view_as(layers[stem].weight)
            layers[stem].weight.data += float(alpha) / len(down) * update
    return model


@pytest.mark.parametrize("same_strength", [True, False])
def test_ranks_and_strengths_that_differ_between_layers_are_kept(both, tmp_path, same_strength):
    family = both[0]
    tensors, _ = read(FORMATS["kohya"][0](family.tuned(2, ALPHA).unet, tmp_path))
    for key in [key for key in tensors if "resnets" in key and key.endswith("lora_down.weight")]:
        stem = key.removesuffix(".lora_down.weight")
        tensors[key] = tensors[key][:3]
        tensors[stem + ".lora_up.weight"] = tensors[stem + ".lora_up.weight"][:, :3]
        tensors[stem + ".alpha"] = torch.tensor(6.0 if same_strength else 1.5)
    model = family.fresh()
    with logged() as messages:
        load_lora(model, write(tmp_path / "mixed.safetensors", tensors))
    assert_rounded(family.answer(model), family.answer(merged(family.fresh(), tensors)), depth=200)
    assert "padded with zeros to 4" in messages[0] and ("multiplied in" in messages[0]) != same_strength
    save_lora(model.unet, tmp_path / "again")
    assert_rounded(
        load_theirs(family, tmp_path / "again" / "pytorch_lora_weights.safetensors"), family.answer(model), depth=200
    )


def test_the_blocks_of_sdxl_have_the_numbers_of_its_first_release():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    names = layer_names(unet)
    # kohya's names, and the layers that diffusers' conversion of a single-file SDXL checkpoint makes of them.
    down, up = "down_blocks.{}.attentions.{}.transformer_blocks.{}", "up_blocks.{}.attentions.{}.transformer_blocks.{}"
    known = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_k": down.format(1, 0, 0) + ".attn1.to_k",
        "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": down.format(2, 1, 9) + ".attn2.to_out.0",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_2_1_transformer_blocks_3_ff_net_0_proj": up.format(0, 2, 3) + ".ff.net.0.proj",
        "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "output_blocks_8_0_emb_layers_1": "up_blocks.2.resnets.2.time_emb_proj",
        "label_emb_0_2": "add_embedding.linear_2",
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
    }
    assert {key: names.get(flat("lora_unet_" + key)) for key in known} == known
    layers = [name for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert set(names.values()) == set(layers) and len({flat(layer) for layer in layers}) == len(layers) > 700


def test_an_upsampler_is_numbered_after_the_attention_if_there_is_one():
    with torch.device("meta"):
        names = layer_names(UNet2DConditionModel())  # whose blocks are those of Stable Diffusion 1.5
    assert names["output_blocks_2_1_conv"] == "up_blocks.0.upsamplers.0.conv"
    assert names["output_blocks_5_2_conv"] == "up_blocks.1.upsamplers.0.conv"


@pytest.mark.parametrize(
    "key, text",
    [
        ("encoder.layers.1.mlp.fc1.lora_A.weight", True),
        ("text_model.encoder.layers.1.mlp.fc1.lora_A.weight", True),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", True),
        ("lora_te2_text_projection.lora_down.weight", True),
        ("base_model.model.text_model.encoder.layers.0.self_attn.k_proj.lora_B.weight", True),
        ("unet.time_embedding.linear_1.lora.down.weight", False),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", False),
        ("down_blocks.0.attentions.0.proj_in.lora.up.weight", False),
    ],
)
def test_keys_of_text_encoders_are_recognised(key, text):
    assert of_text_encoder(key) == text


@pytest.mark.parametrize(
    "key, fault",
    [
        (TE, "1 halves of layers are missing, the first is lora.up of text_encoder.encoder.layers.0.mlp.fc1"),
        (TE2, f"1 tensors are for text encoders, which are not of this model, the first is {TE2}"),
    ],
)
def test_one_line_tells_what_is_left_out_of_a_file(both, tmp_path, caplog, key, fault):
    family = both[0]
    tuned = family.tuned(3, ALPHA)
    path = save_lora(tuned.unet, tmp_path)
    tensors, header = read(path)
    write(path, tensors | {key: torch.zeros(RANK, 32)}, header)
    model = family.fresh()
    with pytest.raises(ValueError, match=f"{fault}.*allow_partial=True"):
        load_lora(model, path)
    with caplog.at_level(logging.WARNING):
        load_lora(model, path, allow_partial=True)
    assert torch.equal(family.answer(model), family.answer(tuned))
    (line,) = [record.getMessage() for record in caplog.records]
    rest = "; left out: 1 of 2 layers are missing, the first is lora of text_encoder.encoder.layers.1.mlp.fc1"
    assert line == f"{path}: left out: {fault}{rest if key == TE else ''}"


def test_some_layers_only_are_loaded_only_if_allowed(both, tmp_path):
    family = both[0]
    tensors, header = read(FORMATS["kohya"][0](family.tuned(4, ALPHA).unet, tmp_path))
    middle = {key: value for key, value in tensors.items() if "mid_block" in key}
    path = write(tmp_path / "middle.safetensors", middle, header)
    model = family.fresh()
    with pytest.raises(ValueError, match=r"of \d+ layers are missing, the first is lora of down_blocks"):
        load_lora(model, path)
    load_lora(model, path, allow_partial=True)
    due = family.answer(merged(family.fresh(), middle))
    assert_rounded(family.answer(model), due, depth=200)


def test_a_missing_alpha_defaults_to_the_rank(both, tmp_path):
    family = both[0]
    path = FORMATS["kohya"][0](family.tuned(5, RANK).unet, tmp_path)
    without_alpha(path)
    model = family.fresh()
    with logged() as messages:
        load_lora(model, path)
    assert_rounded(family.answer(model), load_theirs(family, path), depth=200)
    assert "alpha is missing, so taken to be the rank" in messages[0]


@pytest.mark.parametrize(
    "alpha, words", [(0.0, "other than 0"), (float("nan"), "other than 0"), (None, "have no alpha and others have one")]
)
def test_an_invalid_alpha_is_refused(both, tmp_path, alpha, words):
    tensors, _ = read(FORMATS["kohya"][0](both[0].tuned(6, ALPHA).unet, tmp_path))
    key = next(key for key in tensors if key.endswith(".alpha"))
    del tensors[key]
    if alpha is not None:
        tensors[key] = torch.tensor(alpha)
    with pytest.raises(ValueError, match=words):
        load_lora(both[0].fresh(), write(tmp_path / "alpha.safetensors", tensors))


@pytest.mark.parametrize("strength", ["NaN", "0"])
def test_an_invalid_alpha_in_the_header_is_refused(both, tmp_path, strength):
    tensors, header = read(save_lora(both[0].tuned(7, ALPHA).unet, tmp_path))
    key = "lora_adapter_metadata"
    header[key] = header[key].replace('"unet.lora_alpha": 8.0', f'"unet.lora_alpha": {strength}')
    with pytest.raises(ValueError, match="other than 0"):
        load_lora(both[0].fresh(), write(tmp_path / "file.safetensors", tensors, header))


def test_control_characters_in_a_name_are_escaped(both, tmp_path):
    tensors, header = read(save_lora(both[0].tuned(8, ALPHA).unet, tmp_path))
    path = write(tmp_path / "file.safetensors", tensors | {"unet.\x1b[2J\n.lora.up.weight": torch.zeros(2, 2)}, header)
    with pytest.raises(ValueError) as error:
        load_lora(both[0].fresh(), path)
    assert str(error.value).isprintable()


def test_a_second_lora_is_refused(both, tmp_path):
    tuned = both[0].tuned(8, ALPHA)
    path = save_lora(tuned.unet, tmp_path)
    before = both[0].answer(tuned)
    with pytest.raises(ValueError, match="already has a LoRA"):
        load_lora(tuned, path)
    assert torch.equal(both[0].answer(tuned), before)


def test_two_names_of_one_tensor_are_refused(both, tmp_path):
    tensors, _ = read(FORMATS["kohya"][0](both[0].tuned(9, ALPHA).unet, tmp_path))
    key = next(key for key in tensors if key.endswith("to_q.lora_down.weight"))
    again = key.replace("lora_down", "lora_A").replace("lora_unet_", "unet.")
    path = write(tmp_path / "twice.safetensors", tensors | {again: tensors[key].clone()})
    with pytest.raises(ValueError, match="are of the same layer"):
        load_lora(both[0].fresh(), path)


def test_the_verdict_of_the_stress_program_tells_right_from_wrong(both, tmp_path):
    family = both[0]
    path = save_lora(family.tuned(10, ALPHA).unet, tmp_path)
    other = family.answer(family.tuned(11, ALPHA))
    assert verdict(family, path, other, {"lora"}) == "wrong"
    assert verdict(family, path, family.answer(family.tuned(10, ALPHA)), {"lora"}) == "loaded"


def test_the_command_refuses_or_repairs_a_runs_lora(tmp_path):
    model = pictures_of_64(families(tmp_path)[0].folder)
    some = ("none", "float16", "NaN", "half of the keys missing", "empty file")
    assert dict(by_command("sample", model, tmp_path, some)) == dict.fromkeys(some, True)
    assert load_pipeline(model, device="cpu") and make_run(model, tmp_path / "run").exists()


def test_no_faulty_weights_are_resumed(both, tmp_path):
    found = dict(resumed(both[0].folder, tmp_path))
    assert len(found) == 30 and all(found.values()), [what for what, right in found.items() if not right]


def test_half_precision_is_cast_with_a_message(both, tmp_path):
    family = both[0]
    tensors, header = read(save_lora(family.tuned(12, ALPHA).unet, tmp_path))
    path = write(tmp_path / "half.safetensors", {key: value.bfloat16() for key, value in tensors.items()}, header)
    model = family.fresh()
    with logged() as messages:
        load_lora(model, path)
    assert "bfloat16 cast to float32, such as unet." in messages[0]
    rows = dict(model.unet.named_parameters())
    key = next(key for key in rows if "lora_A" in key)
    assert rows[key].dtype == torch.float32
    name = "unet." + key.replace(".lora_A.default.", ".lora.down.")
    assert torch.equal(rows[key], tensors[name].bfloat16().float())
    assert not torch.equal(rows[key], normal(rows[key].shape, 0, "x"))
