"""The programs of `examples/` run as they are: the loss starts at log 2, and the LoRA that they write loads again."""

import importlib.util
import math
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from diffusion_align.models import load_lora, load_pipeline

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = {
    "train_dpo": ["--pairs", "8", "--steps", "3"],
    "train_d3po": ["--prompts_per_round", "2", "--pictures", "3", "--steps", "2"],
}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_trains_and_its_lora_loads_again(name, tmp_path):
    argv = [*SMALL[name], "--out", str(tmp_path)]
    losses = load(name).main(argv)
    assert len(losses) == int(SMALL[name][-1])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] != losses[0]
    (file,) = tmp_path.glob("*.safetensors")
    model = load_pipeline("tiny", device="cpu")
    load_lora(model, file)
    weights = [weight for key, weight in model.unet.named_parameters() if "lora_B" in key]
    assert weights and any(weight.abs().max() > 0 for weight in weights)
