"""`data inspect` takes a path, `tiny`, and with --dataset_name an address on the hub, which is fetched."""

import shutil

import pytest

from diffusion_align import cli
from diffusion_align.commands.data import inspect
from diffusion_align.models.hub import asset


def test_the_embedded_pairs_by_name(capsys):
    assert cli.main(["data", "inspect", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "pairs      800" in said and "--model MODEL --dataset_name tiny\n" in said


def test_a_set_on_the_hub_is_fetched_as_training_fetches_it(tmp_path, monkeypatch, capsys):
    """Under the present address of a set that has moved."""
    asked = []

    def fetch(name, split, cache_dir, **more):
        asked.append((name, split, cache_dir))
        shutil.copy(asset("tiny_pairs.parquet"), tmp_path / "validation-00000-of-00001.parquet")
        return tmp_path

    monkeypatch.setattr(inspect, "fetch_pairs", fetch)
    assert cli.main(["data", "inspect", "--dataset_name", "yuvalkirstain/pickapic_v1", "--split", "validation"]) == 0
    assert asked == [("pickapic-anonymous/pickapic_v1", "validation", None)]
    said = capsys.readouterr().out
    assert "fetching pickapic-anonymous/pickapic_v1, split validation" in said
    assert "--dataset_name pickapic-anonymous/pickapic_v1 --dataset_split_name validation" in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (["--dataset_name", "owner/name"], "no such path here, and the hub says"),
        (["./owner/name"], "no such file or folder"),
        (["my_pairs/trian"], "no such file or folder here; for a data set on the hub: --dataset_name my_pairs/trian"),
        (["--dataset_name", "runs/pairs"], "no such file or folder"),
    ],
)
def test_missing_paths_and_names_are_one_line(word, said, capsys, monkeypatch):
    if said.startswith("no such file"):
        monkeypatch.setattr(inspect, "fetch_pairs", lambda *a, **more: pytest.fail("the hub was asked"))
    assert cli.main(["data", "inspect", *word]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
