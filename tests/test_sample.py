"""The decode loop, the choice of tokens, and the tasks, on tiny random models."""

import argparse
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import sample
from model import ModelConfig, Transformer
from vqgan import VQGAN, VQGANConfig


SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **SLIDING},
    "qwen3": {},
    "qwen3, rows from a codebook": {"codebook_dim": 4, "codebook_size": 20},
    "gemma": {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"model_type": "gemma2", **SLIDING, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", **SLIDING, "rope_local_base_freq": 50.0},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, **options)).eval()
    if "codebook_size" in options:
        model.model.image_rows.start(torch.randn(options["codebook_size"], options["codebook_dim"]))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)     # far from the uniform start, so that mistakes change the argmax
    return model


PROMPTS, NEGATIVES = [[1, 5, 9], [2], [7, 7, 7, 8, 3, 4], [1, 5, 9]], [[3], [3, 4, 5, 6], [3], [2]]


def slowly(model, prompt, n, rows, negative=None, guidance=1.0):
    """Greedy continuation without cache, batch or padding."""
    ids, other = list(prompt), list(negative or [])
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0, -1, slice(*rows)]
        if negative is not None:
            u = model(torch.tensor([other]))[0, -1, slice(*rows)]
            logits = u + guidance * (logits - u)
        ids.append(rows[0] + int(logits.argmax()))
        other.append(ids[-1])
    return ids[len(prompt):]


@torch.no_grad()
@every_family
def test_cached_padded_batch_equals_each_prompt_alone_without_cache(family):
    """Padding, a window or a position shifts in the cache, or rows of a batch mix."""
    model = tiny(**FAMILIES[family])
    out = sample.generate(model, PROMPTS, 7, (10, 50), temperature=0)
    assert out.tolist() == [slowly(model, p, 7, (10, 50)) for p in PROMPTS]


@torch.no_grad()
@every_family
def test_guidance_in_one_batch_equals_two_separate_passes(family):
    """Prompts and their negatives differ in length: a wrong padding or a wrong pairing shows here."""
    model = tiny(**FAMILIES[family])
    out = sample.generate(model, PROMPTS, 6, (10, 50), NEGATIVES, guidance=3.0, temperature=0)
    assert out.tolist() == [slowly(model, p, 6, (10, 50), q, 3.0) for p, q in zip(PROMPTS, NEGATIVES)]


