"""Between files and ids: scenes, vocabulary, tokenizer, templates, pictures, sources, shards, loader."""

import io
import itertools
import json
import pickle
import random
import re
import struct
import tarfile
import threading
import time
import zlib
from collections import Counter
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import IGNORE, Loader, Object, Picture, Scene, Vocab, WordTokenizer

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes

def random_scenes(n, unseen=False):
    return [data.random_scene(random.Random(i), unseen=unseen) for i in range(n)]


@pytest.mark.parametrize("side", [64, 32])
@pytest.mark.parametrize("unseen", [False, True])
def test_a_perfect_drawing_gets_a_perfect_grade(side, unseen):
    """Two scenes that look alike to the grader, so that a flawless drawing can lose."""
    for scene in random_scenes(100, unseen):
        image = data.draw(scene, side)
        assert image.size == (side, side) and data.grade(image) == scene


def test_grade_forgives_small_errors_of_a_tokenizer():
    """A right drawing that counts as wrong for the grain that a tokenizer leaves on it."""
    rng = np.random.default_rng(0)
    for scene in random_scenes(10):
        noisy = np.asarray(data.draw(scene), np.float32) + rng.normal(0, 20, (64, 64, 3))
        assert data.grade(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))) == scene


def test_every_phrasing_of_a_scene_is_read_back():
    """A right caption that scores nothing for its phrasing, or a phrasing that never comes."""
    openings = set()
    for i, scene in enumerate(random_scenes(200) + random_scenes(100, unseen=True)):
        for k in range(6):
            caption = data.describe(scene, random.Random(f"{i}/{k}"))
            assert data.read_description(caption) == scene, caption
            openings.add((" at the " in caption, caption.startswith("on a"), caption.endswith("background")))
    assert len(openings) == 3


@pytest.mark.parametrize("caption", [
    "", "hello", "a white background", "on a white background",
    "a small red circle on a white background",                                                     # no place
    "a small red square and a large blue star at the top left on a white background",               # one without a place
    "a small red square at the top left",                                                           # no background
    "a small red square at the top left on a white background on a navy background",                # two
    "a small red square at the top left and a large blue star at the top left on a pink background",    # one place twice
    "a small red square at the center on a white background",
    "a small red square at the top left and a huge thing at the top right on a white background",
    "a small red square at the top left on a brown background",
    "a small square at the top left on a white background",
    "not a small red square at the top left on a white background"])
def test_a_caption_that_does_not_name_a_scene_scores_nothing(caption):
    """Half a description, a contradiction or a denial that is scored as a scene."""
    assert data.read_description(caption) is None


@pytest.mark.parametrize("count", [0, 3, 12])
def test_withheld_combinations_never_reach_training(count):
    """A score of composition on pairs that a caption, a question or a sentence gave away."""
    withheld, splits = data.PAIRS[:count], data.built_in(0, withheld=count, train=400, val=50, unseen=50)

    def names_one(text):
        return any(re.search(rf"\b{color} {shape}\b", text) for color, shape in withheld)
    assert len(set(data.PAIRS)) == 24
    for p in splits["train"].pictures + splits["val"].pictures:
        assert not any((o.color, o.shape) in withheld for o in p.open.args[0].objects)
        for text in [*p.captions, *itertools.chain(*itertools.chain(*p.talks))]:
            assert not names_one(text), text
    assert not any(map(names_one, splits["train"].texts))
    assert not any(names_one(data.statement(random.Random(i), count)) for i in range(2000))
    assert len(splits["unseen"].pictures) == 50 * (count > 0)
    for p in splits["unseen"].pictures:
        assert sum((o.color, o.shape) in withheld for o in p.open.args[0].objects) == 1
        assert all(map(names_one, p.captions))


def test_validation_is_never_trained_on():
    """Held-out scores of scenes and sentences that were learned by heart."""
    splits = data.built_in(0, train=2000, val=100, unseen=0)
    seen = {p.open.args[0] for p in splits["train"].pictures}
    assert not seen & {p.open.args[0] for p in splits["val"].pictures}
    assert splits["val"].texts and not set(splits["train"].texts) & set(splits["val"].texts)
    first = {p.open.args[0] for p in data.scenes(20, 1, "x")}
    assert not first & {p.open.args[0] for p in data.scenes(60, 1, "x", skip=first)}     # here skip does bite


def content(pictures):
    return [(p.name, p.open.args, p.captions, p.talks) for p in pictures]


def test_scene_i_depends_on_seed_name_and_i_alone():
    """Other scenes because somebody asked for more of them, or the same ones for every seed and split."""
    few, many = content(data.scenes(5, 3, "train")), content(data.scenes(30, 3, "train"))
    assert few == many[:5]
    skip = {many[2][1][0]}
    assert content(data.scenes(28, 3, "train", skip=skip)) == [c for c in many if c[1][0] not in skip][:28]
    assert few != content(data.scenes(5, 4, "train")) and few != content(data.scenes(5, 3, "val"))


def test_answers_are_true():
    """A false answer, learned and then scored as the truth; a question about the color of nothing."""
    red, blue = Object("small", "red", "square", "top left"), Object("large", "blue", "star", "bottom right")
    there = {"top left": red, "bottom right": blue}
    answers = dict(data.questions(Scene("pink", (red, blue))))
    assert answers.pop("what is the background?") == "pink" and answers.pop("how many shapes are there?") == "two"
    for place in data.PLACES:
        o = there.get(place)
        assert answers.pop(f"what is at the {place}?") == (f"a {o.size} {o.color} {o.shape}" if o else "nothing")
        assert answers.pop(f"which shape is at the {place}?") == (o.shape if o else "none")
        assert answers.pop(f"is there anything at the {place}?") == ("yes" if o else "no")
        assert answers.pop(f"what color is the shape at the {place}?", None) == (o and o.color)
    assert not answers


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary and tokenizer

VOCAB = Vocab(bos=300, eos=301, pad=302, boi=303, eoi=304, uncond=305, image_start=400, image_size=16)


def test_codes_and_ids_are_inverses():
    """Codes that come back from the vocabulary as other codes, flattened or in another type."""
    codes = torch.arange(16).view(2, 2, 4)
    ids = VOCAB.codes_to_ids(codes)
    assert ids.shape == codes.shape and ids.dtype == torch.int64 and torch.equal(VOCAB.ids_to_codes(ids), codes)
    assert VOCAB.codes_to_ids([]).numel() == 0


