"""`reward ls`, `reward score` and `reward serve` as they are typed."""

import inspect
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_machine import HANG, free_port
from helpers_rewards import pictures
from PIL import Image

from diffusion_align import cli
from diffusion_align.commands.evaluate.judging import check_judging, open_judging
from diffusion_align.data.images import encode_png
from diffusion_align.options import Evaluate, Synth, TrainSpm
from diffusion_align.options.synth import check_synth
from diffusion_align.options.train.spm import check_train_spm
from diffusion_align.rewards import http_reward, load_reward, spec, to_uint8
from diffusion_align.rewards.catalogue import CATALOGUE

COMMAND = [sys.executable, "-m", "diffusion_align.cli"]
MISTAKES = [
    ["reward", "score"],
    ["reward", "score", "--reward", "pickscor", "--images", "x"],
    ["reward", "score", "--reward", "tiny"],
    ["reward", "serve", "--reward", "hpsv21"],
    ["reward", "serve", "--reward", "tiny", "--port", "70000"],
    ["reward", "ls", "x"],
    ["reward", "lst"],
    ["data", "synth", "--models", "tiny", "--prompts", "tiny", "--rewards", "pickscor"],
    ["train", "d3po", "--model", "tiny", "--prompts", "tiny", "--reward", "pickscor"],
]


@pytest.mark.parametrize("argv", [["reward", "ls"], *MISTAKES], ids=" ".join)
def test_the_list_and_mistakes_are_answered_without_torch(argv):
    """Counted in modules, of which torch alone has more than 1000: seconds are the machine's affair."""
    heavy = ("torch", "numpy", "PIL", "open_clip", "transformers")
    program = (
        f"import sys; from diffusion_align.cli import main; code = main({argv!r}); "
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules], len(sys.modules) < 400); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY [] True"
    assert done.returncode == (2 if argv in MISTAKES else 0)
    if argv in MISTAKES:
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("diffusion-align: error: ")


def test_ls_names_every_reward_with_unit_licence_and_weights(capsys):
    assert cli.main(["reward", "ls"]) == 0
    said = capsys.readouterr().out
    for name, entry in CATALOGUE.items():
        block = re.search(rf"^{re.escape(name)} .*\n.*\n.*$", said, re.MULTILINE)
        assert block and all(text in block[0] for text in (entry.about, entry.unit, entry.licence, entry.origin))