def draw_twice(model):
    """Greedily, eager and compiled, prompts of two lengths -> programs that the compiler made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompts in (PROMPTS, [p + [6] for p in PROMPTS]):
        args = (model, prompts, 6, (10, 50), NEGATIVES, 3.0, 0)
        assert torch.equal(sample.generate(*args, compile=True), sample.generate(*args))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_steps_draw_the_same_from_one_program(monkeypatch):
    """A number of the host is burned into the program, which then repeats a step, or is compiled again at each."""
    traced = torch.compile(sample.decode_one, dynamic=False, fullgraph=True, backend="aot_eager")   # quick: all but the kernels
    monkeypatch.setattr(sample, "compiled", lambda device_type: traced)
    assert draw_twice(tiny(**FAMILIES["gemma2"])) == 1


@pytest.mark.slow
@every_family
def test_compiled_steps_draw_the_same(family):
    """The same with the kernels, in every family."""
    assert draw_twice(tiny(**FAMILIES[family])) == 1


def test_guidance_of_one_is_unguided():
    """Negatives that change a drawing at a scale that means none."""
    model = tiny()
    args = (model, PROMPTS, 5, (10, 50))
    assert torch.equal(sample.generate(*args, [[3]] * 4, guidance=1.0, temperature=0), sample.generate(*args, temperature=0))


def test_only_allowed_rows_are_chosen_and_bad_ranges_are_errors():
    """A word in the middle of a drawing, or rows to choose from that the model does not have."""
    out = sample.generate(tiny(), PROMPTS, 50, (20, 24), temperature=3.0, generator=torch.Generator().manual_seed(0))
    assert set(out.flatten().tolist()) == {20, 21, 22, 23}
    with pytest.raises(ValueError, match="not within"):
        sample.generate(tiny(), PROMPTS, 1, (20, 61))


def test_a_row_repeats_its_stop_token_and_the_others_go_on():
    """Words behind the end of a caption, or captions cut short as their neighbour has ended."""
    model = tiny()
    free = sample.generate(model, PROMPTS, 8, temperature=0)
    stop = int(free[0, 2])
    out = sample.generate(model, PROMPTS, 8, temperature=0, stop={stop})
    for row, want in zip(out.tolist(), free.tolist()):
        end = want.index(stop) if stop in want else 8
        assert row == want[:end] + [stop] * (8 - end)


def test_rows_of_one_prompt_differ_from_their_first_token_on():
    """A draw that is broadcast over the batch would make all rows equal."""
    out = sample.generate(tiny(), [[1, 2]] * 64, 2, generator=torch.Generator().manual_seed(0))
    assert len(set(out[:, 0].tolist())) > 5


def test_same_seed_same_draw_in_any_batch():
    """A drawing that cannot be made again, as it was one of a batch."""
    def draw(prompts, seeds):
        return sample.generate(tiny(), prompts, 6, generator=[torch.Generator().manual_seed(s) for s in seeds]).tolist()
    both = draw([[1, 2], [3, 4, 5]], [7, 8])
    assert both == draw([[1, 2], [3, 4, 5]], [7, 8]) and both[1:] == draw([[3, 4, 5]], [8])


def test_top_k_and_top_p_keep_what_they_say_and_draw_in_proportion():
    """Unlikely tokens that --top-k or --top-p should have kept out, or a draw that favors some of the rest."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)
    def shares(**options):
        chosen = sample.choose(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)), **options)
        return chosen.bincount(minlength=4) / len(chosen)
    assert torch.allclose(shares(), logits[0].exp(), atol=0.02)
    assert torch.allclose(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(shares(top_p=0.4), torch.tensor([1.0, 0, 0, 0]))
    assert torch.equal(sample.choose(logits, None, temperature=0), torch.zeros(20_000, dtype=torch.long))


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4, l2_norm=True,
                              patch=8)).eval()
    tokenizer = data.WordTokenizer.learn(["a red circle " * 3, data.DRAW * 3, data.CAPTION * 3])
    vocab = tokenizer.vocab(16)
    model = Transformer(ModelConfig(vocab_size=vocab.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)     # else it repeats one token, whatever the prompt
    return sample.Run(model, vqgan, vocab, tokenizer, (2, 2), False, {})


def test_the_four_tasks_return_one_result_each(run):
    """Results that depend on their batch or on chance, or tensors where a user expects pictures and strings."""
    images = sample.text_to_image(run, ["a red circle", "x"], sample.Sampling(seed=3))
    assert [i.size for i in images] == [(16, 16)] * 2
    again = sample.text_to_image(run, ["x"], sample.Sampling(seed=3, batch=1), numbers=[1])[0]
    # the same seed and number draw the same codes in another batch, which the decoder may round to another level of 256
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(images[1])).max() <= 1
    pictures = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (8, 8))]
    for task, *inputs in ((sample.caption, pictures), (sample.answer, pictures, ["what?", "how many?"]),
                          (sample.complete, ["a red", "", "Grüße"])):
        texts = task(run, *inputs, n=9)
        assert [type(text) for text in texts] == [str] * len(inputs[0]) and any(texts)
        assert task(run, *inputs, n=9) == texts and task(run, *(x[1:] for x in inputs), n=9) == texts[1:]


def test_the_choices_of_the_command_line_reach_the_decode_loop(run, tmp_path, monkeypatch):
    """A seed that draws what another one drew, or guidance that is announced and not given."""
    calls, generate = [], sample.generate

    def spy(*args, **options):
        ids = generate(*args, **options)
        calls.append((ids.tolist(), inspect.signature(generate).bind(*args, **options).arguments))
        return ids
    monkeypatch.setattr(sample, "generate", spy)
    monkeypatch.setattr(sample, "load", lambda *_: run)
    drawing = ["t2i", "a red circle", "--out", str(tmp_path / "x.png"), "--guidance", "2.5"]
    for argv in (drawing, ["text", "a red", "--n", "4"]):
        for seed in "343":
            sample.main([*argv, "--seed", seed, "--temperature", "1.1", "--top-k", "90", "--top-p", "0.95"])
        (first, given), (other, _), (again, _) = calls[-3:]
        assert first == again != other
        assert [given[name] for name in ("temperature", "top_k", "top_p")] == [1.1, 90, 0.95]
    drawn = calls[0][1]
    assert drawn["guidance"] == 2.5 and drawn["allowed"] == run.vocab.image_rows
    assert drawn["negatives"] == [data.render_t2i(run.vocab, run.tokenizer, None)[0]]
    sample.main(["text", "a red"])
    assert calls[-1][1]["temperature"] == 0


