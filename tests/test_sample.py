"""The decode loop, the choice of tokens, and the tasks, on tiny random models."""

import dataclasses
import inspect
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import sample
from model import Cache, ModelConfig, Transformer
from vqgan import VQGAN, VQGANConfig

SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
SHAPES = {
    "windows": {"model_type": "qwen2", **SLIDING},
    "rows from a codebook": {"vocab_size": 36, "image_rows": 24, "codebook": (20, 4)},
    "untied": {"model_type": "llama", "vocab_size": 40, "image_rows": 20, "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", **SLIDING, "attn_logit_softcapping": 1.5,
               "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", **SLIDING, "rope_local_base_freq": 50.0},
}
everywhere = pytest.mark.parametrize("name", SHAPES)
PROMPTS, NEGATIVES = [[1, 5, 9], [2], [7, 7, 7, 8, 3, 4], [1, 5, 9]], [[3], [3, 4, 5, 6], [3], [2]]


def tiny(**options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = Transformer(ModelConfig(**sizes | options)).eval()
    if "codebook" in options:
        model.model.embed_tokens.image_rows.start(torch.randn(options["codebook"]))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)     # far from uniform, so that mistakes change the argmax
    return model


# -----------------------------------------------------------------------------------------------------------
# The decode loop

def slowly(model, prompt, n, rows, negative, guidance):
    """Greedy continuation without cache, batch or padding."""
    ids, other = list(prompt), list(negative or [])
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0, -1, slice(*rows)]
        if negative:
            u = model(torch.tensor([other]))[0, -1, slice(*rows)]
            logits = u + guidance * (logits - u)
        ids.append(rows[0] + int(logits.argmax()))
        other.append(ids[-1])
    return ids[len(prompt):]


@pytest.mark.guidance
@everywhere
@torch.no_grad()
def test_guidance_in_a_padded_batch_equals_two_passes_of_each_prompt_alone(name):
    """A position or a window shifts in the cache, rows mix, or a prompt gets another's negative."""
    model = tiny(**SHAPES[name])
    for negatives, scale in (([None] * 4, 1.0), (NEGATIVES, 3.0)):
        out = sample.generate(model, PROMPTS, 7, (10, 50), negatives, scale, temperature=0)
        alone = [slowly(model, p, 7, (10, 50), q, scale) for p, q in zip(PROMPTS, negatives)]
        assert out.tolist() == alone


