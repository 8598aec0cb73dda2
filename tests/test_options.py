"""The options: names that people know, who has the last word, and errors that say what would be right."""

import dataclasses
import random
import string

import pytest
import yaml

from diffusion_align.methods.shared.plan import accumulation_of
from diffusion_align.options import (
    VERBS,
    Sample,
    TrainDpo,
    UsageError,
    all_presets,
    build_parser,
    by_any_name,
    options_of,
    parse,
    preset_path,
    read_yaml,
    resolve,
    to_yaml,
)
from diffusion_align.options.annotate import Annotate

# In all of 13 public training scripts: three diffusers DPO/ORPO families, DreamBooth, DiffusionDPO, MaPO and others.
UNIVERSAL = """
    pretrained_model_name_or_path revision cache_dir output_dir logging_dir seed resolution num_train_epochs
    max_train_steps learning_rate scale_lr lr_scheduler lr_warmup_steps gradient_accumulation_steps
    gradient_checkpointing mixed_precision allow_tf32 adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
    max_grad_norm checkpointing_steps resume_from_checkpoint report_to dataloader_num_workers hub_model_id local_rank
""".split()
# The defaults of diffusers' examples/research_projects/diffusion_dpo/train_diffusion_dpo.py, read from its source.
DIFFUSERS_DEFAULTS = {
    "train_batch_size": 4, "num_train_epochs": 1, "max_train_steps": None, "checkpointing_steps": 500,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "beta_dpo": 2500, "loss_type": "sigmoid", "learning_rate": 5e-4, "scale_lr": False, "lr_scheduler": "constant",
    "lr_num_cycles": 1, "lr_power": 1.0, "dataloader_num_workers": 0, "use_8bit_adam": False,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "local_rank": -1, "rank": 4, "run_validation": None, "validation_steps": 200, "vae_encode_batch_size": 8,
    "random_crop": False, "no_hflip": False,
}  # fmt: skip
# Its accumulation of 1 is None here, where nothing was asked for: 1, or what effective_batch_size leaves.
# The SD command in the README beside that script, as people paste it.
README_COMMAND = """
    --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --output_dir=diffusion-dpo --mixed_precision=fp16
    --dataset_name=kashif/pickascore --resolution=512 --train_batch_size=16 --gradient_accumulation_steps=2
    --gradient_checkpointing --use_8bit_adam --rank=8 --learning_rate=1e-5 --report_to=wandb --lr_scheduler=constant
    --lr_warmup_steps=0 --max_train_steps=10000 --checkpointing_steps=2000 --run_validation --validation_steps=200
    --seed=0 --report_to=wandb --push_to_hub
""".split()
# launchers/sd15.sh of SalesforceAIResearch/DiffusionDPO.
SALESFORCE_COMMAND = """
    --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --dataset_name=yuvalkirstain/pickapic_v2
    --train_batch_size=1 --dataloader_num_workers=16 --gradient_accumulation_steps=128 --max_train_steps=2000
    --lr_scheduler=constant_with_warmup --lr_warmup_steps=500 --learning_rate=1e-8 --scale_lr
    --cache_dir=/data/pick_a_pic --checkpointing_steps 500 --beta_dpo 5000 --output_dir=tmp-sd15
""".split()


def read(argv, verb="train dpo"):
    """Command line -> Resolved, the way the command does it."""
    record = VERBS[verb]
    parsed = parse(record.options, argv, verb, record.positional)
    return resolve(record.options, verb, preset=parsed.preset, config=parsed.config, settings=parsed.settings)


def test_the_universal_flags_are_all_there():
    assert len(UNIVERSAL) == 28
    assert [name for name in UNIVERSAL if name not in options_of(TrainDpo)] == []


def test_defaults_are_those_of_the_script_that_people_know():
    assert {name: getattr(TrainDpo(), name) for name in DIFFUSERS_DEFAULTS} == DIFFUSERS_DEFAULTS


def test_the_diffusers_command_is_read_as_it_stands():
    options = read(README_COMMAND).options
    assert (options.learning_rate, options.rank) == (1e-5, 8)
    assert (options.train_batch_size, options.gradient_accumulation_steps) == (16, 2)
    assert options.use_8bit_adam and options.gradient_checkpointing and options.run_validation
    assert options.beta_dpo == 2500 and options.beta_convention == "diffusers"