def test_no_text_runs_past_what_the_model_reads(run, monkeypatch):
    """Gibberish, in silence, at positions that training never had."""
    asked, longest = [], len(data.render_text(run.vocab, run.tokenizer, "a red circle", ended=False)[0])
    monkeypatch.setattr(sample, "generate", lambda model, prompts, n, *_, **__: asked.append(n) or torch.zeros(2, n, dtype=torch.long))
    sample.complete(run, ["a", "a red circle"], n=10_000)
    assert asked == [run.model.config.max_position_embeddings - longest]


def test_losses_do_not_depend_on_what_they_are_batched_with(run):
    """A score that changes with the texts it is padded beside, or that goes to another text."""
    examples = [data.render_text(run.vocab, run.tokenizer, text) for text in ("a", "a red circle and more", "red")]
    sums, counts = sample.losses(run.model, examples)
    for example, total, count in zip(examples, sums, counts):
        alone, n = sample.losses(run.model, [example])
        assert torch.allclose(alone[0], total, atol=1e-4) and n == count


def test_scores_see_what_is_wrong():
    """A wrong background or missing shapes that count as drawn, or objects marked down for their background."""
    wanted = [data.grade(p.open()) for p in data.scenes(20, 0, "x")]
    images = [data.draw(s) for s in wanted]
    assert sample.score_drawings(images, wanted) == (1.0, 1.0)
    images[0] = data.draw(wanted[0]._replace(background="navy" if wanted[0].background != "navy" else "pink"))
    assert sample.score_drawings(images, wanted) == (0.95, 1.0)
    images[1] = data.draw(data.Scene(wanted[1].background, ()))
    exact, objects = sample.score_drawings(images, wanted)
    assert exact == 0.9 and objects < 1


class Exact:
    """A VQGAN with a code for all that a quarter of a scene can show; one, `broken`, comes back as the next."""
    config = VQGANConfig(ch=32, ch_mult=(1,), patch=16, n_embed=196)
    broken = -1

    def __init__(self):
        shown = np.concatenate([data.renderings(background, 16)[1] for background in data.BACKGROUNDS])
        self.shown = torch.cat([data.to_pixels(x) for x in shown]).flatten(1)       # (196, 3 * 16 * 16)

    def encode(self, pixels):                                       # (B, 3, 32, 32)
        return torch.cdist(F.pixel_unshuffle(pixels, 16).permute(0, 2, 3, 1), self.shown).argmin(-1)

    def decode(self, codes):                                        # (B, 2, 2)
        return F.pixel_shuffle(self.shown[codes + (codes == self.broken)].permute(0, 3, 1, 2), 16)


class Believer:
    """A model for which a token takes one bit where it believes the text, else two; what it says is in `answers`."""
    device, config = torch.device("cpu"), ModelConfig()

    def __init__(self, vocab, tokenizer, believed):
        self.vocab, self.tokenizer, self.believed, self.answers = vocab, tokenizer, believed, {}

    def believes(self, ids):
        return torch.tensor([[self.tokenizer.decode([i for i in row if i < self.vocab.image_start]) in self.believed]
                             for row in ids.tolist()])              # (B, 1)

    def __call__(self, ids, targets=None):
        if targets is not None:
            return (targets != data.IGNORE) * (2 - self.believes(ids).float()) * math.log(2)
        wrong = (ids == self.vocab.boi) & ~self.believes(ids)       # the first code of what it does not believe
        first, past_last = self.vocab.image_rows
        guess = ids.roll(-1, 1) + wrong
        return F.one_hot(guess.where(guess < past_last, first), self.vocab.size).float()

    def learn(self, prompt, whole):
        self.answers[tuple(prompt[0])] = whole[0][len(prompt[0]):]

    def generate(self, prompts, n, *_, **__):
        return torch.tensor([(self.answers[tuple(p)] + [self.vocab.eos] * n)[:n] for p in prompts])


