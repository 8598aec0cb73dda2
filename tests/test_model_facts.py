"""What a plan says of a model without loading it, against the loaded model."""

import pytest
from helpers_sdxl import make_tiny_sdxl_folder
from helpers_tiny import make_tiny_folder

from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.models import add_lora, load_pipeline
from diffusion_align.vocabulary import LORA_TARGETS


@pytest.mark.parametrize("make", [make_tiny_folder, make_tiny_sdxl_folder])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_the_number_of_trained_parameters(tmp_path, targets, make, dora):
    folder = make(tmp_path / "model")
    facts = read_model_facts(str(folder))
    model = load_pipeline(folder, device="cpu")
    assert facts.full_parameters() == sum(p.numel() for p in model.unet.parameters())
    assert facts.lora_parameters(3, targets, dora) == sum(
        p.numel() for p in add_lora(model.unet, 3, targets=LORA_TARGETS[targets], dora=dora)
    )


@pytest.mark.parametrize("make, family", [(make_tiny_folder, "Stable Diffusion 1.5"), (make_tiny_sdxl_folder, "SDXL")])
def test_a_folder_is_read(tmp_path, make, family):
    folder = make(tmp_path / "model", prediction_type="v_prediction")
    facts, model = read_model_facts(str(folder)), load_pipeline(folder, device="cpu")
    assert facts.known and facts.family == family and facts.resolution == model.resolution
    assert facts.latent_shape(None) == model.latent_shape() and facts.latent_shape(64) == model.latent_shape(64)
    assert facts.scheduler["prediction_type"] == model.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "name, family, side",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5", 64),
        ("stabilityai/stable-diffusion-xl-base-1.0", "SDXL", 128),
        ("SG161222/RealVisXL_V4.0", "SDXL", 128),
        ("stabilityai/sdxl-turbo", "SDXL", 64),
        ("someone-xl/sd15", "Stable Diffusion 1.5", 64),
    ],
)
def test_what_is_assumed_of_a_model_on_the_hub(name, family, side):
    facts = read_model_facts(name)
    assert not facts.known and facts.family == family and facts.latent_shape(None) == (4, side, side)
    assert facts.scheduler["beta_schedule"] == "scaled_linear" and not facts.unet_shapes
