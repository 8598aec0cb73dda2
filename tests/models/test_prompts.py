"""Long prompts, weights of words and clip skip, against hand arithmetic and text encoders with fewer layers."""

import copy
import json
from functools import partial

import pytest
import torch
from helpers_machine import assert_rounded
from helpers_sdxl import POOLED, TOKENS

from diffusion_align import cli
from diffusion_align.commands.data.long_captions import describe_long_captions, opposite_pairs
from diffusion_align.data import Pair
from diffusion_align.data.images import encode_png
from diffusion_align.models.prompts.chunks import chunks_of, joined, tokens_of, weighed
from diffusion_align.models.prompts.reading import Reading
from diffusion_align.models.prompts.token_limit import cut_captions, kept_tokens
from diffusion_align.models.prompts.weighted import words_of

LONG = " ".join(["a small red circle above two blue squares on a gray background"] * 16)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a ((red)) cat", [("a ", 1), ("red", 1.21), (" cat", 1)]),
        ("a (red:1.5) cat", [("a ", 1), ("red", 1.5), (" cat", 1)]),
        ("(a (red:1.5) cat:0.5)", [("a ", 0.5), ("red", 0.75), (" cat", 0.5)]),
        ("[red] cat", [("red", 1 / 1.1), (" cat", 1)]),
        ("[(red)] cat", [("red cat", 1)]),
        (r"a \(red\) cat", [("a (red) cat", 1)]),
        ("red) cat", [("red) cat", 1)]),
        ("a (red cat", [("a ", 1), ("red cat", 1.1)]),
        ("a: cat :1.2", [("a: cat :1.2", 1)]),
        ("red :1.2) cat", [("red :1.2) cat", 1)]),
        ("a BREAK (b) BREAKER", [("a", 1), None, ("b", 1.1), (" BREAKER", 1)]),
        ("(red:-1)", [("red", -1)]),
        ("([red)]", [("red)", 1.1 / 1.1)]),
        ("", []),
        ("()", []),
    ],
)
def test_weights_of_words(prompt, expected):
    found = words_of(prompt)
    assert [part and part[0] for part in found] == [part and part[0] for part in expected]
    assert [part and part[1] for part in found if part] == pytest.approx([part[1] for part in expected if part])


@pytest.mark.parametrize(
    "prompt",
    ["a <lora:style:0.8>", "[red:blue:0.5] cat", "[red:10] cat", "[red::3]", "[red|blue] cat", "cat AND dog"],
)
def test_syntax_that_has_no_single_encoding_is_refused_and_plain_reads_it(model, prompt):
    with pytest.raises(ValueError, match="no single encoding: take it out, or .* --prompt_syntax plain"):
        words_of(prompt)
    model.reading = Reading()
    assert model.encode_text([prompt]).isfinite().all()