@pytest.fixture
def folder(tmp_path):
    """Three pictures of two sizes, a broken one, and the samples.json that `sample` writes."""
    home = tmp_path / "drawn"
    home.mkdir()
    sizes = {"0000-00.png": (32, 32), "0000-01.png": (32, 32), "0001-00.png": (24, 40)}
    for seed, (name, size) in enumerate(sizes.items()):
        (home / name).write_bytes(encode_png(pictures(1, size, seed)[0]))
    (home / "0002-00.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    rows = [{"file": path.name, "prompt": f"prompt {path.name}"} for path in sorted(home.iterdir())]
    (home / "samples.json").write_text(json.dumps({"pictures": rows}))
    return home


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch", ["1", "2", "16"])
def test_score_writes_one_line_a_picture(folder, tmp_path, capsys, batch):
    out = tmp_path / "out" / "scores.jsonl"
    argv = ["reward", "score", "--reward", "jpeg-large", "--images", str(folder), "--out", str(out)]
    assert cli.main([*argv, "--batch_size", batch]) == 0
    rows = rows_of(out)
    assert [row["image"] for row in rows] == [str(path) for path in sorted(folder.glob("*.png"))]
    assert [row["prompt"] for row in rows] == [f"prompt {path.name}" for path in sorted(folder.glob("*.png"))]
    sizes = [(32, 32), (32, 32), (24, 40)]
    exact = [to_uint8(pictures(1, size, seed)).float() / 255 for seed, size in enumerate(sizes)]
    expected = [load_reward("jpeg-large")(image, ["x"]).item() for image in exact]
    assert [row["score"] for row in rows[:3]] == pytest.approx(expected)
    assert rows[3]["score"] is None and "cannot be decoded" in rows[3]["error"]
    said = capsys.readouterr().out
    assert f"mean {sum(expected) / 3:.4f} +- " in said and "over 3 pictures" in said and "/s" in said
    assert "1 pictures have no score; the first: " in said
    assert sorted(path.name for path in out.parent.iterdir()) == ["scores.jsonl"]


def test_options_that_name_rewards_parse_each_text_once(monkeypatch):
    """`evaluate`, `data synth` and a relabelling pass what the check has parsed on to whatever loads the reward."""
    made, real = [], spec.RewardSpec
    monkeypatch.setattr(spec, "RewardSpec", lambda *args: made.append(real(*args)) or made[-1])
    synth = Synth(models=("tiny",), prompts="tiny", rewards=("random", "jpeg-small"))
    spm = TrainSpm(pretrained_model_name_or_path="tiny", train_data_dir="x", relabel="2:random")
    evaluate = Evaluate(run=("x",), reward="random", held_out_reward=("jpeg-large",), features="none")
    check_synth(synth)
    check_train_spm(spm)
    check_judging(evaluate, in_world=False)
    assert [str(one) for one in made] == ["random", "jpeg-small", "2:random", "random", "jpeg-large"]
    assert [synth.reward_specs["random"], spm.relabel_spec, *evaluate.reward_specs.values()] == [made[0], *made[2:]]
    assert list(open_judging(evaluate, False, 64).rewards) == ["reward", "jpeg-large"] and len(made) == 5


def test_the_text_of_a_reward_is_parsed_once(folder, tmp_path, monkeypatch):
    """From the options to the scores: the parser, wherever it is imported, makes one RewardSpec."""
    made, real = [], spec.RewardSpec
    monkeypatch.setattr(spec, "RewardSpec", lambda *args: made.append(real(*args)) or made[-1])
    argv = ["reward", "score", "--images", str(folder), "--out", str(tmp_path / "s")]
    assert cli.main([*argv, "--reward", "0.5:jpeg-small,random"]) == 0
    assert [str(one) for one in made] == ["0.5:jpeg-small,random"]
    load_reward("random")
    assert len(made) == 2  # texts are counted wherever they are parsed


def test_following_a_reward_from_text_to_scores_takes_six_files(folder, tmp_path):
    """The files of the package about rewards in which a function runs; lazy names of packages are not counted."""
    files, package = set(), Path(cli.__file__).parent

    def note(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED and file.is_relative_to(package):
            files.add(file.relative_to(package).as_posix())

    argv = ["reward", "score", "--reward", "tiny", "--images", str(folder), "--out", str(tmp_path / "s")]
    sys.setprofile(note)
    try:
        assert cli.main(argv) == 0
    finally:
        sys.setprofile(None)
    about_rewards = {file for file in files if "reward" in file and not file.endswith("__init__.py")}
    assert about_rewards == {
        "options/reward.py",
        "commands/reward/score.py",
        *(f"rewards/{name}.py" for name in ("spec", "load", "clip", "interface")),
    }


def test_prompts_are_one_each_or_one_for_all(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def f(images, prompts): return [len(prompt) for prompt in prompts]")
    images = ["--images", str(folder / "0001-00.png"), "--images", str(folder / "0000-00.png")]
    argv = ["reward", "score", "--reward", f"python:{tmp_path / 'mine.py'}:f", *images, "--out", str(tmp_path / "s")]
    for lines, expected in ((["one", "three"], [3, 5]), (["four"], [4, 4])):
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        assert cli.main([*argv, "--prompts_file", str(tmp_path / "prompts.txt")]) == 0
        assert [row["score"] for row in rows_of(tmp_path / "s")] == expected
    (tmp_path / "prompts.txt").write_text("a\nb\nc")
    assert cli.main([*argv, "--prompts_file", str(tmp_path / "prompts.txt")]) == 1
    assert "3 prompts for 2 pictures" in capsys.readouterr().err


def test_score_names_what_is_missing(folder, tmp_path, capsys):
    argv = ["reward", "score", "--reward", "judge", "--out", str(tmp_path / "s"), "--images"]
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "has no picture"),
        (folder / "0002-00.png", "none of 1 pictures has a score: cannot be decoded"),
    ]
    for place, message in cases:
        assert cli.main([*argv, str(place)]) == 1
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1
    (folder / "samples.json").write_text('{"pictures": []}')
    assert cli.main([*argv, str(folder)]) == 1
    assert "is not in its folder's samples.json; give --prompts_file" in capsys.readouterr().err
    (folder / "samples.json").unlink()
    assert cli.main([*argv, str(folder)]) == 1
    assert "which prompts? --prompts_file FILE" in capsys.readouterr().err
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s*"))


def test_pictures_in_the_layout_of_geneval_have_their_prompts(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def f(images, prompts): return [len(prompt) for prompt in prompts]")
    for number, prompt in enumerate(["one", "three"]):
        samples = tmp_path / "drawn" / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"prompt": prompt, "tag": "x"}))
        for which in range(2):
            (samples / f"{which:04d}.png").write_bytes(encode_png(pictures(1, (16, 16))[0]))
        (samples / "._0000.png").write_bytes(b"\x00")
    out = ["--out", str(tmp_path / "s")]
    mine = ["reward", "score", "--reward", f"python:{tmp_path / 'mine.py'}:f", *out]
    assert cli.main([*mine, "--images", str(tmp_path / "drawn")]) == 0
    assert [row["score"] for row in rows_of(tmp_path / "s")] == [3, 3, 5, 5]
    assert cli.main([*mine, "--images", str(tmp_path / "drawn" / "00001" / "samples")]) == 0
    assert [row["score"] for row in rows_of(tmp_path / "s")] == [5, 5]