def test_every_score_is_what_is_counted_by_hand(monkeypatch):
    """A score that is inverted, in another unit, or from another task or split: each has its own share of mistakes."""
    val, unseen, train = (data.scenes(n, 0, name, 32, unseen=name == "unseen")
                          for name, n in (("val", 20), ("unseen", 4), ("train", 30)))
    tokenizer = data.WordTokenizer.learn([*(c for p in train for c in p.captions), data.DRAW * 3, data.CAPTION * 3])
    vocab, vqgan, ends = tokenizer.vocab(196), Exact(), list(data.CORNERS.values())
    believed = {p.captions[0] + data.DRAW for p in train}
    for i, (color, shape) in enumerate(data.PAIRS):                 # of 24, it is wrong about 6
        believed.add(f"Any {color} {shape} has {ends[(list(data.CORNERS).index(shape) + (i < 6)) % 4]}.")
    model = Believer(vocab, tokenizer, believed)
    run, common = sample.Run(model, vqgan, vocab, tokenizer, (2, 2), False, {}), (vocab, tokenizer)
    codes = {p.name: vqgan.encode(data.to_pixels(p.open()))[0] for p in [*val, *unseen]}
    for pictures, blank, misread, misheard in ((val, 3, 2, 5), (unseen, 1, 2, 4)):      # mistakes in the first so many
        for i, p in enumerate(pictures):
            seen, words, (question, answer) = codes[p.name], p.captions[0], p.talks[i % len(p.talks)][0]
            model.learn(data.render_t2i(*common, words),
                        data.render_t2i(*common, words, seen // 49 * 49 if i < blank else seen))    # background alone
            model.learn(data.render_i2t(*common, seen),
                        data.render_i2t(*common, seen, words + " or not" if i < misread else words))
            model.learn(data.render_vqa(*common, seen, [(question, None)]),
                        data.render_vqa(*common, seen, [(question, "no idea" if i < misheard else answer)]))
    monkeypatch.setattr(sample, "generate", Believer.generate)
    used = [set(codes[p.name].flatten().tolist()) for p in [*val, *unseen]]
    vqgan.broken = min(used[0] - set().union(*used[1:]))            # in one picture alone
    first = val[0].open()
    error = np.square(np.asarray(first, float) - data.to_image(vqgan.decode(codes[val[0].name][None]))).mean()
    objects = [len(p.open.args[0].objects) for p in val]
    splits = {name: data.Split(pictures, texts) for name, pictures, texts in
              (("train", train, ["aab"]), ("val", val, ["ab", "é"]), ("unseen", unseen, []))}
    scores = sample.evaluate(run, splits)
    majority = scores.pop("vqa_majority")
    assert 0 < majority < 1 and majority == sample.score_answers(run, val, train, 20)[1]
    assert scores == pytest.approx({
        "n": 20, "reconstruction_exact": 19 / 20, "codes_used": len(set().union(*used[:20])),
        "reconstruction_psnr": (19 * 100 + 10 * math.log10(255 ** 2 / error)) / 20,     # a perfect one counts as 100 dB
        "t2i_code_accuracy": 3 / 4, "t2i_code_accuracy_train": 1, "t2i_exact": 17 / 20,
        "t2i_objects": sum(objects[3:]) / sum(objects), "caption_exact": 18 / 20, "vqa": 15 / 20,
        "text_bits_per_byte": 2 * (2 + 1 + 2 + 1) / 4, "text_cloze": 18 / 24,           # an end takes a token, too
        "text_bits_per_byte_unigram": -math.log2(3 / 259 * 2 / 259 * 1 / 259 * 1 / 259) / 4,
        "reconstruction_unseen_combinations": 4 / 4, "t2i_unseen_combinations": 3 / 4,
        "caption_unseen_combinations": 2 / 4})
    own = sample.evaluate(run, {name: splits[name] for name in ("train", "val")}, 10)   # pictures that cannot be graded
    assert own.keys() - {"vqa_majority"} == scores.keys() and own["t2i_exact"] is own["text_cloze"] is None
    assert (own["n"], own["caption_exact"], own["vqa"]) == (10, 8 / 10, 5 / 10)


def test_answers_stand_beside_those_of_always_giving_the_most_common_one(run, monkeypatch):
    """A majority that is taken over all questions, or over the answers that it is compared with."""
    def asked(*talks):
        return [data.Picture("", lambda: Image.new("RGB", (16, 16)), [], [[talk]] * bool(talk)) for talk in talks]
    train = asked(("how?", "so"), ("how?", "so"), ("how?", "no"), ("why?", "no"), ("why?", "no"))
    split = asked(("how?", "so"), None, ("how?", "no"), ("how?", "so"), ("who?", "no"), ("beyond the limit?", "no"))
    heard, said = [], ["so", "so", "x", "x"]
    monkeypatch.setattr(sample, "answer", lambda run, images, questions: heard.extend(questions) or said)
    assert sample.score_answers(run, split, train, 4) == (1 / 4, 3 / 4)     # to who?, the majority says no
    assert heard == ["how?", "how?", "how?", "who?"]
    assert sample.score_answers(run, asked(None, ("why? " * 1000, "no")), train, 4) == (None, None)     # too long to ask


def test_a_missing_run_ends_in_one_sentence():
    """A traceback, or a sentence that does not name what is missing."""
    with pytest.raises(SystemExit, match="nowhere/model.pt: no such file"):
        sample.main(["t2i", "x", "--run", "nowhere"])


def test_a_folder_as_liquid_published_it_draws(tmp_path):
    """Weights without our layout: the last rows are codes, pictures are padded squares of 512 pixels."""
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4, patch=64))
    torch.save({"config": dataclasses.asdict(vqgan.config), "model": vqgan.state_dict()}, tmp_path / "vqgan.pt")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    bpe.add_special_tokens(["<boi>", "<eoi>", "<unconditional>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    Transformer(ModelConfig("llama", 20 + 16, 32, 48, 1, 2, 1, 16)).save_pretrained(tmp_path, bos_token_id=5, eos_token_id=6)
    run = sample.load(tmp_path, tmp_path / "vqgan.pt", "cpu")
    assert (run.vocab.image_rows, run.grid, run.pad, run.sampling) == ((20, 36), (8, 8), True, sample.LIQUID)
    assert sample.text_to_image(run, ["a"])[0].size == (512, 512)


def test_sampling_fits_pictures_as_training_did(run):
    """--pad that shows the model the whole picture in training, and its centre in sampling."""
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste("blue", (0, 0, 16, 16))
    for pad in (False, True):
        seen = run.vqgan.encode(data.to_pixels(data.fit(wide, 16, pad)))[0]
        assert torch.equal(sample.encode(dataclasses.replace(run, pad=pad), [wide])[0], seen)


def test_two_pictures_do_not_share_a_caption_file(run, tmp_path):
    """A caption that is overwritten by that of a picture of the same name and another suffix."""
    for name in ("a.png", "b.png", "a.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    args = argparse.Namespace(picture=str(tmp_path), save_dir=str(tmp_path / "captions"), n=3)
    with pytest.raises(ValueError, match="2 pictures in it would share the caption .*a.txt"):
        sample.caption_command(run, args, sample.GREEDY)


def test_scoring_keeps_to_its_batch(run, monkeypatch):
    """--batch that bounds drawings and leaves memory to what is encoded, captioned and asked."""
    sizes, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda model, prompts, *a, **k: sizes.append(len(prompts)) or generate(model, prompts, *a, **k))
    few = dataclasses.replace(run, sampling=dataclasses.replace(sample.GREEDY, batch=2))
    sample.caption(few, [Image.new("RGB", (16, 16))] * 5, n=2)
    assert sizes == [2, 2, 1]


def test_how_a_run_was_trained_says_how_it_is_drawn_from(run):
    """Drawings full of the noise that --code_noise taught, or a pretrained run drawn without Liquid's guidance."""
    for config, usual in (({}, sample.Sampling()), ({"code_noise": 0.4}, sample.GREEDY), ({"init": "gemma"}, sample.LIQUID)):
        assert dataclasses.replace(run, config=config, sampling=None).sampling == usual
