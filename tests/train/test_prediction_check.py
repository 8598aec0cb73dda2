"""A network that does not predict what its scheduler says is found; one whose output decides nothing is not."""

import json
import shutil

import pytest
import torch

from diffusion_align import cli
from diffusion_align.commands.trained_weights import base_of, run_config
from diffusion_align.models.hub import asset
from diffusion_align.rng import normal
from diffusion_align.schedule import Schedule
from diffusion_align.train.prediction_check import contradiction, prediction_errors

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENTS, TEXT = normal((4, 4, 8, 8), 0, "latents"), torch.zeros(4, 3, 5)
T = 899


def levels(schedule):
    return float(schedule.alpha(T)), float(schedule.sigma(T))


def schedule_of(kind, **more):
    return Schedule.from_config({**BETAS, **more, "prediction_type": kind})


def predictor(kind, schedule, blur=0.0):
    """A network that knows the clean latents, up to an error of `blur`, and puts out what `kind` asks for."""
    alpha, sigma = levels(schedule)
    seen = iter(range(len(LATENTS)))

    def predict(x, t, text):
        i = next(seen)
        clean = LATENTS[i : i + 1] + blur * normal((1, 4, 8, 8), 1, "blur", i)
        noise = (x - alpha * clean) / sigma
        return noise if kind == "epsilon" else alpha * noise - sigma * clean

    return predict


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("blur", [0.0, 0.5])
@pytest.mark.parametrize("made", ["epsilon", "v_prediction"])
def test_only_the_wrong_scheduler_is_a_contradiction(made, blur, zero):
    (wrong,) = {"epsilon", "v_prediction"} - {made}
    right = schedule_of(made, rescale_betas_zero_snr=zero)
    assert contradiction(predictor(made, right, blur), right, LATENTS, TEXT) is None
    found = contradiction(predictor(made, right, blur), schedule_of(wrong, rescale_betas_zero_snr=zero), LATENTS, TEXT)
    assert found is not None and (found.said, found.found, found.timestep) == (wrong, made, T)


def test_the_errors_are_fractions_of_the_targets_size():
    """A network that puts out nothing misses each target by all of it, whatever the size of the latents."""
    for scale in (0.1, 1.0, 7.0):
        errors, t = prediction_errors(lambda x, t, text: 0 * x, schedule_of("epsilon"), scale * LATENTS, TEXT, 0)
        assert t == T and errors == pytest.approx({"epsilon": 1.0, "v_prediction": 1.0})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 30.0])
def test_an_untrained_network_decides_nothing(kind, size):
    def predict(x, t, text):
        return size * normal(x.shape, 5, "output")

    assert contradiction(predict, schedule_of(kind), LATENTS, TEXT) is None


def test_other_kinds_are_left_alone():
    assert contradiction(lambda *a: 1 / 0, schedule_of("sample"), LATENTS, TEXT) is None


def test_a_training_stops_before_its_first_step_and_the_cure_works(tmp_path, capsys):
    place = shutil.copytree(asset("tiny"), tmp_path / "model")
    file = place / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    few = [
        "--max_train_samples=2",
        "--train_batch_size=1",
        "--max_train_steps=1",
        "--run_validation=false",
        "--threads=1",
    ]
    argv = ["train", "dpo", "--preset=tiny", f"--model={place}", *few, f"--output_dir={tmp_path / 'run'}"]
    argv += ["--lr_scheduler=constant", "--device=cpu"]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("give --prediction_type epsilon") and "is taken to predict v_prediction" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert cli.main([*argv, "--prediction_type=epsilon"]) == 0
    base = base_of(tmp_path / "run", run_config(tmp_path / "run"))  # what sample and evaluate load
    assert base["prediction_type"] == "epsilon"
