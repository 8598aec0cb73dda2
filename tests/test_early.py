"""What is refused before anything is loaded: devices, packages, places and names that are not there."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from helpers_machine import HANG

from diffusion_align import cli
from diffusion_align.commands import early
from diffusion_align.commands.train import job
from diffusion_align.options import VERBS, TrainDpo

WITH_DEVICE = [words for words, verb in VERBS.items() if "device" in {f.name for f in dataclasses.fields(verb.options)}]
# Enough for each verb's own checks, which come first.
ENOUGH = {
    "train": ["--model=tiny", "--data=tiny"],
    "online": ["--model=tiny", "--prompts=tiny", "--reward=judge"],
    "sample": ["--model=tiny", "--prompt=a"],
    "evaluate": ["tiny"],
    "data synth": ["--models=tiny", "--prompts=tiny", "--rewards=judge"],
    "reward score": ["--reward=judge", "--images=x"],
    "reward serve": ["--reward=judge"],
    "reward train-spm": ["--model=tiny", "--data=tiny"],
}


def enough(words):
    online = words.split()[-1] in ("d3po", "spo", "prdp", "ddpo")
    return ENOUGH.get(words) or ENOUGH["online" if online else "train"]


def refused(capsys, argv, code=2):
    assert cli.main(argv) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def no_gpu(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.fixture
def loads_nothing(monkeypatch):
    """No command may get as far as its own work."""

    def started(*args):
        raise AssertionError("the command has started")

    monkeypatch.setattr("diffusion_align.options.verb._function", lambda where: started)


def test_the_verbs_with_a_device_are_all_tried():
    assert {"train dpo", "train spo", *ENOUGH} - {"train", "online"} <= set(WITH_DEVICE)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("words", WITH_DEVICE)
def test_a_missing_device_is_answered_with_existing_ones(words, dry, monkeypatch, capsys, loads_nothing):
    no_gpu(monkeypatch)
    for word in ("cuda", "cuda:7", "mps"):
        said = refused(capsys, [*words.split(), *enough(words), "--device", word, *dry])
        assert f"--device {word} does not exist" in said and "this machine has cpu;" in said
    said = refused(capsys, [*words.split(), *enough(words), "--device", "banana", *dry])
    assert "machine.device must be cpu, cuda, cuda:N or mps, not 'banana'" in said


@pytest.mark.parametrize(
    ("word", "meant"),
    [("gpu", "cuda"), ("GPU:1", "cuda:1"), ("0", "cuda:0"), ("Cuda", "cuda"), ("rocm", "cuda"), ("metal", "mps"),
     ("cuda7", None), ("cuda:", "cuda"), ("cuda:-1", None), ("cpu:0", "cpu"), ("auto", None), ("cuda:1,2", None)],
)  # fmt: skip
def test_other_names_of_devices_are_corrected(word, meant, capsys):
    said = refused(capsys, ["train", "dpo", f"--device={word}"])
    assert said.endswith(f"not {word!r}" + (f"; did you mean {meant}?" if meant else ""))


def test_several_gpus_are_named_and_one_of_them_is_no_device_for_several_processes(monkeypatch):
    no_gpu(monkeypatch, cuda=2)
    early.require_device("cuda")
    early.require_device("cuda:1")
    with pytest.raises(ValueError, match="this machine has cpu, cuda, cuda:0, cuda:1;"):
        early.require_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    early.require_device("cuda")
    with pytest.raises(ValueError, match="one device for 2 processes: give cuda"):
        early.require_device("cuda:1")


@pytest.mark.parametrize(("word", "told"), [("cuda:1", "cuda:1"), ("mps", "mps"), (None, None), ("cpu", None)])
def test_the_device_asked_for_reaches_accelerate(word, told, monkeypatch):
    """accelerate takes the best one, unless its own variable names another; afterwards that is what it was."""
    seen = []

    class Stub:
        def __init__(self, **given):
            seen.append((os.environ.get("ACCELERATE_TORCH_DEVICE"), given["cpu"]))
            self.device, self.process_index, self.num_processes = torch.device(word or "cpu"), 0, 1

    monkeypatch.setattr(job, "Accelerator", Stub)
    monkeypatch.setattr(job, "barrier", lambda accelerator: None)
    monkeypatch.setattr(job.watch, "start", lambda *args: None)
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    job.join(TrainDpo(device=word))
    assert seen == [(told, word == "cpu")] and "ACCELERATE_TORCH_DEVICE" not in os.environ
    Stub.device = property(lambda self: torch.device("cpu"), lambda self, value: None)
    if told:
        with pytest.raises(ValueError, match=f"accelerate uses cpu instead of --device {word}"):
            job.join(TrainDpo(device=word))


@pytest.mark.parametrize("words", ["train dpo", "train prdp", "reward train-spm"])
def test_fp16_without_a_gpu_is_refused_by_the_run_and_its_plan(words, monkeypatch, capsys, loads_nothing):
    no_gpu(monkeypatch)
    for dry in ([], ["--dry-run"]):
        said = refused(capsys, [*words.split(), *enough(words), "--mixed_precision=fp16", *dry])
        assert "fp16 needs a CUDA GPU" in said


@pytest.mark.parametrize(
    ("flag", "package", "cure"),
    [("--use_8bit_adam", "bitsandbytes", "diffusion_align[8bit]"),
     ("--enable_xformers_memory_efficient_attention", "xformers", "diffusion_align[xformers]")],
)  # fmt: skip
def test_a_missing_package_is_told_before_anything_is_loaded(flag, package, cure, monkeypatch, capsys, loads_nothing):
    monkeypatch.setattr(early, "find_spec", lambda name: None)
    said = refused(capsys, ["train", "dpo", "--model=tiny", "--data=tiny", flag])
    assert f"needs {package}: pip install '{cure}'" in said


@pytest.mark.parametrize(
    ("words", "metric", "told"),
    [("train dpo", "rewards", "there are loss"), ("train dpo", "-los", "did you mean loss?"),
     ("train dpo", "reward_mean", "there are loss"), ("train spo", "reward_mean", "did you mean score_mean?"),
     ("train rankdpo", "implicit_acc", "did you mean implicit_accuracy?"), ("train ddpo", "kl_w", "did you mean kl?")],
)  # fmt: skip
def test_a_metric_that_the_method_does_not_write_cannot_be_kept_best(words, metric, told, capsys, loads_nothing):
    said = refused(capsys, [*words.split(), *enough(words), f"--keep_best={metric}"])
    assert f"this method writes no metric {metric.removeprefix('-')!r}; {told}" in said


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no file, whoever asks")
@pytest.mark.parametrize(
    ("words", "option"),
    [("train dpo", "output_dir"), ("train d3po", "output_dir"), ("train dpo", "cache_dir"), ("sample", "out"),
     ("evaluate", "output_dir"), ("data synth", "out"), ("reward score", "out"), ("reward train-spm", "output_dir"),
     ("data convert", "out"), ("data check", "bad_rows")],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_told_before_anything_is_loaded(
    words, option, tmp_path, capsys, loads_nothing
):
    start = [*words.split(), *(["x"] if words in ("data convert", "data check") else enough(words)), f"--{option}"]
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(capsys, [*start, str(tmp_path / "file" / "run" / "deep")])
    assert "/proc" in refused(capsys, [*start, "/proc/run/deep"])  # for root too


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "/no/run"], "/no/run: no such run, checkpoint or model"),
        (["export", "/no/run", "--to", "kohya"], "/no/run: no such run, checkpoint or model"),
        (["sample", "--run", "/no/run", "--prompt", "x"], "/no/run: no such run, checkpoint or model"),
        (["sample", "--run", "/", "--prompt", "x"], "/ is not a run folder: it has no config.yaml"),
    ],
)
def test_a_run_that_is_not_there_is_refused_before_torch_is_imported(argv, message):
    """Counted in modules: seconds are the machine's affair."""
    program = (
        f"import sys; from diffusion_align import cli; code = cli.main({argv!r}); "
        "print(code, sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG)
    assert done.stdout.strip() == "1 []", done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