def draw_twice(model):
    """Greedily, eager and compiled, prompts of two lengths -> programs that the compiler made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompts in (PROMPTS, [p + [6] for p in PROMPTS]):
        args = (model, prompts, 6, (10, 50), NEGATIVES, 3.0, 0)
        assert torch.equal(sample.generate(*args, compile=True), sample.generate(*args))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_steps_draw_the_same_from_one_program(monkeypatch):
    """A number of the host is burned into the program, which repeats a step or is compiled again at each."""
    options = dict(dynamic=False, fullgraph=True, backend="aot_eager")      # quick: all but the kernels
    traced = torch.compile(sample.decode_one, **options)
    monkeypatch.setattr(sample, "compiled", lambda device_type: traced)
    assert draw_twice(tiny(**SHAPES["gemma2"])) == 1


@pytest.mark.slow
@everywhere
def test_compiled_steps_draw_the_same(name):
    """A kernel that computes something else than the eager step."""
    assert draw_twice(tiny(**SHAPES[name])) == 1


def test_only_allowed_rows_are_chosen_and_bad_ranges_are_errors():
    """A word in the middle of a drawing, or rows to choose from that the model does not have."""
    seeded = torch.Generator().manual_seed(0)
    out = sample.generate(tiny(), PROMPTS, 50, (20, 24), temperature=3.0, generator=seeded)
    assert set(out.flatten().tolist()) == {20, 21, 22, 23}
    with pytest.raises(ValueError, match="not within"):
        sample.generate(tiny(), PROMPTS, 1, (20, 61))


def test_a_row_repeats_its_stop_token_and_the_others_go_on():
    """Words behind the end of a caption, or captions cut short as their neighbour has ended."""
    free = sample.generate(tiny(), PROMPTS, 8, temperature=0).tolist()
    stop, wanted = free[0][2], []
    for row in free:
        end = row.index(stop) if stop in row else 8
        wanted.append(row[:end] + [stop] * (8 - end))
    assert wanted[0] == wanted[3] != free[0] and free[1] in wanted
    for rows in (slice(4), slice(1)):           # the latter ends before the eighth
        out = sample.generate(tiny(), PROMPTS[rows], 8, temperature=0, stop={stop})
        assert out.tolist() == wanted[rows]


def test_same_seed_same_draw_in_any_batch_and_another_seed_another_draw():
    """A drawing that cannot be made again, as it was one of a batch, or a random number for all rows."""
    def draw(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample.generate(tiny(), prompts, 6, generator=generators).tolist()
    both = draw([[1, 2], [3, 4, 5]], [7, 8])
    assert both == draw([[1, 2], [3, 4, 5]], [7, 8]) and both[1:] == draw([[3, 4, 5]], [8])
    assert len({row[0] for row in draw([[1, 2]] * 64, range(64))}) > 5
    together = sample.generate(tiny(), [[1, 2]] * 64, 1, generator=torch.Generator().manual_seed(0))
    assert len(together.unique()) > 5


@pytest.mark.top_k_top_p
def test_top_k_and_top_p_keep_what_they_say_and_draw_in_proportion():
    """Unlikely tokens that --top-k or --top-p should keep out, or a draw that favors some of the rest."""
    n, square = 1000, [0.0225, 0.25, 0.0025, 0.09]
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(n, 4)
    for options, wanted in (({}, [0.15, 0.5, 0.05, 0.3]), ({"top_k": 2}, [0, 0.625, 0, 0.375]),
                            ({"top_p": 0.6}, [0, 0.625, 0, 0.375]), ({"top_p": 0.4}, [0, 1, 0, 0]),
                            ({"top_p": 0.6, "top_k": 1}, [0, 1, 0, 0]), ({"temperature": 0}, [0, 1, 0, 0]),
                            ({"temperature": 0.5}, [x / sum(square) for x in square]),
                            ({"temperature": 0.5, "top_p": 0.6}, [0, 1, 0, 0])):
        chosen = sample.choose(logits, torch.arange(n) / n, **options)      # each as often as any other
        assert (chosen.bincount(minlength=4) / n).tolist() == pytest.approx(wanted, abs=0.002), options


# -----------------------------------------------------------------------------------------------------------
# The tasks

@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4,
                              l2_norm=True, patch=8)).eval()
    tokenizer = data.WordTokenizer.learn(["a red circle " * 3, data.DRAW * 3, data.CAPTION * 3])
    vocab = tokenizer.vocab(16)
    model = Transformer(ModelConfig(vocab_size=vocab.image_start, image_rows=20, codebook=(16, 4),
                                    hidden_size=32, intermediate_size=64, num_hidden_layers=1)).eval()
    model.model.embed_tokens.image_rows.start(vqgan.quantize.codebook())
    for name, p in model.named_parameters():
        if "image_rows" not in name:            # else it repeats one token, whatever the prompt
            p.data += 0.1 * torch.randn_like(p)
    return sample.Run(model, vqgan, vocab, tokenizer, (2, 2), {})


def picture(width=16):
    return Image.new("RGB", (width, 16), "red")


def test_the_four_tasks_return_one_result_each(run):
    """Results that depend on their batch or on chance, or tensors in place of pictures and strings."""
    images = sample.text_to_image(run, ["a red circle", "x"], sample.Sampling(seed=3))
    assert [i.size for i in images] == [(16, 16)] * 2
    again = sample.text_to_image(run, ["x"], sample.Sampling(seed=3, batch=1), numbers=[1])[0]
    # The codes are the same; in another batch, the decoder may round them to the next of 256 levels.
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(images[1])).max() <= 1
    seeded = [sample.text_to_image(run, ["x", "x"], sample.Sampling(seed=seed)) for seed in (0, 1)]
    assert len({image.tobytes() for images in seeded for image in images}) == 4
    pictures = [picture(40), Image.new("RGB", (8, 8))]
    for task, *inputs in ((sample.caption, pictures), (sample.answer, pictures, ["what?", "how many?"]),
                          (sample.complete, ["a red", "", "Grüße"])):
        texts = task(run, *inputs, n=9)
        assert [type(text) for text in texts] == [str] * len(inputs[0]) and any(texts)
        assert task(run, *inputs, n=9) == texts and task(run, *(x[1:] for x in inputs), n=9) == texts[1:]


def test_the_choices_of_the_command_line_reach_the_decode_loop(run, tmp_path, monkeypatch):
    """A seed that draws what another one drew, or guidance that is announced and not given."""
    calls, generate = [], sample.generate

    def spy(*args, **options):
        given = inspect.signature(generate).bind(*args, **options).arguments
        calls.append((generate(**given | {"compile": False}).tolist(), given))
        return torch.tensor(calls[-1][0])
    monkeypatch.setattr(sample, "generate", spy)
    monkeypatch.setattr(sample, "load", lambda *_: run)
    drawing = ["t2i", "a red circle", "--out", str(tmp_path / "x.png"), "--guidance", "2.5", "--compile"]
    for argv in (drawing, ["text", "a red", "--n", "4"]):
        for seed in "343":
            sample.main([*argv, "--seed", seed, "--temperature", "1.1", "--top-k", "90", "--top-p", "0.95"])
        (first, given), (other, _), (again, _) = calls[-3:]
        assert first == again != other
        assert [given[name] for name in ("temperature", "top_k", "top_p")] == [1.1, 90, 0.95]
    drawn, written = calls[0][1], calls[-1][1]
    assert (drawn["guidance"], drawn["compile"]) == (2.5, True)
    assert (drawn["allowed"], drawn["n"]) == (run.vocab.image_rows, 4)
    assert drawn["negatives"] == [data.render_t2i(run.vocab, run.tokenizer, None)[0]]
    assert (written["allowed"], written["n"]) == ((0, run.vocab.image_start), 4)
    sample.main(["text", "a red"])
    assert calls[-1][1]["temperature"] == 0


def test_captions_stand_one_a_line_in_the_order_of_the_files(run, tmp_path, monkeypatch, capsys):
    """A caption that a script takes for that of the next picture."""
    monkeypatch.setattr(sample, "load", lambda *_: run)
    monkeypatch.setattr(sample, "caption", lambda run, images, *_: [f"{i.width}\nwide" for i in images])
    files = [str(tmp_path / f"{width}.png") for width in (20, 10)]
    for file, width in zip(files, (20, 10)):
        picture(width).save(file)
    sample.main(["i2t", *files])
    assert capsys.readouterr().out == "20 wide\n10 wide\n"


def test_prompts_come_in_batches_that_the_model_can_read(run, monkeypatch):
    """--batch that bounds drawings and no captions, or positions that training never had."""
    calls, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda model, prompts, n, *rest, **options: (
        calls.append((len(prompts), n)) or generate(model, prompts, 1, *rest, **options)))
    few = dataclasses.replace(run, sampling=sample.Sampling(batch=2))
    sample.caption(few, [picture()] * 5, n=2)
    assert calls == [(2, 2), (2, 2), (1, 2)]
    most, longest = ModelConfig().max_position_embeddings, len(run.tokenizer.encode("a red circle")) + 1
    sample.complete(few, ["a", "a red circle"], n=10_000)
    assert calls[3:] == [(2, most - longest)]
    monkeypatch.setattr(sample, "rows_within", lambda budget, config, slots, itemsize: 3)
    sample.complete(few, ["a"] * 5, n=1)
    list(sample.in_batches(few, [[1]] * 2, 1, None, few.sampling, negatives=[[2]] * 2))     # two rows for each prompt
    assert [size for size, _ in calls[4:]] == [2, 2, 1, 1, 1]
    for task in (sample.text_to_image, sample.complete):
        with pytest.raises(ValueError, match=f"too long.* {most}"):
            task(few, ["a", "a" * most])


def test_a_7b_that_draws_512_pixels_fits_beside_its_weights_into_80_gb():
    """The scores are out of memory, after days of training."""
    gemma = ModelConfig("gemma", 256_000, 8196, hidden_size=3072, intermediate_size=24_576, num_hidden_layers=28,
                        num_attention_heads=16, num_key_value_heads=16, head_dim=256)
    with torch.device("meta"):
        weights = sum(p.numel() for p in Transformer(gemma).parameters()) * 2
    budget, slots = int(80e9) // 4, 1024 + 80
    rows = sample.rows_within(budget, gemma, slots, 2)
    cache = Cache(gemma, rows, slots, device="meta", dtype=torch.bfloat16)
    held = sum(x.nbytes for x in (*cache.k, *cache.v))
    assert 32 <= rows and held <= budget < held * (rows + 1) / rows
    prompts = rows * 1024 * 2 * (3 * gemma.intermediate_size + 6 * gemma.hidden_size)   # an MLP's activations
    pictures = 8 * 4 * 128 * 512 ** 2 * 5                       # eight of them, in the VQGAN's first level
    assert weights + held + prompts + pictures < 80e9


@everywhere
def test_autocast_keeps_its_type_in_the_cache(name):
    """Float32 slots refuse bf16 keys, so evaluation has to run in float32, or training without autocast."""
    model = tiny(**SHAPES[name])
    assert model.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sample.prefill(model, PROMPTS, 1)[0].k[0].dtype == model.dtype == torch.bfloat16
        out = sample.generate(model, PROMPTS, 7, (10, 50), NEGATIVES, 3.0, temperature=0)
    assert out.shape == (4, 7)


def test_sampling_crops_or_pads_pictures_as_training_did(run):
    """--pad that shows the model the whole picture in training, and its centre in sampling."""
    wide = picture(64)
    wide.paste("blue", (0, 0, 16, 16))
    for pad in (False, True):
        seen = run.vqgan.encode(data.to_pixels(data.crop_square(wide, 16, pad)))[0]
        assert torch.equal(sample.encode(dataclasses.replace(run, config={"pad": pad}), [wide])[0], seen)


@pytest.mark.parametrize("config, usual", [({}, sample.Sampling()), ({"code_noise": 0.4}, sample.GREEDY),
                                           ({"init": "gemma", "code_noise": 0.4}, sample.LIQUID)])
def test_how_a_run_was_trained_says_how_it_is_drawn_from(run, config, usual):
    """Drawings full of the noise that --code_noise taught, or a pretrained run without Liquid's guidance."""
    assert dataclasses.replace(run, config=config, sampling=None).sampling == usual