def test_the_salesforce_command_is_read_as_it_stands():
    options = read(SALESFORCE_COMMAND).options
    assert (options.learning_rate, options.scale_lr, options.gradient_accumulation_steps) == (1e-8, True, 128)
    assert options.beta_dpo == 5000
    notes = VERBS["train dpo"].notes(options, read(SALESFORCE_COMMAND).origins)
    assert len(notes) == 1 and "--beta_convention salesforce" in notes[0]


def test_what_has_no_effect_is_told_once_each():
    notes = read(README_COMMAND).notes() + read(SALESFORCE_COMMAND).notes()
    assert [note.split()[0] for note in notes] == ["push_to_hub", "dataloader_num_workers"]
    assert all("has no effect" in note for note in notes)


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "1e-5"],
        ["--learning-rate", "1e-5"],
        ["--learning-rate=1e-5"],
        ["train.learning_rate=1e-5"],
        ["learning_rate=1e-5"],
        ["--unet_lr=1e-5"],
        ["--learning_rate=3", "train.learning_rate=1e-5"],
        ["train.learning_rate=3", "--learning_rate=1e-5"],
    ],
)
def test_one_option_has_many_spellings_and_the_last_word_wins(argv):
    assert read(argv).options.learning_rate == 1e-5


def test_kohya_names_are_aliases():
    options = read(["--network_dim", "16", "--network_alpha=8"]).options
    assert (options.rank, options.network_alpha) == (16, 8.0)


@pytest.mark.parametrize(
    ("argv", "value"), [([], False), (["--scale_lr"], True), (["--scale_lr=false"], False), (["scale_lr=on"], True)]
)
def test_switches(argv, value):
    assert read(argv).options.scale_lr is value


def test_prompts_are_left_alone():
    prompts = ("--a dash-and under_score", "x=1", "100 % sure")
    argv = [f"--prompt={prompts[0]}", "--prompt", prompts[1], "--prompt", prompts[2]]
    assert read(argv, "sample").options.prompt == prompts


def test_bare_words_are_the_runs_of_evaluate_and_the_one_folder_of_annotate():
    assert read(["runs/lr=1e-5", "--seed", "3", "b"], "evaluate").options.run == ("runs/lr=1e-5", "b")
    assert parse(Annotate, ["a"], "data annotate", "folder").settings == [("folder", "a")]
    with pytest.raises(UsageError, match="'more' is neither"):
        parse(Annotate, ["a", "more"], "data annotate", "folder")


def test_each_text_of_a_list_is_one_of_its_choices():
    assert read(["a", "--sampler", "ddim"], "evaluate").options.sampler == ("ddim",)
    with pytest.raises(UsageError, match="one of dpmpp, ddim, not .*; did you mean ddim"):
        read(["a", "--sampler", "dpmpp", "--sampler", "dddim"], "evaluate")


