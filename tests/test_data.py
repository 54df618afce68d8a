"""Between files and ids: scenes, vocabulary, tokenizers, templates, pictures, sources, shards, loader."""

import io
import itertools
import json
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
from PIL import EpsImagePlugin, Image

import data
from data import IGNORE, Loader, Object, Picture, Scene, Vocab, WordTokenizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
brief = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def png(color=RED):
    return saved(Image.new("RGB", (4, 4), color), "PNG").getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(function, argument, *words):
    """With one sentence that has these words."""
    with pytest.raises(ValueError) as caught:
        function(argument)
    message = str(caught.value)
    assert all(str(word) in message for word in words) and "\n" not in message, message


def dumped(value):
    """As JSON keeps it, pictures as their codes."""
    return json.loads(json.dumps(value, default=lambda x: getattr(x, "codes", x).tolist()))


# -----------------------------------------------------------------------------------------------------------
# Scenes

@pytest.mark.parametrize("side", [64, 32])
def test_grade_inverts_draw(side):
    """A flawless drawing, or one with the grain of a tokenizer, counts as wrong."""
    rng = np.random.default_rng(0)
    for i in range(200):
        scene = data.random_scene(random.Random(i), unseen=i % 2)
        image = data.draw(scene, side)
        noisy = np.asarray(image) + rng.normal(0, 0.3 * side, (side, side, 3))
        assert image.size == (side, side) and data.grade(image) == data.grade(noisy) == scene


def test_read_description_inverts_describe():
    """A right caption scores nothing for its phrasing; half of one, or a denial, is scored as a scene."""
    openings, square = set(), "a small red square at the top left"
    for i in range(900):
        scene = data.random_scene(random.Random(i), unseen=i % 3 == 0)
        caption = data.describe(scene, random.Random(f"{i}/x"))
        assert data.read_description(caption) == scene, caption
        openings.add((" at the " in caption, caption[:4] == "on a", caption.endswith("background")))
    assert len(openings) == 3
    for caption in ("", square, "on a white background", "a small red square on a white background",
                    f"{square} and a large blue star on a white background",        # one without a place
                    f"{square} on a white background on a navy background", f"{square} on a brown background",
                    f"{square} and a large blue star at the top left on a pink background",
                    f"{square} and a huge thing at the top right on a white background",
                    f"not {square} on a white background"):
        assert data.read_description(caption) is None, caption


@pytest.mark.parametrize("count", [0, 3, 12])
def test_built_in_splits(count):
    """Training sees what is held out, names pairs that composition is scored on, or changes with its size."""
    withheld, (train, val, unseen) = data.PAIRS[:count], data.built_in(0, 64, count, 800, 50, 50).values()
    assert not {p.scene for p in train.pictures} & {p.scene for p in val.pictures}
    assert val.texts and not set(train.texts) & set(val.texts) and len(set(data.PAIRS)) == 24
    few = data.built_in(0, 64, count, 9, 50, 0)["train"].pictures
    assert len(few) > 9 and repr(few) == repr(train.pictures[:len(few)])

    def names_one(text):
        return any(re.search(rf"\b{color} {shape}\b", text) for color, shape in withheld)
    for p in train.pictures + val.pictures:
        assert not any((o.color, o.shape) in withheld for o in p.scene.objects)
        parts = [part for talk in p.dialogues + p.edits for part in data.parts_of(talk)]
        assert not any(map(names_one, p.captions + [part for part in parts if isinstance(part, str)]))
    assert not any(map(names_one, train.texts)) and len(unseen.pictures) == 100 * (count > 0)
    for p, before in zip(unseen.pictures[::2], unseen.pictures[1::2]):
        for scene, number in ((p.scene, 1), (before.scene, 0)):
            assert [(o.color, o.shape) in withheld for o in scene.objects].count(True) == number
        assert all(map(names_one, p.captions)) and before.edits[0][0][1] == [p]


def test_answers_are_true():
    """A false answer is learned and scored as the truth, or a question asks for the color of nothing."""
    objects = [Object("small", "red", "square", "top left"), Object("large", "blue", "star", "top right"),
               Object("large", "blue", "square", "bottom left")]
    place = {"what is the background?": "pink", "how many shapes are there?": "three"}
    for where, thing, shape, color in (("top left", "a small red square", "square", "red"),
                                       ("top right", "a large blue star", "star", "blue"),
                                       ("bottom left", "a large blue square", "square", "blue"),
                                       ("bottom right", "nothing", "none", None)):
        place |= {f"what is at the {where}?": thing, f"which shape is at the {where}?": shape,
                  f"is there anything at the {where}?": "yes" if color else "no"}
        place |= {f"what color is the shape at the {where}?": color} if color else {}
    asked = data.questions(Scene("pink", tuple(objects)), random.Random(0))
    assert dict(asked["place"]) == place
    assert dict(asked["named"]) == {        # nothing about "the square" or "the blue shape": there are two
        "how many squares are there?": "two", "how many stars are there?": "one",
        "which shape is red?": "square", "what color is the star?": "blue",
        "where is the star?": "top right", "is the star small or large?": "large"}
    there = {f"is there a {o.color} {o.shape}?" for o in objects}
    assert {question for question, reply in asked["exists"] if reply == "yes"} == there
    assert len(asked["exists"]) == 6 and {reply for _, reply in asked["exists"]} == {"yes", "no"}


def test_edits():
    """An instruction that another scene answers as well, that changes two things, or leads to a withheld pair."""
    kinds = set()
    for i in range(600):
        rng = random.Random(i)
        before = data.random_scene(rng)
        after = data.change(before, rng)
        assert len(before.facts() ^ after.facts()) in (2, 4)        # a move changes two places
        assert not any((o.color, o.shape) in data.PAIRS[:3] for o in after.objects)
        there, back = (data.instruct(*pair, rng) for pair in ((before, after), (after, before)))
        assert obey(before, there) == after and obey(after, back) == before, there
        kinds.add(there.split()[0])
    assert kinds == {"make", "change", "add", "put", "remove", "take", "turn", "move"}


KNOWN = dict(size=data.SIZES, color=data.COLORS, shape=data.SHAPES, place=data.PLACES)


def obey(scene, words):
    """What a person makes of an instruction."""
    find = re.compile("|".join(itertools.chain(*KNOWN.values()))).findall
    if "background" in words:
        return scene._replace(background=words.split()[-1])
    at = {o.place: o for o in scene.objects}
    if re.match("(add|put) a ", words):
        at[find(words)[3]] = Object(*find(words))
    else:
        name, value = re.fullmatch(r"(?:make|change|turn|move|put|remove|take away) (the shape at the \w+ \w+|"
                                   r"the .*?(?:circle|square|triangle|star))(.*)", words).groups()
        old, = [o for o in scene.objects if {*find(name)} <= {*o}]
        del at[old.place]
        for new in find(value):
            moved = old._replace(**{next(k for k, known in KNOWN.items() if new in known): new})
            at[moved.place] = moved
    return Scene(scene.background, tuple(at[place] for place in data.PLACES if place in at))


