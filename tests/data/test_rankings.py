"""Rankings from every layout, written and read back, in the cache; errors of one line that name row and cure."""

import dataclasses
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion_align import rng
from diffusion_align.data import EncodingSettings, Ranking, build_cache, read_pairs, read_rankings, write_pairs_parquet
from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.frames import load_picture
from diffusion_align.data.images import encode_png
from diffusion_align.data.pairs_and_rankings import fingerprint, write_rankings_parquet
from diffusion_align.data.rows.raw_rows import read_bytes

SIZE = 16


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def listed(folder, rows, name="set.jsonl"):
    """A JSON-lines file of rankings over six pictures beside it."""
    folder.mkdir(exist_ok=True)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(i))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def row(*files, prompt="p", **values):
    return {"prompt": prompt, "images": [f"{file}.png" for file in files], **values}


def message(path, **options):
    with pytest.raises(DataError) as caught:
        read_rankings(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_relevance_scores_and_ranks_by_hand(tmp_path):
    """Of four pictures the best by one scorer wins 3 of 3. With scorers (1, 3, 2) and (5, 4, 4): wins 0 + 2, 2 + 0 and
    1 + 0 of 4, as the tie is nobody's; with ranks (1, 2, 2): 2, 0 and 0 of 2.
    """
    path = listed(
        tmp_path,
        [
            row(0, 1, 2, relevance=[0.25, 1, 0]),
            row(0, 1, 2, 3, scores=[0.1, 0.4, -3, 0.2]),
            row(0, 1, 2, scores=[[1, 3, 2], [5, 4, 4]]),
            row(0, 1, 2, ranks=[1, 2, 2]),
            row(0, 1, 2, relevance=[0, 1, 1], scores=[9, 1, 1]),  # what is said outright holds
        ],
    )
    rankings, counts = read_rankings(path)
    assert [ranking.relevance for ranking in rankings] == [
        (0.25, 1, 0),
        (1 / 3, 1, 0, 2 / 3),
        (0.5, 0.5, 0.25),
        (1, 0, 0),
        (0, 1, 1),
    ]
    assert rankings[2].scores == ((1, 3, 2), (5, 4, 4)) and rankings[0].scores == ()
    assert [read_bytes(picture) for picture in rankings[1].pictures] == [png(i) for i in range(4)]
    assert (rankings[1].id, rankings[1].prompt) == ("set.jsonl:2", "p")
    assert str(counts) == "5 rows: 5 rankings, 0 ties dropped, 0 bad"


def test_pictures_that_are_equally_good_are_a_tie(tmp_path):
    path = listed(tmp_path, [row(0, 1, relevance=[0.5, 0.5]), row(0, 1, scores=[2, 2]), row(0, 1, ranks=[2, 1])])
    rankings, counts = read_rankings(path)
    assert (counts.rows, counts.used, counts.ties, counts.broken) == (3, 1, 2, 0)
    assert rankings[0].relevance == (0, 1)
    # Opposite scorers: each picture wins once.
    path = listed(tmp_path, [row(0, 1, scores=[[1, 2], [2, 1]])])
    assert "all 1 rows are ties (all pictures equally relevant)" in message(path)


def test_what_is_written_is_read(tmp_path):
    rankings = [
        Ranking("a", "first", (png(0), png(1), png(2)), (1.0, 0.5, 0.0), ((3.0, 2.0, 1.0), (9.0, 9.0, -1.0))),
        Ranking("b", "second", (png(3), png(4)), (0.0, 1.0)),
        Ranking("c", "third", (png(0), png(5), png(4)), (0.0, 1.0, 0.25)),
    ]
    path = tmp_path / "rankings.parquet"
    write_rankings_parquet(path, iter(rankings), rows_per_group=2)
    read, counts = read_rankings(path)
    assert counts.used == 3 and pq.read_metadata(path).num_row_groups == 2
    for mine, theirs in zip(read, rankings, strict=True):
        assert (mine.prompt, mine.relevance, mine.scores) == (theirs.prompt, theirs.relevance, theirs.scores)
        assert tuple(map(read_bytes, mine.pictures)) == theirs.pictures
    table = pq.read_table(path)
    assert table.schema.names == ["prompt", "images", "relevance", "scores"]
    assert table.schema.field("images").type == pa.list_(pa.binary())
    turned = dataclasses.replace(read[0], pictures=read[0].pictures[::-1])
    assert fingerprint([turned, *read[1:]]) != fingerprint(read)
    # And once more, out of the file that was read, byte for byte.
    write_rankings_parquet(tmp_path / "again.parquet", read, rows_per_group=2)
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


def test_image_structs_and_captions(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([[{"bytes": png(i), "path": None} for i in range(3)]], pa.list_(struct))
    pq.write_table(pa.table({"caption": ["c"], "images": images, "ranks": [[3, 1, 2]]}), tmp_path / "x.parquet")
    (ranking,), _ = read_rankings(tmp_path / "x.parquet")
    assert ranking.prompt == "c" and ranking.relevance == (0, 1, 0.5)
    assert [read_bytes(picture) for picture in ranking.pictures] == [png(0), png(1), png(2)]


def test_pairs_are_rankings_of_two(tmp_path):
    path = tmp_path / "pairs.parquet"
    write_pairs_parquet(path, list("abc"), [png(i) for i in range(3)], [png(9)] * 3, [1, 0, 0.5])
    rankings, counts = read_rankings(path)
    assert [(ranking.prompt, ranking.relevance) for ranking in rankings] == [("a", (1, 0)), ("b", (1, 0))]
    assert [read_bytes(ranking.pictures[0]) for ranking in rankings] == [png(0), png(9)]
    assert str(counts) == "3 rows: 2 rankings, 1 ties dropped, 0 bad"
    path = listed(tmp_path / "set", [{"prompt": "p", "chosen": "4.png", "rejected": "2.png"}])
    (ranking,), _ = read_rankings(path)
    assert [read_bytes(picture) for picture in ranking.pictures] == [png(4), png(2)]
    assert read_pairs(path)[1].what == "pairs"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(0, relevance=[1]), "ranks 1 picture: a ranking needs at least 2"),
        (row(relevance=[1, 0]), "ranks 0 pictures"),
        (row(0, 1, relevance=[1, 0, 0]), "'relevance' has 3 numbers for 2 pictures"),
        (row(0, 1, relevance=[1.5, 0]), "'relevance' holds 1.5, not a finite number from 0 to 1"),
        (row(0, 1, relevance=[True, False]), "'relevance' holds True"),
        (row(0, 1, relevance="1, 0"), "'relevance' is str, not a list of numbers"),
        (row(0, 1, scores=[float("nan"), 1]), "'scores' holds nan, not a finite number"),
        (row(0, 1, scores=[10**400, 1]), "'scores' holds 1000"),
        (row(0, 1, scores=[[1, 2], [1]]), "'scores' has 1 numbers for 2 pictures"),
        (row(0, 1, ranks=["first", "second"]), "'ranks' holds 'first'"),
        (row(0, 1), "says nothing of its pictures: give one of relevance, scores, ranks"),
        (row(0, 9, relevance=[1, 0]), "'9.png' does not exist"),
        ({"prompt": "p", "images": [1, 2], "relevance": [1, 0]}, "'images[0]' is int, not a file name"),
        ({"prompt": "p", "images": "0.png", "relevance": [1, 0]}, "a list 'images' is missing"),
        ({"prompt": "p", "chosen": "0.png", "rejected": "1.png"}, "a list 'images' is missing; it has 'prompt'"),
        (row(0, 1, prompt=None, relevance=[1, 0]), "the prompt is NoneType"),
        ("{not json", "is not JSON"),
        ("[1, 2]", "is a list"),
    ],
)
def test_bad_rows_are_counted_with_their_reason(tmp_path, bad, reason):
    good = [row(0, 1, prompt=f"p{i}", relevance=[1, 0]) for i in range(99)]
    path = listed(tmp_path, [*good[:50], bad, *good[50:]])
    rankings, counts = read_rankings(path)
    assert len(rankings) == 99 and counts.broken == 1 and counts.bad_rows[0].row == "set.jsonl:51"
    assert reason in counts.bad_rows[0].reason
    said = message(path, max_bad_fraction=0.005)
    assert "1 of 100 rows are bad" in said and "set.jsonl:51" in said and "raise max_bad_fraction" in said