def test_layers_in_order(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("train:\n  learning_rate: 3e-4\n  seed: 5\nrank: 3\n")
    argv = ["--preset", "tiny", "--config", str(config), "train.seed=7"]
    resolved = read(argv)
    options = resolved.options
    assert options.adam_beta1 == 0.9  # default
    assert options.pretrained_model_name_or_path == "tiny"  # preset
    assert (options.learning_rate, options.rank) == (3e-4, 3)  # file over preset
    assert options.seed == 7  # command line over file
    assert resolved.origins["seed"] == "command line" and resolved.origins["rank"] == str(config)
    assert resolved.origins["mode"] == "preset tiny" and "adam_beta1" not in resolved.origins


def test_yaml_traps(tmp_path):
    """By the letter of YAML 1.1 1e-5 is text, `no` false and 2_000 a number; all three mean what the person meant."""
    config = tmp_path / "c.yaml"
    lines = [
        "learning_rate: 1e-5",
        "mixed_precision: no",
        "max_train_steps: 2_000",
        "seed: 1e3",
        "resume: null",
        "hub:",
    ]
    config.write_text("\n".join(lines))
    options = read(["--config", str(config)]).options
    assert (options.learning_rate, options.mixed_precision, options.max_train_steps) == (1e-5, "no", 2000)
    assert options.seed == 1000 and type(options.seed) is int


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train:\n  lerning_rate: 1", "unknown key train.lerning_rate; did you mean train.learning_rate?"),
        ("tain:\n  seed: 1", "unknown section tain; did you mean train?"),
        ("model:\n  seed: 1", "unknown key model.seed; did you mean train.seed?"),
        ("seed: 1\nseed: 2", "line 2, column 1 the key seed stands twice"),
        ("seed: 1\ntrain:\n  seed: 2", "train.seed is set twice, to 1 and to 2"),
        ("seed: [1", "line 1, column 9"),
        ("- 1", "expected `key: value` lines, found list"),
        ("verb: sample\nseed: 1", "written for `sample`, not for `train dpo`"),
        ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("train: {seed: true}", "train.seed must be a whole number at least 0, not 'true'"),
        ("learning_rate: {a: 1}", "unknown section learning_rate"),
        ("validation_prompts: {a: 1}", "unknown section validation_prompts"),
        ("validation_prompts: [[a]]", "must be a list of texts"),
    ],
)
def test_errors_in_files_name_the_file(tmp_path, content, message):
    config = tmp_path / "mine.yaml"
    config.write_text(content)
    with pytest.raises(UsageError) as caught:
        read(["--config", str(config)])
    assert message in str(caught.value) and "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--learning_rate=fast", "train.learning_rate must be a number above 0, not 'fast'"),
        ("--learning_rate=0", "train.learning_rate must be a number above 0, not '0'"),
        ("--learning_rate=nan", "train.learning_rate must be a number above 0, not 'nan'"),
        ("--beta_dpo=inf", "train.beta_dpo must be a number above 0, not 'inf'"),
        ("--seed=1.5", "train.seed must be a whole number at least 0, not '1.5'"),
        ("--seed=inf", "train.seed must be a whole number"),
        ("--seed=²", "train.seed must be a whole number"),
        ("--seed", "--seed needs a value"),
        ("--scale_lr=maybe", "train.scale_lr must be true or false, not 'maybe'"),
        (
            "--loss_type=sigmod",
            "one of sigmoid, ipo, hinge, robust, kto, kto_pairs, mapo, dspo, not 'sigmod'; did you mean sigmoid?",
        ),
        ("--adam_beta2=1", "train.adam_beta2 must be a number at least 0 and below 1, not '1'"),
        ("--proportion_empty_prompts=2", "at least 0 and at most 1, not '2'"),
        ("--lerning-rate=1", "unknown flag --lerning_rate; did you mean --learning_rate?"),
        ("train.lerning_rate=1", "unknown key train.lerning_rate; did you mean train.learning_rate?"),
        ("trian.learning_rate=1", "did you mean train.learning_rate?"),
        ("--zzzzqqqq", "unknown flag --zzzzqqqq; `diffusion-align train dpo --help`"),
        ("--preset=tinny", "unknown preset tinny; did you mean tiny?"),
        ("--config=tiny", "a preset has this name: use --preset"),
        ("surprise", "'surprise' is neither a flag nor key=value"),
    ],
)
def test_errors_on_the_command_line(argument, message):
    with pytest.raises(UsageError) as caught:
        read([argument])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which model"),
        (["--model=tiny"], "which pairs"),
        (["--model=tiny", "--data=a", "--dataset_name=b"], "not both"),
        (["--model=tiny", "--data=a", "--loss_type=ipo", "--label_smoothing=0.1"], "no effect for loss_type ipo"),
        (["--model=tiny", "--data=a", "--loss_type=kto", "--winner_share=0.5"], "is for losses of the margin, not"),
        (["--model=tiny", "--data=a", "--resume=auto", "--overwrite_output_dir"], "deletes what"),
    ],
)
def test_contradictions(argv, message):
    with pytest.raises(UsageError, match=message):
        VERBS["train dpo"].check(read(argv).options)


def one_edit(word, rng):
    """Drop, insert, replace or swap one letter."""
    at = rng.randrange(len(word))
    letter = rng.choice(string.ascii_lowercase + "_")
    swap = min(at, len(word) - 2)
    return rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at:],
            word[:at] + letter + word[at + 1 :],
            word[:swap] + word[swap + 1] + word[swap] + word[swap + 2 :],
        ]
    )