# -----------------------------------------------------------------------------------------------------------
# Vocabulary and tokenizers

VOCAB = Vocab(300, 301, 302, boi=303, eoi=304, uncond=305, eol=306, image_start=400, image_size=16)


@pytest.mark.code_to_id
def test_vocabulary():
    """Codes come back as others or share their rows with words or marks, or a word is decoded as a code."""
    codes = torch.arange(16).view(2, 2, 4)
    ids = VOCAB.codes_to_ids(codes)
    assert torch.equal(ids, codes + 400) and ids.dtype == torch.int64 and not VOCAB.codes_to_ids([]).numel()
    assert torch.equal(VOCAB.ids_to_codes(ids), codes)
    for wrong in ([-1, 0], [15, 16]):
        refused(VOCAB.codes_to_ids, wrong, "image range")
        refused(VOCAB.ids_to_codes, torch.tensor(wrong) + 400, "image range")
    vocab = Vocab.extend(100, 8, bos=1, eos=2, pad=0)
    marks = [vocab.boi, vocab.eoi, vocab.uncond, vocab.eol]
    assert (vocab.image_rows, sorted(marks), vocab.size) == ((100, 108), [108, 109, 110, 111], 112)
    assert WordTokenizer(["aa", " b"]).vocab(8) == Vocab.extend(3 + 256 + 2, 8, bos=1, eos=2, pad=0)
    assert VOCAB.size == 416 and Vocab(**dumped(asdict(VOCAB))) == VOCAB    # marks among words, as Liquid's


WORDS = WordTokenizer.learn(["the cat, the cat. The\ncat été中文 😀😀 ... x² \u3000 \ud800"] * 3)


@brief
@hypothesis.given(st.text(st.characters() | st.sampled_from(" aé\n")))      # surrogates, too
@hypothesis.example("the cat\r\n\t_a1 b\u3000c x\ud800\udc00 \ud800 été")
def test_any_text_comes_back(text):
    """Spaces or accents are lost between a caption and its ids, or a lone surrogate ends the run."""
    assert WORDS.decode(WORDS.encode(text)) == text.encode("utf-8", "replace").decode()


def test_words_and_bytes():
    """A rare word takes a row, a common one is spelled in bytes, or a loaded tokenizer has other ids."""
    tokenizer = WordTokenizer.learn(["the cat é!"] * 3 + ["a dog"] * 2)
    assert set(tokenizer.words) == {"the", " cat", " é"}
    assert len(tokenizer.encode("the cat")) == 2
    assert tokenizer.encode("the dög")[1:] == [3 + b for b in " dög".encode()]
    assert len(WordTokenizer.learn(["a b c d"] * 3, size=2).words) == 2
    loaded = data.load_tokenizer(dumped(tokenizer.state()))
    assert loaded.encode("the cat sat") == tokenizer.encode("the cat sat") and loaded.size == tokenizer.size
    assert WordTokenizer([" cat"]).decode([0, 1, 2, 3 + 0xff, 259, 3 + 0xc3]) == "\ufffd cat\ufffd"


