"""`sample --layout` from the command line: the same pictures, resumed, or arranged from an evaluation."""

import json

import numpy as np
import pytest
from helpers_tiny import make_tiny_folder
from PIL import Image

from diffusion_align import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """DPG-Bench's own form: a file a prompt, named by its id."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, text in (("10", "a red circle"), ("vrd2", "two blue squares")):
        (folder / f"{name}.txt").write_text(text)
    return folder


def sample(model, out, *argv):
    settings = ["--steps", "2", "--batch_size", "3", "--device", "cpu", "--out", out]
    return cli.main([str(word) for word in ("sample", "--model", model, *settings, *argv)])


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_layout_moves_pictures_and_does_not_change_them(model, prompts, tmp_path, capsys):
    four = ("--prompts", prompts, "--num_images_per_prompt", "4")
    assert sample(model, tmp_path / "flat", *four) == 0
    assert sample(model, tmp_path / "geneval", *four, "--layout", "geneval") == 0
    assert sample(model, tmp_path / "dpg", *four, "--layout", "dpg") == 0
    assert "PIC_NUM=4 bash dpg_bench/dist_eval.sh" in capsys.readouterr().out
    assert sample(model, tmp_path / "comp", *four, "--layout", "compbench") == 0
    assert f"--out_dir {tmp_path / 'comp' / 'compbench'}" in capsys.readouterr().out
    for place, (name, text) in enumerate((("10", "a red circle"), ("vrd2", "two blue squares"))):
        grid = pixels(tmp_path / "dpg" / "dpg" / f"{name}.png")
        metadata = json.loads((tmp_path / "geneval" / f"0000{place}" / "metadata.jsonl").read_text())
        assert metadata == {"item_id": name, "prompt": text}
        for which in range(4):
            flat = pixels(tmp_path / "flat" / f"{place:04d}-{which:02d}.png")
            row, column = divmod(which, 2)
            quarter = grid[32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)]
            number = 4 * place + which
            for other in (
                quarter,
                pixels(tmp_path / "geneval" / f"0000{place}" / "samples" / f"000{which}.png"),
                pixels(tmp_path / "comp" / "compbench" / "samples" / f"{text}_{number:06d}.png"),
            ):
                assert np.array_equal(flat, other)
    assert len(list((tmp_path / "dpg" / "dpg").iterdir())) == 2
    assert len(list((tmp_path / "comp" / "compbench" / "samples").iterdir())) == 8


def test_an_interrupted_layout_draws_only_what_is_missing(model, prompts, tmp_path, capsys):
    argv = ("--prompts", prompts, "--num_images_per_prompt", "4", "--layout", "dpg")
    assert sample(model, tmp_path, *argv) == 0
    whole = contents(tmp_path)
    (tmp_path / "pictures" / "00001" / "samples" / "0002.png").unlink()
    (tmp_path / "pictures" / "00000" / "samples" / "0000.png").write_bytes(b"cut")
    (tmp_path / "dpg" / "vrd2.png").unlink()
    assert "8 pictures of 2 prompts" in capsys.readouterr().out
    assert sample(model, tmp_path, *argv) == 0
    assert "2 of them new" in capsys.readouterr().out and contents(tmp_path).keys() == whole.keys()
    # A kernel may sum in another order in a batch of another size: at most one level of 255.
    for name in whole:
        if name.endswith(".png"):
            (tmp_path / "before.png").write_bytes(whole[name])
            assert abs(pixels(tmp_path / name) - pixels(tmp_path / "before.png")).max() <= 1
    (tmp_path / "before.png").unlink()
    assert sample(model, tmp_path, *argv) == 0
    assert "0 of them new" in capsys.readouterr().out
    for more in (("--seed", "1"), ("--negative_prompt", "x"), ("--guidance", "2"), ("--eta", "0.5")):
        assert sample(model, tmp_path, *argv, *more) == 1
        assert "holds pictures made with another" in capsys.readouterr().err


def test_pictures_of_an_evaluation_are_arranged_without_drawing(model, prompts, tmp_path, capsys):
    argv = ["evaluate", model, "--base", model, "--prompts", prompts, "--num_images_per_prompt", "4", "--steps", "2"]
    argv += ["--reward", "jpeg-small", "--features", "none", "--sampler", "ddim", "--device", "cpu"]
    assert cli.main([str(word) for word in [*argv, "--output_dir", tmp_path / "run"]]) == 0
    source = next((tmp_path / "run" / "evaluation").glob("tuned-*")) / "ddim"
    arrange = ["sample", "--from_pictures", str(source), "--out", str(tmp_path / "out"), "--layout"]
    assert cli.main([*arrange, "dpg"]) == 0 and cli.main([*arrange, "compbench"]) == 0
    assert "2 files in" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out" / "dpg").iterdir()) == ["10.png", "vrd2.png"]
    corner = pixels(tmp_path / "out" / "dpg" / "vrd2.png")[32:, 32:]
    assert np.array_equal(corner, pixels(source / "00001" / "samples" / "0003.png"))
    one = pixels(tmp_path / "out" / "compbench" / "samples" / "two blue squares_000007.png")
    assert np.array_equal(corner, one)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--prompts", "{prompts}", "--layout", "dpg"), 0, ""),
        (("--prompts", "{prompts}", "--num_images_per_prompt", "2", "--layout", "dpg"), 2, "four pictures of a prompt"),
        (("--prompt", "a red circle", "--layout", "dpg"), 1, "prompt 0 has no item_id"),
        (("--prompt", "a red_circle", "--layout", "compbench"), 1, "prompt 0 has _"),
        (("--prompt", "a", "--from_pictures", "x", "--layout", "dpg"), 2, "draws nothing, so --pretrained_model"),
        (("--prompts", "geneva"), 1, "did you mean geneval?"),
        (("--prompt", "a", "--layout", "dgp"), 2, "one of samples, geneval, dpg, compbench"),
    ],
)
def test_bad_layouts_are_refused_before_drawing(model, prompts, tmp_path, capsys, argv, code, said):
    words = [word.format(prompts=prompts) for word in argv]
    assert sample(model, tmp_path / "out", *words) == code
    error = capsys.readouterr().err
    assert said in error and (tmp_path / "out").exists() == (code == 0)


def test_two_pictures_of_a_prompt_make_no_grid(model, tmp_path, capsys):
    two = ("--prompt", "a red circle", "--num_images_per_prompt", "2", "--layout", "geneval")
    assert sample(model, tmp_path / "drawn", *two) == 0
    argv = ["sample", "--from_pictures", tmp_path / "drawn", "--out", tmp_path / "out", "--layout", "dpg"]
    assert cli.main([str(word) for word in argv]) == 1
    assert "takes 4 or 1, so draw with --num_images_per_prompt 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(tmp_path, capsys):
    for argv, code, said in (
        (("--layout", "dpg"), 1, "has no pictures.json: give a folder that evaluate or sample --layout geneval"),
        ((), 2, "is for --layout dpg or compbench"),
    ):
        assert cli.main(["sample", "--from_pictures", str(tmp_path), "--out", str(tmp_path / "out"), *argv]) == code
        assert said in capsys.readouterr().err


def test_the_first_prompts_of_a_list(model, tmp_path):
    assert sample(model, tmp_path, "--prompts", "parti", "--num_prompts", "2") == 0
    assert [row["prompt"] for row in json.loads((tmp_path / "samples.json").read_text())["pictures"]] == [
        "bond",
        "element",
    ]