@pytest.mark.parametrize("convert, wrong", [("codes_to_ids", [-1, 0]), ("codes_to_ids", [15, 16]),
                                            ("ids_to_codes", [399, 400]), ("ids_to_codes", [415, 416])])
def test_nothing_outside_the_image_range_is_converted(convert, wrong):
    """A word that is decoded as a code, or a code that lands on a row behind the codebook's, in silence."""
    with pytest.raises(ValueError, match="image range"):
        getattr(VOCAB, convert)(wrong)


def test_text_and_image_rows_are_disjoint_and_cover_the_embedding():
    """A code that shares its row with a word, or a special token behind the codes that has no row at all."""
    (a, b), (c, d) = VOCAB.text_rows, VOCAB.image_rows
    assert (a, b, c, d) == (0, 400, 400, 416) and VOCAB.size == 416
    behind = Vocab(1, 2, 0, boi=416, eoi=417, uncond=418, image_start=400, image_size=16)
    assert behind.size == 419 and behind.image_rows == (400, 416)
    learned = WordTokenizer(["a", " b"]).vocab(8)
    assert learned.size == 6 + 256 + 2 + 8 and learned.codes_to_ids(0) == 264


def test_a_vocabulary_survives_its_checkpoint():
    """A loaded run with other special tokens, or ids that change while a model uses them."""
    assert Vocab(**json.loads(json.dumps(asdict(VOCAB)))) == VOCAB
    with pytest.raises(AttributeError):
        VOCAB.bos = 1


