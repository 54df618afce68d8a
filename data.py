"""Everything between files and ids: vocabulary, templates, tokenizers, pictures, scenes, sources, loader.

    file --load_image--> image --to_pixels--> pixels ... codes --Vocab.codes_to_ids--> ids
    text --tokenizer.encode-----------------------------------------------------------> ids
    parts --render_*--> (ids, targets) --Loader--> batch

R rows of a batch   T positions in a row   K codes   h, w code grid
"""

import csv
import hashlib
import io
import itertools
import json
import math
import os
import posixpath
import random
import re
import tarfile
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

# ---- Vocabulary: which row of the table means what --------------------------------------------------------

@dataclass(frozen=True)
class Vocab:
    """The words' rows come first, then one row for each code, then one for each mark."""
    bos: int
    eos: int
    pad: int
    boi: int            # <boi>, a picture begins
    eoi: int            # <eoi>, it ends
    uncond: int         # <unconditional>, in place of words: the half of guidance that knows no prompt
    eol: int            # <eol>, a row of codes ends
    image_start: int
    image_size: int     # K

    @classmethod
    def extend(cls, words, codes, bos, eos, pad) -> "Vocab":
        """Of a table of `words` rows, extended by rows for codes and marks."""
        marks = words + codes
        return cls(bos, eos, pad, marks, marks + 1, marks + 2, marks + 3, words, codes)

    @property
    def size(self) -> int:
        return 1 + max(self.image_start + self.image_size - 1, self.boi, self.eoi, self.uncond, self.eol)

    @property
    def new_rows(self) -> int:
        """Rows behind the words: of codes and marks."""
        return self.size - self.image_start

    @property
    def image_rows(self) -> tuple[int, int]:
        """(first, past the last)"""
        return self.image_start, self.image_start + self.image_size

    def codes_to_ids(self, codes):
        """Codes 0..K-1 -> ids of the same shape. ValueError outside that range."""
        return self._shift(codes, 0, self.image_start)

    def ids_to_codes(self, ids):
        """Ids of image rows -> codes of the same shape. ValueError if one is another row."""
        return self._shift(ids, self.image_start, -self.image_start)

    def _shift(self, x, first, offset):
        x = torch.as_tensor(x)
        if x.numel() and not (first <= int(x.min()) and int(x.max()) < first + self.image_size):
            last = first + self.image_size - 1
            raise ValueError(f"{int(x.min())}..{int(x.max())} is not within the image range {first}..{last}")
        return x + offset


# ---- Templates: parts, each given or learned -> (ids, targets) --------------------------------------------
# Without its answer, an example is the prompt of sampling. targets[t] is the id to predict after ids[..t].

IGNORE = -100
TASKS = ("t2i", "i2t", "vqa", "edit", "text")
DRAW = " Generate an image based on this description."
CAPTION = "The caption of this image is:"


def sequence(vocab, tokenizer, *parts):
    """Parts (content, learned) -> (ids, targets); a content is words, codes (h, w), or ids."""
    ids, learned = [], []
    for content, learn in parts:
        if isinstance(content, str):
            content = tokenizer.encode(content)
        elif torch.is_tensor(content):
            content = vocab.codes_to_ids(content).flatten().tolist()        # in raster order
        ids += content
        learned += [learn] * len(content)
    return ids, [i if learn else IGNORE for i, learn in zip(ids[1:], learned[1:])] + [IGNORE]


def render_t2i(vocab, tokenizer, caption, codes=None):
    """Draw a caption; without one, draw anything (the unconditional half of guidance)."""
    words = [vocab.uncond] if caption is None else caption + DRAW
    answer = [] if codes is None else [(codes, True), ([vocab.eoi, vocab.eos], True)]
    return sequence(vocab, tokenizer, ([vocab.bos], False), (words, False), ([vocab.boi], False), *answer)


def render_i2t(vocab, tokenizer, codes, caption=None):
    answer = [] if caption is None else [(caption, True), ([vocab.eos], True)]
    return sequence(vocab, tokenizer, ([vocab.bos, vocab.boi], False), (codes, False), ([vocab.eoi], False),
                    (CAPTION, False), *answer)


def render_dialogue(vocab, tokenizer, turns):
    """Talk in turns of (question, reply), lists of words and codes; None for no reply yet.

    The task is vqa if all replies are words, and edit if one has a picture.
    """
    chat, parts = tokenizer.chat, [([vocab.bos], False)]

    def add(contents, learned, lead=""):
        for content in contents:
            if torch.is_tensor(content):
                parts.extend([([vocab.boi], learned), (content, learned), ([vocab.eoi], learned)])
                parts.append(("" if learned else "\n", learned))        # as Liquid asks
            else:
                parts.append((lead + content, learned))
    for i, (question, reply) in enumerate(turns):
        opening = tokenizer.marks(chat.again if i else chat.opening)
        parts.append((opening, False))
        add(question, False)
        parts.append((tokenizer.marks(chat.reply), False))
        if reply is None:
            return sequence(vocab, tokenizer, *parts)
        add(reply, True, chat.lead)
        parts.append((tokenizer.marks(chat.end), True))
    return sequence(vocab, tokenizer, *parts, ([vocab.eos], True))


def render_text(vocab, tokenizer, text, ended=True):
    """Read a text; with ended=False it goes on."""
    end = [vocab.eos] if ended else []
    return sequence(vocab, tokenizer, ([vocab.bos], False), (text, True), (end, True))


# ---- Text tokenizers --------------------------------------------------------------------------------------

class Chat(NamedTuple):
    """The marks of a dialogue: opening QUESTION reply lead ANSWER end, then again QUESTION reply ..."""
    opening: str = ""
    reply: str = "\n"
    end: str = "\n"
    again: str = ""
    lead: str = " "         # words know " red" from captions; "red" would be another id


