"""What people type: values that look like flags, flags of other tools, and what is said twice."""

import pytest
from test_options import read

from diffusion_align import cli
from diffusion_align.options import VERBS, TrainDpo, UsageError, by_any_name, options_of, to_yaml
from diffusion_align.options.reading.other_tools import MEANT, NOT_HERE, VALUES


def error(argv, verb="train dpo"):
    with pytest.raises(UsageError) as caught:
        read(argv, verb)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("verb", "argv", "name", "value"),
    [
        ("train dpo", ["--keep_best", "-loss"], "keep_best", "-loss"),
        ("train d3po", ["--reward", "-0.5:tiny,0.5:judge"], "reward", "-0.5:tiny,0.5:judge"),
        ("train dpo", ["--local_rank", "-1"], "local_rank", -1),
        ("sample", ["--negative_prompt", "-- no dashes"], "negative_prompt", "-- no dashes"),
        ("sample", ["--prompt", "-"], "prompt", ("-",)),
        ("sample", ["--prompt", "seed=3"], "prompt", ("seed=3",)),
        ("sample", ["--prompt", "--a dash", "--prompt", "x=1", "seed=3"], "prompt", ("--a dash", "x=1")),
        ("sample", ["--out", "steps=4"], "out", "steps=4"),
        ("train dpo", ["--train_data_dir", "lr=1e-5/pairs"], "train_data_dir", "lr=1e-5/pairs"),
        ("train dpo", ["--use_ema", "true"], "use_ema", True),
        ("train dpo", ["--use-ema", "False", "--rank", "8"], "use_ema", False),
        ("train dpo", ["--use_ema", "--rank", "8"], "use_ema", True),
        ("train dpo", ["--scale_lr", "off"], "scale_lr", False),
        ("train dpo", ["--validation_prompts", "a cat", "a dog"], "validation_prompts", ("a cat", "a dog")),
        ("train dpo", ["--validation_prompts", "a", "b", "seed=3"], "validation_prompts", ("a", "b")),
        ("train dpo", ["--validation_prompts=a", "--rank=2", "validation_prompts=b"], "validation_prompts", ("a", "b")),
        ("data synth", ["--models", "tiny", "run", "--rewards", "judge", "random"], "rewards", ("judge", "random")),
        ("reward score", ["--images", "0.png", "1.png", "--reward=judge"], "images", ("0.png", "1.png")),
        ("evaluate", ["--sampler", "ddim", "dpmpp", "runs/a"], "run", ("runs/a",)),
        ("evaluate", ["--held_out_reward", "judge", "runs/a", "runs/b"], "run", ("runs/a", "runs/b")),
    ],
)  # fmt: skip
def test_flags_take_the_next_word_as_value(verb, argv, name, value):
    assert getattr(read(argv, verb).options, name) == value