def test_words_in_transformers(tmp_path):
    """An exported model gets other ids from AutoTokenizer than it was trained on."""
    WORDS.save_pretrained(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == WORDS.size
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    rng = random.Random(0)
    pieces = [*"ab1_ \n\t\r,.!²ª½Ⅳ😀\u0301\u3000\u2028", "the", " cat", "été", "中文", "👩‍👧", "हिन्दी", " ..."]
    for text in ["", "the cat, the cat.\n\n  The", *("".join(rng.choices(pieces, k=9)) for _ in range(500))]:
        ids = WORDS.encode(text)
        assert theirs(text).input_ids == ids and theirs.decode(ids) == text, repr(text)


# What published templates do: marks around turns; a default system prompt, a thought in the last reply alone,
# and the opening of one more reply.
PLAIN = """{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end>
{% endfor %}"""
FULL = """{{ bos_token }}<turn>system
Be good.<end>{% for m in messages %}<turn>{{ m.role }}<text>
{% if loop.last %}<think></think>{% endif %}{{ m.content }}<end>{% endfor %}<turn>assistant<text>
"""
CHATS = {None: data.Chat(),
         PLAIN: data.Chat("<turn>user\n", "<end>\n<turn>model\n", "<end>\n", "<turn>user\n", ""),
         FULL: data.Chat("<turn>system\nBe good.<end><turn>user<text>\n",
                         "<end><turn>assistant<text>\n<think></think>", "<end>", "<turn>user<text>\n", "")}
SPECIAL = {"<bos>": 256, "<turn>": 257, "<end>": 258, "<text>": 259}


def published(folder, template=None):
    """A tokenizer of bytes and SPECIAL, which asks for truncation, padding and <bos>, in a folder."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL))
    bpe.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 256)])
    bpe.enable_truncation(4)
    bpe.enable_padding(length=64)
    options = dict(tokenizer_object=bpe, bos_token="<bos>", chat_template=template)
    transformers.PreTrainedTokenizerFast(**options).save_pretrained(folder)
    put(folder / "tokenizer.json", bpe.to_str())
    return folder


@pytest.mark.parametrize("template", CHATS, ids=["none", "plain", "full"])
def test_published_tokenizer(tmp_path, template):
    """Another model's turns, endless replies, or text that is cut, padded or taken for the mark it spells."""
    tokenizer, mark = data.PretrainedTokenizer.load(published(tmp_path, template)), "|".join(SPECIAL)
    for t in (tokenizer, data.load_tokenizer(dumped(tokenizer.state()))):
        assert t.chat == CHATS[template] and list(t.stops) == ([t.id("<end>")] if template else [])
        for text in ("", " <end>\n<turn>model\nno", "\n é😀  " * 9, *SPECIAL, *t.chat):
            ids = t.encode(text)
            assert len(ids) == len(text.encode()) and max(ids, default=0) < 256 and t.decode(ids) == text
        for text in t.chat:
            assert [i for i in t.marks(text) if i >= 256] == [SPECIAL[m] for m in re.findall(mark, text)]
            assert t.decode(t.marks(text)) == re.sub(mark, "", text)


def test_published_folder(tmp_path):
    """Texts end with another token than the model knows, or half a download ends in a traceback."""
    refused(data.PretrainedTokenizer.load, tmp_path, tmp_path)
    put(published(tmp_path) / "tokenizer.json", "{")
    refused(data.PretrainedTokenizer.load, tmp_path, tmp_path)
    refused(data.special_ids, tmp_path, tmp_path, "eos_token_id")
    put(tmp_path / "generation_config.json", '{"bos_token_id": 1, "eos_token_id": [5, 6]}')
    assert data.special_ids(tmp_path) == {"bos": 1, "eos": 5, "pad": 5}
    put(tmp_path / "config.json", '{"bos_token_id": null, "eos_token_id": 7, "pad_token_id": 0}')
    assert data.special_ids(tmp_path) == {"bos": 1, "eos": 7, "pad": 0}


# -----------------------------------------------------------------------------------------------------------
# Templates, each against its layout written out by hand; the tokenizer is one id a byte

class Bytes:
    chat, stops = data.Chat("U:", "M:", "E", "A:", "~"), ()

    def encode(self, text):
        return list(text.encode())

    def marks(self, text):
        return self.encode(text)


class Pairs(Bytes):
    """Two characters an id, so that an odd prompt could swallow the first of its answer."""
    def encode(self, text):
        return [int.from_bytes(pair.encode(), "big") for pair in re.findall("..?", text, re.DOTALL)]


CODES = torch.tensor([[3, 0], [15, 7]])
PICTURE = [303, 403, 400, 415, 407, 304]       # <boi>, raster order, <eoi>
TURNS = [(["how?"], ["so", CODES]), ([CODES, "why?"], [CODES])]


@pytest.mark.answer_loss
@pytest.mark.parametrize("render, given, layout", [
    pytest.param(data.render_t2i, ["a dog", CODES], [
        ([300, *b"a dog Generate an image based on this description.", 303], 0), ([*PICTURE[1:], 301], 1)],
                 marks=pytest.mark.t2i_template),
    pytest.param(data.render_t2i, [None, CODES], [([300, 305, 303], 0), ([*PICTURE[1:], 301], 1)],
                 marks=pytest.mark.t2i_template),
    (data.render_i2t, [CODES, "a dog"],
     [([300, *PICTURE, *b"The caption of this image is:"], 0), ([*b"a dog", 301], 1)]),
    (data.render_dialogue, [[([CODES, "how?"], ["so"]), (["why?"], ["no"])]],
     [([300, *b"U:", *PICTURE, *b"\nhow?M:"], 0), (b"~soE", 1), (b"A:why?M:", 0), ([*b"~noE", 301], 1)]),
    (data.render_dialogue, [TURNS],
     [([300, *b"U:how?M:"], 0), ([*b"~so", *PICTURE, *b"E"], 1), ([*b"A:", *PICTURE, *b"\nwhy?M:"], 0),
      ([*PICTURE, *b"E", 301], 1)]),
    (data.render_text, ["a dog"], [([300], 0), ([*b"a dog", 301], 1)])],
    ids=["t2i", "uncond", "i2t", "vqa", "edit", "text"])
def test_layout(render, given, layout):
    """Loss on the prompt, none on the answer's end, targets one place off, or words without condition."""
    ids = [i for part, _ in layout for i in part]
    answer = [i if learned else IGNORE for part, learned in layout for i in part]
    assert render(VOCAB, Bytes(), *given) == (ids, answer[1:] + [IGNORE])


@pytest.mark.answer_loss
@pytest.mark.parametrize("tokenizer", [Bytes(), Pairs()], ids=["bytes", "pairs"])
@pytest.mark.parametrize("render, unanswered, answered", [
    (data.render_t2i, ["a dog"], ["a dog", CODES]), (data.render_t2i, [None], [None, CODES]),
    (data.render_i2t, [CODES], [CODES, "no"]), (data.render_text, ["a ", False], ["a dog"]),
    (data.render_dialogue, [[([CODES, "how?"], None)]], [[([CODES, "how?"], ["no"]), (["why?"], ["so"])]]),
    (data.render_dialogue, [[(["how?"], None)]], [TURNS]),
    (data.render_dialogue, [[TURNS[0], (TURNS[1][0], None)]], [TURNS])])
def test_prompts_are_prefixes(tokenizer, render, unanswered, answered):
    """A prompt that training never had, or that ends elsewhere than where its answer is learned."""
    prompt, whole, targets = render(VOCAB, tokenizer, *unanswered)[0], *render(VOCAB, tokenizer, *answered)
    n = len(prompt)
    assert n < len(whole) and whole[:n] == prompt and targets[n - 1] == whole[n]


# -----------------------------------------------------------------------------------------------------------
# Pictures

def two(mode, *values, palette=None):
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    if palette:
        image.putpalette(palette)
    return image


TURNED = Image.Exif()
TURNED[0x0112] = 6              # left is up
LATER = dict(save_all=True, append_images=[Image.new("RGB", (2, 1), WHITE)])
WIDE = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))


