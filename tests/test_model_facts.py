"""What a plan says of a model without loading it, against the loaded model."""

import pytest
from helpers_tiny import make_tiny_folder

from diffusion_align.commands.model_facts import LORA_LAYERS, read_model_facts
from diffusion_align.models import add_lora, load_pipeline
from diffusion_align.models.adapters import TARGETS


@pytest.mark.parametrize("targets", TARGETS)
def test_the_number_of_trained_parameters(tmp_path, targets):
    folder = make_tiny_folder(tmp_path / "model")
    facts = read_model_facts(str(folder))
    gate = load_pipeline(folder, device="cpu")
    assert facts.full_parameters() == sum(p.numel() for p in gate.unet.parameters())
    assert {name: tuple(layers) for name, layers in LORA_LAYERS.items()} == TARGETS
    assert facts.lora_parameters(3, targets) == sum(p.numel() for p in add_lora(gate.unet, 3, targets=TARGETS[targets]))
