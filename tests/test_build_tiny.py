"""The build of the embedded world, every stage at toy size, cut off and gone on with."""

import json

import build_tiny
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny.fit import fit

from diffusion_align.data import read_pairs, read_rankings
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.rng import generator
from diffusion_align.shapes import ATTRIBUTES

TOY = """--vae-steps 1 --decoder-steps 1 --unet-steps 1 1 1 --reward-steps 1 --pictures 64 --reward-prompts 2
    --pair-prompts 2 --measure-prompts 2 --reconstructions 8""".split()


@pytest.mark.filterwarnings("ignore")  # libraries talk while saving pipelines
def test_every_stage_at_toy_size_and_again(tmp_path, monkeypatch):
    arguments = [*TOY, "--out", str(tmp_path / "assets"), "--work", str(tmp_path / "work")]
    with monkeypatch.context() as patch:
        # The reward's stage dies; what stood before must not be made again.
        patch.setattr(build_tiny, "train_clip", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_tiny.main(arguments)
    weights = tmp_path / "assets" / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    # Untrained, the model draws nothing that the judge could tell apart.
    marks = {name: torch.arange(8.0).view(2, 4) for name in (*ATTRIBUTES, "share")}
    monkeypatch.setattr(build_tiny, "marks_of", lambda pictures, prompts: marks)
    build_tiny.main(arguments)
    assert weights.stat().st_mtime_ns == before
    StableDiffusionPipeline.from_pretrained(tmp_path / "assets" / "tiny")
    assert (tmp_path / "assets" / "tiny_clip" / "open_clip_model.safetensors").exists()
    facts = json.loads((tmp_path / "assets" / "tiny" / "build.json").read_text())
    assert facts["pair_prompts"] == 2 and facts["seed"] == 0
    # Each pair is the best and the worst of its prompt's ranking, to the byte.
    pairs, _ = read_pairs(tmp_path / "assets" / "tiny_pairs.parquet")
    rankings, _ = read_rankings(tmp_path / "assets" / "tiny_rankings.parquet")
    for pair, ranking in zip(pairs, rankings, strict=True):
        said, phi = ranking.scores[0], ranking.relevance
        assert len(ranking.pictures) == 4 and pair.prompt == ranking.prompt
        assert phi == pytest.approx([sum(mine > other for other in said) / 3 for mine in said])
        best, worst = (read_bytes(ranking.pictures[phi.index(end)]) for end in (max(phi), min(phi)))
        assert (read_bytes(pair.winner), read_bytes(pair.loser)) == (best, worst)
    # Rankings alone are made again without touching the pairs.
    before = (tmp_path / "assets" / "tiny_rankings.parquet").read_bytes()
    (tmp_path / "assets" / "tiny_rankings.parquet").unlink()
    untouched = (tmp_path / "assets" / "tiny_pairs.parquet").stat().st_mtime_ns
    build_tiny.main(arguments)
    assert (tmp_path / "assets" / "tiny_rankings.parquet").read_bytes() == before
    assert (tmp_path / "assets" / "tiny_pairs.parquet").stat().st_mtime_ns == untouched


def test_training_goes_on_as_if_it_had_not_been_cut_off(tmp_path):
    def run(folder, cuts):
        folder.mkdir()
        for steps in cuts:
            network = torch.nn.utils.skip_init(torch.nn.Linear, 3, 2)
            with torch.no_grad():
                for p in network.parameters():
                    p.fill_(0.1)

            def loss_at(step, network=network):
                return network(torch.randn(4, 3, generator=generator(0, "toy", step))).square().mean()

            stop = KeyboardInterrupt if steps else None

            def cut(step, loss_at=loss_at, steps=steps, stop=stop):
                if stop and step == steps:
                    raise stop
                return loss_at(step)

            try:
                fit("toy", folder, {"net": network}, cut, steps=30, learning_rate=0.1, save_every=5)
            except KeyboardInterrupt:
                continue
            return [p.detach().clone() for p in network.parameters()]

    whole, resumed = run(tmp_path / "a", [0]), run(tmp_path / "b", [7, 23, 0])
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