@pytest.mark.parametrize("image, format, options, shown", [
    (two("P", 0, 1, palette=[*RED, *BLUE]), "GIF", {}, [RED, BLUE]),
    (two("P", 0, 1, palette=[*RED, *BLUE]), "PNG", {"transparency": 1}, [RED, WHITE]),
    (two("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)), "PNG", {}, [WHITE, RED]),
    (two("LA", (0, 128), (7, 255)), "PNG", {}, [(127, 127, 127), (7, 7, 7)]),
    (two("RGB", RED, BLUE), "PNG", {"transparency": RED}, [WHITE, BLUE]),
    (two("L", 0, 9), "PNG", {}, [(0, 0, 0), (9, 9, 9)]), (two("1", 0, 1), "PNG", {}, [(0, 0, 0), WHITE]),
    (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", {"quality": 100}, [RED] * 64),
    (WIDE, "PNG", {}, [(0, 0, 0), (100, 100, 100), WHITE]),
    (two("RGB", RED, BLUE), "PNG", {"exif": TURNED}, [RED, BLUE, "turned"]),
    (two("RGB", RED, BLUE), "WEBP", {"exif": TURNED, "lossless": True}, [RED, BLUE, "turned"]),
    (two("RGB", RED, BLUE), "GIF", LATER, [RED, BLUE]),
    (two("RGB", RED, BLUE), "WEBP", LATER | {"lossless": True}, [RED, BLUE])])
def test_pictures_are_read_as_they_are_shown(image, format, options, shown):
    """Palette numbers as gray, hidden colors, black behind logos, white scans, photographs on their side."""
    result = data.load_image(saved(image, format, **options))
    found = [result.getpixel((x, y)) for y in range(result.height) for x in range(result.width)]
    assert result.mode == "RGB" and found + ["turned"] * (result.height == 2) == shown


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))


@brief
@hypothesis.given(st.binary(max_size=60), st.sampled_from(["PNG", "JPEG", "WEBP"]))
@hypothesis.example(b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0" + bytes(4), "JPEG")
def test_good_pixels_are_read_whatever_stands_beside_them(noise, format):
    """A camera's broken notes, or a profile that is too large, cost a good picture."""
    for options in ({"exif": b"Exif\0\0" + noise}, {"icc_profile": noise + bytes(2_000_000 * (format == "PNG"))}):
        assert data.load_image(saved(NOISE, format, **options)).size == (20, 20)


@pytest.mark.parametrize("numbers", [np.linspace(0, 1, 9, dtype=np.float32), np.arange(9, dtype=np.int32)])
def test_numbers_without_a_white_are_refused(numbers):
    """Depths and measurements become black pictures."""
    refused(data.load_image, saved(Image.fromarray(numbers.reshape(3, 3)), "TIFF"), "8 or 16 bits")


def test_crop_square():
    """--pad cuts edges off, a crop lies beside the centre, a strip shrinks to nothing or takes all memory."""
    stripes = Image.fromarray(np.repeat(np.array([[RED, WHITE, BLUE]], np.uint8), 16, 1).repeat(16, 0))
    padded = np.asarray(data.crop_square(stripes, 48, True))
    assert (padded[16:32] == np.asarray(stripes)).all() and (padded[[0, 15, 32, 47]] == (122, 116, 104)).all()
    assert (np.asarray(data.crop_square(stripes, 48))[:, 8:40] == WHITE).all()
    for pad in (False, True):
        assert (np.asarray(data.crop_square(NOISE, 20, pad)) == np.asarray(NOISE)).all()
        for size in ((1, 1), (3, 2), (2000, 1), (1, 200_000)):
            assert data.crop_square(Image.new("RGB", size, RED), 32, pad).size == (32, 32)


def test_to_image_inverts_to_pixels():
    """A shade is lost on the way, too bright pixels wrap round to black, or a sheet lacks its last row."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    values[..., 1] = values[..., 1].T
    pixels = data.to_pixels(Image.fromarray(values))
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert all((np.asarray(data.to_image(p)) == values).all() for p in (pixels, pixels[0]))
    white, black = (data.to_image(torch.full((3, 2, 1), outside)) for outside in (9.0, -9.0))
    sheet = np.asarray(data.contact_sheet([black, white, black], 2, gap=1))[..., 0]
    assert sheet.tolist() == [[0, 255, 255]] * 2 + [[255] * 3] + [[0, 255, 255]] * 2


def huge(side):
    """A PNG whose header promises side x side pixels."""
    raw = bytearray(png())
    raw[16:24] = struct.pack(">II", side, side)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
CUT = [saved(NOISE, kind).getvalue()[:-200] for kind in ("PNG", "JPEG", "WEBP", "GIF")]


@pytest.mark.parametrize("raw", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", EPS,
                                 huge(11_000), huge(20_000), *CUT], ids=lambda raw: raw and str(len(raw)))
def test_unreadable_picture(tmp_path, monkeypatch, raw):
    """A traceback that names no file, a header that takes all memory, or a program in PostScript runs."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: Image.new("RGB", (8, 8)).im)
    file = tmp_path / "broken.png" if raw is None else put(tmp_path / "broken.png", raw)
    refused(data.load_image, file, f"{file}: not a readable picture")


def test_reading_by_threads(tmp_path):
    """Pixels slip to the next picture when one cannot be read, or it is left out without a word."""
    files = [put(tmp_path / f"{i}.png", raw) for i, raw in enumerate((png(RED), "nothing", png(WHITE)))]
    pictures = [Picture(str(f), partial(data.load_image, f)) for f in files]
    (some, why), (none, _), (twice, _) = data.read_pixels(pictures, [[2, 1, 0], [1], [0, 0]], 8, threads=2)
    assert some.shape == twice.shape == (2, 3, 8, 8) and some.dtype == torch.uint8 and none is None
    assert [tuple(x[:, 0, 0].tolist()) for x in (*some, *twice)] == [WHITE, RED, RED, RED]
    assert list(why) == [1] and str(files[1]) in why[1] and len(data.first_images(pictures, 2)) == 2


def test_reading_ahead():
    """Results out of order, an error that looks like the end, all read at once, or a thread left over."""
    threads, started, seen = threading.active_count(), [], []

    def slow(i):
        started.append(i)
        time.sleep(0.05)
    assert list(data.ahead(str, range(20), 3)) == list(map(str, range(20))) and not list(data.ahead(str, []))
    with pytest.raises(ZeroDivisionError):
        seen.extend(data.ahead(lambda i: 1 // i, (4, 3, 2, 1, 0, 1), 2))
    stream = data.ahead(slow, itertools.count())
    next(stream)
    stream.close()
    assert len(started) <= 5 and threading.active_count() == threads and seen == [0, 0, 0, 1]


# -----------------------------------------------------------------------------------------------------------
# Sources

def talks(pictures, kind="dialogues"):
    """Dialogues of each picture, each turn a flat list of words and of keys of pictures."""
    return [[[[getattr(part, "key", part) for part in data.parts_of([turn])] for turn in talk]
             for talk in getattr(p, kind)] for p in pictures]


def tar_of(path, members):
    """members: {name: content, or a type and target of a link}"""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info, raw = tarfile.TarInfo(name), content.encode() if isinstance(content, str) else content
            if isinstance(content, tuple):
                (info.type, info.linkname), raw = content, b""
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


FILES = {"a.png": png(), "a.txt": " one \n\ntwo\r\none\n", "deep/er/B.JPG": png(BLUE),
         "deep/er/B.json": json.dumps({"caption": "blue", "qa": [["what?", "sea"], ["how?", "so"]]}),
         "c.d.webp": png(), "c.d.Caption": "\ufeffsame", "c.d.json": '\ufeff{"caption": "same"}',
         "e.jpeg": png(), "e.jpeg.txt": "five", "e.cap.txt": "5", "notes.txt": "", "._a.png": "", "@eaDir/a.png": "", "__MACOSX/a.png": ""}


@pytest.mark.parametrize("prefix", [None, "", "./"])       # the last is how `tar cf x.tar .` spells names
def test_files(tmp_path, prefix):
    """Captions beside the wrong picture, one passed over for its suffix, or a companion taken for one."""
    if prefix is None:
        path = [put(tmp_path / "x" / name, content) for name, content in FILES.items()] and tmp_path / "x"
    else:
        path = tar_of(tmp_path / "x.tar", {prefix + name: content for name, content in FILES.items()})
    found = {p.key: (p.captions, talks([p])[0], p.open().getpixel((0, 0))) for p in data.read_pictures(path)}
    assert found == {"a": (["one", "two"], [], RED), "c.d": (["same"], [], RED), "e": (["5", "five"], [], RED),
                     "deep/er/B": (["blue"], [[["deep/er/B", "what?", "sea"]], [["deep/er/B", "how?", "so"]]], BLUE)}


def test_tars(tmp_path):
    """Files of one name in two tars are taken for one another, or a stranger's tar leads out of itself."""
    secret, outside = str(put(tmp_path / "secret.png", png(BLUE))), str(tmp_path / "absolute.png")
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    links = {f"x/link{i}.png": (kind, secret) for i, kind in enumerate(kinds)}
    tars = put(tmp_path / "tars" / "note", "").parent
    tar_of(tars / "0.tar", links | {"x/0.png": png(), "x/0.txt": "first", outside: png(), "x/1.cls": "3"})
    tar_of(tars / "1.tar", {"x/0.txt": "second", "x/0.JPG": png(BLUE), "broken.webp": "nothing"})
    broken, *good = sorted(data.read_pictures(tars), key=lambda p: "broken" not in p.name)
    found = [(*p.captions, p.open().getpixel((0, 0))) for p in good]
    assert sorted(found, key=str) == [("first", RED), ("second", BLUE), (RED,)]
    refused(lambda p: p.open(), broken, f"{tars / '1.tar'}:broken.webp")
    assert len(data.read_pictures(tars / "1.tar")) == 2 and len(list(tmp_path.iterdir())) == 2


def test_rows(tmp_path):
    """A published list has to be rewritten first, or a line is cut in two within its caption."""
    for name in "abcd":
        put(tmp_path / "sub" / f"{name}.png", png())
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Blue."},
             {"from": "human", "value": "And this?"}, {"from": "gpt", "value": "Red."}]
    parts = [{"type": "image", "image": "sub/b.png"}, {"type": "text", "text": " make it blue"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "image", "image": "sub/d.png"}]},
                {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "Yes."}]
    rows = [{"image": "sub/a.png", "text": "ours\u2028\x85one line"},
            {"image_path": "sub/b.png", "text_prompt": "Liquid's"},
            {"image": "sub/c.png", "conversations": turns},
            {"data_type": "t2i", "text": "encoded", "vqcode_512": str(list(range(16)))},
            {"data_type": "t2i", "text": "encoded", "vqcode_512": [[3, 1], [2, 0]]},
            {"image": "sub/../sub/a.png", "text": "again"},         # as in COCO, a picture has many captions
            {"messages": messages}]
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    ours, raw, edited, llava, flat, square = data.read_pictures(put(tmp_path / "x.jsonl", "\ufeff" + lines + "\n"))
    assert ours.captions == ["ours\u2028\x85one line", "again"] and raw.captions == ["Liquid's"]
    assert talks([llava]) == [[[["sub/c", "What is it?", "Blue."], ["And this?", "Red."]]]]
    talk = [["Be brief.", "sub/b", "make it blue", "sub/b"], ["thanks", "Yes."]]    # one key for both
    assert talks([raw], "edits") == [[talk]] and raw.edits[0][0][1] == [edited] and "d.png" in edited.name
    assert all(p.open().getpixel((0, 0)) == RED and p.codes is None for p in (ours, raw, llava))
    assert flat.captions == ["encoded"] and torch.equal(flat.codes, torch.arange(16).view(4, 4))
    assert square.codes.tolist() == [[3, 1], [2, 0]] and square.codes.dtype == torch.int64


def own(tmp_path, files):
    """The same files as a folder and as a tar."""
    for name, content in files.items():
        put(tmp_path / "own" / name, content)
    return tmp_path / "own", tar_of(tmp_path / "own.tar", files)


def said(path):
    return {p.key: (p.captions, talks([p])[0]) for p in data.read_pictures(path)}


META = {"a.png": png(), "sub/b.jpg": png(BLUE), "c.png": png(), "c.txt": "beside"}


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n{"file_name": "./sub/b.jpg", "text": "two\\nlines"}'),
    ("metadata.csv", 'file_name,text\na.png,one\nsub/../sub/b.jpg,"two\nlines"\n'),
    ("metadata.csv", '\ufefftext,file_name,license\r\none,a.png\r\n"two\r\nlines",sub/b.jpg,x,y\r\n')])
