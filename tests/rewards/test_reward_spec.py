"""The parser of rewards: what a text means, and the messages for texts that are wrong."""

import pytest

from diffusion_align.options import UsageError
from diffusion_align.options.reward import check_reward
from diffusion_align.rewards.catalogue import CATALOGUE
from diffusion_align.rewards.spec import RewardPart as Part
from diffusion_align.rewards.spec import RewardSpec as Spec
from diffusion_align.rewards.spec import read_spec


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_name_of_the_catalogue_is_read_and_can_be_loaded(name):
    assert read_spec(name) == Spec((Part(name),))
    assert str(check_reward(name)) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pickscore@v1.0", Spec((Part("pickscore", revision="v1.0"),))),
        (
            "0.5:pickscore,0.5:hpsv2.1",
            Spec((Part("pickscore", weight=0.5), Part("hpsv2.1", weight=0.5))),
        ),
        ("sum:tiny,jpeg-small", Spec((Part("tiny"), Part("jpeg-small")))),
        ("min:tiny,judge", Spec((Part("tiny"), Part("judge")), smallest=True)),
        (
            "std:tiny,-1e-1:jpeg-large",
            Spec((Part("tiny"), Part("jpeg-large", weight=-0.1)), standardise=True),
        ),
        (
            "std:min:.5:tiny,+2:judge",
            Spec((Part("tiny", weight=0.5), Part("judge", weight=2.0)), True, True),
        ),
        ("min:std:tiny,judge", Spec((Part("tiny"), Part("judge")), True, True)),
        (
            "3:ViT-H-14:laion2b_s32b_b79k",
            Spec((Part("open_clip", "ViT-H-14:laion2b_s32b_b79k", weight=3.0),)),
        ),
        ("hf-hub:owner/name", Spec((Part("open_clip", "hf-hub:owner/name"),))),
        ("http://localhost:8000", Spec((Part("http", "http://localhost:8000"),))),
        ("2:https://a.b:8/x,tiny", Spec((Part("http", "https://a.b:8/x", weight=2.0), Part("tiny")))),
    ],
)
def test_reward_texts(text, expected):
    assert read_spec(text) == expected


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(images, prompts): return [0] * len(prompts)")
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "odd,name=x").mkdir()
    (tmp_path / "odd,name=x" / "open_clip_config.json").write_text("{}")
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_spec("hpsv2=w.pt,2:python:mine.py:f").parts == (
        Part("hpsv2", "w.pt"),
        Part("python", "mine.py:f", weight=2.0),
    )
    assert read_spec(str(tmp_path / "odd,name=x")).parts == (Part("open_clip", str(tmp_path / "odd,name=x")),)
    assert read_spec("tiny").parts == (Part("tiny"),)  # a folder of that name does not matter
    for text in ("pickscore=none", "python:none.py:f"):
        with pytest.raises(FileNotFoundError, match="no file"):
            read_spec(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pickscor", "unknown reward pickscor; did you mean pickscore?"),
        ("PickScore", "unknown reward PickScore; did you mean pickscore?"),
        ("hpsv21", "unknown reward hpsv21; did you mean hpsv2.1?"),
        ("pikscore=x.pt", "unknown reward pikscore=x.pt; did you mean pickscore?"),
        ("0.5:pickscore,0.5:imagereword", "unknown reward imagereword; did you mean imagereward?"),
        ("asthetic:0.5", "unknown reward asthetic:0.5; did you mean aesthetic?"),
        ("zzz", "reward 'zzz' is neither a folder nor a known name"),
        ("ViT-H-14", 'an architecture needs weights, such as "ViT-H-14:laion2b_s32b_b79k"'),
        ("", "an empty reward"),
        ("tiny,", "an empty reward"),
        ("min:sum:tiny", "either the sum or the min"),
        ("0.5:people,tiny", "people choose by themselves"),
        ("judge=x", "reward judge has no weights to take from x"),
        ("aesthetic@main", "reward aesthetic has no repository"),
        ("pickscore@", "reward pickscore has no repository whose revision"),
        ("1e999:tiny", "the weight of reward tiny is not a finite number"),
        ("python:a.txt:f", "a Python reward is python:FILE.py:FUNCTION"),
        ("python:a.py", "a Python reward is python:FILE.py:FUNCTION"),
    ],
)
def test_misspelt_rewards(text, message):
    with pytest.raises(ValueError) as caught:
        read_spec(text)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    with pytest.raises(UsageError, match="reward"):
        check_reward(text)


def test_checking_loads_nothing(monkeypatch):
    import diffusion_align.rewards.weight_files as weight_files

    monkeypatch.setattr(weight_files, "hub_file", lambda *args: pytest.fail("fetched"))
    check_reward("min:pickscore,0.5:hpsv2,aesthetic,imagereward,http://localhost:1,ViT-L-14:openai")
    with pytest.raises(UsageError, match="did you mean"):
        check_reward("tiny,juge")
    with pytest.raises(UsageError, match="known name; `diffusion-align reward ls` lists the names"):
        check_reward("zzz")


def test_a_folder_without_a_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no open_clip_config.json in .*: not an open_clip folder"):
        read_spec(str(tmp_path))