# -----------------------------------------------------------------------------------------------------------
# Scores

def test_losses_do_not_depend_on_what_they_are_batched_with(run):
    """A score that changes with the texts it is padded beside, or that goes to another text."""
    texts = "a", "a red circle and more", "red"
    examples = [data.render_text(run.vocab, run.tokenizer, text) for text in texts]
    sums, counts = sample.losses(run.model, examples)
    for example, total, count in zip(examples, sums, counts):
        alone, n = sample.losses(run.model, [example])
        assert torch.allclose(alone[0], total, atol=1e-4) and n == count


class Exact:
    """A VQGAN with a code for all that a quarter can show; one, `broken`, comes back as the next."""
    config = VQGANConfig(ch=32, ch_mult=(1,), patch=16, n_embed=196)
    broken = -1

    def __init__(self):
        shown = np.concatenate([data.renderings(background, 16)[1] for background in data.BACKGROUNDS])
        self.shown = torch.cat([data.to_pixels(x) for x in shown]).flatten(1)       # (196, 3 * 16 * 16)

    def encode(self, pixels):                                       # (B, 3, 32, 32)
        return torch.cdist(F.pixel_unshuffle(pixels, 16).permute(0, 2, 3, 1), self.shown).argmin(-1)

    def decode(self, codes):                                        # (B, 2, 2)
        return F.pixel_shuffle(self.shown[codes + (codes == self.broken)].permute(0, 3, 1, 2), 16)


