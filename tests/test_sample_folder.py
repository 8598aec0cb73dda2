"""`sample` into a folder with pictures: another command's are not mixed in, and only --overwrite replaces them."""

import json
import math

import pytest
from helpers_tiny import make_tiny_folder

from diffusion_align import cli
from diffusion_align.commands.sample.folder import claim
from diffusion_align.models import TextToImage


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_other_settings_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    model, out = make_tiny_folder(tmp_path / "model"), tmp_path / "out"
    base = ["sample", "--model", str(model), "--out", str(out), "--steps=1", "--device=cpu", "--prompt", "circle"]
    assert cli.main([*base, "--prompt", "square"]) == 0
    assert names(out) == ["0000-00.png", "0001-00.png", "samples.json"]
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    assert cli.main([*base, "--prompt", "square"]) == 0  # the same again
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_align.models.loading.load_pipeline", lambda *a, **b: pytest.fail("it was loaded"))
        for more, other in (
            ([], "pictures"),
            (["--prompt", "square", "--seed=1"], "seed"),
            (["--model=tiny"], "model"),
        ):
            capsys.readouterr()
            assert cli.main([*base, *more]) == 1
            said = capsys.readouterr().err
            assert f"{out} holds pictures made with other " in said and other in said and said.count("\n") == 1
            assert "--overwrite removes them, another --out leaves them alone" in said
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before
    (out / "choices.jsonl").write_text("")
    assert cli.main([*base, "--overwrite"]) == 0
    assert names(out) == ["0000-00.png", "choices.jsonl", "samples.json"]
    assert len(json.loads((out / "samples.json").read_text())["pictures"]) == 1
    assert cli.main([*base, "--overwrite", "--layout=geneval"]) == 2
    assert "is for layout samples" in capsys.readouterr().err


def test_an_interrupted_command_is_continued_or_refused(tmp_path):
    def about(count):
        return {"pictures": [{"file": f"{i:04d}-00.png"} for i in range(count)]}

    for i in range(3):
        (tmp_path / f"{i:04d}-00.png").write_bytes(b"")
    claim(tmp_path, about(3), overwrite=False)
    claim(tmp_path, about(5), overwrite=False)
    with pytest.raises(ValueError, match="holds pictures of another command"):
        claim(tmp_path, about(2), overwrite=False)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(ValueError, match="holds pictures of another command"):
        claim(tmp_path, about(3), overwrite=False)
    (tmp_path / "mine.png").write_bytes(b"")
    claim(tmp_path, about(2), overwrite=True)
    assert names(tmp_path) == ["mine.png"]
    claim(tmp_path / "new", about(2), overwrite=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["samples", "geneval"])
def test_a_model_that_overflows_writes_no_black_pictures(tmp_path, monkeypatch, capsys, layout):
    decode = TextToImage.decode
    monkeypatch.setattr(TextToImage, "decode", lambda self, z, chunk=16: decode(self, z, chunk) * math.nan)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tag": "single_object", "include": [], "prompt": "a circle"}\n')
    argv = ["sample", "--model", "tiny", "--prompts", str(prompts), "--steps", "1", "--layout", layout]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 1
    assert "the picture of prompt 0 is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))
