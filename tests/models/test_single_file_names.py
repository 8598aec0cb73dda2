"""The key names of single files, against diffusers' own readers: at the published sizes without weights, and with
weights at tiny ones."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion_align.models.single_file.names import OPEN_CLIP, SDXL_OPEN_CLIP, unet_places, vae_places
from diffusion_align.models.single_file.write import to_original

UNETS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def encoder(kind, width, layers, projection=64):
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=1,
        projection_dim=projection, vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layers)
        return kind(config).state_dict()


@pytest.mark.parametrize(("name", "count"), [("sd1", 686), ("sd2", 686), ("sdxl", 1680)])
def test_every_unet_tensor_of_the_published_sizes_is_where_diffusers_finds_it(name, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    state = unet.state_dict()
    at = unet_places(state)
    assert len({place.key for place in at.values()}) == len(state) == count
    read = theirs.convert_ldm_unet_checkpoint({at[key].key: tensor for key, tensor in state.items()}, unet.config)
    assert read.keys() == state.keys()
    assert all(read[key] is state[key] for key in state)


def test_every_vae_tensor_of_the_published_size_is_where_diffusers_finds_it():
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    state = vae.state_dict()
    at = vae_places(state)
    assert len({place.key for place in at.values()}) == len(state) == 248
    original = {at[key].key: tensor for key, tensor in state.items()}
    read = theirs.convert_ldm_vae_checkpoint(original, vae.config)
    assert read.keys() == state.keys()
    assert all(read[key].shape.numel() == state[key].numel() for key in state)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
    ],
)
def test_known_keys_of_stable_diffusion_are_written(key):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["sd1"])
    assert key in {place.key for place in unet_places(unet.state_dict()).values()}


def tiny_states(version):
    widths = {"block_out_channels": (32, 64, 64), "layers_per_block": 1}
    settings = {key: value for key, value in UNETS["sdxl"].items() if key != "block_out_channels"} | widths
    settings |= {"transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 96, "attention_head_dim": (1, 2, 2)}
    if version != "sdxl":
        settings |= {"addition_embed_type": None}
    settings |= {"use_linear_projection": version != "sd1"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**settings)
        vae = AutoencoderKL(**{**VAE, "block_out_channels": (32, 32, 32, 64), "layers_per_block": 1})
    states = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": encoder(CLIPTextModel, 32, 3)}
    if version == "sdxl":
        states["text_encoder_2"] = encoder(CLIPTextModelWithProjection, 64, 2, projection=48)
    return states, unet, vae


def same(found, wanted):
    assert found.keys() == wanted.keys()
    return all(torch.equal(found[key].reshape(wanted[key].shape), wanted[key]) for key in wanted)


@pytest.mark.parametrize("version", ["sd1", "sd2", "sdxl"])
def test_unet_and_vae_survive_a_file_and_the_way_back_through_diffusers(version):
    states, unet, vae = tiny_states(version)
    original = to_original(states)
    assert same(theirs.convert_ldm_unet_checkpoint(original, unet.config), states["unet"])
    assert same(theirs.convert_ldm_vae_checkpoint(original, vae.config), states["vae"])
    kinds = {"decoder.mid.attn_1.q.weight": 4, "decoder.mid.attn_1.norm.weight": 1}
    assert {key: original[f"first_stage_model.{key}"].ndim for key in kinds} == kinds


def test_clip_keeps_its_names_under_the_original_prefix():
    states, _, _ = tiny_states("sd1")
    read = theirs.convert_ldm_clip_checkpoint(to_original(states))
    assert same(read, {f"text_model.{key}": tensor for key, tensor in states["text_encoder"].items()})
    states, _, _ = tiny_states("sdxl")
    read = theirs.convert_ldm_clip_checkpoint(to_original(states))
    assert same(read, {f"text_model.{key}": tensor for key, tensor in states["text_encoder"].items()})


class Towered(torch.nn.Module):
    """What diffusers' reader asks of a model: nothing but a config."""

    class config:
        hidden_size = 32


def test_open_clip_is_fused_as_diffusers_takes_it_apart():
    states, _, _ = tiny_states("sdxl")
    read = theirs.convert_open_clip_checkpoint(Towered(), to_original(states) | {}, SDXL_OPEN_CLIP)
    wanted = states["text_encoder_2"]
    # diffusers counts rows by the projection's first side, which is the width in every published model, as here.
    assert same(read, dict(wanted))


def test_stable_diffusion_2_gets_the_last_layer_that_readers_expect():
    states, _, _ = tiny_states("sd2")
    original = to_original(states)
    blocks = {key.split(".")[4] for key in original if key.startswith(f"{OPEN_CLIP}transformer.resblocks.")}
    assert blocks == {"0", "1", "2", "3"}
    read = theirs.convert_open_clip_checkpoint(Towered(), original, OPEN_CLIP)
    wanted = {f"text_model.{key}": tensor for key, tensor in states["text_encoder"].items()}
    assert same({key: tensor for key, tensor in read.items() if key in wanted}, wanted)


@pytest.mark.parametrize("key", ["down_blocks.0.strange", "mid_block.attentions.0.to_q.base_layer.weight"])
def test_other_networks_and_unmerged_loras_are_refused(key):
    states, _, _ = tiny_states("sd1")
    states["unet"] = dict(states["unet"]) | {key: torch.zeros(1)}
    with pytest.raises(ValueError, match="has no place in a single file|must be merged"):
        to_original(states)