class Parrot:
    """A model for which each token takes two bits; what it answers to which prompt is in `answers`."""
    device, dtype, config = torch.device("cpu"), torch.float32, ModelConfig()

    def __init__(self, vocab):
        self.vocab, self.answers = vocab, {}

    def __call__(self, ids, targets):
        return (targets != data.IGNORE) * 2 * math.log(2)

    def learn(self, prompt, whole):
        self.answers[tuple(prompt[0])] = whole[0][len(prompt[0]):]

    def generate(self, prompts, n, *_, **__):
        return torch.tensor([(self.answers[tuple(p)] + [99] * n)[:n] for p in prompts])


def test_every_score_is_what_is_counted_by_hand(monkeypatch):
    """A score inverted, in another unit, or of another task or split: each has its own share of mistakes."""
    val, unseen, train = (data.scenes(n, 0, name, 32, unseen=name == "unseen", edited=n)
                          for name, n in (("val", 20), ("unseen", 4), ("train", 30)))
    texts = [*(c for p in train for c in p.captions), data.DRAW * 3, data.CAPTION * 3]
    tokenizer, vqgan = data.WordTokenizer.learn(texts), Exact()
    vocab = tokenizer.vocab(196)
    model = Parrot(vocab)
    run, common = sample.Run(model, vqgan, vocab, tokenizer, (2, 2), {}), (vocab, tokenizer)
    codes = {p.name: vqgan.encode(data.to_pixels(p.open()))[0] for p in [*val, *unseen]}

    def learn_edit(before, wrong=None):
        (((words, _), (after,)),), seen = before.edits[0], codes[before.name]
        drawn = codes[after.name] if wrong is None else wrong
        prompt, whole = (data.render_dialogue(*common, [([words, seen], reply)])[0] for reply in (None, [drawn]))
        for n in (1, 6):                # from <boi> the codes, and from <eoi> on the end
            model.learn([whole[:len(prompt) + n]], [whole])
    for i, (before, after) in enumerate(zip(val[::2], val[1::2])):      # 2 blank pictures, 3 left as they were
        learn_edit(before, codes[before.name] // 49 * 49 if i < 2 else codes[before.name] if i < 5 else None)
    for i, before in enumerate(unseen[1::2]):
        learn_edit(before, codes[before.name] if i < 3 else None)
    lost = sum(bool({*p.scene.objects} & {*q.scene.objects}) for p, q in zip(val[:4:2], val[1:4:2]))
    for i, (color, shape) in enumerate(data.PAIRS):
        start = f"The color of every {color} {shape} is"
        said = " grey." if i < 6 else f" {color}."
        model.learn(data.render_text(*common, start, False), data.render_text(*common, start + said))
    for pictures, blank, misread, misheard in ((val[::2], 3, 2, 5), (unseen[::2], 1, 2, 4)):    # mistakes
        for i, p in enumerate(pictures):
            seen, words = codes[p.name], p.captions[0]
            drawn = seen // 49 * 49 if i < blank else seen          # the background alone
            model.learn(data.render_t2i(*common, words), data.render_t2i(*common, words, drawn))
            model.learn(data.render_i2t(*common, seen),
                        data.render_i2t(*common, seen, words + " or not" if i < misread else words))
            asked = itertools.chain(*(itertools.chain(*data.questions(p.scene, random.Random(n)).values())
                                      for n in range(200)))        # about all pairs
            for question, answer in [*asked, *((talk[0][0][1], talk[0][1][0]) for talk in p.dialogues)]:
                reply = "no idea" if i < misheard else answer
                model.learn(data.render_dialogue(*common, [([seen, question], None)]),
                            data.render_dialogue(*common, [([seen, question], [reply])]))
    monkeypatch.setattr(sample, "generate", Parrot.generate)
    used = [set(codes[p.name].flatten().tolist()) for p in val[::2]]
    vqgan.broken = min(used[0] - set().union(*used[1:]))            # in one picture alone
    first = val[0].open()
    error = np.asarray(first, float) - data.to_image(vqgan.decode(codes[val[0].name][None]))
    psnr = 10 * math.log10(255 ** 2 / np.square(error).mean())      # a perfect one counts as 100 dB
    objects = [len(p.scene.objects) for p in val[::2]]
    splits = {name: data.Split(pictures, texts) for name, pictures, texts in
              (("train", train, ["aab"]), ("val", val, ["ab", "é"]), ("unseen", unseen, []))}
    scores = sample.score(run, splits)
    assert scores == pytest.approx({
        "n": 20, "reconstruction_psnr": (19 * 100 + psnr) / 20, "codes_used": len(set().union(*used)),
        "reconstruction_exact": 19 / 20, "t2i_exact": 17 / 20, "t2i_objects": sum(objects[3:]) / sum(objects),
        "caption_exact": 18 / 20, "edit_exact": 15 / 20, "edit_unchanged": (20 - lost) / 20, "text_color": 18 / 24,
        "vqa": 15 / 20, "vqa_place": 15 / 20, "vqa_named": 15 / 20, "vqa_exists": 15 / 20,
        "text_bits_per_byte": 2 * (2 + 1 + 2 + 1) / 4,              # an end takes a token, too
        "reconstruction_unseen_combinations": 4 / 4, "t2i_unseen_combinations": 3 / 4,
        "caption_unseen_combinations": 2 / 4, "edit_unseen_combinations": 1 / 4})
    few = data.Split(val[:20:2], texts)             # which cannot be graded
    own = sample.score(run, {"train": splits["train"], "val": few}, 10)
    assert own.keys() == scores.keys() and own["t2i_exact"] is None
    assert (own["n"], own["caption_exact"], own["vqa"], own["edit_exact"]) == (10, 8 / 10, 5 / 10, None)


def test_a_reply_goes_on_behind_its_pictures_and_ends_with_the_turn(monkeypatch):
    """Pictures of a question in another order than asked, or a reply that ends at its first picture or never."""
    first, second = (p.open() for p in data.scenes(2, 0, "x", 32))
    tokenizer, vqgan = data.WordTokenizer([" so", " done"]), Exact()
    run = sample.Run(Parrot(tokenizer.vocab(196)), vqgan, tokenizer.vocab(196), tokenizer, (2, 2), {})
    a, b = sample.encode(run, [first, second])
    asked, said = ["mix", a, "and", b], ["so", b, a, "done"]
    prompt, whole = (data.render_dialogue(run.vocab, tokenizer, [(asked, reply)])[0] for reply in (None, said))
    boi = [i for i, token in enumerate(whole) if token == run.vocab.boi and i >= len(prompt)]
    for end in (len(prompt), *(i + n for i in boi for n in (1, 6))):        # from a <boi>, from an <eoi> on
        run.model.learn([whole[:end]], [whole])
    monkeypatch.setattr(sample, "generate", Parrot.generate)
    content = [{"type": "text", "text": "mix"}, {"type": "image", "image": first},
               {"type": "text", "text": "and"}, {"type": "image", "image": second}]
    words, *images, last = sample.reply(run, [{"role": "user", "content": content}])
    with pytest.raises(ValueError, match="not a user's"):
        sample.reply(run, [])
    assert (words, last) == ("so", "done") and [i.tobytes() for i in images] == [second.tobytes(), first.tobytes()]


def test_a_picture_that_was_begun_keeps_its_rows(run, tmp_path, monkeypatch):
    """Codes of the given half change, the model sees another beginning, or a whole picture is asked for."""
    seen, decode = [], sample.decode
    monkeypatch.setattr(sample, "decode", lambda run, ids: seen.append(ids) or decode(run, ids))
    given, (h, w) = run.vocab.codes_to_ids(sample.encode(run, [picture()])[0]).flatten(), run.grid
    for prompt, rows in itertools.product(("a red circle", None), range(h)):
        sample.text_to_image(run, [prompt, "a"], sample.GREEDY, begin=picture(), rows=rows)
        first = given[:rows * w].tolist()
        asked, other = (data.render_t2i(run.vocab, run.tokenizer, words)[0] + first for words in (prompt, None))
        rest = sample.generate(run.model, [asked], h * w - len(first), run.vocab.image_rows, [other], 1.5, 0)
        assert seen[-1].tolist()[0] == first + rest[0].tolist() and seen[-1][1].tolist()[:len(first)] == first
    with pytest.raises(ValueError, match=f"--rows {h}"):
        sample.text_to_image(run, ["a"], begin=picture(), rows=h)


def test_a_wrong_background_is_no_exact_drawing_and_costs_no_object():
    """A drawing that counts as exact by its objects alone, or objects marked down for their background."""
    wanted = [p.scene for p in data.scenes(4, 0, "x")]
    wrong = next(ground for ground in data.BACKGROUNDS if ground != wanted[0].background)
    images = [data.draw(scene) for scene in (wanted[0]._replace(background=wrong), *wanted[1:])]
    assert sample.score_drawings(images, wanted) == (3 / 4, 1)


def test_questions_too_long_to_ask_are_left_out(run, monkeypatch):
    """Scores, after all the training, that end at a question which training had left out, too."""
    heard, pictures = [], [data.Picture("", picture) for _ in range(4)]
    for p, asked in zip(pictures, [("how?", "so"), None, ("why? " * 1000, "no"), ("who?", "no")]):
        p.ask(asked) if asked else None
    monkeypatch.setattr(sample, "replies", lambda run, asked, n: heard.extend(asked) or [["so"]] * 2)
    assert sample.score_answers(run, pictures) == 1 / 2
    assert heard == [[([pictures[0], "how?"], None)], [([pictures[3], "who?"], None)]]


# -----------------------------------------------------------------------------------------------------------
# Folders

def test_a_missing_run_ends_in_one_sentence():
    """A traceback, or a sentence that does not name what is missing."""
    with pytest.raises(SystemExit, match="nowhere/model.pt: no such file"):
        sample.main(["t2i", "x", "--run", "nowhere"])


def test_a_folder_as_liquid_published_it_draws(tmp_path):
    """Rows taken for other codes or marks, pictures cropped, or a score of data that nobody knows."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4,
                              patch=64))
    torch.save({"config": dataclasses.asdict(vqgan.config), "model": vqgan.state_dict()}, tmp_path / "vq.pt")
    Transformer(ModelConfig("llama", vocab_size=20 + 16, hidden_size=32, intermediate_size=48,
                            num_hidden_layers=1)).save_pretrained(tmp_path, bos_token_id=5, eos_token_id=6)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither nanoliquid.json"):
        sample.load(tmp_path, tmp_path / "vq.pt", "cpu")
    bpe.add_special_tokens(["<boi>", "<eoi>", "<unconditional>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path)
    run = sample.load(tmp_path, tmp_path / "vq.pt", "cpu")
    assert (run.vocab.boi, run.vocab.eoi, run.vocab.uncond, run.vocab.image_rows) == (1, 2, 3, (20, 36))
    assert (run.grid, run.sampling, run.config["pad"]) == ((8, 8), sample.LIQUID, True)
    assert sample.text_to_image(run, ["a"])[0].size == (512, 512)
    with pytest.raises(SystemExit, match="eval needs a run of train.py"):
        sample.main(["eval", "--run", str(tmp_path), "--vqgan", str(tmp_path / "vq.pt"), "--device", "cpu"])


def test_an_export_opens_in_transformers_and_in_ours(run, tmp_path):
    """A from-scratch run that lm-eval cannot read, image rows that come back as words, or another text."""
    transformers = pytest.importorskip("transformers")
    sample.export(run, tmp_path)
    again = sample.load(tmp_path, device="cpu")
    assert (again.vocab, again.grid, again.sampling) == (run.vocab, run.grid, run.sampling)
    assert again.model.config.image_rows == 20
    drawn = [sample.text_to_image(each, ["a red circle"])[0].tobytes() for each in (run, again)]
    assert drawn[0] == drawn[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == run.vocab.eos
    for text in ("a red circle", "Grüße"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        said = theirs.generate(ids, max_new_tokens=9, do_sample=False,     # words alone, as ours
                               suppress_tokens=list(range(run.vocab.image_start, run.vocab.size)))
        said = tokenizer.decode(said[0, ids.shape[1]:], skip_special_tokens=True)
        assert said and [said] == sample.complete(run, [text], n=9) == sample.complete(again, [text], n=9)