def test_an_image_folder_and_a_tar_of_it(tmp_path, name, text):
    """Captions that another tool wrote into one list are read by nobody, or read from a folder alone."""
    for path in own(tmp_path, META | {name: text}):
        assert said(path) == {"a": (["one"], []), "sub/b": (["two\nlines"], []), "c": (["beside"], [])}
    rows = {p.key: p.captions for p in data.read_pictures(tmp_path / "own" / name)}     # the list itself
    assert rows == {"a": ["one"], "sub/b": ["two\nlines"]}


def test_what_is_left_out_is_counted(tmp_path):
    """Half of somebody's pictures are never seen, and nobody is told."""
    files = META | {"a.bmp": png(), "d.psd": "x", "e.psd": "x", "._a.png": "", "README": "x", "f.txt": "alone",
                    "g.JPE": png(), "h.apng": png(), "c.json": '{"qa": [{"question": "q", "answer": "a"}]}'}
    for path in own(tmp_path, files):
        data.load_source(path, say=(lines := []).append)
        found, left_out = lines[0].split("left out: ")
        assert found == f"{path}: 5 pictures, 1 with captions, 1 with questions; 0 texts of {path}; "
        assert set(left_out.split(", ")) == {"1 .png", "2 .psd", "1 hidden", "1 no ending", "1 .txt without a picture"}
    put(tmp_path / "bare" / "a.png", png())
    refused(data.load_source, tmp_path / "bare", "1 pictures, 0 with captions, 0 with questions")


ASK, SAY = {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}
SYSTEM, CHAT = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("turns, wanted", [
    ([ASK, SAY], [["a", "q", "a"]]), ([SYSTEM, ASK, SAY, ASK, CHAT], [["s", "a", "q", "a"], ["q", "b"]]),
    ([ASK, ASK, SAY], [["a", "q", "q", "a"]]), ([SYSTEM, SAY], [["a", "s", "a"]]),
    ([SAY, ASK, SAY], [["a", "a", "q", "a"]]), ([ASK, SAY, ASK], [["a", "q", "a"]]), ([SAY, ASK], None), ([{"from": "x", "value": "q"}, SAY], None)])
def test_who_speaks_decides_what_is_learned(tmp_path, turns, wanted):
    """The model learns to say what its user said, because somebody else began to talk."""
    file = put(tmp_path / "x.json", json.dumps([{"image": "a.png", "conversations": turns}]))
    if wanted is None:
        refused(data.read_pictures, file, file, "line 1")
    else:
        assert talks(data.read_pictures(file)) == [[wanted]]


def test_rows_without_a_picture(tmp_path):
    """Published mixtures do not load for their rows of words, or lose them without a word."""
    rows = [{"image": "a.png", "prompt": " one "}, {"id": 1, "image": "", "conversations": [ASK, SAY]},
            {"data_type": "text_pretrain", "text": " words ", "vqcode_512": "no"},
            {"data_type": "t2i", "text": "drawn", "vqcode_512": "[1, 2, 3, 4]"}]
    lines = "\n".join(map(json.dumps, rows))
    for file in (put(tmp_path / "x.json", json.dumps(rows)), put(tmp_path / "x.jsonl", lines)):
        found = data.read_pictures(file)
        assert [p.captions for p in found] == [["one"], ["drawn"]] and found.texts == ["words"]
        assert found.left_out == {"dialogues without a picture": 1}
        assert data.load_source(file)["val"].texts == ["words"]
    assert data.read_texts(put(tmp_path / "t.json", '[{"text": "one"}, {"text": "two"}]')) == ["one", "two"]
    for text in ('{"text": "one"}', '["one"]', "one", '[{"words": "one"}]'):
        refused(data.read_texts, put(tmp_path / "t.json", text), "t.json")


