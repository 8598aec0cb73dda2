"""Paths in options: home folders, outputs that cannot be written, names on the hub, what a run writes down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_align import cli
from diffusion_align.commands.evaluate.contenders import contender
from diffusion_align.commands.train.items import source_path
from diffusion_align.methods import dpo
from diffusion_align.models.hub import locate, on_hub
from diffusion_align.options import VERBS, TrainDpo, UsageError, options_of, parse, resolve, to_yaml
from diffusion_align.options.reading import paths as paths_module
from diffusion_align.options.reading.paths import KINDS, absolute_reward, require_outputs, without_folders

# Texts that are no paths, whatever the verb. A new text option is one of these, or says what kind of path it is.
WORDS = """revision variant device keep_best report_to tracker_name validation_prompts hub_model_id hub_token
    split dataset_config_name dataset_split_name columns encoding lora_targets key shard host prompt
    negative_prompt""".split()
PATHS = [
    (verb, option.name)
    for verb, record in VERBS.items()
    for option in options_of(record.options).values()
    if option.path
]


def read(argv, verb="train dpo"):
    record = VERBS[verb]
    parsed = parse(record.options, argv, verb, record.positional)
    return resolve(record.options, verb, preset=parsed.preset, config=parsed.config, settings=parsed.settings)


def test_every_text_option_is_a_path_or_known_to_be_none():
    for verb, record in VERBS.items():
        for option in options_of(record.options).values():
            if option.kind in (str, tuple) and not option.choices:
                assert option.path in KINDS or option.name in WORDS, (verb, option.name)
            else:
                assert not option.path, (verb, option.name)
    assert len(PATHS) > 80


@pytest.mark.parametrize("verb", VERBS)
def test_home_is_the_home_folder_in_every_option_that_takes_a_path(verb, tmp_path, monkeypatch):
    """On the command line in each spelling, where a shell leaves `~` alone, and in a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    record, right = VERBS[verb], str(tmp_path / "x y")
    for option in (options_of(record.options)[name] for words, name in PATHS if words == verb):
        texts = [["~/x y", right]]
        if option.path == "reward":
            texts += [
                ["pickscore=~/x y", f"pickscore={right}"],
                ["0.5:tiny,-1:hpsv2=~/x y", f"0.5:tiny,-1:hpsv2={right}"],
            ]
        for text, wanted in texts:
            config = tmp_path / "mine.yaml"
            config.write_text(f"{option.section}:\n  {option.name}: {text}\n")
            ways = [[f"--{option.name}={text}"], [f"--{option.name}", text], [f"{option.key}={text}"]]
            ways += [["--config", "~/mine.yaml"]] + ([[text]] if record.positional == option.name else [])
            for argv in ways:
                value = getattr(read(argv, verb).options, option.name)
                assert value == ((wanted,) if option.kind is tuple else wanted), (argv, value)


