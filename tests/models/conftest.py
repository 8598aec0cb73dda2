import pytest
from helpers_sdxl import make_tiny_sdxl_folder
from helpers_tiny import make_tiny_folder

from diffusion_align.models import load_pipeline


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("models") / "epsilon")


@pytest.fixture(scope="session")
def tiny_v_folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("models") / "v", prediction_type="v_prediction", seed=1)


@pytest.fixture
def model(tiny_folder):
    return load_pipeline(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    return make_tiny_sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def sdxl_v_folder(tmp_path_factory):
    """v-prediction, and an empty prompt that is encoded like any other."""
    folder = tmp_path_factory.mktemp("models") / "sdxl_v"
    return make_tiny_sdxl_folder(folder, prediction_type="v_prediction", seed=1, force_zeros=False)


@pytest.fixture
def sdxl(sdxl_folder):
    return load_pipeline(sdxl_folder, device="cpu")