@pytest.mark.parametrize("form", ["--{}=1", "{}=1"])
def test_suggestions_for_one_edit_typos(form):
    """At least 95 % of 300 generated typos, of flags and of dotted keys, are met with the name they came from."""
    rng = random.Random(0)
    names = by_any_name(TrainDpo)
    words = sorted(name for name in names if ("." in name) == (form[0] == "{"))
    right = total = 0
    while total < 300:
        meant = rng.choice(words)
        typed = one_edit(meant, rng)
        if typed in names or typed.startswith(("-", ".", "=")) or "-" in typed:
            continue
        total += 1
        with pytest.raises(UsageError) as caught:
            read([form.format(typed)])
        right += f"did you mean {form.format(meant).removesuffix('=1')}?" in str(caught.value)
    assert right >= 0.95 * total


def test_the_saved_configuration_reads_back_and_keeps_no_secret(tmp_path):
    argv = ["--preset=tiny", "--data=pairs", "--hub_token=hf_fake_token", "--resume=latest", "lr_power=1e-7"]
    argv.append("--validation_prompt=a: b #c")
    options = read(argv).options
    text = to_yaml(options, "train dpo")
    assert "hf_fake_token" not in text and "resume" not in text
    run = tmp_path / "run" / "checkpoints" / "step-10"
    run.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(text)
    for place in (run.parents[1] / "config.yaml", run.parents[1], run):
        again = read(["--config", str(place)]).options
        kept = dataclasses.replace(options, hub_token=None, resume_from_checkpoint=None)
        assert again == dataclasses.replace(kept, output_dir=str(tmp_path / "run"))  # it lies beside checkpoints


def test_no_option_is_printed_with_a_secret():
    assert not any("secret" in note for note in read(["--hub_token=secret"]).notes())


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option_with_its_default(verb):
    record = VERBS[verb]
    text = " ".join(build_parser(record.options, verb, "").format_help().split())
    for option in options_of(record.options).values():
        assert f"--{option.name}" in text and option.help.split()[0] in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_name_means_one_option(verb):
    options = options_of(VERBS[verb].options)
    words = [word for option in options.values() for word in (option.name, *option.aliases)]
    assert len(words) == len(set(words))


def read_preset(name):
    """METHOD/NAME -> its options as a start without any more flags than the data would give."""
    method, _, bare = name.partition("/")
    record = VERBS[f"train {method}"]
    data = "train_data_dir" if "train_data_dir" in options_of(record.options) else "prompts"
    # Which reward is nobody's default: a preset of a real model leaves it to whoever starts it.
    more = [("reward", "judge")] if "reward" in options_of(record.options) else []
    return record, resolve(record.options, record.words, preset=bare, settings=[(data, "somewhere"), *more])


@pytest.mark.parametrize("name", all_presets())
def test_presets_are_complete_but_for_the_data(name):
    method, _, bare = name.partition("/")
    content = read_yaml(preset_path(bare, f"train {method}"))
    record, resolved = read_preset(name)
    record.check(resolved.options)
    assert content["verb"] == record.words and resolved.notes() == []
    assert {"learning_rate", "max_train_steps"} & set(resolved.origins) and len(content["about"]) < 100
    if method in ("dpo", "rankdpo"):
        own = {"mapo_beta"} if content["train"].get("loss_type") == "mapo" else {"beta_dpo", "beta_convention"}
        assert {*own, "max_train_steps"} <= set(resolved.origins)
    else:
        assert {"solver", "eta", "steps", "guidance", "log_ratio_unit", "clip"} <= set(resolved.origins)