def test_home_inside_the_forms_of_a_reward(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("python:{}/r.py:judge", "local-dir:{}/clip", "ViT-B-32:{}/w.safetensors", "min:std:tiny,hpsv2={}/a"):
        argv = [f"--reward={text.format('~')}"]
        assert read(argv, "train d3po").options.reward == text.format(tmp_path)
    assert read(["--reward=jpeg~2"], "train d3po").options.reward == "jpeg~2"


def test_home_folders_of_unknown_users_are_refused():
    with pytest.raises(UsageError, match="output.output_dir: this machine has no user ~nobody-here: ~nobody-here/x"):
        read(["--output_dir=~nobody-here/x"])


def outputs():
    return [(verb, name) for verb, name in PATHS if options_of(VERBS[verb].options)[name].path in ("folder", "file")]


@pytest.mark.parametrize(("verb", "name"), outputs())
def test_an_output_that_cannot_be_made_is_refused_by_its_option(verb, name, tmp_path, monkeypatch):
    option = options_of(VERBS[verb].options)[name]
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    def refusal(place):
        with pytest.raises(UsageError) as caught:
            require_outputs(VERBS[verb].options(**{name: str(place)}))
        assert option.key in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "file is not a folder" in refusal(tmp_path / "file" / "run" / "deep")
    assert "link is a broken link" in refusal(tmp_path / "link" / "x")
    if option.path == "folder":
        assert "as it is not a folder" in refusal(tmp_path / "file")
    else:
        assert "is a folder" in refusal(tmp_path)
    monkeypatch.chdir(tmp_path)  # no other output of the verb is in the way
    require_outputs(VERBS[verb].options(**{name: str(tmp_path / "new" / "deep")}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]

    def denied(**where):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(paths_module.tempfile, "mkdtemp", denied)
    assert "cannot be written" in refusal(tmp_path / "new") and "Permission denied" in refusal(tmp_path / "new")


def test_a_run_that_cannot_be_written_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "file").write_text("x")
    argv = ["train", "dpo", "--model", "tiny", "--dataset_name", "tiny", "--output_dir", str(tmp_path / "file" / "run")]
    program = (
        f"import sys; from diffusion_align.cli import main; code = main({argv!r}); "
        "print([name for name in ('torch', 'diffusers') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "[]\n"
    assert "is not a folder: give another --output_dir" in done.stderr and done.stderr.count("\n") == 1


def test_what_a_run_writes_down_means_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("models/mine", "pairs", "r.py", "w.pt", "x,y"):
        (tmp_path / name).mkdir(parents=True) if "." not in name else (tmp_path / name).write_text("")
    argv = ["--model=models/mine", "--data=pairs", "--output_dir=runs/a", "--cache_dir=cache", "--logging_dir=logs"]
    options = read(argv).options
    text = to_yaml(options, "train dpo", absolute=True)
    for name in ("models/mine", "pairs", "runs/a", "cache"):
        assert f": {tmp_path / name}\n" in text
    assert "logging_dir: logs\n" in text  # inside the run, wherever that is
    assert to_yaml(options, "train dpo").count(str(tmp_path)) == 0  # a dry run shows what was typed
    named = to_yaml(read(["--model=owner/name", "--dataset_name=tiny"]).options, "train dpo", absolute=True)
    assert "name_or_path: owner/name\n" in named and "dataset_name: tiny\n" in named
    here = str(tmp_path)
    for given, wanted in {
        "tiny": "tiny",
        "python:r.py:judge": f"python:{here}/r.py:judge",
        "0.5:pickscore=w.pt,-1:jpeg": f"0.5:pickscore={here}/w.pt,-1:jpeg",
        "http://pairs:80/pairs": "http://pairs:80/pairs",
        "x,y": f"{here}/x,y",
        "ViT-B-32:openai": "ViT-B-32:openai",
    }.items():
        assert absolute_reward(given) == wanted
        assert without_folders(absolute_reward(given)) == without_folders(given)


@pytest.mark.parametrize(
    "where", ["runs/mien", "models/x", "here/typo", "owner/name.safetensors", "a/b/c", "./a/b", "/a/b"]
)
def test_a_missing_path_is_refused_without_a_question_to_the_hub(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def asked(*args, **more):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("diffusion_align.models.hub._download", asked)
    assert not on_hub(where)
    with pytest.raises(FileNotFoundError, match="no such run, checkpoint or model"):
        contender(where)
    with pytest.raises(FileNotFoundError, match="no model at"):
        locate(where)


def test_a_name_on_the_hub_is_one():
    for name in ("stabilityai/sdxl-turbo", "CompVis/stable-diffusion-v1-4", "0-hero/SD_1.5"):
        assert on_hub(name) and contender(name).base["pretrained_model_name_or_path"] == name


def test_pairs_on_disk_never_ask_a_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "diffusion_align.commands.train.items.fetch_pairs", lambda *a, **more: pytest.fail("the hub was asked")
    )
    assert source_path(dpo.METHOD, TrainDpo(dataset_name="owner/name")) is None
    assert source_path(dpo.METHOD, TrainDpo(train_data_dir="my_pairs")) == Path("my_pairs")
    for typo in ("owner/typo", "my_pairs", "a/b/c", "data/pairs"):
        assert cli.main(["train", "dpo", "--model", "tiny", "--train_data_dir", typo, "--dry-run"]) == 1
        said = capsys.readouterr().err
        assert f"{typo}: no such" in said and said.count("\n") == 1
        assert ("--dataset_name owner/typo" in said) == (typo == "owner/typo")


def test_paths_to_and_inside_the_current_folder_are_valid_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", "a/b/../c", str(tmp_path), os.path.join("..", tmp_path.name, "x")):
        require_outputs(TrainDpo(output_dir=place))


def test_a_run_whose_model_has_moved_is_evaluated_and_drawn_from_where_it_is_now(tmp_path, capsys):
    run, gone, new = tmp_path / "run", tmp_path / "gone", tmp_path / "new"
    run.mkdir()
    new.mkdir()
    (run / "pytorch_lora_weights.safetensors").write_bytes(b"")
    options = TrainDpo(str(gone), dataset_name="tiny", revision="abc", variant="fp16")
    (run / "config.yaml").write_text(to_yaml(options, "train dpo", absolute=True))
    with pytest.raises(FileNotFoundError, match=f"trained from, {gone}, is missing: --model says where it is now"):
        contender(str(run))
    # The revision was one of the repository that the model was fetched from.
    wanted = {"pretrained_model_name_or_path": str(new), "revision": None, "variant": "fp16"}
    wanted |= {"pretrained_vae_model_name_or_path": None, "prediction_type": None}
    assert contender(str(run), str(new)).base == wanted
    assert read([str(run), "--model", str(new)], "evaluate").options.pretrained_model_name_or_path == str(new)
    for argv in (["evaluate", str(run)], ["sample", "--run", str(run), "--prompt", "a"]):
        assert cli.main(argv) == 1
        said = capsys.readouterr().err
        assert "--model says where it is now" in said and said.count("\n") == 1


def test_home_in_the_words_that_are_no_options(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["presets", "cp", "tiny", "~/mine.yaml"]) == 0 and (tmp_path / "mine.yaml").is_file()
    assert read(["--config=~/mine.yaml"]).options.pretrained_model_name_or_path == "tiny"