def test_a_picture_is_what_it_is_and_not_where_it_is_listed(tmp_path):
    """One file under two spellings is learned and held out, or a longer list moves what was held out."""
    spellings = ("a/b.png", "./a/b.png", "a/../a//b.png", str(tmp_path / "a" / "b.png"), "a/b.jpg")
    rows = [{"image": image, "text": str(i)} for i, image in enumerate(spellings)]
    rows += [{"vqcode_512": [i % 3] * 4, "text": f"c{i}"} for i in range(4)]
    ways = [data.read_pictures(put(tmp_path / "x.json", json.dumps(order))) for order in (rows, rows[::-1])]
    one, other = ({p.key: sorted(p.captions) for p in way} for way in ways)
    assert one == other and one.pop("a/b") == list("01234")
    assert sorted(one.values()) == [["c0", "c3"], ["c1"], ["c2"]]


@pytest.mark.parametrize("mode, name", [("w", "x.tar"), ("w:gz", "x.tar.gz"), ("w:gz", "x.TGZ"), ("w:gz", "x.tar"),
                                        ("w:xz", "x.tar.xz")])
def test_packed_and_linked_tars(tmp_path, mode, name):
    """A hub's symlinks and deduplicated copies are dropped in silence, or a packed tar has to be unpacked first."""
    with tarfile.open(tmp_path / name, mode) as tar:
        for file, kind, content in ((".", tarfile.DIRTYPE, ""), ("./s/a.png", tarfile.SYMTYPE, "../blobs/1.png"),
                                    ("./blobs/1.png", None, png(BLUE)), ("./s/a.txt", None, b"blue"),
                                    ("./b.png", tarfile.LNKTYPE, "./blobs/1.png"),
                                    ("./c.png", tarfile.SYMTYPE, "/etc/passwd"),
                                    ("./d.png", tarfile.SYMTYPE, "d.png")):
            info = tarfile.TarInfo(file)
            if kind:
                info.type, info.linkname = kind, content
            info.size = 0 if kind else len(content)
            tar.addfile(info, io.BytesIO(b"" if kind else content))
    for path in (tmp_path, tmp_path / name):
        found = data.read_pictures(path)
        assert {p.key: p.open().getpixel((0, 0)) for p in found} == dict.fromkeys(("b", "blobs/1", "s/a"), BLUE)
        assert said(path)["s/a"] == (["blue"], []) and found.left_out["links"] == 2


def test_broken_rows(tmp_path):
    """One slip among a million rows or notes is trained on, or ends in a traceback that names no place."""
    talks = ("null", '"ab"', '{"value": "q"}', "[{}, {}]", '[{"value": "q"}]', '[{"value": 1}]')
    codes = ("[]", '"[]"', "null", "{}", '"[1, 2"', "[1, 2]", "[0, 1, 2, -1]", "[0.5]", '["1"]',
             "[[1, 2], [3]]", f"[{10 ** 30}]", f"[{2 ** 63}]", "[true]", json.dumps("[" * 100_000))
    for line in ('{"image": "a.png"', "[1]", "{}", f'{{"image": {"1" * 5000}}}', '{"caption": "alone"}',
                 '{"image": 3, "text": "x"}', '{"image": "a.png", "text": 3}',
                 "[" * 100_000, *(f'{{"image": "a.png", "conversations": {talk}}}' for talk in talks),
                 *(f'{{"text": "x", "vqcode_512": {code}}}' for code in codes)):
        file = put(tmp_path / "x.jsonl", '{"image": "a.png", "text": "fine"}\n' + line + "\n")
        refused(data.read_pictures, file, file, "line 2")
    put(tmp_path / "a" / "a.png", png())
    for note in ("{", "[]", "3", '{"caption": 3}', '{"qa": 3}', '{"qa": null}', '{"qa": [1]}', "[" * 100_000,
                 '{"qa": [["alone"]]}', '{"qa": [["how many?", null]]}'):
        found = data.read_pictures((file := put(tmp_path / "a" / "a.json", note)).parent)
        assert not found[0].dialogues and [why for why in found.left_out if f"{file}: not " in why]
    tar = tar_of(tmp_path / "x.tar", {"a.png": png(), "a.json": "{", "b.png": png(), "b.txt": b"\xff"})
    assert all(any(f"{tar}:{name}" in why for why in data.read_pictures(tar).left_out)
               for name in ("a.json", "b.txt"))


def test_no_source(tmp_path):
    """A typing error or half a download starts a run on nothing, or ends in a traceback."""
    whole = tar_of(tmp_path / "x.tar", {"a.png": png(), "a.txt": "x" * 2000}).read_bytes()
    for i, raw in enumerate((b"", whole[:100], whole[:532], whole[:2048], zlib.compress(whole))):
        refused(data.read_pictures, put(tmp_path / f"{i}.tar", raw), tmp_path / f"{i}.tar")
    for name in ("nowhere", "no.jsonl", "no.tar"):
        refused(data.read_pictures, tmp_path / name, tmp_path / name)
    for name, raw in (("b.txt", b"\xff\0"), ("e.txt", " \n"), ("b.jsonl", '{"text": 1}'), ("c.jsonl", "{")):
        refused(data.read_texts, put(tmp_path / name, raw), tmp_path / name)
    refused(data.read_texts, tmp_path / "no.txt", tmp_path / "no.txt")


def test_texts(tmp_path):
    """Byte order marks or carriage returns are learned, words are lost, or passages come twice or endless."""
    assert data.read_texts(put(tmp_path / "a.txt", "\ufeffone\r\ntwo\n")) == ["one\ntwo"]
    rows = '{"text": "one\u2028more"}\n\n{"text": "two", "other": 1}'
    assert data.read_texts(put(tmp_path / "a.jsonl", rows)) == ["one\u2028more", "two"]
    assert data.read_texts(put(tmp_path / "b.txt", "word " * 1000), 400) == ["word " * 80, "word " * 40]
    assert data.passages("aaa bbb ccc\n\nddd\n", 9) == ["aaa bbb ", "ccc\n\nddd"]
    rng = random.Random(0)
    texts = ["", "\n" * 999, "x" * 1000, " " + "x" * 1000, "\t" * 700 + "word", ("x" * 239 + " ") * 3]
    pieces = ["a", "word", "x" * 90, "y" * 250, " ", "   ", "\n", "\t", "\r\n", "\u2028"]
    for text in texts + ["".join(rng.choices(pieces, k=60)) for _ in range(100)]:
        parts = data.passages(text, 99)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert all(part.strip() and len(part) <= 100 for part in parts)