class WordTokenizer:
    """Frequent words whole, the rest as bytes; ids: pad, bos, eos, 256 bytes, then the words."""
    # Each character is in one class, so pieces tile the text; Chinese and Japanese have no spaces.
    PIECES = re.compile(r"[぀-鿿]| ?(?:(?![぀-鿿])[\w])+| ?(?:(?![぀-鿿])[^\w\s])+|\s")
    FIRST_BYTE = 3
    chat, stops = Chat(), ()

    def __init__(self, words):
        self.words = list(words)
        self.pieces = [b""] * self.FIRST_BYTE + [bytes([i]) for i in range(256)]
        self.pieces += [word.encode("utf-8", "replace") for word in self.words]
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if piece}

    @classmethod
    def learn(cls, texts, size=4096):
        """The most frequent pieces, of those that occur three times and are longer than a byte."""
        counts = Counter(piece for text in texts for piece in cls.PIECES.findall(text))
        often = [p for p, n in counts.most_common() if n >= 3 and len(p.encode("utf-8", "replace")) > 1]
        return cls(often[:size])

    @property
    def size(self):
        return len(self.pieces)

    def encode(self, text):
        ids = []
        for piece in self.PIECES.findall(text):
            raw = piece.encode("utf-8", "replace")      # JSON may hold lone surrogates
            ids += [self.ids[raw]] if raw in self.ids else [self.FIRST_BYTE + byte for byte in raw]
        return ids

    marks = encode

    def decode(self, ids):
        """Without special tokens; bytes that are no UTF-8 become replacement characters."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def vocab(self, codes) -> Vocab:
        return Vocab.extend(self.size, codes, pad=0, bos=1, eos=2)

    def state(self):
        return {"kind": "words", "words": self.words}

    def save_pretrained(self, folder):
        """Write a byte-level BPE without merges, which transformers' AutoTokenizer opens."""
        tokenizers, transformers = extra("tokenizers"), extra("transformers")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]       # GPT-2's spelling of bytes
        letters = {b: chr(b) for b in printable}
        letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
        spelled = ["".join(letters[b] for b in piece) for piece in self.pieces[self.FIRST_BYTE:]]
        names = {s: i for i, s in enumerate(["<pad>", "<bos>", "<eos>", *spelled])}
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pattern = self.PIECES.pattern.replace(r"\w", r"\p{L}\p{N}_")    # its own \w has accents, too
        pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(names, [], ignore_merges=True))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([pieces, byte_level])
        bpe.decoder = tokenizers.decoders.ByteLevel()
        transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>",
                                             eos_token="<eos>").save_pretrained(folder)


class PretrainedTokenizer:
    """A published tokenizer.json, as text; none of what it encodes becomes a special token."""
    def __init__(self, text, chat=Chat()):
        self.text, self.chat = text, Chat(*chat)
        self.tokenizer = extra("tokenizers").Tokenizer.from_str(text)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.mark_ids = {mark: self.encode(mark) for mark in self.chat}
        self.tokenizer.encode_special_tokens = True     # as mere letters from here on
        end = self.mark_ids[self.chat.end]
        self.stops = end[:1] if self.decode(end[:1]) == "" else ()      # a special token

    @classmethod
    def load(cls, folder):
        """What transformers' AutoTokenizer reads, with its chat template."""
        with naming(folder, "no readable tokenizer"):
            tokenizer = extra("transformers").AutoTokenizer.from_pretrained(folder)
            return cls(tokenizer.backend_tokenizer.to_str(), read_chat(tokenizer))

    def encode(self, text):
        text = text.encode("utf-8", "replace").decode()         # JSON may hold lone surrogates
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def marks(self, text):
        """One of the chat's marks -> ids, in which special tokens are what they mean."""
        return self.mark_ids[text]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def size(self):
        """Past the last id that words become: special tokens never do."""
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return 1 + max({*self.tokenizer.get_vocab().values()} - special)

    def id(self, name):
        return self.tokenizer.token_to_id(name)

    def state(self):
        return {"kind": "pretrained", "text": self.text, "chat": list(self.chat)}