def test_any_text_comes_back_as_it_was():
    """Spaces, accents or lone surrogates that are lost between a caption and its ids."""
    hypothesis = pytest.importorskip("hypothesis")
    tokenizer = WordTokenizer.learn(["the cat, the cat. The\ncat \u00e9t\u00e9 \ud800"] * 3)

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @hypothesis.given(hypothesis.strategies.text(hypothesis.strategies.characters()))      # surrogates too
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    check()
    for text in ("", " ", "  the  cat", "the cat\r\n\t_a1 b\u3000c", "\ud800", " \ud800", "x\ud800\udc00", "\U0001f600",
                 "the cat, \u00e9t\u00e9"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_words_are_one_id_and_unknown_words_are_bytes():
    """A rare word that vanishes or takes a row of its own, or a common one that is spelled out in bytes."""
    tokenizer = WordTokenizer.learn(["the cat"] * 3 + ["a dog"] * 2)
    assert set(tokenizer.words) == {"the", " cat"}
    assert len(tokenizer.encode("the cat")) == 2 and len(tokenizer.encode(" d\u00f6g")) == 5
    assert tokenizer.encode("the dog")[1:] == [6 + b for b in b" dog"]
    assert len(WordTokenizer.learn(["a b c d"] * 3, size=2).words) == 2


def test_broken_bytes_and_special_tokens_do_not_stop_the_decoder():
    """A traceback in place of text when a model writes half a character, or a special token that shows."""
    tokenizer = WordTokenizer([" cat"])
    assert tokenizer.decode([6 + 0xff, 262]) == "\ufffd cat"
    assert tokenizer.decode([0, 1, 2, 3, 4, 5, 262, 6 + 0xc3]) == " cat\ufffd"


def test_a_tokenizer_survives_its_checkpoint():
    """A loaded run that spells its words with other ids than those it was trained on."""
    tokenizer = WordTokenizer.learn(["one two three"] * 3)
    other = data.load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert other.encode("three two four") == tokenizer.encode("three two four") and other.size == tokenizer.size


MARKS = {
    "gemma": (["<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused1>", "<unused2>"], "<end_of_turn>"),
    "chatml": (["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"], "<|im_end|>"),
    "llama3": (["<|start_header_id|>", "<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(3))], "<|eot_id|>"),
    "plain": ([], None)}


@pytest.mark.parametrize("chat", MARKS)
def test_each_family_lends_its_turns_and_its_spare_ids(tmp_path, chat):
    """Special tokens on rows that words or codes use, or turns of another family; what the table in the README says."""
    tokenizers = pytest.importorskip("tokenizers")
    (marks, turn_end), bpe = MARKS[chat], tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    bpe.add_special_tokens(marks)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.PretrainedTokenizer.load(tmp_path)
    vocab = tokenizer.vocab(8, {"vocab_size": 100, "bos_token_id": 3, "eos_token_id": [4, 5]})
    assert tokenizer.chat == data.CHATS[chat]
    assert tokenizer.stops == ((tokenizer.id(turn_end),) if marks else ())
    assert (vocab.bos, vocab.eos, vocab.pad, vocab.image_rows) == (3, 4, 4, (100, 108))     # behind padding rows, too
    assert (vocab.boi, vocab.eoi, vocab.uncond) == (tuple(map(tokenizer.id, marks[-3:])) if marks else (108, 109, 110))


# ---------------------------------------------------------------------------------------------------------------------
# Templates, each against its layout written out by hand; the tokenizer is one id a byte

class Bytes:
    chat, stops = data.Chat("U:", "M:", "E"), ()

    def encode(self, text):
        return list(text.encode())


CODES = torch.tensor([[3, 0], [15, 7]])
PICTURE = [303, 403, 400, 415, 407, 304]       # <boi>, raster order, <eoi>
T2I = data.render_t2i(VOCAB, Bytes(), "a dog", CODES)
I2T = data.render_i2t(VOCAB, Bytes(), CODES, "a dog")
VQA = data.render_vqa(VOCAB, Bytes(), CODES, [("how?", "so"), ("why?", "no")])
TEXT = data.render_text(VOCAB, Bytes(), "a dog")


@pytest.mark.parametrize("rendering, layout", [
    (T2I, [([300, *b"a dog Generate an image based on this description.", 303], 0), ([403, 400, 415, 407, 304, 301], 1)]),
    (I2T, [([300, *PICTURE, *b"The caption of this image is:"], 0), ([*b"a dog", 301], 1)]),
    (VQA, [([300, *b"U:", *PICTURE, *b"\nhow?EM:"], 0), (b"soE", 1), (b"U:why?EM:", 0), (b"noE", 1), ([301], 1)]),
    (TEXT, [([300], 0), ([*b"a dog", 301], 1)])], ids=data.TASKS)
def test_targets_are_exactly_the_answer_shifted_by_one(rendering, layout):
    """Loss on the prompt, none on the answer's end, or all targets one place off."""
    ids = [i for part, _ in layout for i in part]
    answer = [i if learned else IGNORE for part, learned in layout for i in part]
    assert rendering == (ids, answer[1:] + [IGNORE])


@pytest.mark.parametrize("prompt, whole, first_answer", [
    (data.render_t2i(VOCAB, Bytes(), "a dog"), T2I, 403),
    (data.render_i2t(VOCAB, Bytes(), CODES), I2T, ord("a")),
    (data.render_vqa(VOCAB, Bytes(), CODES, [("how?", None)]), VQA, ord("s")),
    (data.render_vqa(VOCAB, Bytes(), CODES, [("how?", "so"), ("why?", None)]), VQA, ord("n")),
    (data.render_text(VOCAB, Bytes(), "", ended=False), TEXT, ord("a")),
    (data.render_text(VOCAB, Bytes(), "a d", ended=False), TEXT, ord("o"))])
def test_sampling_sees_the_prompt_of_training(prompt, whole, first_answer):
    """A prompt in sampling that training never had, and answers that are worse for it."""
    n = len(prompt[0])
    assert n < len(whole[0]) and whole[0][:n] == prompt[0] and whole[0][n] == first_answer
    assert whole[1][n - 1] == first_answer and len(prompt[1]) == n


def test_the_unconditional_rendering_holds_no_words():
    """Guidance that leads away from words, as its unconditional half still reads some."""
    assert data.render_t2i(VOCAB, Bytes(), None)[0] == [300, 305, 303]
    ids, targets = data.render_t2i(VOCAB, Bytes(), None, CODES)
    assert ids == [300, 305, *PICTURE, 301] and targets == [IGNORE, IGNORE, 403, 400, 415, 407, 304, 301, IGNORE]


def test_prompts_stay_prefixes_under_a_tokenizer_that_merges():
    """A prompt that ends in other tokens once its answer follows: training never saw it as sampling writes it."""
    class Merging(Bytes):
        def encode(self, text):
            return [int.from_bytes(pair.encode(), "big") for pair in re.findall("..?", text, re.DOTALL)]
    tokenizer = Merging()               # two characters an id, so that an odd prompt would swallow its answer's first
    for words in ("a red star", "no"):
        for render, unanswered, answered in ((data.render_i2t, None, words), (data.render_vqa, [("why?", None)], [("why?", words)]),
                                             (data.render_vqa, [("how?", None)], [("how?", words)])):
            prompt, whole = (render(VOCAB, tokenizer, CODES, answer)[0] for answer in (unanswered, answered))
            assert whole[:len(prompt)] == prompt and len(whole) > len(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def loaded(image, format="PNG", **options):
    result = data.load_image(saved(image, format, **options))
    assert result.mode == "RGB"
    return [result.getpixel((x, y)) for y in range(result.height) for x in range(result.width)]


def two(mode, *values):
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    return image


def test_palette_pictures_are_read_by_their_colors():
    """Palette numbers taken for shades of gray, or a transparent entry that keeps its hidden color."""
    image = two("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    assert loaded(image) == [RED, BLUE]
    assert loaded(image, transparency=1) == [RED, WHITE]
    assert loaded(image, "GIF") == [RED, BLUE]


def test_transparency_is_shown_on_white_not_black():
    """Logos on black squares, or colors that were hidden under transparent pixels."""
    assert loaded(two("RGBA", (0, 0, 0, 0), (255, 0, 0, 255))) == [WHITE, RED]
    assert loaded(two("LA", (0, 0), (7, 255))) == [WHITE, (7, 7, 7)]
    (half,) = set(loaded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))
    assert half[0] == 255 and all(126 <= x <= 128 for x in half[1:])
    assert loaded(two("RGB", RED, BLUE), transparency=RED) == [WHITE, BLUE]


def test_gray_and_print_colors_become_rgb():
    """Gray or one-bit pictures without three channels, or print colors that come out inverted."""
    assert loaded(two("L", 0, 9)) == [(0, 0, 0), (9, 9, 9)]
    assert loaded(two("1", 0, 1)) == [(0, 0, 0), WHITE]
    cmyk = loaded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert all(max(abs(a - b) for a, b in zip(pixel, RED)) <= 3 for pixel in cmyk)


def test_sixteen_bits_are_scaled_not_clipped():
    """Scans of 16 bits that turn almost wholly white."""
    wide = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert data.load_image(saved(wide, "PNG")).size == (3, 1)
    assert loaded(wide) == [(0, 0, 0), (100, 100, 100), WHITE]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_photograph_stands_upright(format):
    """Photographs of a turned camera that the model learns lying on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6        # the camera was turned: left is up
    options = {"lossless": True} if format == "WEBP" else {}
    image = data.load_image(saved(two("RGB", RED, BLUE), format, exif=exif, **options))
    assert image.size == (1, 2) and image.getpixel((0, 0)) == RED


@pytest.mark.parametrize("format, options", [("GIF", {}), ("WEBP", {"lossless": True})])
def test_of_an_animation_the_first_picture_is_taken(format, options):
    """A later frame, or a mixture of all, where the caption speaks of the first."""
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    assert set(loaded(frames[0], format, save_all=True, append_images=frames[1:], **options)) == {RED}


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 2), (1, 200_000)])
@pytest.mark.parametrize("pad", [False, True])
def test_any_shape_fits(size, pad):
    """A strip one pixel wide that shrinks to nothing, or whose padded square does not fit into memory."""
    assert data.fit(Image.new("RGB", size, RED), 32, pad).size == (32, 32)


def test_padding_crops_nothing_and_cropping_keeps_the_centre():
    """Edges that --pad cuts off, a crop beside the centre, or a picture that fits already and is blurred."""
    thirds = Image.new("RGB", (48, 16))
    for i, color in enumerate((RED, WHITE, BLUE)):
        thirds.paste(color, (i * 16, 0, i * 16 + 16, 16))
    padded, cropped = np.asarray(data.fit(thirds, 48, True)), np.asarray(data.fit(thirds, 48))
    assert (padded[:16] == (122, 116, 104)).all() and (padded[32:] == (122, 116, 104)).all()
    assert (padded[16:32] == np.asarray(thirds)).all()
    tall = np.asarray(data.fit(thirds.rotate(90, expand=True), 48, True))
    assert (tall[:, :16] == (122, 116, 104)).all() and (tall[0, 16:32] == BLUE).all() and (tall[-1, 16:32] == RED).all()
    assert (cropped[:, 8:40] == WHITE).all()
    same = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    assert all((np.asarray(data.fit(same, 8, pad)) == np.asarray(same)).all() for pad in (False, True))


def test_pixels_and_image_are_exact_inverses():
    """A picture that loses a shade on its way through pixels, or too bright pixels that wrap round to black."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    values[..., 1] = values[..., 1].T
    pixels = data.to_pixels(Image.fromarray(values))
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert (np.asarray(data.to_image(pixels)) == values).all() and (np.asarray(data.to_image(pixels[0])) == values).all()
    for outside, cut in ((9.0, WHITE), (-9.0, (0, 0, 0))):          # not wrapped
        assert data.to_image(torch.full((3, 1, 1), outside)).getpixel((0, 0)) == cut


def test_a_grid_holds_every_image():
    """A sheet of samples without its last row, which is not full."""
    sheet = data.grid([Image.new("RGB", (2, 3), color) for color in (RED, BLUE, RED)], 2, gap=1)
    assert sheet.size == (5, 7) and [sheet.getpixel(at) for at in ((0, 0), (3, 0), (0, 4), (3, 4))] == [RED, BLUE, RED, WHITE]


def huge(side):
    """A PNG whose header promises side x side pixels."""
    raw = bytearray(saved(Image.new("RGB", (1, 1)), "PNG").getvalue())
    raw[16:24] = struct.pack(">II", side, side)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


def mislabelled():
    """A JPEG to be turned, as its EXIF says, whose width is a word."""
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    return saved(Image.new("RGB", (8, 8)), "JPEG", exif=exif).getvalue().replace(b"\1\x0f\0\2", b"\1\0\0\2")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))


@pytest.mark.parametrize("raw", [
    b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"%!PS-Adobe-3.0 EPSF-3.0\n",
    huge(11_000), huge(20_000), mislabelled(),
    *(saved(NOISE, f).getvalue()[:-n] for f in ("PNG", "JPEG", "WEBP", "GIF") for n in (200, 400))],
    ids=lambda raw: f"{len(raw)} bytes")
def test_an_unreadable_picture_is_a_value_error_that_names_it(tmp_path, raw):
    """A traceback out of Pillow, or a header that asks for all memory, and no word about which file it was."""
    file = tmp_path / "broken.png"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(f"{file}: not a readable picture")):
        data.load_image(file)


def test_an_eps_is_not_handed_to_ghostscript(monkeypatch):
    """A program in PostScript that runs because a file of the user's data holds it, whatever the file is called."""
    from PIL import EpsImagePlugin
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(1) or Image.new("RGB", (8, 8)).im)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="not a readable picture"):
        data.load_image(io.BytesIO(eps), "x.png")
    assert not started