@pytest.mark.parametrize("reward", ["jpeg-small", "0.5:jpeg-large,random", "min:std:jpeg-small,random"])
def test_rewards_that_read_no_prompt_ask_for_none(folder, tmp_path, reward):
    (folder / "samples.json").unlink()
    argv = ["reward", "score", "--reward", reward, "--images", str(folder), "--out", str(tmp_path / "s")]
    assert cli.main(argv) == 0
    assert [row["prompt"] for row in rows_of(tmp_path / "s")] == [""] * 4


@pytest.mark.parametrize("reward", ["python:{}:f", "jpeg-small,python:{}:f", "http://127.0.0.1:9"])
def test_rewards_that_read_prompts_ask_for_them_and_take_them(folder, tmp_path, capsys, reward):
    (tmp_path / "mine.py").write_text("def f(images, prompts): return [len(prompt) for prompt in prompts]")
    (folder / "samples.json").unlink()
    reward = reward.format(tmp_path / "mine.py")
    argv = ["reward", "score", "--reward", reward, "--images", str(folder), "--out", str(tmp_path / "s")]
    assert cli.main(argv) == 1
    assert "which prompts? --prompts_file FILE with one a line" in capsys.readouterr().err
    if "http" not in reward:
        (tmp_path / "p.txt").write_text("a cat")
        assert cli.main([*argv, "--prompts_file", str(tmp_path / "p.txt")]) == 0


def test_serve_answers_until_it_is_interrupted():
    port = free_port()
    argv = [*COMMAND, "reward", "serve", "--reward", "jpeg-large", "--port", str(port)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert f"jpeg-large at http://127.0.0.1:{port}; Ctrl-C ends it" in process.stdout.readline()
            images = pictures(3, (24, 24))
            scores = http_reward(f"http://127.0.0.1:{port}", timeout=HANG)(images, ["x"] * 3)
            torch.testing.assert_close(scores, load_reward("jpeg-large")(images, ["x"] * 3))
            process.send_signal(signal.SIGINT)
            assert process.wait(HANG) == 0
            assert process.stdout.read() == "stopped\n" and process.stderr.read() == ""
        finally:
            process.kill()


def test_pictures_are_scored_upright_and_in_rgb(tmp_path):
    image = Image.new("RGBA", (16, 12), (255, 0, 0, 0))  # transparent: white
    image.save(tmp_path / "a.png")
    (tmp_path / "mine.py").write_text("def f(images, prompts): return images.amin((1, 2, 3))")
    (tmp_path / "p.txt").write_text("x")
    argv = ["reward", "score", "--reward", f"python:{tmp_path / 'mine.py'}:f", "--images", str(tmp_path / "a.png")]
    assert cli.main([*argv, "--prompts_file", str(tmp_path / "p.txt"), "--out", str(tmp_path / "s")]) == 0
    assert rows_of(tmp_path / "s")[0]["score"] == 1.0


def test_the_benchmark_prints_a_row_a_reward(capsys):
    import bench_rewards

    argv = [
        "--rewards",
        "tiny",
        "jpeg-small",
        "--pictures",
        "4",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--model",
        "none",
        "--device",
        "cpu",
    ]
    assert bench_rewards.main(argv) == 0
    rows = {line.split()[0]: [float(n) for n in line.split()[1:]] for line in capsys.readouterr().out.splitlines()[2:]}
    assert set(rows) == {"tiny", "jpeg-small"} and all(len(row) == 5 and row[0] > 0 for row in rows.values())
    assert rows["tiny"][1] > 0 and rows["jpeg-small"][1] == 0