def test_dry_run_and_other_switches_of_every_verb_take_a_word_too(monkeypatch, capsys):
    sample = ["sample", "--model=tiny", "--prompt=a"]
    assert cli.main([*sample, "--dry_run", "true"]) == 0 and "guidance" in capsys.readouterr().out
    monkeypatch.setattr("diffusion_align.options.verb._function", lambda where: lambda o: 7)
    assert cli.main([*sample, "--dry-run=false"]) == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed"], "--seed needs a value"),
        (["--seed", "--rank", "4"], "--seed needs a value"),
        (["--seed", "--lerning_rate=1"], "--seed needs a value"),
        (["--validation_prompt", "a", "cat"], "key=value; quote a prompt of several words: \"a cat ...\""),
        (["-rank", "4"], "unknown flag -rank; a flag has two dashes: --rank"),
        (["-learning-rate=4"], "a flag has two dashes: --learning_rate"),
        (["-preset", "tiny"], "a flag has two dashes: --preset"),
        (["--config=a.yaml", "--config", "b.yaml"], "--config is given twice, as a.yaml and b.yaml"),
        (["--preset=tiny", "--preset=sd15-lora"], "--preset is given twice, as tiny and sd15-lora"),
        (["--config=config/dgx.py"], "a Python configuration is a program"),
        (["--local_rnk=1"], "did you mean --local_rank?"),
        (["--no_scale_lr"], "use --scale_lr=false"),
        (["--disable_gradient_checkpointing"], "use --gradient_checkpointing=false"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(argv, message):
    assert message in error(argv)


def test_the_same_file_twice_is_no_contradiction():
    assert read(["--preset=tiny", "--preset", "tiny"]).options.pretrained_model_name_or_path == "tiny"


@pytest.mark.parametrize(
    ("flag", "told"),
    [("lora_rank", "here it is --rank"), ("network_weights", "here it is --lora"), ("dora", "here it is --use_dora"),
     ("snr_gamma", "not here: every pair's loss"),
     ("min_bucket_reso", "not here: --aspect_buckets"), ("crops_coords_top_left_h", "--size_conditioning pictures"),
     ("image_interpolation_mode", "not here: pictures are resized"), ("color_aug", "not here: pictures keep"),
     ("min_snr_gamma", "not here:"), ("optimizer_type", "not here: the optimizer is AdamW"),
     ("config.train.batch_size", "here it is --train_batch_size"), ("num_processes", "torchrun"),
     ("fp16", "--mixed_precision fp16"), ("cpu", "--device cpu")],
)  # fmt: skip
def test_flags_of_other_tools(flag, told):
    said = error([f"--{flag}", "4"])
    assert told in said and "local_rank" not in said
    assert told in error([f"{flag.replace('-', '_')}=4"])  # as a key too


@pytest.mark.parametrize("flag", ["center_crop", "random_flip", "center-crop", "enable_bucket", "random_crop"])
def test_flags_of_given_pictures_are_refused_where_a_method_draws_its_own(flag):
    for argv in ([f"--{flag}", "4"], [f"{flag.replace('-', '_')}=4"]):
        said = error(argv, "train d3po")
        assert "not here: it is an option of train dpo and train rankdpo" in said and "local_rank" not in said
    assert read([f"--{flag}", "--model=tiny", "--data=tiny"]).options is not None


@pytest.mark.parametrize(
    ("argv", "at_random"),
    [([], False), (["--center_crop"], False), (["--center_crop", "false"], True), (["--random_crop"], True),
     (["--random_crop", "--center_crop=false"], True), (["--no_hflip"], False)],
)  # fmt: skip
def test_center_crop_false_crops_at_random_as_in_diffusers(argv, at_random):
    assert read([*argv, "--model=tiny", "--data=tiny"]).options.crops_at_random is at_random


@pytest.mark.parametrize(
    ("argv", "cure"),
    [(["--random_crop", "--center_crop"], "--center_crop crops in the middle"),
     (["--random_flip", "--no_hflip"], "--no_hflip has none"), (["--bucket_step=64"], "give both, or neither")],
)  # fmt: skip
def test_crops_that_contradict_each_other_are_refused(argv, cure):
    options = read([*argv, "--model=tiny", "--data=tiny"]).options
    with pytest.raises(UsageError, match=cure):
        VERBS["train dpo"].check(options)


@pytest.mark.parametrize(
    ("text", "value"),
    [("512", 512), ("768x512", "768x512"), ("768X512", "768x512"), ("768,512", "768x512"), ("512x512", 512),
     ("1e3", 1000), ("none", None)],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["train dpo", "train d3po", "sample", "evaluate", "data synth"])
def test_a_resolution_is_a_side_or_width_x_height(verb, text, value, tmp_path):
    found = read([f"--resolution={text}"], verb).options.resolution
    assert found == value and type(found) is type(value)
    (tmp_path / "c.yaml").write_text(f"resolution: {text}")
    assert read(["--config", str(tmp_path / "c.yaml")], verb).options.resolution == value


@pytest.mark.parametrize("text", ["7", "768x4", "4x768", "x512", "512x", "512x512x3", "1.5", "big", "0x0"])
def test_what_is_no_resolution_is_refused(text):
    assert "must be a whole number, or width x height as in 768x512" in error([f"--resolution={text}"])


@pytest.mark.parametrize("flag", MEANT)
def test_flags_of_other_tools_are_answered_with_an_existing_option(flag):
    """Row by row, in every verb that has one of the options it means, and in no verb where it is an option itself."""
    met = 0
    for verb, record in VERBS.items():
        names = by_any_name(record.options)
        means = [option for option in MEANT[flag] if option.partition("=")[0] in names]
        if flag in ("use_lora", "full_finetune", "train_unet") and verb == "data annotate":
            continue  # whose mode is another one
        if flag in names or not means or flag in ("config_file", "c", "yaml", "debug", "verbose"):
            continue
        met += 1
        assert error([f"--{flag}=1"], verb).endswith(f"here it is --{means[0].replace('=', ' ')}")
    assert met or flag in ("lora_alpha", "gradient_clipping", "config_file", "c", "yaml", "debug", "verbose")


@pytest.mark.parametrize("flag", NOT_HERE)
def test_missing_flags_of_other_tools_are_explained(flag):
    for verb in ("train dpo", "train spo"):
        if flag not in by_any_name(VERBS[verb].options):
            assert f"unknown flag --{flag}; not here: " in error([f"--{flag}"], verb)


def test_what_a_flag_means_is_an_option_somewhere():
    every = {name for record in VERBS.values() for name in by_any_name(record.options)} | {"config", "traceback"}
    assert {option.partition("=")[0] for options in MEANT.values() for option in options} <= every
    for meant in (option for options in MEANT.values() for option in options if "=" in option):
        name, _, value = meant.partition("=")
        kinds = [options_of(record.options).get(name) for record in VERBS.values()]
        choices = {choice for option in kinds if option is not None for choice in option.choices}
        assert value in choices or name in ("device", "report_to")


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in VALUES for value in VALUES[option]])
def test_values_of_other_tools(option, value):
    verb = "train d3po" if option == "solver" else "train dpo"
    meant = VALUES[option][value]
    assert f"not {value!r}; did you mean {meant}?" in error([f"--{option}={value}"], verb)
    described = options_of(VERBS[verb].options)[option]
    assert value not in described.choices and (meant.startswith("the verb") or meant.split(",")[0] in described.choices)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("collapse_alarm: off", "collapse_alarm", "off"),
        ("train: {collapse_alarm: Off}", None, "did you mean off?"),
        ("output_dir: yes", "output_dir", "yes"),
        ("output_dir: 2024-1-1", "output_dir", "2024-1-1"),
        ("output_dir: 010", "output_dir", "010"),
        ("output_dir: 1e5", "output_dir", "1e5"),
        ("output_dir: 1:30", "output_dir", "1:30"),
        ('output_dir: "null"', "output_dir", "null"),
        ("output_dir: ~", None, "output.output_dir must be text, not None"),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: false", None, "one of no, fp16, bf16, not 'false'"),
        ("validation_prompts: [yes, no, 1.0, 010, 2024-01-01]", "validation_prompts",
         ("yes", "no", "1.0", "010", "2024-01-01")),
        ("validation_prompt: on", "validation_prompts", ("on",)),
        ("validation_prompts: [a, null]", None, "must be a list of texts"),
        ("network_alpha: ~", "network_alpha", None),
        ("network_alpha: null", "network_alpha", None),
        ("network_alpha:", "network_alpha", None),
        ("network_alpha: .5", "network_alpha", 0.5),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1.0E-4", "learning_rate", 1e-4),
        ("max_train_steps: 1e5", "max_train_steps", 100_000),
        ("max_train_steps: 1_000", "max_train_steps", 1000),
        ("rank: '8'", "rank", 8),
        ("rank: +8", "rank", 8),
        ("use_ema: yes", "use_ema", True),
        ("use_ema: Off", "use_ema", False),
        ("rank: 010", None, "adapter.rank 010 would be octal in YAML: write 10"),
        ("adapter: {rank: 0_17}", None, "adapter.rank 0_17 would be octal in YAML: write 17"),
        ("network_alpha: 010", None, "adapter.network_alpha 010 would be octal in YAML: write 10"),
        ("rank: 0o10", None, "adapter.rank must be a whole number at least 1, not '0o10'"),
        ("rank: 0x10", None, "adapter.rank must be a whole number at least 1, not '0x10'"),
        ("rank: 1:30", None, "adapter.rank must be a whole number at least 1, not '1:30'"),
        ("seed: 2024-01-01", None, "train.seed must be a whole number at least 0, not '2024-01-01'"),
        ("seed: yes", None, "train.seed must be a whole number at least 0, not 'yes'"),
        ("max_train_steps: 1.5", None, "train.max_train_steps must be a whole number"),
        ("lora_rank: 4", None, "unknown key lora_rank; here it is --rank"),
        ("data: {color_aug: true}", None, "unknown key data.color_aug; not here: pictures keep"),
        ("data: {center_crop: true}", "center_crop", True),
    ],
)  # fmt: skip
def test_yaml_values_keep_their_written_form(line, name, value, tmp_path):
    (tmp_path / "c.yaml").write_text(line)
    argv = ["--config", str(tmp_path / "c.yaml")]
    if name is None:
        assert value in error(argv) and "c.yaml" in error(argv)
    else:
        found = getattr(read(argv).options, name)
        assert found == value and type(found) is type(value)


def test_anchors_of_a_file_are_followed(tmp_path):
    (tmp_path / "c.yaml").write_text("train: &a {seed: 3}\nadapter: {rank: 2}\noutput_dir: &o runs/x\ncache_dir: *o\n")
    options = read(["--config", str(tmp_path / "c.yaml")]).options
    assert (options.seed, options.rank, options.cache_dir) == (3, 2, "runs/x")


@pytest.mark.parametrize("word", ["off", "yes", "010", "1e5", "null", "~", "2024-01-01", "1:30", "", "- a", "a: b #c"])
def test_texts_survive_saving_and_loading(word, tmp_path):
    options = TrainDpo(validation_prompts=(word, "x"))
    (tmp_path / "c.yaml").write_text(to_yaml(options, "train dpo"))
    assert read(["--config", str(tmp_path / "c.yaml")]).options == options


def test_zeros_before_a_number_on_the_command_line_are_what_a_loop_of_a_shell_writes():
    assert read(["--seed", "007"]).options.seed == 7