def test_splits(tmp_path):
    """Data that grow or move put into training what was held out, or a small source has nothing to score."""
    assert data.hold_out(["x"], str) == (["x"], ["x"]) and len(data.hold_out(["x", "y"], str)[1]) == 1
    small, large = (set(data.hold_out(list(range(n)), str)[1]) for n in (2000, 5000))
    assert 80 < len(small) < 120 and small == {i for i in large if i < 2000}
    for root, i in itertools.product(("here", "there"), range(60)):
        put(tmp_path / root / f"{i}.png", png())
        put(tmp_path / root / f"{i}.txt", "a caption" * (i % 2))
    text = put(tmp_path / "x.jsonl", "".join(f'{{"text": "text {i}"}}\n' for i in range(60)))
    (train, val), moved = (data.load_source(tmp_path / root, text).values() for root in ("here", "there"))
    keys = [[p.key for p in split.pictures] for split in (train, val)]
    assert keys == [[p.key for p in split.pictures] for split in moved]
    for part, held_out in (keys, (train.texts, val.texts)):
        assert held_out and len({*part, *held_out}) == len(part) + len(held_out) == 60
    tasks = data.tasks_of(train)
    assert tasks["t2i"] == tasks["i2t"] == [p for p in train.pictures if p.captions] and tasks["vqa"] == []


# -----------------------------------------------------------------------------------------------------------
# Shards

def some_pictures(n=3, codes=0):
    pictures = [Picture(f"p{i}", None, ["é \ud800", "b"][:i], codes=torch.arange(4).view(2, 2) + codes + i)
                for i in range(n)]
    for p, other in zip(pictures[:2], pictures[1:]):
        p.edits.append([(["q", p], [other, "a"]), (["r"], ["中"])])
        other.ask(("q", "a"), ("r", "中"))
    return pictures


def fields(pictures):
    return [dumped([p.name, p.captions, p.dialogues, p.edits, p.codes.tolist()]) for p in pictures]


@pytest.mark.parametrize("codes", [0, 2 ** 16 - 2, 2 ** 16])
def test_shards(tmp_path, codes):
    """Captions, dialogues or codes are lost or changed between encoding and training."""
    parts, shards = [some_pictures(3, codes), [], some_pictures(2, 7)], []
    every = fields(itertools.chain(*parts))
    parts[0][0].dialogues.append([(["q", Picture("unreadable")], ["a"])])       # left out with the picture
    for i, part in enumerate(parts):
        data.write_shard(tmp_path / "deep" / f"{i}.pt", part, "print", {"bad.png": "why"})
        shards.append(data.read_shard(tmp_path / "deep" / f"{i}.pt", "print"))
    pictures = data.Encoded(shards)
    assert len(pictures) == 5 and fields(pictures) == every and shards[1]["skipped"] == {"bad.png": "why"}
    assert all(p.codes.dtype == torch.int64 for p in pictures)
    tasks = data.tasks_of(data.Split(pictures, ["text"]))
    assert fields(tasks["t2i"]) == [f for f in every if f[1]] and len(tasks["t2i"]) == 3
    assert fields(tasks["vqa"]) == [f for f in every if f[2]] and tasks["text"] == ["text"]
    assert fields(tasks["edit"]) == [f for f in every if f[3]] and len(tasks["edit"]) == 3
    assert len(data.Encoded([]).only("dialogues")) == 0


def test_shards_stay_on_the_disk(tmp_path):
    """Opening a run reads all of its captions and codes into memory."""
    path, codes = tmp_path / "x.pt", torch.full((64, 64), 0x4242)
    data.write_shard(path, [Picture("MARK", None, ["c"], codes=codes)] * 50, "print")
    captioned, raw = data.Encoded([data.read_shard(path, "print")]).only("captions"), path.read_bytes()
    with open(path, "r+b") as file:         # in place: what is not yet read changes
        file.write(raw.replace(b"MARK", b"READ").replace(b"\x42\x42", b"\x43\x43"))
    assert len(captioned) == 50 and captioned[49].name == "READ" and (captioned[49].codes == 0x4343).all()


def test_damaged_shard(tmp_path):
    """Codes of another tokenizer are trained on, or a traceback comes where a file could be made again."""
    path, other = tmp_path / "x.pt", tmp_path / "y.pt"
    data.write_shard(path, some_pictures(), "print")
    whole, good = path.read_bytes(), torch.load(path)
    assert data.read_shard(path, "print")
    assert data.read_shard(path, "another") is data.read_shard(other, "print") is None
    for raw in (b"", b"garbage" * 100, *(whole[:n] for n in range(0, len(whole) - 1, 150)), whole[:-1]):
        assert data.read_shard(put(other, raw), "print") is None
    for value in ([1], {}, WordTokenizer, *({**good, name: good[name][:-2]} for name in ("codes", "rows"))):
        torch.save(value, other)
        assert data.read_shard(other, "print") is None


# -----------------------------------------------------------------------------------------------------------
# The loader

def texts_of(lengths):
    return [(f"{i} " + "x" * n)[:max(n, 4)] for i, n in enumerate(lengths)]


MIX = {"t2i": 3, "i2t": 2, "vqa": 2, "edit": 1, "text": 2}


