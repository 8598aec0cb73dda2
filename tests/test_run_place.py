"""Which folder a run goes on in, from which checkpoint, by which command, and which of two options counts."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from diffusion_align import cli
from diffusion_align.commands import printed_commands, run_folder
from diffusion_align.commands.data.inspect import describe
from diffusion_align.commands.data.summary import summarise_data
from diffusion_align.commands.printed_commands import command_line, restart_command
from diffusion_align.data import write_pairs_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.data.rows.recognise import recognise
from diffusion_align.models.hub import asset
from diffusion_align.options import VERBS, TrainDpo, UsageError, options_of, parse, resolve, to_yaml
from diffusion_align.options.reading.place import step_named
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.store import CheckpointError


def read(argv, verb="train dpo"):
    record = VERBS[verb]
    parsed = parse(record.options, argv, verb, record.positional)
    return resolve(record.options, verb, preset=parsed.preset, config=parsed.config, settings=parsed.settings)


def make_run(folder, *steps):
    """A folder as a run leaves it, with checkpoints of one number."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    options = TrainDpo("tiny", dataset_name="tiny", output_dir=str(folder))
    (folder / "config.yaml").write_text(to_yaml(options, "train dpo", absolute=True))
    for step in steps:
        checkpoint.save(folder / "checkpoints", step, {"model": {"w": torch.full((1,), float(step))}}, {}, keep=9)
    return folder


@pytest.mark.parametrize("how", ["moved", "copied"])
@pytest.mark.parametrize("named", ["", "config.yaml", "checkpoints", "checkpoints/step-00000004"])
def test_the_folder_of_the_configuration_is_the_run(how, named, tmp_path):
    old, new = make_run(tmp_path / "a", 2, 4), tmp_path / "b"
    if how == "moved":
        old.rename(new)
    else:
        import shutil

        shutil.copytree(old, new)
    resolved = read(["--config", str(new / named), "--resume_from_checkpoint", "latest"])
    assert resolved.options.output_dir == str(new)
    assert resolved.notes() == [f"the run is in {new}; it was in {old}"]
    assert read(["--config", str(new / named)]).options.output_dir == str(new)