def test_no_path_leaves_the_folder(tmp_path):
    assert "leads outside" in message(listed(tmp_path, [row(0, "../x", relevance=[1, 0])]))


def test_missing_columns_and_files(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "images": [[png(0), png(1)]], "relevence": [[1.0, 0.0]]}), path)
    assert "column 'relevance' is missing" in message(path) and "did you mean 'relevence'" in message(path)
    assert "no such file or folder; give parquet or .jsonl with prompt, images" in message(tmp_path / "absent")
    write_rankings_parquet(tmp_path / "empty.parquet", [])
    assert "holds no rows" in message(tmp_path / "empty.parquet")


def test_rankings_beside_pairs_are_not_guessed(tmp_path):
    write_rankings_parquet(tmp_path / "rankings.parquet", [Ranking("", "p", (png(0), png(1)), (1.0, 0.0))])
    assert len(read_rankings(tmp_path)[0]) == 1
    write_pairs_parquet(tmp_path / "pairs.parquet", ["p"], [png(0)], [png(1)], [1])
    assert "holds rankings (rankings.parquet) and pairs (pairs.parquet); name the file" in message(tmp_path)


class Encoders:
    """A model whose latents are the picture's mean colour, and which counts what it encodes."""

    pictures = 0

    def fingerprint(self):
        return "fake"

    def latent_shape(self, resolution=None):
        return (3, 1, 1)

    @property
    def empty_text(self):
        return torch.zeros(1, 1, 2)

    def encode_text(self, prompts):
        return torch.stack([torch.full((1, 2), float(len(prompt))) for prompt in prompts])

    def encode_images(self, images, noise):
        self.pictures += len(images)
        return images.mean((2, 3), keepdim=True)