def test_presets_carry_the_papers_numbers():
    """Literal numbers from the launchers' text above, not from our files."""
    full = read(["--preset=sd15-full"]).options
    effective = full.train_batch_size * accumulation_of(full, 1)
    assert (effective, full.learning_rate * effective, full.scale_lr) == (2048, pytest.approx(2.048e-5), True)
    assert (full.beta_dpo, full.beta_convention, full.mode) == (5000, "salesforce", "full")
    assert (full.lr_warmup_steps, full.max_train_steps, full.proportion_empty_prompts) == (500, 2000, 0.2)
    lora, pasted = read(["--preset=sd15-lora"]).options, read(README_COMMAND).options
    names = """rank learning_rate train_batch_size gradient_accumulation_steps max_train_steps beta_dpo beta_convention
        lr_scheduler lr_warmup_steps checkpointing_steps resolution gradient_checkpointing"""
    for name in names.split():
        assert getattr(lora, name) == getattr(pasted, name), name


@pytest.mark.parametrize(
    ("preset", "effective", "numbers"),
    [
        # Literal numbers of the authors' launchers: loss, beta and its unit, rate in effect, steps, warm-up, what else.
        ("sd15-kto", 8, ("kto", 1000, "diffusers", 1e-7, 20000, 200, {"liked_share": 0.8, "train_batch_size": 2})),
        ("sdxl-mapo", 16, ("mapo", 2500, "diffusers", 1e-5, 2000, 0, {"mapo_beta": 0.1})),
        ("sd15-dspo", 2048, ("dspo", 0.001, "salesforce", 2.048e-5, 2000, 500, {"dspo_strength": 0.001})),
        ("sdxl-dspo", 2048, ("dspo", 0.001, "salesforce", 2.048e-5, 2000, 200, {"train_batch_size": 8})),
        ("sd15-sdpo", 2048, ("sigmoid", 5000, "salesforce", 2.048e-5, 2000, 500, {"winner_share": 0.9})),
        ("sdxl-sdpo", 2048, ("sigmoid", 5000, "salesforce", 2.048e-6, 2000, 500, {"winner_share": 0.6})),
        ("sdxl-full", 2048, ("sigmoid", 5000, "salesforce", 2.048e-5, 2000, 200, {"train_batch_size": 1})),
    ],
)  # fmt: skip
def test_presets_of_the_other_losses_carry_their_authors_numbers(preset, effective, numbers):
    o = read([f"--preset={preset}"]).options
    assert o.train_batch_size * accumulation_of(o, 1) == effective
    rate = o.learning_rate * (effective if o.scale_lr else 1)
    found = (o.loss_type, o.beta_dpo, o.beta_convention, pytest.approx(rate), o.max_train_steps, o.lr_warmup_steps)
    assert numbers[:-1] == found and o.mode == "full"
    assert {name: getattr(o, name) for name in numbers[-1]} == numbers[-1]


@pytest.mark.parametrize(
    ("argv", "beta"),
    [
        # The authors' own, literally: diffusion-kto's default; DSPO's launcher; diffusers' script.
        (["--loss_type=kto"], (1000, "diffusers")),
        (["--loss_type=kto_pairs"], (1000, "diffusers")),
        (["--loss_type=dspo"], (0.001, "salesforce")),
        (["--loss_type=hinge"], (2500, "diffusers")),
        # A preset's beta was meant for its loss: it stays for a loss of the same kind, and goes with another.
        (["--preset=sd15-full", "--loss_type=ipo"], (5000, "salesforce")),
        (["--preset=sd15-full", "--loss_type=dspo"], (0.001, "salesforce")),
        (["--preset=sd15-lora", "--loss_type=kto"], (1000, "diffusers")),
        # Whoever names it has it, in the loss's own unit if no other is named.
        (["--preset=sd15-full", "--loss_type=dspo", "--beta_dpo=0.01"], (0.01, "salesforce")),
        (["--loss_type=dspo", "--beta_dpo=3", "--beta_convention=sum"], (3, "sum")),
        (["--beta_dpo=7", "--loss_type=kto"], (7, "diffusers")),
    ],
)
def test_a_loss_comes_with_its_published_constants(argv, beta):
    resolved = read(argv)
    assert (resolved.options.beta_dpo, resolved.options.beta_convention) == beta
    named = {word.lstrip("-").split("=")[0] for word in argv} & {"beta_dpo", "beta_convention"}
    assert {name for name in resolved.given() if name.startswith("beta")} >= named


