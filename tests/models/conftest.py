import pytest
from helpers_tiny import make_tiny_folder

from diffusion_align.models import load_pipeline


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("models") / "epsilon")


@pytest.fixture(scope="session")
def tiny_v_folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("models") / "v", prediction_type="v_prediction", seed=1)


@pytest.fixture
def gate(tiny_folder):
    return load_pipeline(tiny_folder, device="cpu")