def picture(i):
    return encode_png(rng.normal((3, SIZE, SIZE), 0, "picture", i).sigmoid())


def ranking(number, pictures, relevance=None):
    shares = relevance or [1 - i / (len(pictures) - 1) for i in range(len(pictures))]
    return Ranking(f"set:{number}", "p" * number, tuple(map(picture, pictures)), tuple(shares))


def test_the_cache_holds_k_pictures_a_row_each_encoded_once(tmp_path):
    rankings = [ranking(1, [0, 1, 2]), ranking(2, [2, 3, 0]), ranking(3, [4, 1, 3])]
    model = Encoders()
    cache = build_cache(model, rankings, tmp_path, EncodingSettings(SIZE, pairs_per_shard=2), progress=False)
    latents, text = cache.batch([2, 1])
    assert latents.shape == (2, 3, 3, 1, 1) and cache.lengths == [3, 3, 3]
    assert model.pictures == cache.pictures == 5
    for row, places in zip(latents, ([4, 1, 3], [2, 3, 0]), strict=True):
        expected = torch.stack([load_picture(picture(i), SIZE).mean((1, 2)) for i in places])
        assert torch.allclose(row.flatten(1), expected, atol=1e-6)
    assert text[:, 0, 0].tolist() == [3, 2]
    # Other labels on the same pictures are the same encodings; other pictures are not.
    relabelled = [ranking(1, [0, 1, 2], [0.0, 1.0, 0.5]), *rankings[1:]]
    assert fingerprint(relabelled) == fingerprint(rankings) != fingerprint([ranking(1, [1, 0, 2]), *rankings[1:]])


def test_a_batch_of_several_lengths_is_refused(tmp_path):
    cache = build_cache(
        Encoders(), [ranking(1, [0, 1, 2]), ranking(2, [3, 4])], tmp_path, EncodingSettings(SIZE), progress=False
    )
    assert cache.lengths == [3, 2] and cache.batch([1])[0].shape[1] == 2
    with pytest.raises(ValueError, match="rankings of a batch must have one K, not 2 and 3"):
        cache.batch([0, 1])


def test_broken_pictures_of_a_ranking_are_named(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "images": [[picture(0), picture(1)], [picture(2)], [picture(3), picture(4)[:100]]],
            "relevance": [[1.0, 0.0]] * 3,
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    rankings, _ = read_rankings(tmp_path / "x.parquet")
    cache = build_cache(
        Encoders(), rankings, tmp_path / "cache", EncodingSettings(SIZE), max_bad_fraction=1, progress=False
    )
    assert cache.kept == [0] and cache.bad == 2
    reasons = [json.loads(line)["reason"] for line in (cache.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert "picture 0 cannot be read (x.parquet row 1: images holds 1, not the 2 pictures" in reasons[0]
    assert reasons[1].startswith("picture 1 cannot be decoded")
    with pytest.raises(DataError, match="no ranking has all its good pictures"):
        build_cache(
            Encoders(), rankings[1:], tmp_path / "none", EncodingSettings(SIZE), max_bad_fraction=1, progress=False
        )