def test_a_saved_loss_keeps_its_constants_until_another_is_asked_for(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(read(["--loss_type=dspo", "--beta_dpo=0.05"]).options, "train dpo"))
    again = read(["--config", str(tmp_path)]).options
    assert (again.loss_type, again.beta_dpo, again.beta_convention) == ("dspo", 0.05, "salesforce")
    other = read(["--config", str(tmp_path), "--loss_type=sigmoid"]).options
    assert (other.beta_dpo, other.beta_convention) == (2500, "diffusers")


@pytest.mark.parametrize("words", ["train dpo", "train rankdpo", "train d3po", "train spo", "train prdp", "train ddpo"])
def test_a_resumed_run_prints_no_notes_about_defaults(words, tmp_path):
    """The configuration of a run holds every option; only what a person set is worth a note."""
    verb = VERBS[words]
    for asked in ([], ["--preset=tiny"]):
        parsed = parse(verb.options, asked, words)
        first = resolve(verb.options, words, preset=parsed.preset, settings=parsed.settings)
        (tmp_path / "config.yaml").write_text(to_yaml(first.options, words))
        again = resolve(verb.options, words, config=str(tmp_path))
        said = {*first.notes(), *verb.notes(first.options, first.given())}
        assert {*again.notes(), *verb.notes(again.options, again.given())} <= said, words
    dpo = read(["--config", str(tmp_path)]) if words == "train dpo" else None
    assert dpo is None or VERBS[words].notes(dpo.options, dpo.given()) == []


def test_constants_of_another_loss_cause_a_note():
    for flag, loss in (("--mapo_beta=0.1", "mapo"), ("--dspo_strength=0.2", "dspo"), ("--liked_share=0.5", "kto")):
        resolved = read([flag, "--loss_type=sigmoid"])
        (note,) = VERBS["train dpo"].notes(resolved.options, resolved.given())
        assert f"belongs to loss_type {loss}" in note
        resolved = read([flag, f"--loss_type={loss}"])
        assert VERBS["train dpo"].notes(resolved.options, resolved.given()) == []


@pytest.mark.parametrize(
    ("argv", "processes", "wanted"),
    [
        (["--effective_batch_size=2048", "--train_batch_size=8"], 1, 256),
        (["--effective_batch_size=2048", "--train_batch_size=8"], 16, 16),
        (["--train_batch_size=8"], 4, 1),
        (["--gradient_accumulation_steps=3"], 4, 3),
        (["--effective_batch_size=24", "--train_batch_size=4", "--gradient_accumulation_steps=3"], 2, 3),
        # What is said later counts: the preset asks for 2048 pairs, the command line for micro-batches.
        (["--preset=sd15-full", "--gradient_accumulation_steps=2"], 4, 2),
        (["--preset=sd15-lora", "--effective_batch_size=64"], 2, 2),
        (["--effective_batch_size=10", "--train_batch_size=4"], 1, "is no multiple of .* 4: take 8 or 12"),
        (["--effective_batch_size=4", "--train_batch_size=4"], 2, "x 2 processes = 8: take 8, or"),
        (
            ["--effective_batch_size=24", "--train_batch_size=4", "--gradient_accumulation_steps=1"],
            2,
            "means gradient_accumulation_steps 3, not 1",
        ),
    ],
)
def test_the_effective_batch_is_cut_by_the_devices_there_are(argv, processes, wanted):
    o = read(argv).options
    if isinstance(wanted, int):
        assert accumulation_of(o, processes) == wanted
    else:
        with pytest.raises(UsageError, match=wanted):
            accumulation_of(o, processes)


def test_presets_are_plain_yaml():
    for name in all_presets():
        method, _, bare = name.partition("/")
        assert isinstance(yaml.safe_load(preset_path(bare, f"train {method}").read_text()), dict)


def test_sample_and_evaluate_say_what_they_need():
    with pytest.raises(UsageError, match="which model"):
        VERBS["sample"].check(Sample())
    with pytest.raises(UsageError, match="which prompts"):
        VERBS["sample"].check(Sample(run="r"))
    with pytest.raises(UsageError, match="eta 0 only"):
        VERBS["sample"].check(Sample(run="r", prompt=("a",), order=3, eta=1.0))
    with pytest.raises(UsageError, match="which run"):
        VERBS["evaluate"].check(VERBS["evaluate"].options())