def test_a_run_that_stays_is_not_said_to_have_moved(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", 2)
    monkeypatch.chdir(run)
    for config in (str(run), ".", "config.yaml", "../a"):
        resolved = read(["--config", config, "--resume=latest"])
        assert resolved.options.output_dir == str(run) and resolved.notes() == []


def test_another_folder_than_the_run_that_is_resumed_is_refused(tmp_path):
    run, other = make_run(tmp_path / "a", 2), make_run(tmp_path / "b", 2)
    for resume in ("latest", "auto", "step-00000002"):
        with pytest.raises(UsageError, match="names the run in .*/a and --output_dir another folder, .*/b"):
            read(["--config", str(run), f"--resume={resume}", f"--output_dir={other}"])
    with pytest.raises(UsageError, match="--config names the run in .*/a, --resume_from_checkpoint one in .*/b"):
        read(["--config", str(run), f"--resume={other}/checkpoints/step-00000002"])
    # The same folder by another name, a new run by an old configuration, and one that begins from a checkpoint.
    assert read(["--config", str(run), "--resume=latest", f"--output_dir={run}/../a"]).options.output_dir.endswith(
        "../a"
    )
    assert read(["--config", str(run), f"--output_dir={tmp_path}/c"]).options.output_dir == f"{tmp_path}/c"
    argv = ["--config", str(run), f"--output_dir={tmp_path}/c", f"--resume={run}/checkpoints/step-00000002"]
    assert read(argv).options.output_dir == f"{tmp_path}/c"


def test_resuming_by_checkpoint_path_continues_its_run(tmp_path):
    run = make_run(tmp_path / "a", 2)
    for resume in (run, run / "checkpoints", run / "checkpoints" / "step-00000002"):
        assert read(["--model=tiny", f"--resume={resume}"]).options.output_dir == str(run)
        assert read(["--model=tiny", f"--resume={resume}", "--output_dir=x"]).options.output_dir == "x"
    assert read(["--model=tiny", "--resume=latest"]).options.output_dir == "runs/dpo"


def test_a_configuration_beside_no_run_keeps_its_output_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("output_dir: runs/mine\n")
    assert read(["--config", str(tmp_path), "--resume=auto"]).options.output_dir == "runs/mine"
    make_run(tmp_path / "a", 2)
    (tmp_path / "a" / "mine.yaml").write_text("output_dir: runs/mine\n")  # a person's own file is no record
    assert read(["--config", str(tmp_path / "a" / "mine.yaml")]).options.output_dir == "runs/mine"


def test_the_preference_model_has_a_folder_too(tmp_path):
    """`reward train-spm` writes config.yaml and metrics.jsonl as well."""
    home = tmp_path / "spm"
    home.mkdir()
    (home / "metrics.jsonl").write_text("")
    (home / "config.yaml").write_text("verb: reward train-spm\noutput_dir: elsewhere\n")
    assert read(["--config", str(home)], "reward train-spm").options.output_dir == str(home)


def test_a_checkpoint_by_name_number_path_or_run(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", 3, 12)
    steps = {
        "latest": 12, "auto": 12, "step-00000003": 3, "step-3": 3, "3": 3, "checkpoint-3": 3, "00000012": 12,
        str(run): 12, str(run / "checkpoints"): 12, str(run / "checkpoints" / "step-00000003"): 3,
        str(run / "checkpoints" / "step-00000003" / "manifest.json"): 3,
    }  # fmt: skip
    for resume, step in steps.items():
        assert run_folder.find_checkpoint(run, resume).step == step
        elsewhere = tmp_path / "b"  # a path is a path, whatever run is to be written
        if "/" in resume:
            assert run_folder.find_checkpoint(elsewhere, resume).step == step
    monkeypatch.chdir(run / "checkpoints")
    assert run_folder.find_checkpoint(tmp_path / "b", "step-00000003").step == 3
    (run / "checkpoints" / "3").mkdir()  # a folder of that name here is not what "3" means
    assert run_folder.find_checkpoint(run, "3").step == 3
    assert step_named("step-") is None and step_named("last") is None


@pytest.mark.parametrize("resume", ["step-00000004", "7", "last", "checkpoints/step-00000003", "/no/where"])
def test_a_missing_checkpoint_is_answered_with_existing_ones(resume, tmp_path):
    run = make_run(tmp_path / "a", 3, 12)
    with pytest.raises(FileNotFoundError, match="no such checkpoint; .*/checkpoints has step-00000012, step-0"):
        run_folder.find_checkpoint(run, resume)
    with pytest.raises(FileNotFoundError, match="checkpoints has none"):
        run_folder.find_checkpoint(tmp_path / "b", resume)


def test_a_damaged_checkpoint_given_by_name_is_reported(tmp_path):
    run = make_run(tmp_path / "a", 3)
    (run / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        run_folder.find_checkpoint(run, "step-3")


@pytest.mark.parametrize(
    ("verb", "preset", "argv", "steps", "other"),
    [
        ("train dpo", "sd15-lora", ["--num_train_epochs=2"], None, ("num_train_epochs", 2)),
        ("train dpo", "sd15-lora", ["--max_train_steps=7"], 7, ("num_train_epochs", 1)),
        ("train dpo", "sd15-lora", [], 10000, ("num_train_epochs", 1)),
        ("train rankdpo", "sdxl", ["--num_train_epochs=3"], None, ("num_train_epochs", 3)),
        ("train d3po", "sd15", ["--num_rounds=5"], None, ("num_rounds", 5)),
        ("train spo", "sdxl", ["train.num_rounds=5"], None, ("num_rounds", 5)),
        ("train prdp", "tiny", ["--num_rounds", "5"], None, ("num_rounds", 5)),
        ("train ddpo", "sd15", ["--max_train_steps", "6"], 6, ("num_rounds", 100)),
        # Of two on one command line the steps count, as their help says.
        ("train dpo", "tiny", ["--max_train_steps=9", "--num_train_epochs=2"], 9, ("num_train_epochs", 2)),
        # An option that is set to nothing takes no other's place.
        ("train dpo", "tiny", ["--dataset_name=none", "--data=x"], 240, ("num_train_epochs", 1)),
    ],
)
def test_the_later_length_option_wins(verb, preset, argv, steps, other):
    options = read(["--preset", preset, *argv], verb).options
    assert options.max_train_steps == steps and getattr(options, other[0]) == other[1]


def test_the_later_option_of_a_group_wins(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("max_train_steps: 50\n")
    assert read(["--preset=tiny", "--config", str(config), "--num_train_epochs=4"]).options.max_train_steps is None
    config.write_text("num_train_epochs: 3\n")
    assert read(["--preset=tiny", "--config", str(config)]).options.max_train_steps is None
    spo = read(["--preset=tiny", "--start=5"], "train spo")
    assert spo.options.noise_window is None and spo.options.start == 5 and "noise_window" not in spo.origins
    VERBS["train spo"].check(
        read(["--preset=tiny", "--start=3", "--prompts=tiny", "--reward=tiny"], "train spo").options
    )
    assert read(["--preset=tiny", "--learn_steps=2"], "train d3po").options.noise_window is None
    groups = [
        [option.one_of for option in options_of(record.options).values() if option.one_of] for record in VERBS.values()
    ]
    for group in {name for names in groups for name in names}:  # one that no verb has twice would be a slip
        assert any(names.count(group) > 1 for names in groups), group


ODD = 'a run\'s $HOME; (1) "x" é'


def test_the_resume_command_runs_when_copied(tmp_path, monkeypatch):
    run = make_run(tmp_path / ODD, 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my reward.py").write_text("")
    line = run_folder.resume_line(Path(ODD), "train d3po", "python:my reward.py:judge")
    words = shlex.split(line)
    assert words[:3] == ["diffusion-align", "train", "d3po"]
    record = VERBS["train d3po"]
    parsed = parse(record.options, words[3:], "train d3po")
    given = dict(parsed.settings)
    assert parsed.config == str(run / "config.yaml") and given["resume_from_checkpoint"] == "latest"
    assert given["reward"] == f"python:{tmp_path / 'my reward.py'}:judge"  # from whatever folder it is typed
    assert shlex.split(command_line("evaluate", run)) == ["diffusion-align", "evaluate", str(run)]


def test_the_commands_of_data_inspect_can_be_pasted(tmp_path):
    import shutil

    folder = tmp_path / ODD
    folder.mkdir()
    shutil.copy(asset("tiny_pairs.parquet"), folder / "p.parquet")
    (folder / "prompts.txt").write_text("a\n")
    for path in (folder / "p.parquet", folder / "prompts.txt"):
        source = recognise(path)
        lines = [line[11:] for line in describe(source, summarise_data(source)) if "diffusion-align" in line]
        assert len(lines) >= 2
        for line in lines:
            words = shlex.split(line, comments=True)
            verb = " ".join(words[1:3])
            record = VERBS[verb]
            parsed = parse(record.options, words[3:], verb, record.positional)
            assert str(path) in [value if isinstance(value, str) else value[0] for _, value in parsed.settings]


LAUNCHED = {
    "torchrun, the script of a verb": (
        ["/bin/python3", "/opt/torchrun", "--nproc_per_node", "2", "s/finetune_dpo.py", "--model", "a b", "--seed=1"],
        ["s/finetune_dpo.py", "--model", "a b", "--seed=1"],
        ["/opt/torchrun", "--nproc_per_node", "2", "s/finetune_dpo.py"],
    ),
    "torchrun, the script of all methods": (
        ["/bin/python3", "/opt/torchrun", "s/finetune.py", "dpo", "--seed=1"],
        ["s/finetune.py", "dpo", "--seed=1"],
        ["/opt/torchrun", "s/finetune.py", "dpo"],
    ),
    "accelerate, a module": (
        ["python", "-m", "accelerate.commands.launch", "--num_processes=2", "-m",
         "diffusion_align.cli", "train", "dpo", "-h"],
        ["/x/cli.py", "train", "dpo", "-h"],
        ["python", "-m", "accelerate.commands.launch", "--num_processes=2", "-m",
         "diffusion_align.cli", "train", "dpo"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", LAUNCHED)
def test_the_resume_command_includes_the_launcher(how, monkeypatch):
    parent, own, wanted = LAUNCHED[how]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", own)
    monkeypatch.setattr(printed_commands, "_words_of", lambda process: parent if process == -1 else ["python", *own])
    monkeypatch.setattr(printed_commands.os, "getppid", lambda: -1)
    monkeypatch.setattr(printed_commands.os, "access", lambda path, how: True)  # the script names its interpreter
    monkeypatch.setattr(printed_commands.shutil, "which", lambda name: None)
    more = ["--config", "a b/config.yaml", "--resume_from_checkpoint", "latest"]
    assert shlex.split(restart_command("train dpo", more)) == [*wanted, *more]
    monkeypatch.setenv("WORLD_SIZE", "1")  # one process needs no launcher
    assert shlex.split(restart_command("train dpo", more)) == ["diffusion-align", "train", "dpo", *more]


def test_without_a_known_launcher_the_command_uses_torchrun(monkeypatch):
    from torch.distributed.run import get_args_parser

    monkeypatch.setattr(printed_commands, "_words_of", lambda process: [])
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    words = shlex.split(restart_command("train dpo", ["--config", "c d"]))
    assert words[0] == "torchrun"
    args = get_args_parser().parse_args(words[1:])
    assert (args.nproc_per_node, args.nnodes, args.module, args.training_script) == (
        "2",
        "2",
        True,
        "diffusion_align.cli",
    )
    assert args.training_script_args == ["train", "dpo", "--config", "c d"]


def test_the_next_command_of_a_conversion_can_be_pasted(tmp_path, capsys):
    out = tmp_path / ODD
    picture = encode_png(torch.zeros(3, 16, 16))
    write_pairs_parquet(tmp_path / "p.parquet", ["a"], [picture], [encode_png(torch.ones(3, 16, 16))], [1.0])
    assert cli.main(["data", "convert", str(tmp_path / "p.parquet"), "--out", str(out)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    words = shlex.split(line.partition(": ")[2])
    assert words == ["diffusion-align", "train", "dpo", "--model", "MODEL", "--train_data_dir", str(out)]