def read_chat(tokenizer) -> Chat:
    """The marks of a tokenizer of transformers, read off a dialogue that its template renders."""
    if not tokenizer.chat_template:
        return Chat()
    turns = [{"role": role, "content": f"[{i}]"} for i, role in enumerate(["user", "assistant"] * 2)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    opening, _, again, reply, end = re.split(r"\[[0-3]\]", text)
    end = re.match(r"[^>]*>\s*|.*", end)[0]         # some templates go on with the next reply
    return Chat(opening.removeprefix(tokenizer.bos_token or ""), reply, end, again.removeprefix(end), "")


def load_tokenizer(state):
    """Inverse of state(), which every checkpoint keeps."""
    words = state["kind"] == "words"
    return WordTokenizer(state["words"]) if words else PretrainedTokenizer(state["text"], state["chat"])


def special_ids(folder) -> dict[str, int]:
    """bos, eos and pad of a Hugging Face folder."""
    found, names = {}, ("bos", "eos", "pad")
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        if path.exists():               # the latter counts
            found |= {k: v for k, v in json.loads(read_utf8(path)).items() if v not in (None, -1)}
    if "eos_token_id" not in found:
        raise ValueError(f"{folder}: neither config.json nor generation_config.json has an eos_token_id")
    ids = [found.get(f"{name}_token_id", found["eos_token_id"]) for name in names]
    return {name: i[0] if isinstance(i, list) else i for name, i in zip(names, ids)}


def fetch(name) -> Path:
    """A folder, or the name of a repository on the hub, which is downloaded."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    with naming(name, "no such folder, and the hub did not give it"):
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(extra("huggingface_hub").snapshot_download(str(name), allow_patterns=patterns))


# ---- Pictures: file -> image -> pixels, and back ----------------------------------------------------------

GRAY = (122, 116, 104)      # what Liquid pads with
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")     # never EPS, which runs Ghostscript
SUFFIXES = tuple(end for end, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))
NOTES, ROWS, TAR = (".txt", ".caption", ".json"), (".jsonl", ".json", ".csv"), r"(?i)\.(tar(\.\w+)?|tgz)$"
CAPTIONS, IMAGES = "caption captions text_prompt prompt text".split(), ("image", "image_path", "file_name")
Image.MAX_IMAGE_PIXELS = 50_000_000     # Pillow warns above it and refuses twice as many
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26     # profiles for print and programs' own notes are large


def load_image(file, name=None) -> Image.Image:
    """A path or a Member -> image in RGB: turned as EXIF says, transparency on white, 16 bits as 8."""
    with naming(name or file, "not a readable picture"):
        source = io.BytesIO(file.read_bytes()) if isinstance(file, Member) else file
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            with suppress(Exception):       # whatever a broken EXIF makes of it, the pixels are good
                image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise ValueError("its numbers say not what is white: save it with 8 or 16 bits")
            if image.mode.startswith("I"):
                scaled = np.asarray(image, np.float32) / 257
                image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def crop_square(image, size, pad=False) -> Image.Image:
    """image -> size x size: its centre, or with pad all of it on a gray square."""
    if pad:
        side = min(max(image.size), 4096)       # a long strip's square would not fit into memory
        image = ImageOps.pad(image, (side, side), Image.LANCZOS, GRAY)
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.LANCZOS)


def to_pixels(image) -> torch.Tensor:
    """image -> pixels (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_image(pixels) -> Image.Image:
    """pixels (1, 3, H, W) or (3, H, W) -> image; inverse of to_pixels."""
    pixels = pixels.detach().reshape(pixels.shape[-3:]).float().clamp(-1, 1)
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def contact_sheet(images, columns, gap=4) -> Image.Image:
    """Images of one size -> one picture of them in rows."""
    (w, h), rows = images[0].size, math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet


def first_images(pictures, most):
    """Images of the first pictures that can be read."""
    images = []
    for picture in itertools.islice((p for p in pictures if p.open), 2 * most):
        with suppress(ValueError):          # act 2 of training names it
            images.append(picture.open())
    return images[:most]


def read_pixels(pictures, parts, size, pad=False, threads=4):
    """For each list of indices in parts, yield uint8 (n, 3, size, size) or None, and {index: error}."""
    def read(part):
        found, errors = [], {}
        for i in part:
            try:
                image = crop_square(pictures[i].open(), size, pad)
                found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            except ValueError as error:
                errors[i] = str(error)
        return torch.stack(found) if found else None, errors
    return ahead(read, parts, threads)


def ahead(function, items, threads=1):
    """Yield function(item) of each item in order; threads compute a few of them ahead."""
    pool, items = ThreadPoolExecutor(threads), iter(items)
    try:
        waiting = deque(pool.submit(function, item) for item in itertools.islice(items, threads + 2))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)      # and waits: a thread inside torch aborts an exit


# ---- The built-in scenes: one to three objects, each in its own quarter -----------------------------------
# grade inverts draw, read_description inverts describe; they score what a model draws and says.

SIZES = {"small": 0.32, "large": 0.47}      # radius, in sides of the quarter
COLORS = {"red": (222, 56, 49), "orange": (245, 140, 34), "yellow": (250, 214, 50),
          "green": (52, 160, 84), "blue": (44, 112, 214), "purple": (140, 72, 180)}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {"white": (252, 252, 250), "gray": (196, 199, 205),
               "pink": (255, 212, 220), "navy": (28, 34, 66)}
NUMBERS = ("zero", "one", "two", "three")


class Object(NamedTuple):
    size: str
    color: str
    shape: str
    place: str


class Scene(NamedTuple):
    background: str
    objects: tuple[Object, ...]     # in the order of PLACES

    def facts(self) -> set:
        """The background, and what stands at each place or None."""
        at = dict.fromkeys(PLACES) | {o.place: o for o in self.objects}
        return {self.background, *at.items()}


# All pairs of color and shape, both taking turns; the first few are withheld from all training.
PAIRS = [(list(COLORS)[i % 6], SHAPES[(i + i // 6) % 4]) for i in range(24)]
WITHHELD = 3


def random_scene(rng: random.Random, withheld=WITHHELD, unseen=False) -> Scene:
    """A scene without withheld pairs, or with exactly one."""
    places = sorted(rng.sample(range(4), rng.randint(1, 3)))
    chosen = [rng.choice(PAIRS[withheld:]) for _ in places]
    if unseen:
        chosen[rng.randrange(len(chosen))] = rng.choice(PAIRS[:withheld])
    objects = tuple(Object(rng.choice(list(SIZES)), *kind, PLACES[p]) for kind, p in zip(chosen, places))
    return Scene(rng.choice(list(BACKGROUNDS)), objects)


@lru_cache(maxsize=None)
def sprite(background, size, color, shape, side) -> np.ndarray:
    """A quarter (side, side, 3) uint8, drawn 8 times larger and averaged."""
    s, radius = side * 8, SIZES[size] * side * 8
    image = Image.new("RGB", (s, s), BACKGROUNDS[background])

    def corners(n, radius, inner=None, turn=-math.pi / 2, drop=0.0):
        """n points around the middle, every other one at inner."""
        radii = [radius, inner or radius]
        return [(s / 2 + radii[i % 2] * math.cos(turn + 2 * math.pi * i / n),
                 s / 2 + drop + radii[i % 2] * math.sin(turn + 2 * math.pi * i / n)) for i in range(n)]

    polygons = {"square": corners(4, 1.37 * radius, turn=math.pi / 4),      # shapes equally large
                "triangle": corners(3, 1.15 * radius, drop=0.2 * radius),
                "star": corners(10, 1.1 * radius, 0.5 * radius)}
    pen, fill = ImageDraw.Draw(image), COLORS[color]
    if shape == "circle":
        pen.ellipse([s / 2 - radius, s / 2 - radius, s / 2 + radius, s / 2 + radius], fill=fill)
    else:
        pen.polygon(polygons[shape], fill=fill)
    return np.asarray(image.resize((side, side), Image.BOX))


def quarter(place, side):
    """The slices of a picture that a place covers."""
    row, column = divmod(PLACES.index(place), 2)
    return np.s_[row * side:(row + 1) * side, column * side:(column + 1) * side]


def draw(scene: Scene, side=64) -> Image.Image:
    canvas = np.full((side, side, 3), BACKGROUNDS[scene.background], np.uint8)
    for o in scene.objects:
        canvas[quarter(o.place, side // 2)] = sprite(scene.background, o.size, o.color, o.shape, side // 2)
    return Image.fromarray(canvas)


@lru_cache(maxsize=None)
def renderings(background, side):
    """All that a quarter can show: 49 kinds, (size, color, shape) or None, and (49, side, side, 3)."""
    kinds = [None, *itertools.product(SIZES, COLORS, SHAPES)]
    empty = np.full((side, side, 3), BACKGROUNDS[background], np.float32)
    return kinds, np.stack([sprite(background, *k, side).astype(np.float32) if k else empty for k in kinds])


def grade(image: Image.Image) -> Scene:
    """image -> the Scene with the nearest rendering in squared error; inverse of draw."""
    canvas = np.asarray(image, np.float32)          # (side, side, 3)
    side, found = canvas.shape[0] // 2, []
    for background in BACKGROUNDS:
        kinds, candidates = renderings(background, side)
        errors = [np.square(candidates - canvas[quarter(place, side)]).sum((1, 2, 3)) for place in PLACES]
        nearest = [kinds[e.argmin()] for e in errors]                                       # e: (49,)
        objects = [Object(*kind, place) for kind, place in zip(nearest, PLACES) if kind]
        found.append((sum(e.min() for e in errors), Scene(background, tuple(objects))))
    return min(found)[1]


PHRASES = (("{objects} on a {background} background", "a {size} {color} {shape} at the {place}"),
           ("on a {background} background, {objects}", "at the {place} a {size} {color} {shape}"),
           ("a {background} background with {objects}", "a {size} {color} {shape} in the {place}"))


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption that names all of the scene, in one of several phrasings."""
    whole, part = rng.choice(PHRASES)
    *others, last = [part.format(**o._asdict()) for o in scene.objects]
    objects = f"{', '.join(others)} and {last}" if others else last
    return whole.format(background=scene.background, objects=objects)


def read_description(text: str) -> Scene | None:
    """caption -> Scene, or None; inverse of describe."""
    known = SIZES, COLORS, SHAPES, PLACES, BACKGROUNDS
    sizes, colors, shapes, places, grounds = ("|".join(words) for words in known)
    patterns = (rf"\ba ({sizes}) ({colors}) ({shapes})\b", rf"\b(?:at|in) the ({places})\b",
                rf"\ba ({grounds}) background\b")
    kinds, places, background = (re.findall(pattern, text) for pattern in patterns)
    # Other words, such as "no" or "huge", change the meaning.
    rest = set(re.findall(r"\w+", re.sub("|".join(patterns), "", text))) - {"on", "with", "and"}
    if rest or len(background) != 1 or not 0 < len(kinds) == len(places) == len(set(places)):
        return None
    objects = [Object(*kind, place) for kind, place in zip(kinds, places)]
    return Scene(background[0], tuple(sorted(objects, key=lambda o: PLACES.index(o.place))))


def questions(scene: Scene, rng: random.Random, withheld=WITHHELD) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) pairs by kind: about places, about what a name tells, and what there is."""
    at, pairs = {o.place: o for o in scene.objects}, [(o.color, o.shape) for o in scene.objects]
    place = [("what is the background?", scene.background),
             ("how many shapes are there?", NUMBERS[len(scene.objects)])]
    for p in PLACES:
        o = at.get(p)
        place += [(f"what is at the {p}?", f"a {o.size} {o.color} {o.shape}" if o else "nothing"),
                  (f"which shape is at the {p}?", o.shape if o else "none"),
                  (f"is there anything at the {p}?", "yes" if o else "no")]
        if o:
            place.append((f"what color is the shape at the {p}?", o.color))
    named, exists = [], []
    for o in scene.objects:
        alike = [x for x in scene.objects if x.shape == o.shape]
        named.append((f"how many {o.shape}s are there?", NUMBERS[len(alike)]))
        if len(alike) == 1:             # else there are several answers
            named += [(f"what color is the {o.shape}?", o.color), (f"where is the {o.shape}?", o.place),
                      (f"is the {o.shape} small or large?", o.size)]
        if [color for color, _ in pairs].count(o.color) == 1:
            named.append((f"which shape is {o.color}?", o.shape))
        absent = rng.choice([pair for pair in PAIRS[withheld:] if pair not in pairs])
        for pair in [(o.color, o.shape), absent]:
            article, reply = "an" if pair[0] == "orange" else "a", "yes" if pair in pairs else "no"
            exists.append((f"is there {article} {pair[0]} {pair[1]}?", reply))
    return {"place": place, "named": named, "exists": exists}


def change(scene: Scene, rng: random.Random, withheld=WITHHELD) -> Scene:
    """A scene without withheld pairs that differs in one thing."""
    values = dict(size=SIZES, color=COLORS, shape=SHAPES, place=PLACES)
    while True:
        background, at = scene.background, {o.place: o for o in scene.objects}
        kind, place = rng.choice(["background", "add", "remove", *values]), rng.choice(list(at))
        if kind == "background":
            background = rng.choice(list(BACKGROUNDS))
        elif kind == "add":
            new = Object(*(rng.choice(list(each)) for each in values.values()))
            at[new.place] = new
        else:
            old = at.pop(place)
            if kind != "remove":
                new = old._replace(**{kind: rng.choice(list(values[kind]))})
                at[new.place] = new
        after = Scene(background, tuple(at[p] for p in PLACES if p in at))
        number = len(scene.objects) + {"add": 1, "remove": -1}.get(kind, 0)     # none was put over another
        hidden = any((o.color, o.shape) in PAIRS[:withheld] for o in after.objects)
        if after != scene and len(at) == number and 0 < number < 4 and not hidden:
            return after


def instruct(before: Scene, after: Scene, rng: random.Random) -> str:
    """The words that turn a scene into one that differs in one thing, in one of several phrasings."""
    old, new = ([o for o in a.objects if o not in b.objects] for a, b in ((before, after), (after, before)))
    if not old + new:
        return rng.choice(["make the background {}", "change the background to {}"]).format(after.background)
    if not old:
        return rng.choice(["add a {} {} {} at the {}", "put a {} {} {} at the {}"]).format(*new[0])
    o, others = old[0], [x for x in before.objects if x != old[0]]
    names = [f"the shape at the {o.place}"]
    if (o.color, o.shape) not in [(x.color, x.shape) for x in others]:
        names.append(f"the {o.color} {o.shape}")
    if o.shape not in [x.shape for x in others]:
        names.append(f"the {o.shape}")
    if not new:
        return rng.choice(["remove {}", "take away {}"]).format(rng.choice(names))
    value, = {*new[0]} - {*o}
    phrasings = ["make {} {}", "change {} to {}"]
    if value in PLACES + SHAPES:
        phrasings = ["move {} to the {}", "put {} at the {}"] if value in PLACES else ["turn {} into a {}"]
    return rng.choice(phrasings).format(rng.choice(names), value)


CORNERS = {"circle": "no corners", "square": "four corners",
           "triangle": "three corners", "star": "five points"}
MIXES = {"orange": "red and yellow", "green": "blue and yellow", "purple": "red and blue"}


def statement(rng: random.Random, withheld=WITHHELD) -> str:
    """A true sentence without a withheld pair."""
    color, shape = rng.choice(PAIRS[withheld:])
    mixed = rng.choice(list(MIXES))
    return rng.choice([
        f"Any {color} {shape} has {CORNERS[shape]}.",
        f"Every {shape}, small or large, has {CORNERS[shape]}.",
        f"The color of every {color} {shape} is {color}.",
        f"A large {shape} is larger than a small {shape}.",
        f"You get {mixed} when you mix {MIXES[mixed]}.",
        f"If a picture shows one {color} {shape} and nothing else, it shows one shape."])


# ---- Sources: where pictures and texts come from ----------------------------------------------------------

@dataclass(eq=False)
class Picture:
    """A captioned picture: a file that is opened when it is needed, or codes.

    A dialogue is a list of turns (question, reply), each a list of words and pictures: this one, or others.
    """
    name: str                       # in messages
    open: Callable[[], Image.Image] | None = None
    captions: list[str] = field(default_factory=list)
    dialogues: list[list[tuple[list, list]]] = field(default_factory=list)  # whose replies are words
    edits: list[list[tuple[list, list]]] = field(default_factory=list)      # in which one has a picture
    key: str = ""                   # its name below the source, which decides if it is held out
    scene: Scene | None = None      # of a built-in one
    codes: torch.Tensor | None = None                                       # (h, w)

    def ask(self, *pairs):
        """Add a dialogue about this picture, of pairs (question, answer)."""
        (question, answer), *more = pairs
        self.dialogues.append([([self, question], [answer]), *(([q], [a]) for q, a in more)])


class Split(NamedTuple):
    pictures: list[Picture]         # or Encoded
    texts: list[str]


def digest(text) -> int:
    """64 bits that depend on the text alone."""
    raw = text.encode("utf-8", "surrogatepass")     # which file names may hold
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def hold_out(items, key=str):
    """A list -> (train, val): one in 20 by a hash of its key, at least one; a single item is both."""
    hashes = [digest(key(item)) for item in items]
    picked = {h for h in hashes if h % 20 == 0} or {min(hashes, default=0)}
    val = [item for item, h in zip(items, hashes) if h in picked]
    return [item for item, h in zip(items, hashes) if h not in picked] or val, val


def passages(text, length=160) -> list[str]:
    """Cut a text, or a Path's lines, into passages of about length characters; long lines at spaces."""
    result = [""]
    for line in text.open(encoding="utf-8-sig") if isinstance(text, Path) else text.splitlines(True):
        # up to a space, a part of a word longer than a passage, or the space before such a word
        for part in re.findall(rf".{{1,{length}}}(?:\s|$)|\S{{{length}}}|.", line, re.DOTALL):
            if len(result[-1]) + len(part) > length:
                result.append("")
            result[-1] += part
    return [passage.strip("\n") for passage in result if passage.strip()]


def read_texts(path, length=160) -> list[str]:
    """A .txt, or rows with `text` -> passages of about length characters."""
    path, result = Path(path), []
    rows = read_rows(path) if path.suffix.lower() in ROWS else [(path, {"text": path})]
    for place, row in rows:
        with naming(place, "no readable text"):
            result += passages(row["text"], length)
    if not result:
        raise ValueError(f"{path}: no text in it")
    return list(dict.fromkeys(result))      # a passage that comes twice could be learned and held out


def scenes(count, seed, name, side=64, withheld=WITHHELD, unseen=False, skip=(), edited=0) -> list[Picture]:
    """Pictures of random scenes that are not in skip, each a function of (seed, name, its number).

    Behind each of the first `edited` stands one that differs in one thing; it has no captions.
    """
    pictures, numbers, made = [], itertools.count(), 0
    while made < count:
        key = f"{name}/{next(numbers)}"
        rng = random.Random(f"{seed}/{key}")
        scene = random_scene(rng, withheld, unseen)
        if scene in skip:
            continue
        captions = [describe(scene, rng) for _ in range(4)]
        picture = Picture(key, partial(draw, scene, side), captions, key=key, scene=scene)
        asked = questions(scene, rng, withheld)     # the harder, the more
        for pair in rng.sample(asked["place"], 8) + asked["named"] + 2 * asked["exists"]:
            picture.ask(pair)
        rng.shuffle(picture.dialogues)
        pictures.append(picture)
        made += 1
        if made <= edited and (other := change(scene, rng, withheld)) not in skip:
            pictures.append(Picture(f"{key}/edited", partial(draw, other, side), key=key, scene=other))
            for a, b in (pictures[-2:], pictures[:-3:-1]):
                a.edits.append([([instruct(a.scene, b.scene, rng), a], [b])])      # see sample.edit
    return pictures


def built_in(seed, side=64, withheld=WITHHELD, train=20000, val=400, unseen=200, edited=5000):
    """The scenes; their text is statements, and English that every Python carries."""
    from pydoc_data.topics import topics
    held_out, rng = scenes(val, seed, "val", side, withheld, edited=val), random.Random(f"{seed}/text")
    new = scenes(unseen if withheld else 0, seed, "unseen", side, withheld, True, edited=unseen)
    seen = scenes(train, seed, "train", side, withheld, skip={p.scene for p in held_out}, edited=edited)
    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    english = dict.fromkeys(passages("\n\n".join(dict.fromkeys(paragraphs))))       # topics repeat each other
    train_texts, val_texts = hold_out(list(english), str)
    statements = [statement(rng, withheld) for _ in english]
    return {"train": Split(seen, train_texts + statements), "val": Split(held_out, val_texts),
            "unseen": Split(new, [])}


class Member(NamedTuple):
    """A file in a tar, read where it stands, or the bytes of one in a compressed tar."""
    tar: Path
    path: PurePosixPath
    offset: int
    size: int
    raw: bytes | None

    def __str__(self):
        return f"{self.tar}:{self.path}"

    def read_bytes(self):
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size) if self.raw is None else self.raw


class Found(list):
    """Pictures of a source; .texts beside them, and .left_out: {reason: number}."""
    def __init__(self):
        self.texts, self.left_out = [], Counter()


def annotate(picture, note):
    """Add what a note says: {"caption": ..., "qa": [[question, answer], ...]}, or a row of a .jsonl."""
    said = next((note[key] for key in CAPTIONS if note.get(key)), [])
    for caption in said if isinstance(said, list) else [said]:
        if caption.strip() not in ("", *picture.captions):
            picture.captions.append(caption.strip())
    for pair in note.get("qa", []):
        question, answer = (pair["question"], pair["answer"]) if isinstance(pair, dict) else pair
        picture.ask((question.strip(), answer.strip()))


def parts_of(dialogue, sides=(0, 1)) -> list:
    """Words and pictures of its questions (side 0), replies (1) or both."""
    return [part for turn in dialogue for side in sides for part in turn[side] or ()]


def read_dialogue(messages, find, images=()) -> list[tuple[list, list | None]]:
    """Messages in the layout of transformers' chat templates, or LLaVA's -> turns of (question, reply).

    find(name) -> a picture; images take the places of LLaVA's <image>. What a system says, or a model before
    it is asked, is given with the question.
    """
    turns, images = [], iter(images)
    for message in messages:
        role, content = message.get("role") or message["from"], message.get("content", message.get("value"))
        if isinstance(content, str):
            parts = re.split("(<image>)", content)
            parts = [next(images, "") if part == "<image>" else part for part in parts]
        else:
            parts = [find(part["image"]) if part["type"] == "image" else part["text"] for part in content]
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        parts = [part for part in parts if part != ""]
        waiting = turns and turns[-1][1] is None
        if role in ("assistant", "gpt") and waiting and parts:
            turns[-1] = turns[-1][0], parts
        elif role in ("user", "human", "system") or role in ("assistant", "gpt") and not turns:
            turns.append((turns.pop()[0] + parts if waiting else parts, None))
        else:
            raise ValueError(f"{role!r} has no turn to speak, or says nothing")
    return turns


def read_tar(tar, left_out):
    """-> {name: Member}; a link leads to a file of the same tar, or nowhere."""
    with naming(tar, "not a readable tar file"), tarfile.open(tar) as members:
        every, files = {posixpath.normpath(m.name): m for m in members}, {}
        plain = isinstance(members.fileobj, io.BufferedReader)
        for name, m in every.items():
            if m.issym() or m.islnk():
                target = posixpath.join(posixpath.dirname(name) * m.issym(), m.linkname)
                m = every.get(posixpath.normpath(target), m)
            if m.isfile():
                raw = None if plain else members.extractfile(m).read()
                files[name] = Member(tar, PurePosixPath(name), m.offset_data, m.size, raw)
            left_out["links"] += not m.isfile() and not m.isdir()
    return files


def add_files(found, files, root):
    """{name: file} -> pictures; name.txt or name.caption has a caption a line, name.json is a note."""
    pictures, notes = {}, []
    for name, file in sorted(files.items()):
        path = PurePosixPath(name)      # hidden files and companions that systems add are no pictures
        key, suffix = str(path.with_suffix("")), path.suffix.lower()
        if any(part[0] in ".@" or part == "__MACOSX" for part in path.parts):
            found.left_out["hidden"] += 1
        elif isinstance(file, Path) and re.search(TAR, name):
            add_files(found, read_tar(file, found.left_out), "")
        elif suffix in SUFFIXES and key not in pictures:
            pictures[key] = Picture(str(file), partial(load_image, file), key=key)
        elif suffix in NOTES or path.name in ("metadata.jsonl", "metadata.csv"):
            notes.append((key, suffix, file))
        else:
            found.left_out[suffix or "no ending"] += 1
    for key, suffix, file in notes:
        picture = pictures.get(key, pictures.get(os.path.splitext(key)[0]))     # of 0.jpg.txt, 0.caption.txt
        try:
            if suffix not in NOTES:
                add_rows(file, root, pictures, found)
            elif picture:
                text = read_utf8(file)
                with naming(file, 'not {"caption": ..., "qa": [[question, answer]]}'):
                    note = json.loads(text) if suffix == ".json" else {"caption": text.splitlines()}
                    annotate(picture, note)
            else:
                found.left_out[f"{suffix} without a picture"] += 1
        except ValueError as error:
            found.left_out[f"note, {error}"] += 1
    found += pictures.values()


def add_rows(file, root, pictures, found):
    """Rows in our layout, ImageFolder's, Liquid's raw or pre-encoded one, LLaVA's or transformers' messages.

    Rows of one picture are merged. Pictures of one dialogue are held out together.
    """
    groups = {}

    def find(name):
        path = getattr(file, "path", file).parent / name
        key = os.path.splitext(os.path.relpath(path, root))[0]      # of any spelling
        return pictures.setdefault(key, Picture(str(path), partial(load_image, path), key=key))

    for place, row in read_rows(file):
        with naming(place, "not a row about a picture"):
            codes, names = row.get("vqcode_512", "no"), next((row[k] for k in IMAGES if row.get(k)), [])
            if codes != "no":               # a list, or its text, of codes of a square grid
                codes = np.array(json.loads(codes) if isinstance(codes, str) else codes).flatten()
                side = math.isqrt(len(codes))
                if codes.dtype != np.int64 or codes.min() < 0 or side * side != len(codes):
                    raise ValueError("vqcode_512 is not a square grid of whole numbers from 0")
                key = str(digest(str(codes.tolist())))
                new = Picture(place, key=key, codes=torch.from_numpy(codes).view(side, side))
                here = [pictures.setdefault(key, new)]
            else:
                here = [find(name) for name in ([names] if isinstance(names, str) else names)]
            talk = next((name for name in ("messages", "conversations") if name in row), None)
            turns = read_dialogue(row[talk], find, here) if talk else []
            if turns and turns[-1][1] is None:
                turns.pop()
                found.left_out["questions without a reply"] += 1
            if talk and not turns:
                raise ValueError(f"{talk} holds no question with a reply")
            here += [part for part in parts_of(turns) if isinstance(part, Picture)]
            if not here:
                if not turns:
                    found.texts.append(row["text"].strip())
                found.left_out["dialogues without a picture"] += bool(turns)
                continue
            annotate(here[0], row)
            if turns:
                if not any(isinstance(part, Picture) for part in parts_of(turns)):
                    turns[0][0].insert(0, here[0])          # LLaVA's picture stands before the question
                drawn = any(isinstance(part, Picture) for part in parts_of(turns, [1]))
                (here[0].edits if drawn else here[0].dialogues).append(turns)
            group = list(dict.fromkeys(other for p in here for other in groups.get(p, [p])))
            groups.update(dict.fromkeys(group, group))
    for picture, group in groups.items():
        picture.key = group[0].key


def read_pictures(path) -> Found:
    """A folder of pictures, notes and tars, or one tar, or a list of rows."""
    path, found, pictures = Path(path), Found(), {}
    if path.suffix.lower() in ROWS:
        add_rows(path, path.parent, pictures, found)
        found += pictures.values()
    else:
        root, walked = (path.parent, [path]) if path.is_file() else (path, list(path.rglob("*")))
        files = {file.relative_to(root).as_posix(): file for file in walked if file.is_file()}
        found.left_out["links"] = sum(file.is_symlink() and not file.is_file() for file in walked)
        add_files(found, files, root)
    if not found:
        raise ValueError(f"{path}: no pictures, rows about them, or tars")
    places = {}
    found.sort(key=lambda p: places.setdefault(p.key, len(places)))     # those of one dialogue side by side
    return found


def load_source(data=None, text=None, side=64, withheld=WITHHELD, long=False, say=str) -> dict[str, Split]:
    """The splits "train" and "val", and of the built-in data "unseen"; with long, passages are long."""
    found, length = Found(), 4000 if long else 160
    if data is None:
        splits = built_in(0, side, withheld)
        found += itertools.chain(*(split.pictures for split in splits.values()))
    else:
        found = read_pictures(data)
        texts = list(dict.fromkeys(p for words in found.texts for p in passages(words, length)))
        pictures = hold_out(found, lambda picture: picture.key)
        splits = {name: Split(*both) for name, *both in zip(("train", "val"), pictures, hold_out(texts))}
    if text is not None:
        train, val = hold_out(read_texts(text, length))
        splits |= {"train": splits["train"]._replace(texts=train), "val": splits["val"]._replace(texts=val)}
    captioned, asked = sum(bool(p.captions) for p in found), sum(bool(p.dialogues or p.edits) for p in found)
    texts = sum(len(split.texts) for split in splits.values())
    left_out = ", ".join(f"{n} {why}" for why, n in found.left_out.items() if n) or "nothing"
    line = (f"{data or 'scenes'}: {len(found)} pictures, {captioned} with captions, {asked} with questions; "
            f"{texts} texts of {text or data or 'English'}; left out: {left_out}")
    if not captioned + asked:
        raise ValueError(f"nothing has a caption or a question; {line}")
    say(line)
    return splits


def tasks_of(split) -> dict[str, list]:
    """The examples of each task."""
    def only(kind):
        lazy = isinstance(split.pictures, Encoded)
        return split.pictures.only(kind) if lazy else [p for p in split.pictures if getattr(p, kind)]
    captioned = only("captions")
    return {"t2i": captioned, "i2t": captioned, "vqa": only("dialogues"), "edit": only("edits"),
            "text": split.texts}


# ---- Shards: encoded pictures, which stay on the disk until each is asked for -----------------------------

FORMAT = "nanoLiquid codes 4"


def write_shard(path, pictures, fingerprint, skipped=None):
    """Pictures with codes -> a file; fingerprint: how it was made; skipped: {name: why it was not read}.

    In a dialogue, a picture is its number in the shard; those of skipped pictures are left out.
    """
    number = {p.name: i for i, p in enumerate(pictures)}

    def whole(talks):
        return [d for d in talks if all(isinstance(p, str) or p.name in number for p in parts_of(d))]
    kept = [dict(captions=p.captions, dialogues=whole(p.dialogues), edits=whole(p.edits)) for p in pictures]
    rows = [json.dumps((p.name, *k.values()), default=lambda other: number[other.name]).encode()
            for p, k in zip(pictures, kept)]
    codes = torch.stack([p.codes for p in pictures]) if pictures else torch.zeros(0, 0, 0)
    kind = torch.int32 if (codes >= 2 ** 16).any() else torch.uint16
    save_atomically({"format": FORMAT, "fingerprint": fingerprint, "skipped": json.dumps(skipped or {}),
                     "codes": codes.to(kind),
                     "rows": torch.frombuffer(bytearray(b"".join(rows) + b" "), dtype=torch.uint8),
                     "ends": torch.tensor(list(itertools.accumulate(map(len, rows), initial=0))),
                     **{kind: torch.tensor([bool(k[kind]) for k in kept])
                        for kind in ("captions", "dialogues", "edits")}}, path)


def read_shard(path, fingerprint) -> dict | None:
    """The file, opened by mmap; None if it is missing, damaged or made in another way."""
    try:
        shard = torch.load(path, weights_only=True, mmap=True)
        shard["skipped"] = dict(json.loads(shard["skipped"]))
        whole = len(shard["codes"]) + 1 == len(shard["ends"]) and shard["ends"][-1] < len(shard["rows"])
        return shard if whole and (shard["format"], shard["fingerprint"]) == (FORMAT, fingerprint) else None
    except Exception:       # of a damaged file; the shard is made again
        return None


class Encoded:
    """A lazy list of the pictures in shards, or of those whose numbers are chosen."""
    def __init__(self, shards, chosen=None):
        self.shards = shards
        self.starts = np.cumsum([0, *(len(shard["codes"]) for shard in shards)])
        self.chosen = range(self.starts[-1]) if chosen is None else chosen

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i) -> Picture:
        i = int(self.chosen[i])
        number = np.searchsorted(self.starts, i, "right") - 1
        shard, i = self.shards[number], i - self.starts[number]
        begin, end = shard["ends"][i:i + 2].tolist()
        name, captions, *talks = json.loads(shard["rows"][begin:end].numpy().tobytes())
        codes = lru_cache(lambda number: shard["codes"][number].long())
        talks = [[[[[codes(p) if isinstance(p, int) else p for p in side] for side in turn]
                   for turn in dialogue] for dialogue in talk] for talk in talks]
        return Picture(name, None, captions, *talks, codes=codes(int(i)))

    def only(self, kind) -> "Encoded":
        """Those that have captions, dialogues or edits."""
        flags = np.concatenate([shard[kind].numpy() for shard in self.shards] or [[]]).astype(bool)
        return Encoded(self.shards, None if flags.all() else np.flatnonzero(flags).astype(np.int32))


# ---- The loader: an endless, mixed, packed stream for each row of the batch -------------------------------

class Batch(NamedTuple):
    """Whole examples side by side in each row; none sees its neighbours."""
    ids: torch.Tensor           # (R, T) int64
    targets: torch.Tensor       # (R, T) int64, IGNORE where nothing is learned
    positions: torch.Tensor     # (R, T) int64, from 0 in each example
    documents: torch.Tensor     # (R, T) int64, number of the example in its row, -1 in padding
    tasks: torch.Tensor         # (R, T) int64, index into TASKS, -1 in padding


def to_device(x, device):       # without a wait
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def shuffled(place, n, key) -> int:
    """Element `place` of a permutation of range(n), by a Feistel network that is walked until below n."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    while True:
        left, right = place >> half, place & (1 << half) - 1
        for turn in range(4):
            left, right = right, left ^ digest(f"{key}/{turn}/{right}") & (1 << half) - 1
        place = left << half | right
        if place < n:
            return place


class Loader:
    """next() -> (Batch, state): {row: state} resumes its rows right after that batch.

    tasks    {task: list of Picture or str}; mix {task: weight}
    rows     of a batch over all ranks, of which a rank has rank, rank + world, ...
    context  positions of a row; longer examples are left out and counted in `dropped`
    uncond   share of drawings without words, for guidance
    perturb  turns codes to draw, with a torch.Generator, into codes that look alike
    A row is a pure function of (seed, its number, how much it has drawn); the choices of an example depend on
    (seed, task, epoch, index). All rows together take each example once an epoch.
    """
    PATIENCE = 16       # examples that may wait for a row's next batch

    def __init__(self, tasks, mix, vocab, tokenizer, rows, context, seed=0, rank=0, world=1, state=None,
                 uncond=0.1, perturb=None):
        self.tasks, self.vocab, self.tokenizer = tasks, vocab, tokenizer
        self.rows, self.context, self.seed = rows, context, seed
        self.uncond, self.perturb = uncond, perturb
        self.mix = {task: weight for task, weight in mix.items() if weight > 0 and len(tasks.get(task, ()))}
        if not self.mix:
            raise ValueError(f"nothing to train on: there are no examples of {', '.join(mix)}")
        self.states = {}
        for row in range(rank, rows, world):
            old = (state or {}).get(row, {"drawn": {}, "waiting": [], "dropped": 0})
            waiting = [(task, epoch, index) for task, epoch, index in old["waiting"]
                       if task in self.mix and index < len(tasks[task])]    # the mix or the data may be new
            drawn = dict.fromkeys(self.mix, 0) | old["drawn"]
            self.states[row] = {"drawn": drawn, "waiting": waiting, "dropped": old["dropped"]}

    def next(self):
        return self.batch(), {row: {**s, "drawn": dict(s["drawn"])} for row, s in self.states.items()}

    @property
    def dropped(self):
        return sum(state["dropped"] for state in self.states.values())

    def next_example(self, row):
        drawn = self.states[row]["drawn"]
        rng = random.Random(f"{self.seed}/{row}/{sum(drawn.values())}")
        task = rng.choices(list(self.mix), self.mix.values())[0]
        epoch, place = divmod(drawn[task] * self.rows + row, len(self.tasks[task]))
        drawn[task] += 1
        return task, epoch, shuffled(place, len(self.tasks[task]), f"{self.seed}/{task}/{epoch}")

    @lru_cache(maxsize=2048)
    def render(self, task, epoch, index):
        rng = random.Random(f"{self.seed}/{task}/{epoch}/{index}")
        item, common = self.tasks[task][index], (self.vocab, self.tokenizer)

        def drawn(part):
            if isinstance(part, str) or not self.perturb:
                return part
            return self.perturb(part, torch.Generator().manual_seed(rng.getrandbits(63)))
        if task == "text":
            return render_text(*common, item)
        if task in ("vqa", "edit"):
            turns = rng.choice(item.dialogues if task == "vqa" else item.edits)
            return render_dialogue(*common, [(question, [*map(drawn, reply)]) for question, reply in turns])
        caption = rng.choice(item.captions)
        if task == "i2t":
            return render_i2t(*common, item.codes, caption)
        words = None if rng.random() < self.uncond else caption
        return render_t2i(*common, words, drawn(item.codes))

    length = lru_cache(2 ** 16)(lambda self, *key: len(self.render(*key)[0]))       # while it waits

    def fill(self, row):
        """First-fit packing -> (task, ids, targets) of each; examples without room wait."""
        state, placed, free, misfits = self.states[row], [], self.context, []
        waiting, most = list(state["waiting"]), state["dropped"] + 10_000
        while len(misfits) < self.PATIENCE:
            key = waiting.pop(0) if waiting else self.next_example(row)
            length = self.length(*key)
            if length > self.context:
                state["dropped"] += 1
                if state["dropped"] > most:
                    raise ValueError(f"--context {self.context}: no example fits, one has {length} tokens")
            elif length > free:
                misfits.append(key)
            else:
                placed.append((key[0], *self.render(*key)))
                free -= length
        state["waiting"] = misfits + waiting
        return placed

    def batch(self) -> Batch:
        planes = Batch(*np.full((5, len(self.states), self.context), -1, np.int64))
        planes.ids[:], planes.targets[:], planes.positions[:] = self.vocab.pad, IGNORE, 0
        for r, row in enumerate(self.states):
            start = 0
            for number, (task, ids, targets) in enumerate(self.fill(row)):
                span = np.s_[r, start:start + len(ids)]
                planes.ids[span], planes.targets[span], planes.positions[span] = ids, targets, range(len(ids))
                planes.documents[span], planes.tasks[span] = number, TASKS.index(task)
                start += len(ids)
        return Batch(*map(torch.from_numpy, planes))


# ---- Files ------------------------------------------------------------------------------------------------

def extra(name):
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f'{name} is not installed: pip install -e ".[pretrained]"') from None


@contextmanager
def naming(file, problem):
    """Any error of a library becomes a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: {problem} ({reason})") from None


def read_utf8(file) -> str:
    with naming(file, "not a readable UTF-8 text"):
        raw = (file if isinstance(file, Member) else Path(file)).read_bytes()
        return raw.decode("utf-8-sig").replace("\r\n", "\n")


def read_rows(file):
    """Yields (place, row) of a .jsonl, of the array in a .json, or of a .csv."""
    text, suffix = read_utf8(file), PurePosixPath(str(file)).suffix.lower()
    with naming(file, "not an array of rows"):
        rows = json.loads(text) if suffix == ".json" else csv.DictReader(io.StringIO(text))
        lines = text.split("\n") if suffix == ".jsonl" else list(map(json.dumps, rows))
    for number, line in enumerate(lines, 1):
        if line.strip():
            with naming(f"{file}, line {number}", "not JSON"):
                row = json.loads(line)
            yield f"{file}, line {number}", row


def write_atomically(path, write):
    """Let write(file) fill a file that replaces `path` once it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:        # torch.save raises the latter over the disk's own error
        reason = getattr(error.__context__ or error, "strerror", None) or error
        raise OSError(f"{path}: not written ({reason}), and left as it was before") from None
    finally:
        unfinished.unlink(missing_ok=True)


def save_atomically(value, path):
    write_atomically(path, partial(torch.save, value))