def text_tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def test_chunks_hold_every_token_once_and_are_framed_as_the_tokenizer_frames(sdxl):
    for tokenizer in (sdxl.tokenizer, sdxl.second.tokenizer):  # they pad with different tokens
        size, ids = tokenizer.model_max_length - 2, text_tokens(tokenizer, LONG)
        count = -(-len(ids) // size)
        assert count > 2
        tokens = tokens_of(tokenizer, [LONG, "a circle", ""], Reading("chunk", count))
        assert tokens.ids.shape == (3, count, size + 2) and bool((tokens.weights == 1).all())
        assert tokens.ids[0, :, 1:-1].flatten().tolist()[: len(ids)] == ids
        plain = tokenizer(["a circle", "", ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(tokens.ids[1:, 0], plain[:2]) and torch.equal(tokens.ids[1:, 1], plain[1:])
        by_one = tokens_of(tokenizer, [LONG, "a circle"], Reading("chunk", 1, "a1111"))
        usual = tokens_of(tokenizer, [LONG, "a circle"])
        assert torch.equal(by_one.ids, usual.ids)  # neither commas nor brackets: the same cut


def test_a_chunk_ends_at_a_comma_that_is_near(model):
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.model_max_length = 77
    size, (comma,) = 75, text_tokens(tokenizer, ",")
    (word,) = text_tokens(tokenizer, "circle")
    for back, moved in ((1, True), (19, True), (20, False)):
        prompt = " ".join(["circle"] * (size - back - 1) + [","] + ["circle"] * (back + 5))
        first, second = ([i for i, _ in chunk] for chunk in chunks_of(tokenizer, prompt, "a1111"))
        assert first == [word] * (size - back - 1) + [comma] + [word] * (0 if moved else back)
        assert second == [word] * (back + 5 if moved else 5)
    full = " ".join(["circle"] * size + [", circle"])
    assert [i for i, _ in chunks_of(tokenizer, full, "a1111")[1]] == [comma, word]
    assert [len(c) for c in chunks_of(tokenizer, "circle BREAK circle circle BREAK", "a1111")] == [1, 2]


def test_weights_go_with_their_tokens(model):
    tokens = tokens_of(model.tokenizer, ["a (red circle:1.5) cat", "circle"], Reading("chunk", 2, "a1111"))
    count = len(text_tokens(model.tokenizer, "red circle"))
    weights = tokens.weights[0, 0].tolist()
    first = 1 + len(text_tokens(model.tokenizer, "a"))
    assert weights[first : first + count] == [1.5] * count
    assert weights[:first] == [1] * first and set(weights[first + count :]) == {1}
    assert bool((tokens.weights[1] == 1).all()) and bool((tokens.weights[0, 1] == 1).all())


def test_weighed_states_keep_their_mean():
    states = torch.arange(1.0, 13).double().view(2, 2, 3)
    weights = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    found = weighed(states, weights, True)
    # by hand: 2 4 6 | 4 5 6 has the mean 4.5, and 1 2 3 | 4 5 6 has 3.5
    by_hand = torch.tensor([[2.0, 4, 6], [4, 5, 6]]).double() * 3.5 / 4.5
    torch.testing.assert_close(found[0], by_hand)
    assert torch.equal(found[1], states[1])
    assert weighed(states, weights, False).tolist() == [[[2, 4, 6], [4, 5, 6]], states[1].tolist()]
    balanced = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    with pytest.raises(ValueError, match="nearly 0.* a1111_no_norm"):
        weighed(balanced, weights[:1], True)
    assert torch.equal(weighed(balanced, weights[1:], True), balanced)


def test_states_of_chunks_put_together_by_hand():
    states = torch.arange(24.0).view(4, 3, 2)  # two prompts of two chunks, three tokens each
    assert torch.equal(joined(states, 2, Reading("chunk", 2))[1], states[2:].flatten(0, 1))
    kohya = joined(states, 2, Reading("chunk_kohya", 2))
    assert kohya[0].tolist() == [
        states[0, 0].tolist(),
        states[0, 1].tolist(),
        states[1, 1].tolist(),
        states[1, 2].tolist(),
    ]
    assert joined(states, 1, Reading()) is states


def encoded_by_hand(encoder, tokenizer, ids):
    """A chunk of tokens through transformers alone: all outputs."""
    framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    framed += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(framed))
    return encoder(torch.tensor([framed]), output_hidden_states=True)


@torch.no_grad()
def test_a_long_prompt_is_its_chunks_encoded_one_by_one(model, sdxl):
    for some in (model, sdxl):
        size, ids = some.tokenizer.model_max_length - 2, text_tokens(some.tokenizer, LONG)
        some.reading = Reading("chunk", 3)
        pieces = [ids[i * size : (i + 1) * size] for i in range(3)]
        ours = some.encode_text([LONG, "a circle"])
        if some.second is None:
            by_hand = [encoded_by_hand(some.text_encoder, some.tokenizer, piece).last_hidden_state for piece in pieces]
            assert_rounded(ours[:1], torch.cat(by_hand, 1), depth=50)
            continue
        outputs = [
            [encoded_by_hand(encoder, tokenizer, piece) for piece in pieces]
            for encoder, tokenizer in (
                (some.text_encoder, some.tokenizer),
                (some.second.text_encoder, some.second.tokenizer),
            )
        ]
        hidden = [torch.cat([output.hidden_states[-2] for output in of], 1) for of in outputs]
        assert ours.shape[1] == 3 * TOKENS + 2
        assert_rounded(ours[:1, :-2], torch.cat(hidden, -1), depth=50)
        assert_rounded(ours[:1, -2, :POOLED], outputs[1][0].text_embeds, depth=50)
        assert some.empty_text.shape == ours[:1].shape


def with_layers(encoder, count):
    """Another text encoder of the same kind, at random, with `count` layers."""
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = count
    with torch.random.fork_rng(devices=[]):
        return type(encoder)(config).eval()


def cut_short(encoder, count):
    """The first `count` layers of it."""
    short = copy.deepcopy(encoder)
    del getattr(short, "text_model", short).encoder.layers[count:]
    return short


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_is_a_text_encoder_with_fewer_layers(model, sdxl, skip):
    prompts = ["a small red circle", ""]
    model.text_encoder = with_layers(model.text_encoder, 4)
    model.reading = Reading(clip_skip=skip)
    tokens = model.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = cut_short(model.text_encoder, 5 - skip)(tokens).last_hidden_state  # with the norm
    assert_rounded(model.encode_text(prompts), expected, depth=50)

    sdxl.text_encoder, sdxl.second.text_encoder = (
        with_layers(e, 4) for e in (sdxl.text_encoder, sdxl.second.text_encoder)
    )
    sdxl.reading = Reading(clip_skip=skip)
    expected = []
    for tokenizer, encoder in ((sdxl.tokenizer, sdxl.text_encoder), (sdxl.second.tokenizer, sdxl.second.text_encoder)):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        expected.append(cut_short(encoder, 4 - skip)(tokens, output_hidden_states=True).hidden_states[-1])
    ours = sdxl.encode_text(prompts)
    assert_rounded(ours[:, :-2], torch.cat(expected, -1), depth=50)
    assert_rounded(ours[:, -2, :POOLED], sdxl.second.text_encoder(tokens).text_embeds, depth=50)
    for some, most in ((model, 4), (sdxl, 3)):
        some.reading = Reading(clip_skip=most + 1)
        with pytest.raises(ValueError, match="skips all 4 layers"):
            some.encode_text(prompts)


@torch.no_grad()
def test_weights_change_the_states_of_their_words_only(model):
    model.text_encoder.final_layer_norm.bias.add_(0.5)  # at random its states have the mean 0, which CLIP's do not
    first = 1 + len(text_tokens(model.tokenizer, "a"))
    words = slice(first, first + len(text_tokens(model.tokenizer, "red")))
    for syntax in ("a1111", "a1111_no_norm"):
        model.reading = Reading("chunk", 1, syntax)
        plain, strong = model.encode_text(["a red circle", "a (red:1.5) circle"])
        expected = plain.double()
        expected[words] *= 1.5
        if syntax == "a1111":
            expected *= plain.double().mean() / expected.mean()
        assert_rounded(strong, expected.float(), depth=200)


def test_long_captions_are_counted_and_what_is_kept_compared(model):
    size = model.tokenizer.model_max_length - 2
    captions = ["circle", "circle " * size, "circle " * (size + 1), "circle " * (2 * size + 1)]
    assert cut_captions([model.tokenizer], captions) == (2, size + 2)
    assert cut_captions([model.tokenizer], captions, Reading("chunk", 2)) == (1, 2 * size + 4)
    assert cut_captions([model.tokenizer], captions, Reading("chunk", 2, "a1111")) == (1, 2 * size + 4)
    kept = [kept_tokens([model.tokenizer], caption) for caption in captions]
    assert kept[1] == kept[2] == kept[3] != kept[0]
    assert kept_tokens([model.tokenizer], captions[2], Reading("chunk", 2)) != kept_tokens(
        [model.tokenizer], captions[1], Reading("chunk", 2)
    )


def test_the_fingerprint_tells_how_prompts_are_read(model):
    usual = model.fingerprint()
    model.reading = Reading("chunk", 3)
    three = model.fingerprint()
    model.reading = Reading("chunk_kohya", 3)
    assert len({usual, three, model.fingerprint()}) == 3
    model.reading = Reading()
    assert model.fingerprint() == usual


@pytest.mark.parametrize(
    "wrong", [("cut",), ("truncate", 2), ("chunk", 0), ("chunk", 1, "sd"), ("chunk", 1, "plain", 0)]
)
def test_impossible_readings_are_refused(wrong):
    with pytest.raises(ValueError):
        Reading(*wrong)


def test_pairs_that_contradict_each_other_once_their_captions_are_cut(model, tmp_path):
    size = model.tokenizer.model_max_length - 2
    long, other = "circle " * size + "red", "circle " * size + "blue"
    one, two = b"one", b"two"
    pairs = [
        Pair("0", long, one, two),
        Pair("1", other, two, one),  # reads as pair 0 and prefers the opposite
        Pair("2", other, one, two),  # agrees with pair 0, contradicts pair 1
        Pair("3", long, two, one, tie=True),
        Pair("4", "circle", two, one),  # another caption
        Pair("5", other, b"three", one),
        Pair("6", other, tmp_path / "missing.png", one),
        Pair("7", "circle", one, two),  # contradicts pair 4, but in its own words
    ]

    def kept(reading):
        return partial(kept_tokens, [model.tokenizer], reading=reading)

    assert opposite_pairs(pairs, kept(Reading())) == 3
    assert opposite_pairs(pairs, kept(Reading("chunk", 2))) == 0
    line = describe_long_captions(6, 8, 77, 3)
    assert "6 of 8 are longer than" in line and line.endswith("; 3 pairs then contradict another of the same pictures")


def train(tmp_path, name, *words):
    argv = ["train", "dpo", "--preset", "tiny", "--output_dir", str(tmp_path / name), "--run_validation", "false"]
    return cli.main([*argv, "--max_train_steps", "2", "--threads", "1", "--max_train_samples", "8", *words])


def test_a_run_is_drawn_and_evaluated_as_it_read_its_prompts(tmp_path, capsys):
    assert train(tmp_path, "long", "--long_prompts", "chunk", "--prompt_chunks", "2") == 0
    assert train(tmp_path, "usual", "--prompt_chunks", "5") == 0  # without effect on what is truncated
    losses = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0]) for run in ("long", "usual")]
    assert losses[0]["loss"] == losses[1]["loss"] and losses[0]["grad_norm"] != losses[1]["grad_norm"]
    prompt = ["--prompt", "a small red circle on a gray background", "--steps", "2", "--threads", "1"]
    for out, words in (("a", []), ("b", ["--long_prompts", "truncate"]), ("c", ["--prompt_chunks", "2"])):
        assert cli.main(["sample", "--run", str(tmp_path / "long"), *prompt, "--out", str(tmp_path / out), *words]) == 0
    facts = [json.loads((tmp_path / out / "samples.json").read_text()) for out in "abc"]
    assert [some.get("prompts") for some in facts] == ["chunk 2, plain, layer 1", None, "chunk 2, plain, layer 1"]
    pictures = [sorted((tmp_path / out).glob("*.png"))[0].read_bytes() for out in "abc"]
    assert pictures[0] == pictures[2] != pictures[1]
    both = [str(tmp_path / "long"), str(tmp_path / "usual")]
    argv = [
        "evaluate",
        *both,
        "--num_prompts",
        "2",
        "--steps",
        "2",
        "--output_dir",
        str(tmp_path / "e"),
        "--threads",
        "1",
    ]
    assert cli.main(argv) == 1
    assert "choose one with --long_prompts" in capsys.readouterr().err
    assert cli.main([*argv, "--long_prompts", "truncate"]) == 0


def test_prompt_syntax_that_cannot_be_read_stops_before_anything_is_encoded(tmp_path, capsys, monkeypatch):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for side in "ab":
        (pairs / f"{side}.png").write_bytes(encode_png(torch.full((3, 64, 64), 0.2 if side == "a" else 0.7)))
    rows = [{"prompt": "a [red:blue:3] circle", "chosen": "a.png", "rejected": "b.png"}]
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "train",
        "dpo",
        "--model",
        "tiny",
        "--train_data_dir",
        str(pairs),
        "--beta_dpo",
        "100",
        "--max_train_steps",
        "1",
    ]
    argv += ["--run_validation", "false", "--output_dir", str(tmp_path / "run"), "--threads", "1"]
    assert cli.main([*argv, "--prompt_syntax", "a1111"]) == 1
    error = capsys.readouterr().err
    assert "no single encoding" in error and "--prompt_syntax plain" in error and "Traceback" not in error
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert cli.main([*argv, "--prompt_syntax", "plain"]) == 0
