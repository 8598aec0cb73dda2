"""Settings of accelerate's launcher: overruled with a line, or refused; never dropped without a word."""

import pytest

from diffusion_align import cli
from diffusion_align.commands.train.launcher import overruled
from diffusion_align.options import TrainD3po, TrainDpo, UsageError


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, {}, []),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, {"mixed_precision": "bf16"}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, ["mixed_precision bf16; --mixed_precision no of this command"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"mixed_precision": "fp16"}, ["fp8; --mixed_precision fp16"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, {"gradient_accumulation_steps": 8}, []),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, {}, ["steps 8; --gradient_accumulation_steps is not given"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, []),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, ["nothing is compiled"]),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "True"}, {}, []),
    ],
)
def test_one_line_says_who_wins(environment, options, expected):
    lines = overruled(TrainDpo(**options), environment)
    assert len(lines) == len(expected) and all(part in line for part, line in zip(expected, lines, strict=True))


def test_a_method_without_the_option_is_asked_for_its_own():
    (line,) = overruled(TrainD3po(), {"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert "--mixed_precision no of this command is used" in line
    assert not hasattr(TrainD3po(), "gradient_accumulation_steps")
    (line,) = overruled(TrainD3po(), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert "this method has its own steps" in line


@pytest.mark.parametrize(
    ("name", "plugin"),
    [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron"), ("PARALLELISM_CONFIG", "parallelism")],
)
def test_plugins_that_shard_the_model_are_refused_and_the_cure_works(name, plugin, monkeypatch, tmp_path, capsys):
    argv = ["train", "dpo", "--preset", "tiny", "--output_dir", str(tmp_path / "run"), "--report_to", "nosuch"]
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UsageError, match=f"{plugin}.*--multi_gpu --num_processes N"):
        overruled(TrainDpo(), {f"ACCELERATE_USE_{name}": "true"})
    assert cli.main([*argv[:-2]]) == 2
    error = capsys.readouterr().err
    assert plugin in error and error.count("\n") == 1 and not (tmp_path / "run").exists()
    monkeypatch.delenv(f"ACCELERATE_USE_{name}")
    words = ["--max_train_steps", "1", "--run_validation", "false", "--threads", "1", "--max_train_samples", "4"]
    if name == "FSDP":
        assert cli.main([*argv[:-2], *words]) == 0
        assert "launcher         asks for mixed_precision bf16; --mixed_precision no" in capsys.readouterr().out