def test_a_missing_picture_or_a_folder_is_a_value_error_that_names_it(tmp_path):
    """A missing file, or a folder in place of one, that ends in a traceback."""
    for file in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(file))):
            data.load_image(file)


def test_damaged_files_raise_nothing_but_value_errors():
    """One wrong byte in a picture that ends a run with an exception that nobody catches."""
    rng = random.Random(0)
    files = [saved(NOISE, f).getvalue() for f in ("PNG", "JPEG", "WEBP", "GIF")]
    for i in range(400):
        raw = bytearray(files[i % len(files)])
        for _ in range(rng.randint(1, 4)):
            raw[int(rng.random() ** 2 * len(raw))] = rng.randrange(256)
        try:
            assert data.load_image(io.BytesIO(raw)).mode == "RGB"
        except ValueError:
            pass


# ---------------------------------------------------------------------------------------------------------------------
# Sources

def png(color=RED):
    return saved(Image.new("RGB", (4, 4), color), "PNG").getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(function, path, *words):
    with pytest.raises(ValueError) as caught:
        function(path)
    assert all(str(word) in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_with_its_captions_and_questions(tmp_path):
    """Captions beside the wrong picture, or pictures passed over for their capital suffix or their subfolder."""
    put(tmp_path / "a.png", png())
    put(tmp_path / "a.txt", " a red square\n")
    put(tmp_path / "deep" / "er" / "B.JPG", png(BLUE))
    put(tmp_path / "deep" / "er" / "B.json", json.dumps({"caption": "blue", "qa": [["what?", "sea"], ["how?", "so"]]}))
    put(tmp_path / "c.webp", png())
    put(tmp_path / "c.txt", b"\xef\xbb\xbfsame")
    put(tmp_path / "c.json", b'\xef\xbb\xbf{"caption": "same"}')
    put(tmp_path / "d.jpeg", png())
    put(tmp_path / "notes.txt", "no picture's")
    a, c, d, b = data.read_pictures(tmp_path)
    assert (a.captions, a.talks, a.open().getpixel((0, 0))) == (["a red square"], [], RED)
    assert (b.captions, b.talks, b.open().getpixel((0, 0))) == (["blue"], [[("what?", "sea")], [("how?", "so")]], BLUE)
    assert (c.captions, c.talks, d.captions, d.talks) == (["same"], [], [], [])
    assert [p.name for p in (a, b)] == [str(tmp_path / "a.png"), str(tmp_path / "deep" / "er" / "B.JPG")]


@pytest.mark.parametrize("note", ["{", "[]", "3", '{"caption": 3}', '{"qa": 3}', '{"qa": [["only a question"]]}', '{"qa": null}',
                                  '{"qa": [["how many?", null]]}', '{"qa": [1]}', "[" * 100_000], ids=lambda note: note[:70])
def test_a_broken_note_beside_a_picture_is_named(tmp_path, note):
    """A slip in one of many .json files that is ignored, or a traceback that does not say in which."""
    put(tmp_path / "a.png", png())
    put(tmp_path / "a.json", note)
    refused(data.read_pictures, tmp_path, tmp_path / "a.png", ".json")


def test_a_caption_that_is_not_text_is_named(tmp_path):
    """Bytes of a stray file that are learned as a caption, or a decoding error that does not say whose."""
    put(tmp_path / "a.png", png())
    put(tmp_path / "a.txt", b"\xff\xfe\x00")
    refused(data.read_pictures, tmp_path, tmp_path / "a.txt", "UTF-8")


def test_every_layout_of_jsonl_is_read(tmp_path):
    """A published list that has to be rewritten first, or a line cut in two within its caption."""
    for name in "abc":
        put(tmp_path / "sub" / f"{name}.png", png())
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."},
             {"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "Red."}]
    rows = [{"image": "sub/a.png", "text": "ours\u2028\x85one line"},
            {"image_path": "sub/b.png", "text_prompt": "Liquid's"},
            {"image": "sub/c.png", "conversations": turns},
            {"data_type": "t2i", "text": "encoded", "vqcode_512": str(list(range(16)))},
            {"data_type": "t2i", "text": "encoded", "vqcode_512": [[3, 1], [2, 0]]}]
    file = put(tmp_path / "x.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    ours, raw, llava, flat, square = data.read_pictures(file)
    assert ours.captions == ["ours\u2028\x85one line"] and raw.captions == ["Liquid's"] and llava.captions == []
    assert llava.talks == [[("What is it?", "A square."), ("Which color?", "Red.")]]
    assert all(p.open().getpixel((0, 0)) == RED and p.codes is None for p in (ours, raw, llava))
    assert flat.captions == ["encoded"] and torch.equal(flat.codes, torch.arange(16).view(4, 4)) and flat.open is None
    assert square.codes.tolist() == [[3, 1], [2, 0]] and square.codes.dtype == torch.int64


def test_lines_about_one_picture_are_one_picture(tmp_path):
    """Several captions a picture, as in COCO, of which some are trained on and others held out."""
    put(tmp_path / "a.png", png())
    rows = [{"image": "a.png", "text": "one"}, {"image": "b.png", "text": "other"}, {"image_path": "a.png", "text_prompt": "two"},
            {"image": "a.png", "conversations": [{"value": "q"}, {"value": "a"}]}]
    a, b = data.read_pictures(put(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows))))
    assert (a.captions, a.talks, b.captions, b.talks) == (["one", "two"], [[("q", "a")]], ["other"], [])


@pytest.mark.parametrize("line", [
    '{"image": "a.png"', "[1]", '"x"', "null", "{}", "[" * 100_000, f'{{"image": {"1" * 5000}}}', '{"text": "no picture"}',
    '{"image": 3, "text": "x"}', '{"image": "a.png"}', '{"image": "a.png", "text": null}', '{"image": "a.png", "text": ["x"]}',
    '{"image_path": "a.png"}', '{"image_path": null, "text_prompt": "x"}',
    '{"conversations": [{"value": "q"}, {"value": "a"}]}',
    *(f'{{"image": "a.png", "conversations": {talk}}}' for talk in (
        "[]", "null", "3", '"ab"', '["a", "b"]', '{"value": "q"}', '[{"from": "human"}, {"from": "gpt"}]', '[{"value": "q"}]',
        '[{"value": 1}, {"value": "a"}]', '[{"value": "q"}, {"value": "a"}, {"value": "q"}]', "[null, null]")),
    *(f'{{"text": "x", "vqcode_512": {codes}}}' for codes in (
        "[]", '"[]"', "null", "{}", '""', '"[1, 2"', '"words"', "[1, 2]", "[0, 1, 2, -1]",
        "[0.5, 0.5, 0.5, 0.5]", '["1", "2", "3", "4"]',
        "[[1, 2], [3]]", f"[{10 ** 30}]", f"[{2 ** 63}]", "[true]", "[null]", "1.5", json.dumps("[" * 100_000))),
    '{"vqcode_512": [0]}'], ids=lambda line: line[:70])
def test_a_broken_line_is_a_value_error_with_file_and_line(tmp_path, line):
    """One bad line among a million that is trained on, or a traceback that does not say which."""
    file = put(tmp_path / "x.jsonl", '{"image": "a.png", "text": "fine"}\n' + line + "\n")
    refused(data.read_pictures, file, file, "line 2")


def tar_of(path, members):
    """members: (name, bytes) or a TarInfo without contents."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_tar_shards_are_read(tmp_path):
    """A picture that loses its caption in a tar, or that a spawned worker cannot open."""
    tar_of(tmp_path / "0.tar", [("x/000.png", png()), ("x/000.txt", b"first"),
                                ("x/000.json", b'{"qa": [["q", "a"]]}'), ("x/001.cls", b"3")])
    tar_of(tmp_path / "1.tar", [("000.txt", b"second"), ("000.JPG", png(BLUE)), ("broken.webp", b"nothing")])
    first, second, broken = data.read_pictures(tmp_path)
    assert (first.captions, first.talks, first.open().getpixel((0, 0))) == (["first"], [[("q", "a")]], RED)
    assert (second.captions, second.open().getpixel((0, 0))) == (["second"], BLUE)
    refused(lambda p: p.open(), broken, f"{tmp_path / '1.tar'}:broken.webp")
    assert [p.captions for p in data.read_pictures(tmp_path / "1.tar")] == [["second"], []]
    assert pickle.loads(pickle.dumps(first)).open().getpixel((0, 0)) == RED     # as where workers are spawned, not forked


def test_a_tar_can_neither_write_nor_lead_elsewhere(tmp_path):
    """A stranger's tar that writes files outside of it, or whose links make training read them."""
    secret = put(tmp_path / "secret.png", png(BLUE))
    outside = f"{tmp_path}/absolute.png"
    inner = tmp_path / "in"
    inner.mkdir()
    file = tar_of(inner / "x.tar", [
        link("soft.png", str(secret), tarfile.SYMTYPE), link("hard.png", "../secret.png", tarfile.LNKTYPE),
        link("pipe.png", "", tarfile.FIFOTYPE), link("folder.png", "", tarfile.DIRTYPE),
        (outside, png()), ("../../up.png", png()), ("noend", b"x"), ("plain.png", png())])
    before = sorted(tmp_path.rglob("*"))
    pictures = data.read_pictures(file)
    assert [p.name for p in pictures] == [f"{file}:{name}" for name in (outside, "../../up.png", "plain.png")]
    assert all(p.open().getpixel((0, 0)) == RED for p in pictures)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_tar_is_a_value_error_that_names_it(tmp_path):
    """A download that broke off, or a bad note inside, as a traceback that does not say which tar."""
    whole = tar_of(tmp_path / "x.tar", [("a.png", png()), ("a.txt", b"x" * 2000), ("a.json", b"{}")]).read_bytes()
    for raw in (b"", b"no tar", whole[:100], whole[:512 + 20], whole[:4 * 512], zlib.compress(whole)):
        refused(data.read_pictures, put(tmp_path / "y.tar", raw), tmp_path / "y.tar")
    refused(data.read_pictures, tar_of(tmp_path / "z.tar", [("a.png", png()), ("a.json", b"[")]), tmp_path / "z.tar", ".json")
    for cut in range(0, len(whole), 97):
        try:
            data.read_pictures(put(tmp_path / "y.tar", whole[:cut]))
        except ValueError as error:
            assert str(tmp_path / "y.tar") in str(error)


def test_a_source_without_pictures_is_a_value_error_that_names_it(tmp_path):
    """A typing error in --data that starts a run on nothing."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "nowhere", tmp_path / "no.jsonl", tmp_path / "no.tar", put(tmp_path / "a.zip", b"x"),
                 put(tmp_path / "blank.jsonl", "\n\n"), tar_of(tmp_path / "blank.tar", []),
                 put(tmp_path / "binary.jsonl", b"\xff\x00")):
        refused(data.read_pictures, path, path)


def test_texts_are_read_from_txt_and_jsonl(tmp_path):
    """Byte order marks and carriage returns that are learned, or a passage that comes twice, learned and held out."""
    assert data.read_texts(put(tmp_path / "a.txt", "\ufeffone\r\ntwo\n")) == ["one\ntwo"]
    rows = '{"text": "one\u2028more"}\n\n{"text": "two", "other": 1}'
    assert data.read_texts(put(tmp_path / "a.jsonl", rows)) == ["one\u2028more", "two"]
    long = put(tmp_path / "long.txt", "".join(f"{i:04d} " for i in range(1000)))
    pieces = data.load_source(None, long, passage=400)["train"].texts
    assert {len(piece) for piece in pieces} == {400, 200}       # the last one is what is left
    assert data.read_texts(put(tmp_path / "again.txt", "word " * 1000), 400) == ["word " * 80, "word " * 40]     # each once
    for path, words in ((put(tmp_path / "b.txt", b"\xff\xfe\x00"), ("UTF-8",)), (tmp_path, ()),
                        (tmp_path / "nowhere.txt", ("no such file",)), (put(tmp_path / "e.txt", " \n"), ("no text",)),
                        (put(tmp_path / "b.jsonl", '{"text": "x"}\n{"text": 1}'), ("line 2",)),
                        (put(tmp_path / "c.jsonl", '{"text": "x"}\n{'), ("line 2",))):
        refused(data.read_texts, path, path, *words)


def test_a_source_is_split_for_training_and_validation(tmp_path):
    """Own pictures that are both learned and held out, or texts of which none is held out."""
    for i in range(40):
        put(tmp_path / "pictures" / f"{i:02}.png", png())
    text = put(tmp_path / "x.jsonl", "".join(f'{{"text": "text {i}"}}\n' for i in range(40)))
    splits = data.load_source(tmp_path / "pictures", text)
    assert [(len(s.pictures), len(s.texts)) for s in splits.values()] == [(38, 38), (2, 2)]
    assert not {p.name for p in splits["train"].pictures} & {p.name for p in splits["val"].pictures}


@pytest.mark.parametrize("n", [0, 1, 2, 19, 20, 1000, 20_000])
def test_what_is_held_out_is_the_same_every_time_and_disjoint(n):
    """A resumed run that is scored on what it has learned, or a small source that leaves nothing to score."""
    train, val = data.hold_out(list(range(n)))
    assert (train, val) == data.hold_out(list(range(n))) and len(val) <= 400
    if n > 1:
        assert val and sorted(train + val) == list(range(n))
    else:
        assert train == val == list(range(n))       # there is nothing else to validate on


def test_passages_lose_no_word_and_keep_to_their_length():
    """Words that fall out where a text is cut, or a line without spaces that becomes one endless passage."""
    rng = random.Random(0)
    texts = ["", "\n" * 999, "x" * 1000, " " + "x" * 1000, "\t" * 700 + "word", " a" * 500,
             ("x" * 239 + " ") * 3, ("x" * 240 + "\n") * 3]
    pieces = ["a", "word", "x" * 90, "y" * 250, " ", "   ", "\n", "\t", "\r\n", "\u2028"]
    texts += ["".join(rng.choices(pieces, k=60)) for _ in range(200)]
    for text in texts:
        for length in (10, 240):
            parts = data.passages(text, length)
            assert "".join("".join(parts).split()) == "".join(text.split())
            assert all(p.strip() and len(p) <= length + 1 for p in parts)
    assert data.passages("one\n\ntwo\n") == ["one\n\ntwo"]
    assert data.passages("aaa bbb ccc\nddd", 8) == ["aaa bbb ", "ccc\nddd"]


def test_an_unreadable_picture_is_reported_and_the_others_go_on(tmp_path):
    """One broken picture that stops all others, or is left out without a word."""
    names = [put(tmp_path / "a.png", png()), put(tmp_path / "b.png", b"nothing")]
    pixels = data.Pixels([Picture(str(f), partial(data.load_image, f)) for f in names], 8)
    assert len(pixels) == 2 and pixels[0].shape == (3, 8, 8) and pixels[0].dtype == torch.uint8
    assert str(names[1]) in pixels[1]


# ---------------------------------------------------------------------------------------------------------------------
# Shards

def some_pictures(n=3):
    return [Picture(f"p{i}", None, ["a \ud800", "b"][:i], [[("q", "a"), ("r", "b")]] * i, torch.arange(4).view(2, 2) + i)
            for i in range(n)]


def fields(pictures):
    return [(p.name, p.captions, p.talks, p.codes.tolist()) for p in pictures]


def test_a_shard_gives_back_what_was_written(tmp_path):
    """Captions or conversations lost between encoding and training, or a shard without pictures that cannot be kept."""
    for n in (3, 0):
        data.write_shard(tmp_path / "deep" / "x.pt", some_pictures(n), "print", {"bad.png": "why"})
        pictures, skipped = data.read_shard(tmp_path / "deep" / "x.pt", "print")
        assert fields(pictures) == fields(some_pictures(n)) and skipped == {"bad.png": "why"}


def test_a_foreign_or_damaged_shard_is_made_again(tmp_path):
    """Codes of another tokenizer that are trained on, or a traceback where half a file could be made again."""
    path = tmp_path / "x.pt"
    assert data.read_shard(path, "print") is None
    data.write_shard(path, some_pictures(), "print")
    whole = path.read_bytes()
    assert data.read_shard(path, "another") is None
    for raw in (b"", b"garbage" * 100, *(whole[:n] for n in range(0, len(whole) - 1, 150)), whole[:-1]):
        path.write_bytes(raw)
        assert data.read_shard(path, "print") is None
    good = {"format": "nanoLiquid codes 2", "fingerprint": "print", "codes": torch.zeros(1, 2, 2), "rows": "[{}]", "skipped": "{}"}
    for value in ([1, 2], {}, 3, {"format": 1}, WordTokenizer, *({**good, "rows": r} for r in ("[{}]", "[]", "[", "3", "[3]", 3))):
        torch.save(value, path)
        assert data.read_shard(path, "print") is None
    assert data.read_shard(tmp_path, "print") is None


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path):
    """A save that breaks off and takes the last good checkpoint along."""
    path = tmp_path / "x.pt"
    data.save_atomically({"a": 1}, path)
    with pytest.raises(Exception):
        data.save_atomically({"a": torch.zeros(1000), "b": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# The loader

def texts_of(lengths):
    return [(f"{i} " + "x" * n)[:max(n, 4)] for i, n in enumerate(lengths)]


def mixed(n=40, **options):
    """A loader of all tasks with pictures of 4 codes."""
    rng = random.Random(0)
    pictures = [Picture(str(i), None, [f"caption {i} " + "c" * rng.randrange(20), f"other {i}"],
                        [[(f"q{i}", "a")], [("first", "x"), (f"second {i}", "y" * rng.randrange(9))]],
                        torch.tensor([[i % 16, i // 16], [0, 15]])) for i in range(n)]
    tasks = {task: pictures for task in ("t2i", "i2t", "vqa")} | {"text": texts_of(rng.randrange(4, 100) for _ in range(n))}
    return Loader(tasks, {"t2i": 4, "i2t": 2, "vqa": 2, "text": 2}, VOCAB, Bytes(), **{"rows": 6, "context": 160} | options)


def documents(batch):
    """(task, ids, targets) of every example of a batch, after a check of the planes that hold them together."""
    found = []
    for ids, targets, positions, numbers, tasks in zip(*batch):
        padding = numbers == -1
        assert (ids[padding] == VOCAB.pad).all() and (targets[padding] == IGNORE).all() and (tasks[padding] == -1).all()
        assert (positions[padding] == 0).all() and (padding.int().diff() >= 0).all()       # all of it at the end
        for number in range(int(numbers.max()) + 1):
            own = numbers == number
            assert own.any() and positions[own].tolist() == list(range(int(own.sum()))) and len(tasks[own].unique()) == 1
            assert (own.int().diff().abs().sum() + own[0].int() + own[-1].int()) == 2     # in one piece
            found.append((data.TASKS[tasks[own][0]], ids[own].tolist(), targets[own].tolist()))
    return found


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def take(loader, n):
    return list(itertools.islice(iter(loader), n))


def test_packing_cuts_loses_and_repeats_nothing():
    """Examples cut at the end of a row, lost as they found no room, or trained on twice."""
    loader, fresh = mixed(), mixed()
    batches = take(loader, 12)
    placed = Counter(str(document) for batch, _ in batches for document in documents(batch))
    waiting = Counter(str((key[0], *loader.render(*key))) for key in loader.waiting)
    keys = [fresh.draw() for _ in range(sum(loader.drawn.values()))]
    assert len(waiting) and placed + waiting == Counter(str((key[0], *fresh.render(*key))) for key in keys)
    assert loader.dropped == 0 and {key[0] for key in keys} == set(data.TASKS)
    assert all(x.shape == (6, 160) and x.dtype == torch.int64 for x in batches[0][0])


@pytest.mark.parametrize("lengths", [[9] * 7, [4], range(4, 59), [59, 4, 59, 5, 59], [59] * 70, [4] * 200])
def test_every_example_comes_once_an_epoch(lengths):
    """Short examples that come again and again while long ones wait for ever."""
    texts = texts_of(lengths)
    loader = Loader({"text": texts}, {"text": 1}, VOCAB, Bytes(), rows=3, context=61)
    placed = Counter(bytes(ids[1:-1]).decode() for batch, _ in take(loader, 30) for _, ids, _ in documents(batch))
    placed += Counter(texts[index] for _, _, index in loader.waiting)
    rounds = loader.drawn["text"] // len(texts)
    assert rounds and all(rounds <= placed[text] <= rounds + 1 for text in texts)
    assert sum(placed.values()) == loader.drawn["text"]


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_together_read_the_batch_of_one_process(world):
    """Processes that learn the same rows, or others than one process alone would."""
    whole = take(mixed(), 4)
    ranks = [take(mixed(rank=rank, world=world), 4) for rank in range(world)]
    for step, (batch, state) in enumerate(whole):
        for rank in range(world):
            assert same(ranks[rank][step][0], [x[rank::world] for x in batch]) and ranks[rank][step][1] == state


def test_a_resumed_stream_goes_on_as_if_nothing_happened():
    """A resumed run that reads examples twice or leaves some out; a seed that changes nothing."""
    whole = take(mixed(), 8)
    resumed = take(mixed(state=json.loads(json.dumps(whole[3][1]))), 4)
    for (a, state_a), (b, state_b) in zip(whole[4:], resumed):
        assert same(a, b) and state_a == state_b
    assert not same(whole[0][0], take(mixed(seed=1), 1)[0][0])


def test_a_stream_resumes_with_another_mix():
    """Examples that wait for a task which is no longer asked for, or a task that begins again instead of going on."""
    tasks = mixed(n=150).tasks
    before, state = take(Loader(tasks, {"t2i": 1, "vqa": 1}, VOCAB, Bytes(), 2, 160), 1)[0]
    assert {task for task, _, _ in state["waiting"]} == {"t2i", "vqa"}
    for mix in ({"text": 1}, {"t2i": 1, "text": 1}):
        resumed = Loader(tasks, mix, VOCAB, Bytes(), 2, 160, state=json.loads(json.dumps(state)))
        found = [document for batch, _ in take(resumed, 20) for document in documents(batch)]
        assert {task for task, _, _ in found} == set(mix)
        drawings = [tuple(ids) for task, ids, _ in documents(before) + found if task == "t2i"]
        assert len(drawings) == len(set(drawings)) and resumed.drawn["t2i"] <= 150      # each once in its first epoch


def test_a_stream_resumes_with_fewer_examples():
    """Examples that wait, and were deleted before the run went on."""
    state = take(mixed(n=150), 1)[0][1]
    assert any(index >= 40 for _, _, index in state["waiting"])
    assert len(take(mixed(n=40, state=state), 3)) == 3


def test_an_example_depends_on_seed_epoch_and_index_alone():
    """Captions that change with the number of processes or after a resumption; a second epoch just like the first."""
    a, b = mixed(), mixed(rows=2, context=300, rank=1, world=2)
    keys = [(task, epoch, index) for task in data.TASKS for epoch in (0, 1) for index in range(40)]
    before = {key: str(a.render(*key)) for key in keys}
    take(a, 3)
    assert all(str(a.render(*key)) == before[key] == str(b.render(*key)) for key in reversed(keys))
    assert any(before["vqa", 0, i] != before["vqa", 1, i] for i in range(40))      # another conversation next time
    assert sorted(a.order("text", 1)) == list(range(40)) and a.order("text", 0).tolist() != a.order("text", 1).tolist()


def test_long_examples_are_left_out_whole_and_counted():
    """Half a drawing in a row too short for it, or examples that go missing without being counted."""
    loader = Loader({"text": texts_of([10, 500, 20])}, {"text": 1}, VOCAB, Bytes(), rows=2, context=64)
    found = {len(ids) for batch, _ in take(loader, 5) for _, ids, _ in documents(batch)}
    assert found == {12, 22} and loader.dropped >= loader.drawn["text"] // 3
    assert loader.state()["dropped"] == loader.dropped
    exact = Loader({"text": texts_of([62, 63])}, {"text": 1}, VOCAB, Bytes(), rows=2, context=64)
    assert {len(ids) for _, ids, _ in documents(take(exact, 1)[0][0])} == {64}


def test_nothing_that_fits_is_an_error_and_no_endless_loop():
    """A --context too small for any example, and a run that searches for one for ever."""
    loader = Loader({"text": ["x" * 100] * 3}, {"text": 1}, VOCAB, Bytes(), rows=2, context=64)
    with pytest.raises(ValueError, match="context 64.* 102 tokens"):
        loader.batch()


def test_a_mix_without_examples_is_an_error():
    """A run that waits for examples which the data do not have, or an index error in its place."""
    for tasks, mix in (({"text": []}, {"text": 1}), ({"text": ["x"]}, {"text": 0}), ({}, {"t2i": 1})):
        with pytest.raises(ValueError, match="nothing to train on"):
            Loader(tasks, mix, VOCAB, Bytes(), 1, 64)


def test_the_share_of_unconditional_drawings_is_what_was_asked():
    """Guidance that was never trained, or words taken from more drawings than --uncond says."""
    def share(uncond):
        loader = mixed(uncond=uncond)
        return np.mean([VOCAB.uncond in loader.render("t2i", epoch, i)[0] for epoch in range(50) for i in range(40)])
    assert share(0.0) == 0 and share(1.0) == 1 and abs(share(0.1) - 0.1) < 0.02


def test_noise_changes_the_codes_to_draw_and_nothing_else():
    """Noise in pictures that are captioned or asked about, or targets that are not the codes that are read next."""
    def next_code(codes, generator):
        assert isinstance(generator, torch.Generator)
        return (codes + 1) % 16
    for task in data.TASKS:
        for i in range(20):
            (ids, targets), (moved, wanted) = (mixed(perturb=perturb).render(task, 0, i) for perturb in (None, next_code))
            first, past = VOCAB.image_rows
            expected = [first + (x - first + 1) % 16 if first <= x < past and task == "t2i" else x for x in ids]
            assert moved == expected
            assert wanted == [t if t == IGNORE else x for t, x in zip(targets, moved[1:] + [IGNORE])]


def test_the_built_in_mix_is_packed_tightly():
    """Padding is bought and thrown away: at most 5% of it, and the mix of examples is the one asked for."""
    train = data.built_in(0, train=300, val=1, unseen=0)["train"]
    words = [*train.texts, *(c for p in train.pictures for c in p.captions), data.DRAW * 3, data.CAPTION * 3,
             *(w for p in train.pictures for talk in p.talks for pair in talk for w in pair)]
    tokenizer = WordTokenizer.learn(words)
    for p in train.pictures:
        p.codes = torch.zeros(4, 4, dtype=torch.int64)
    mix = {"t2i": 4, "i2t": 2, "vqa": 2, "text": 2}
    tasks = {task: train.texts if task == "text" else train.pictures for task in mix}
    loader = Loader(tasks, mix, tokenizer.vocab(16), tokenizer, 8, 256)
    batches = [batch for batch, _ in take(loader, 30)]
    assert np.mean([(batch.documents == -1).float().mean() for batch in batches]) < 0.05
    drawn = sum(loader.drawn.values())
    assert abs(loader.drawn["t2i"] / drawn - 0.4) < 0.05 and loader.dropped < 0.02 * drawn


def test_one_example_of_each_task_is_shown_with_what_is_learned_underlined(capsys):
    """`python data.py` that shows a reader something else than what the model sees, or nothing."""
    data.show()
    _, *parts = re.split(f"^({'|'.join(data.TASKS)}): ", capsys.readouterr().out, flags=re.M)
    assert tuple(parts[::2]) == data.TASKS
    shown = {task: words.removesuffix("\n\n") for task, words in zip(parts[::2], parts[1::2])}
    learned = {task: "".join(re.findall("\033\\[4m(.*?)\033\\[0m", words, re.S)) for task, words in shown.items()}
    codes = "".join(f"[{i}]" for i in range(16))
    assert data.DRAW in shown["t2i"] and learned["t2i"] == codes + "<eoi><eos>"
    assert f"<boi>{codes}<eoi>{data.CAPTION}" in shown["i2t"]
    assert data.read_description(learned["i2t"].removesuffix("<eos>"))
    assert learned["vqa"].endswith("\n<eos>") and "?" in shown["vqa"] and "?" not in learned["vqa"]
    assert f"<bos>{learned['text']}" == re.sub("\033\\[[04]m", "", shown["text"])


def new_threads(before):
    return [t for t in threading.enumerate() if t not in before]


def test_reading_ahead_changes_nothing_and_ends():
    """Batches out of order, a last one that is lost, or a thread that stays behind."""
    before = threading.enumerate()
    assert list(data.ahead(iter(range(20)))) == list(range(20)) and list(data.ahead(iter([]))) == []
    for thread in new_threads(before):
        thread.join(2)
    assert not new_threads(before)


def failing(n):
    yield from range(n)
    raise OSError("disk")


def test_reading_ahead_hands_over_exceptions():
    """A broken disk that looks like the end of the data, or batches lost that were read before it broke."""
    seen = []
    with pytest.raises(OSError, match="disk"):
        for item in data.ahead(failing(5)):
            seen.append(item)
    assert seen == list(range(5))


@pytest.mark.parametrize("source", [itertools.count, partial(failing, 2), partial(failing, 3)])
def test_reading_ahead_stops_its_thread_when_nobody_reads(source):
    """A thread that reads on after its reader has gone, and aborts the exit of the process."""
    before = threading.enumerate()
    stream = data.ahead(source(), depth=1)
    assert next(stream) == 0
    time.sleep(0.2)         # until the thread waits for room
    stream.close()
    for thread in new_threads(before):
        thread.join(2)
    assert not new_threads(before)