def mixed(n=40, mix=MIX, **options):
    """A loader of all tasks with pictures of 4 codes."""
    rng = random.Random(0)
    pictures = [Picture(str(i), None, [f"caption {i} " + "c" * rng.randrange(20), f"other {i}"],
                        codes=torch.tensor([[i % 16, i // 16], [0, 15]])) for i in range(n)]
    for i, p in enumerate(pictures):
        p.dialogues = [[([p.codes, f"q{i}"], ["a"])],
                       [([p.codes, "first"], ["x"]), ([f"second {i}"], ["y" * rng.randrange(9)])]]
        p.edits = [[([p.codes, f"{words} {i}"], [pictures[i - 1].codes])] for words in ("back", "again")]
    texts = texts_of(rng.randrange(4, 100) for _ in range(n))
    tasks = {"t2i": pictures, "i2t": pictures, "vqa": pictures, "edit": pictures, "text": texts}
    return Loader(tasks, mix, VOCAB, Bytes(), **{"rows": 6, "context": 160} | options)


def documents(batch):
    """(task, ids, targets) of each example of a batch, after a check of the planes around them."""
    found = []
    for ids, targets, positions, numbers, tasks in zip(*batch):
        padding = numbers == -1
        assert (ids[padding] == VOCAB.pad).all() and (targets[padding] == IGNORE).all()
        assert (tasks[padding] == -1).all() and (positions[padding] == 0).all()
        assert (padding.int().diff() >= 0).all()                                        # all of it at the end
        for number in range(int(numbers.max()) + 1):
            own = numbers == number
            assert own.any() and positions[own].tolist() == list(range(int(own.sum())))
            assert own.int().diff().abs().sum() + own[0].int() + own[-1].int() == 2     # in one piece
            assert len(tasks[own].unique()) == 1
            found.append((data.TASKS[tasks[own][0]], ids[own].tolist(), targets[own].tolist()))
    return found


def take(loader, n):
    return [loader.next() for _ in range(n)]


def waiting(states):
    return [tuple(key) for state in states.values() for key in state["waiting"]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_shuffled(n):
    """An example comes twice an epoch and another never, or every epoch has the same order."""
    orders = [[data.shuffled(i, n, key) for i in range(n)] for key in "ab"]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 17 or orders[0] != orders[1] and list(range(n)) not in orders


@brief
@hypothesis.given(st.lists(st.integers(4, 70), min_size=1, max_size=30).filter(lambda x: min(x) < 60),
                  st.integers(1, 5), st.integers(1, 4))
def test_packing(lengths, rows, batches):
    """Examples are cut, lost as they found no room, trained on twice, or left out without being counted."""
    texts = texts_of(lengths)
    loader, fresh = (Loader({"text": texts}, {"text": 1}, VOCAB, Bytes(), rows, 63) for _ in range(2))
    found = [d for batch, _ in take(loader, batches) for d in documents(batch)]
    numbers = [state["drawn"]["text"] for state in loader.states.values()]
    keys = [fresh.next_example(row) for row, n in enumerate(numbers) for _ in range(n)]
    fit = Counter(texts[index] for _, _, index in keys if len(texts[index]) + 2 <= 63)
    placed = Counter(bytes(ids[1:-1]).decode() for _, ids, _ in found)
    assert placed + Counter(texts[index] for _, _, index in waiting(loader.states)) == fit
    assert loader.dropped == len(keys) - fit.total() and len(set(keys)) == len(keys)
    epochs = min(numbers) * rows // len(texts)      # those that all rows have finished
    assert set(itertools.product(["text"], range(epochs), range(len(texts)))) <= set(keys)


@hypothesis.settings(brief, max_examples=15)
@hypothesis.given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 9))
def test_processes_and_resuming(before, after, cut, seed):
    """Processes share rows, or a run goes on with other batches, on as many processes or others."""
    one, states = take(mixed(seed=seed), 4), None
    for world, steps in ((before, one[:cut]), (after, one[cut:])):
        gathered = {}
        for rank in range(world):
            found = take(mixed(seed=seed, rank=rank, world=world, state=states), len(steps))
            gathered |= {row: dumped(state) for row, state in found[-1][1].items()}
            for (batch, _), (whole, _) in zip(found, steps):
                assert all(torch.equal(x, y[rank::world]) for x, y in zip(batch, whole))
        states = gathered
        assert states == {row: dumped(state) for row, state in steps[-1][1].items()}


def test_resume_with_other_data():
    """Examples wait for a task that is no longer asked for, or were deleted, or a task begins again."""
    options = dict(n=150, rows=2)
    before, states = take(mixed(mix={"t2i": 1, "vqa": 1}, **options), 1)[0]
    assert {task for task, _, _ in waiting(states)} == {"t2i", "vqa"}
    for mix in ({"text": 1}, {"t2i": 1, "text": 1}):
        batches = take(mixed(mix=mix, state=states, **options), 20)
        found = [document for batch, _ in batches for document in documents(batch)]
        assert {task for task, _, _ in found} == set(mix)
        drawings = [tuple(ids) for task, ids, _ in documents(before) + found if task == "t2i"]
        assert len(drawings) == len(set(drawings))
    assert any(index >= 40 for _, _, index in waiting(states)) and take(mixed(n=40, rows=2, state=states), 3)


def test_choices_of_an_example():
    """Captions change with the number of processes or after a resumption, or each epoch is like the first."""
    keys = list(itertools.product(("t2i", "i2t", "vqa", "edit"), (0, 1), range(40)))
    loaders = mixed(), mixed(rows=2, context=300, rank=1, world=2), mixed(seed=1)
    take(loaders[1], 3)
    first, same, seed = ({key: loader.render(*key) for key in keys} for loader in loaders)
    assert first == same
    for task in ("t2i", "i2t", "vqa", "edit"):
        assert any(first[task, 0, i] != first[task, 1, i] for i in range(40))
        assert any(first[task, 0, i] != seed[task, 0, i] for i in range(40))


def test_nothing_to_train_on():
    """A run searches for ever for examples that do not exist or do not fit."""
    def start(tasks, weight=1):
        return Loader(tasks, {"text": weight}, VOCAB, Bytes(), rows=9, context=64).next()[0]
    assert {len(ids) for _, ids, _ in documents(start({"text": texts_of([10, 62, 63])}))} == {12, 64}
    refused(start, {"text": ["x" * 100] * 3}, "context 64", "102 tokens")
    refused(start, {"text": []}, "nothing to train on")
    refused(partial(start, weight=0), {"text": ["x"]}, "nothing to train on")


def test_unconditional_and_noisy_drawings():
    """Guidance is not trained as asked, or noise is in pictures to read or in ids but not in targets."""
    for uncond in (0.0, 0.1, 1.0):
        render = mixed(uncond=uncond).render
        share = np.mean([VOCAB.uncond in render("t2i", *key)[0] for key in np.ndindex(50, 40)])
        assert share == pytest.approx(uncond, abs=0.2 * uncond)
    clean = mixed()
    noisy = mixed(perturb=lambda codes, generator: (codes + generator.initial_seed() % 2 + 1) % 16)
    for task, i in itertools.product(data.TASKS, range(20)):
        (ids, targets), (moved, wanted) = clean.render(task, 0, i), noisy.render(task, 0, i)
        shifts = {(y - x) % 16 for x, y in zip(ids, moved)} - {0}
        assert len(shifts) == (task in ("t2i", "edit")) and all(400 <= x < 416 for x, y in zip(ids, moved) if x != y)
        assert wanted == [t if t == IGNORE else x for t, x in zip(targets, moved[1:] + [IGNORE])]


def test_padding():
    """Computing is bought for padding, or the mix of examples is not the one asked for."""
    train, codes = data.built_in(0, train=300, val=1, unseen=0)["train"], torch.zeros(4, 4, dtype=torch.int64)
    said = [*train.texts, *[data.DRAW, data.CAPTION] * 3]
    for p in train.pictures:
        p.codes = codes
        said += p.captions
        for talk in p.dialogues + p.edits:
            said += [part for part in data.parts_of(talk) if isinstance(part, str)]
            talk[:] = [tuple([part if isinstance(part, str) else codes for part in side] for side in turn)
                       for turn in talk]
    tokenizer = WordTokenizer.learn(said)
    loader = Loader(data.tasks_of(train), MIX, tokenizer.vocab(16), tokenizer, 8, 256)
    assert np.mean([(batch.documents == -1).float().mean() for batch, _ in take(loader, 30)]) < 0.06
    counts = sum((Counter(state["drawn"]) for state in loader.states.values()), Counter())
    assert all(abs(counts[task] / counts.total() - weight / 10) < 0.05 for task, weight in MIX.items())
    assert loader.dropped < 0.02 * counts.total()
