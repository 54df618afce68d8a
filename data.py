"""Everything between files and ids: vocabulary, text tokenizers, templates, pictures, built-in scenes, sources, shards
and the loader.

    file --load_image--> image --to_pixels--> pixels ... codes --Vocab.codes_to_ids--> ids
    text --tokenizer.encode-----------------------------------------------------------> ids
    ids --render_*--> (ids, targets) --Loader--> batch

Look at what the model will see (the part of each example that carries loss is underlined):

    python data.py              # one example of every task, from the built-in scenes

R rows of a batch   T positions in a row   K codes   h, w code grid
"""

import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import tarfile
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary: which row of the embedding means what. The only place where codes and ids are converted.

@dataclass(frozen=True)
class Vocab:
    """Text rows, then image rows; where a family has no ids to spare, its new special tokens follow the image rows."""
    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int
    uncond: int
    image_start: int
    image_size: int     # K

    @property
    def size(self) -> int:
        return 1 + max(self.image_start + self.image_size - 1, self.boi, self.eoi, self.uncond)

    @property
    def image_rows(self) -> tuple[int, int]:
        """(first, past the last)"""
        return self.image_start, self.image_start + self.image_size

    @property
    def text_rows(self) -> tuple[int, int]:
        return 0, self.image_start

    def codes_to_ids(self, codes):
        """Codes of any shape, 0..K-1 -> ids of the same shape. ValueError outside that range."""
        return self._shift(codes, 0, self.image_start)

    def ids_to_codes(self, ids):
        """Ids of image rows, of any shape -> codes. ValueError if any of them is another row."""
        return self._shift(ids, self.image_start, -self.image_start)

    def _shift(self, x, first, offset):
        x = torch.as_tensor(x)
        if x.numel() and not (first <= int(x.min()) and int(x.max()) < first + self.image_size):
            last = first + self.image_size - 1
            raise ValueError(f"{int(x.min())}..{int(x.max())} is not within the image range {first}..{last}")
        return x + offset


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_utf8(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable UTF-8 text ({error})") from None


def read_jsonl(path):
    """Yields (line number, object) of every line that is not empty; ValueError names file and line."""
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            yield number, row


def field_of(row, key, path, number) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"{path}, line {number}: no string {key!r}")
    return row[key]


def write_atomically(path, write):
    """Let write(file) fill a file that replaces `path` only once it is whole; OSError names the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(path.name + ".partial")
    try:
        with open(partial_file, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_file, path)
    except (OSError, RuntimeError) as error:    # torch.save raises the latter over the file's own error
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"{path}: not written ({reason.strerror}), and left as it was before") from None
    finally:
        partial_file.unlink(missing_ok=True)


def save_atomically(value, path):
    write_atomically(path, partial(torch.save, value))


# ---------------------------------------------------------------------------------------------------------------------
# Text tokenizers

class Chat(NamedTuple):
    """The marks of a conversation: user QUESTION end model, then, which the model learns, lead ANSWER end."""
    user: str
    model: str
    end: str
    lead: str = ""


CHATS = {"plain": Chat("", "", "\n", " "),     # " red" is the id that captions know, "red" would be another
         "gemma": Chat("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"),
         "chatml": Chat("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
         "llama3": Chat("<|start_header_id|>user<|end_header_id|>\n\n",
                        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")}


class WordTokenizer:
    """Whole words that the data uses often, bytes for the rest; any string comes back as it was.

    Ids: 6 special tokens, 256 bytes, then the words.
    """
    SPECIAL = dict(pad=0, bos=1, eos=2, boi=3, eoi=4, uncond=5)
    PIECES = re.compile(r" ?\w+| ?[^\w\s]+|\s")     # each character is in exactly one class, so pieces tile the text
    chat, stops = CHATS["plain"], ()

    def __init__(self, words):
        self.words, self.first_byte = list(words), len(self.SPECIAL)
        self.ids = {word: self.first_byte + 256 + i for i, word in enumerate(self.words)}
        # What each id stands for; surrogates pass, for JSON may hold lone ones:
        self.pieces = [b""] * self.first_byte + [bytes([i]) for i in range(256)]
        self.pieces += [word.encode("utf-8", "surrogatepass") for word in self.words]

    @classmethod
    def learn(cls, texts, size=4096):
        """The most frequent pieces of the texts that occur at least three times."""
        counts = Counter(piece for text in texts for piece in cls.PIECES.findall(text))
        return cls(piece for piece, n in counts.most_common(size) if n >= 3)

    @property
    def size(self):
        return len(self.pieces)

    def encode(self, text):
        ids = []
        for piece in self.PIECES.findall(text):
            known = self.ids.get(piece)
            ids += [known] if known else [self.first_byte + i for i in piece.encode("utf-8", "surrogatepass")]
        return ids

    def decode(self, ids):
        """Special tokens are left out; bytes that are no UTF-8 become replacement characters."""
        raw = b"".join(self.pieces[i] for i in ids)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")

    def vocab(self, image_size) -> Vocab:
        return Vocab(**self.SPECIAL, image_start=self.size, image_size=image_size)

    def state(self):
        return {"kind": "words", "words": self.words}


class PretrainedTokenizer:
    """The tokenizer.json of a Gemma, Qwen or Llama folder, through the `tokenizers` package."""
    MARKS = {"<start_of_turn>": "gemma", "<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
    SPARE = [("<boi>", "<eoi>", "<unconditional>"),                     # Liquid's own names
             ("<unused0>", "<unused1>", "<unused2>"),                   # Gemma
             ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),   # Qwen, whose text models never see them
             tuple(f"<|reserved_special_token_{i}|>" for i in range(3))]    # Llama 3

    def __init__(self, text):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError('tokenizers is not installed: pip install -e ".[pretrained]"') from None
        self.text, self.tokenizer = text, Tokenizer.from_str(text)
        self.chat = CHATS[next((kind for mark, kind in self.MARKS.items() if self.id(mark) is not None), "plain")]
        turn_end = self.id(self.chat.end.strip())
        self.stops = () if turn_end is None else (turn_end,)

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "tokenizer.json"
        text = read_utf8(path)
        try:
            return cls(text)
        except Exception as error:      # the package raises bare Exceptions
            raise ValueError(f"{path}: {error}") from None

    def id(self, name):
        return self.tokenizer.token_to_id(name)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def vocab(self, image_size, config, image_start=None) -> Vocab:
        """config is the folder's config.json; image rows follow all rows of its embedding, padding rows included.

        boi, eoi and uncond take ids that the family keeps in reserve, or else new rows behind the image rows.
        """
        def first(key, otherwise):
            value = config.get(key)
            value = value[0] if isinstance(value, list) else value
            return otherwise if value is None else value
        image_start = config["vocab_size"] if image_start is None else image_start
        eos = first("eos_token_id", 1)
        spare = next((names for names in self.SPARE if all(self.id(name) is not None for name in names)), None)
        boi, eoi, uncond = map(self.id, spare) if spare else (image_start + image_size + i for i in range(3))
        bos, pad = first("bos_token_id", eos), first("pad_token_id", eos)
        return Vocab(bos, eos, pad, boi, eoi, uncond, image_start, image_size)

    def state(self):
        return {"kind": "pretrained", "text": self.text}


def load_tokenizer(state):
    """The tokenizer that state(), kept in every checkpoint, describes."""
    return WordTokenizer(state["words"]) if state["kind"] == "words" else PretrainedTokenizer(state["text"])


def fetch(name) -> Path:
    """A folder, or the name of a repository on the hub, which is downloaded."""
    if Path(name).exists() or name.count("/") != 1:
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f'--init {name}: no such folder, and for the hub: pip install -e ".[pretrained]"') from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as error:      # the package raises its own and its transport's
        reason = str(error).split("\n")[0]
        raise ValueError(f"--init {name}: no such folder, and the hub did not give it ({reason})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Templates: each task is written once, for training (ids and targets) and for sampling (the same with the answer left
# out). All of them return (ids, targets), two lists of one length: targets[t] is the id to predict after ids[..t], or
# IGNORE where nothing is learned.

IGNORE = -100
TASKS = ("t2i", "i2t", "vqa", "text")
DRAW = " Generate an image based on this description."
CAPTION = "The caption of this image is:"


def sequence(*segments):
    """Segments (ids, learned) -> (ids, targets)."""
    ids, learned = [], []
    for part, learn in segments:
        ids += part
        learned += [learn] * len(part)
    return ids, [i if learn else IGNORE for i, learn in zip(ids[1:], learned[1:])] + [IGNORE]


def picture_ids(vocab, codes):
    """codes (h, w) or (h*w,) -> ids in raster order."""
    return vocab.codes_to_ids(codes).flatten().tolist()


def render_t2i(vocab, tokenizer, caption, codes=None):
    """Draw a caption; without a caption, draw anything (the unconditional half of guidance)."""
    words = [vocab.uncond] if caption is None else tokenizer.encode(caption + DRAW)
    answer = [] if codes is None else picture_ids(vocab, codes) + [vocab.eoi, vocab.eos]
    return sequence(([vocab.bos] + words + [vocab.boi], False), (answer, True))


def render_i2t(vocab, tokenizer, codes, caption=None):
    """Caption a picture."""
    answer = [] if caption is None else tokenizer.encode(caption) + [vocab.eos]
    prompt = [vocab.bos, vocab.boi] + picture_ids(vocab, codes) + [vocab.eoi] + tokenizer.encode(CAPTION)
    return sequence((prompt, False), (answer, True))


def render_vqa(vocab, tokenizer, codes, turns):
    """Talk about a picture: turns is a list of (question, answer), the picture stands before the first question.

    An answer of None ends the sequence: it is what the model has to say.
    """
    chat, segments = tokenizer.chat, [([vocab.bos], False)]
    shown = [vocab.boi] + picture_ids(vocab, codes) + [vocab.eoi] + tokenizer.encode("\n")
    for question, answer in turns:
        opening, shown = tokenizer.encode(chat.user) + shown, []        # once
        segments.append((opening + tokenizer.encode(question + chat.end + chat.model), False))
        if answer is None:
            return sequence(*segments)
        segments.append((tokenizer.encode(chat.lead + answer + chat.end), True))
    return sequence(*segments, ([vocab.eos], True))


def render_text(vocab, tokenizer, text, ended=True):
    """Read a text; with ended=False it goes on."""
    return sequence(([vocab.bos], False), (tokenizer.encode(text) + ([vocab.eos] if ended else []), True))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: file -> image -> pixels, and back

GRAY = (122, 116, 104)      # what Liquid pads with
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")     # whatever the suffix; never EPS, which runs Ghostscript
Image.MAX_IMAGE_PIXELS = 100_000_000


def load_image(file, name=None) -> Image.Image:
    """A path or an open file -> image in RGB: turned as its EXIF says, transparency on white, 16 bits scaled to 8.

    Raises ValueError, naming the file (an open one by `name`), for whatever cannot be read as a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16") or image.mode == "I":
                    image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except Exception as error:      # Pillow raises whatever its parsers stumble over
        raise ValueError(f"{name or file}: not a readable picture ({error})") from None


def fit(image, size, pad=False) -> Image.Image:
    """image -> size x size: the centre of the picture, or with pad all of it on a gray square."""
    if pad:
        side = min(max(image.size), 4096)       # a long strip shrinks first: its square would not fit into memory
        image = ImageOps.pad(image, (side, side), Image.LANCZOS, GRAY)
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.LANCZOS)


def to_pixels(image) -> torch.Tensor:
    """image -> pixels (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_image(pixels) -> Image.Image:
    """pixels (1, 3, H, W) or (3, H, W) -> image; inverse of to_pixels."""
    pixels = pixels.detach().reshape(pixels.shape[-3:]).float().clamp(-1, 1)
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images, columns, gap=4) -> Image.Image:
    """Images of one size -> one picture of them in rows."""
    (w, h), rows = images[0].size, math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# The built-in scenes: one to three objects, each in its own quarter of the picture. draw and grade are inverses, and so
# are describe and read_description; a model's pictures and captions are scored with the second of each pair.

SIZES = {"small": 0.32, "large": 0.47}      # radius, in sides of the quarter
COLORS = {"red": (222, 56, 49), "orange": (245, 140, 34), "yellow": (250, 214, 50),
          "green": (52, 160, 84), "blue": (44, 112, 214), "purple": (140, 72, 180)}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {"white": (252, 252, 250), "gray": (196, 199, 205), "pink": (255, 212, 220), "navy": (28, 34, 66)}
NUMBERS = ("zero", "one", "two", "three")


class Object(NamedTuple):
    size: str
    color: str
    shape: str
    place: str


class Scene(NamedTuple):
    background: str
    objects: tuple[Object, ...]     # in the order of PLACES


# All pairs of color and shape, in an order in which both take turns (without i // 6 half of them would never come). The
# first few, red circle, orange square and yellow triangle, are withheld from all training.
PAIRS = [(list(COLORS)[i % 6], SHAPES[(i + i // 6) % 4]) for i in range(24)]
WITHHELD = 3


def random_scene(rng: random.Random, withheld=WITHHELD, unseen=False) -> Scene:
    """A scene without withheld pairs of color and shape; with unseen, exactly one of its objects is such a pair."""
    places = sorted(rng.sample(range(4), rng.randint(1, 3)))
    chosen = [rng.choice(PAIRS[withheld:]) for _ in places]
    if unseen:
        chosen[rng.randrange(len(chosen))] = rng.choice(PAIRS[:withheld])
    objects = tuple(Object(rng.choice(list(SIZES)), *kind, PLACES[p]) for kind, p in zip(chosen, places))
    return Scene(rng.choice(list(BACKGROUNDS)), objects)


@lru_cache(maxsize=None)
def sprite(background, size, color, shape, side) -> np.ndarray:
    """One quarter of a picture, (side, side, 3) uint8, drawn 8 times larger and averaged down for smooth edges."""
    s, radius = side * 8, SIZES[size] * side * 8
    image = Image.new("RGB", (s, s), BACKGROUNDS[background])

    def corners(n, radius, inner=None, turn=-math.pi / 2, drop=0.0):
        """n points around the middle, every other one at inner; the callers' factors make shapes look equally large."""
        radii = [radius, inner or radius]
        return [(s / 2 + radii[i % 2] * math.cos(turn + 2 * math.pi * i / n),
                 s / 2 + drop + radii[i % 2] * math.sin(turn + 2 * math.pi * i / n)) for i in range(n)]

    pen, fill = ImageDraw.Draw(image), COLORS[color]
    if shape == "circle":
        pen.ellipse([s / 2 - radius, s / 2 - radius, s / 2 + radius, s / 2 + radius], fill=fill)
    elif shape == "square":
        pen.polygon(corners(4, 1.37 * radius, turn=math.pi / 4), fill=fill)
    elif shape == "triangle":
        pen.polygon(corners(3, 1.15 * radius, drop=0.2 * radius), fill=fill)
    else:
        pen.polygon(corners(10, 1.1 * radius, 0.5 * radius), fill=fill)
    return np.asarray(image.resize((side, side), Image.BOX))


def quarter(place, side):
    """The part of a picture's array that a place covers."""
    row, column = divmod(PLACES.index(place), 2)
    return np.s_[row * side:(row + 1) * side, column * side:(column + 1) * side]


def draw(scene: Scene, side=64) -> Image.Image:
    """Scene -> image of side x side pixels."""
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        canvas[quarter(o.place, side // 2)] = sprite(scene.background, o.size, o.color, o.shape, side // 2)
    return Image.fromarray(canvas)


@lru_cache(maxsize=None)
def renderings(background, side):
    """All 49 things that a quarter can show -> (list of (size, color, shape) or None, (49, side, side, 3) float32)."""
    kinds = [None, *itertools.product(SIZES, COLORS, SHAPES)]
    empty = np.broadcast_to(np.asarray(BACKGROUNDS[background], np.float32), (side, side, 3))
    return kinds, np.stack([sprite(background, *k, side).astype(np.float32) if k else empty for k in kinds])


def grade(image: Image.Image) -> Scene:
    """image -> the Scene whose rendering is nearest in squared error; inverse of draw."""
    canvas = np.asarray(image, np.float32)          # (side, side, 3)
    side, found = canvas.shape[0] // 2, []
    for background in BACKGROUNDS:
        kinds, candidates = renderings(background, side)
        total, objects = 0.0, []
        for place in PLACES:
            errors = np.square(candidates - canvas[quarter(place, side)]).sum((1, 2, 3))    # (49,)
            total += errors.min()
            if kind := kinds[errors.argmin()]:
                objects.append(Object(*kind, place))
        found.append((total, Scene(background, tuple(objects))))
    return min(found)[1]


PHRASES = (("{objects} on a {background} background", "a {size} {color} {shape} at the {place}"),
           ("on a {background} background, {objects}", "at the {place} a {size} {color} {shape}"),
           ("a {background} background with {objects}", "a {size} {color} {shape} in the {place}"))


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption that names all of the scene in one of several phrasings, its objects in reading order."""
    whole, part = rng.choice(PHRASES)
    *others, last = [part.format(**o._asdict()) for o in scene.objects]
    objects = f"{', '.join(others)} and {last}" if others else last
    return whole.format(background=scene.background, objects=objects)


def read_description(text: str) -> Scene | None:
    """caption -> Scene, or None when it does not name one; inverse of describe."""
    sizes, colors, shapes, places, grounds = ("|".join(words) for words in (SIZES, COLORS, SHAPES, PLACES, BACKGROUNDS))
    patterns = (rf"\ba ({sizes}) ({colors}) ({shapes})\b", rf"\b(?:at|in) the ({places})\b",
                rf"\ba ({grounds}) background\b")
    kinds, places, background = (re.findall(pattern, text) for pattern in patterns)
    # What no pattern read, such as "no" or "huge", would change the meaning.
    rest = set(re.findall(r"\w+", re.sub("|".join(patterns), "", text))) - {"on", "with", "and"}
    if rest or len(background) != 1 or not 0 < len(kinds) == len(places) == len(set(places)):
        return None
    objects = [Object(*kind, place) for kind, place in zip(kinds, places)]
    return Scene(background[0], tuple(sorted(objects, key=lambda o: PLACES.index(o.place))))


def questions(scene: Scene) -> list[tuple[str, str]]:
    """(question, answer) pairs of every kind that the scene allows."""
    at = {o.place: o for o in scene.objects}
    pairs = [("what is the background?", scene.background), ("how many shapes are there?", NUMBERS[len(scene.objects)])]
    for place in PLACES:
        o = at.get(place)
        pairs += [(f"what is at the {place}?", f"a {o.size} {o.color} {o.shape}" if o else "nothing"),
                  (f"which shape is at the {place}?", o.shape if o else "none"),
                  (f"is there anything at the {place}?", "yes" if o else "no")]
        if o:
            pairs.append((f"what color is the shape at the {place}?", o.color))
    return pairs


CORNERS = {"circle": "no corners", "square": "four corners", "triangle": "three corners", "star": "five points"}
MIXES = {"orange": "red and yellow", "green": "blue and yellow", "purple": "red and blue"}


def statement(rng: random.Random, withheld=WITHHELD) -> str:
    """One true sentence about shapes and colors that names no withheld pair."""
    color, shape = rng.choice(PAIRS[withheld:])
    mixed = rng.choice(list(MIXES))
    return rng.choice([
        f"Any {color} {shape} has {CORNERS[shape]}.",
        f"Every {shape}, small or large, has {CORNERS[shape]}.",
        f"The color of every {color} {shape} is {color}.",
        f"A large {shape} is larger than a small {shape}.",
        f"You get {mixed} when you mix {MIXES[mixed]}.",
        f"If a picture shows one {color} {shape} and nothing else, it shows one shape."])


# ---------------------------------------------------------------------------------------------------------------------
# Sources: where pictures and texts come from

@dataclass
class Picture:
    """A captioned picture, opened when it is needed; with codes, it is encoded already."""
    name: str
    open: Callable[[], Image.Image] | None
    captions: list[str] = field(default_factory=list)
    talks: list[list[tuple[str, str]]] = field(default_factory=list)    # each a list of (question, answer)
    codes: torch.Tensor | None = None                                   # (h, w)


class Split(NamedTuple):
    pictures: list[Picture]
    texts: list[str]

    def tasks(self) -> dict[str, list]:
        """The examples of each task."""
        captioned = [p for p in self.pictures if p.captions]
        return {"t2i": captioned, "i2t": captioned, "vqa": [p for p in self.pictures if p.talks], "text": self.texts}


def hold_out(items):
    """A list -> (train, val): one in 20, at most 400, the same ones every time; a single item is both."""
    if len(items) < 2:
        return list(items), list(items)
    order = random.Random(0).sample(range(len(items)), len(items))
    held = set(order[:min(400, max(1, len(items) // 20))])
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


def passages(text, length=160) -> list[str]:
    """Cut a text at line ends into passages of at most about length characters; longer lines are cut at spaces."""
    result = [""]
    for line in text.splitlines(keepends=True):
        # What ends at a space; of a word longer than a passage, so much at a time; or the space before such a word:
        for part in re.findall(rf".{{1,{length}}}(?:\s|$)|\S{{{length}}}|.", line, re.DOTALL):
            if len(result[-1]) + len(part) > length:
                result.append("")
            result[-1] += part
    return [passage.strip("\n") for passage in result if passage.strip()]


def read_texts(path, length=160) -> list[str]:
    """A .txt file, or a .jsonl file with `text` in every line -> passages of about length characters."""
    path = Path(path)
    rows = read_jsonl(path) if path.suffix == ".jsonl" else [(1, {"text": read_utf8(path)})]
    result = [p for number, row in rows for p in passages(field_of(row, "text", path, number), length)]
    if not result:
        raise ValueError(f"{path}: no text in it")
    return list(dict.fromkeys(result))      # a passage that comes twice could be both learned and held out


def scenes(count, seed, name, side=64, withheld=WITHHELD, unseen=False, skip=()) -> list[Picture]:
    """Pictures of random scenes, none of which is in skip; scene i depends on (seed, name, i) alone."""
    pictures = []
    for i in itertools.count():
        if len(pictures) == count:
            return pictures
        rng = random.Random(f"{seed}/{name}/{i}")
        scene = random_scene(rng, withheld, unseen)
        if scene in skip:
            continue
        captions, talks = [describe(scene, rng) for _ in range(4)], [[pair] for pair in questions(scene)]
        rng.shuffle(talks)
        pictures.append(Picture(f"{name}/{i}", partial(draw, scene, side), captions, talks))


def built_in(seed, side=64, withheld=WITHHELD, train=20000, val=400, unseen=200) -> dict[str, Split]:
    """The scenes, and as text English that every Python carries and statements; val is never trained on."""
    from pydoc_data.topics import topics
    held_out, rng = scenes(val, seed, "val", side, withheld), random.Random(f"{seed}/text")
    known = {p.open.args[0] for p in held_out}      # open is partial(draw, scene, side)
    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    english = list(dict.fromkeys(passages("\n\n".join(dict.fromkeys(paragraphs)))))     # the topics repeat each other
    statements = [statement(rng, withheld) for _ in range(len(english))]
    train_texts, val_texts = hold_out(english)
    return {"train": Split(scenes(train, seed, "train", side, withheld, skip=known), train_texts + statements),
            "val": Split(held_out, val_texts),
            "unseen": Split(scenes(unseen if withheld else 0, seed, "unseen", side, withheld, unseen=True), [])}


def annotated(name, open, text, extra) -> Picture:
    """A Picture from the contents of its .txt, a caption, and .json, {"caption": ..., "qa": [[question, answer]]}."""
    try:
        extra = json.loads(extra) if extra else {}
        captions = [c.strip() for c in (text, extra.get("caption")) if c and c.strip()]
        talks = [[(q.strip(), a.strip())] for q, a in extra.get("qa", [])]
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{name}: its .json is not {{"caption": ..., "qa": [[question, answer]]}} ({error})') from None
    return Picture(name, open, list(dict.fromkeys(captions)), talks)


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def picture_files(folder) -> list[Path]:
    return sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)


def read_folder(path) -> list[Picture]:
    pictures = []
    for file in picture_files(path):
        text, extra = file.with_suffix(".txt"), file.with_suffix(".json")
        pictures.append(annotated(str(file), partial(load_image, file), read_utf8(text) if text.exists() else None,
                                  read_utf8(extra) if extra.exists() else None))
    return pictures


def load_member(path, name, offset, size) -> Image.Image:
    """A picture in a tar. Not inside read_tar: where worker processes are spawned, this function is pickled."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise ValueError(f"{path}: no longer readable ({error})") from None
    return load_image(io.BytesIO(content), name)


def read_tar(path) -> list[Picture]:
    """WebDataset: members key.jpg, key.txt, key.json share a key. Nothing is unpacked: names and links lead nowhere."""
    groups, pictures = {}, []       # key -> {suffix: text of a note, or (offset, size) of a picture}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, _, suffix = member.name.rpartition(".")
                found = member.offset_data, member.size
                if suffix.lower() in ("txt", "json"):
                    found = tar.extractfile(member).read().decode("utf-8-sig")
                groups.setdefault(key, {})["." + suffix.lower()] = found
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{member.name}: not a readable UTF-8 text ({error})") from None
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: not a readable tar file ({error})") from None
    for key, files in groups.items():
        suffix = next((s for s in SUFFIXES if s in files), None)
        if suffix:
            name = f"{path}:{key}{suffix}"
            opened = partial(load_member, path, name, *files[suffix])
            pictures.append(annotated(name, opened, files.get(".txt"), files.get(".json")))
    return pictures


def codes_of(row, path, number) -> torch.Tensor:
    """The list, or the text of a list, in vqcode_512 -> codes (h, w) of a square grid."""
    try:
        codes = row["vqcode_512"]
        codes = np.array(json.loads(codes) if isinstance(codes, str) else codes).flatten()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: vqcode_512 is not a list of codes ({error})") from None
    side = math.isqrt(len(codes))
    if codes.dtype != np.int64 or codes.min() < 0 or side * side != len(codes):
        raise ValueError(f"{path}, line {number}: vqcode_512 is not a square grid of whole numbers from 0")
    return torch.from_numpy(codes).view(side, side)


def talk_of(row, path, number) -> list[tuple[str, str]]:
    """LLaVA's conversations -> (question, answer) pairs; the picture always stands before the first question."""
    try:
        words = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
    except (AttributeError, KeyError, TypeError):
        words = []
    if not words or len(words) % 2:
        raise ValueError(f"{path}, line {number}: conversations is not questions and answers, a 'value' in each")
    return list(zip(words[::2], words[1::2]))


def picture_of_row(row, path, number) -> Picture:
    """One line of a .jsonl in any of the layouts: ours, Liquid's raw and pre-encoded, LLaVA's."""
    def stripped(key):
        return field_of(row, key, path, number).strip()
    if "vqcode_512" in row:
        p = Picture(f"{path}:{number}", None, [stripped("text")], codes=codes_of(row, path, number))
    else:
        liquid = "image_path" in row and "conversations" not in row
        file = path.parent / field_of(row, "image_path" if liquid else "image", path, number)
        p = Picture(str(file), partial(load_image, file))
        if "conversations" in row:
            p.talks.append(talk_of(row, path, number))
        else:
            p.captions.append(stripped("text_prompt" if liquid else "text"))
    p.captions = list(filter(None, p.captions))
    return p


def merged(lines) -> list[Picture]:
    """Lines about one file are one picture: it is encoded once, and never both trained on and held out."""
    pictures = {}
    for p in lines:
        first = pictures.setdefault(p.name, p)
        if first is not p:
            first.captions += p.captions
            first.talks += p.talks
    return list(pictures.values())


def read_pictures(path) -> list[Picture]:
    """A folder of pictures with .txt or .json beside them, a .jsonl, a .tar, or a folder of .tar shards."""
    path = Path(path)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        pictures = [p for shard in shards for p in read_tar(shard)] if shards else read_folder(path)
    elif path.suffix == ".jsonl":
        pictures = merged(picture_of_row(row, path, number) for number, row in read_jsonl(path))
    elif path.suffix == ".tar":
        pictures = read_tar(path)
    else:
        raise ValueError(f"{path}: " + ("not a folder, .jsonl or .tar" if path.exists() else "no such file or folder"))
    if not pictures:
        raise ValueError(f"{path}: no pictures (.png, .jpg, .webp) in it")
    return pictures


def load_source(data=None, text=None, side=64, withheld=WITHHELD, passage=160) -> dict[str, Split]:
    """The splits of a run: "train" and "val" of the user's pictures and texts; of the built-in ones "unseen", too."""
    if data is None:
        splits = built_in(0, side, withheld)
    else:
        train, val = hold_out(read_pictures(data))
        splits = {"train": Split(train, []), "val": Split(val, [])}
    if text is not None:
        train, val = hold_out(read_texts(text, passage))
        splits["train"], splits["val"] = splits["train"]._replace(texts=train), splits["val"]._replace(texts=val)
    return splits


class Pixels(torch.utils.data.Dataset):
    """Pictures as uint8 tensors (3, size, size); for one that cannot be read, the first of `spares` behind it that can,
    or else the sentence that says why."""
    def __init__(self, pictures, size, pad=False, spares=0):
        self.pictures, self.size, self.pad, self.spares = pictures, size, pad, spares

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        for k in range(i, i + 1 + self.spares):
            try:
                image = fit(self.pictures[k % len(self)].open(), self.size, self.pad)
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
            except ValueError as error:
                why = str(error)
        return why


# ---------------------------------------------------------------------------------------------------------------------
# Shards: pictures that are encoded already

def write_shard(path, pictures, fingerprint, skipped=None):
    """Pictures with codes -> one file; fingerprint: how they were made; skipped: {name: why it could not be read}."""
    rows = [dict(name=p.name, captions=p.captions, talks=p.talks) for p in pictures]
    codes = torch.stack([p.codes for p in pictures]).to(torch.int32) if pictures else torch.empty(0, 0, 0)
    save_atomically({"format": "nanoLiquid codes 2", "fingerprint": fingerprint, "codes": codes,
                     "rows": json.dumps(rows), "skipped": json.dumps(skipped or {})}, path)


def read_shard(path, fingerprint) -> tuple[list[Picture], dict[str, str]] | None:
    """The inverse of write_shard: (pictures, skipped); None if the file is missing, damaged or made in another way."""
    try:
        shard = torch.load(path, weights_only=True, mmap=True)
        if shard["format"] != "nanoLiquid codes 2" or shard["fingerprint"] != fingerprint:
            return None
        pictures = []
        for row, codes in zip(json.loads(shard["rows"]), shard["codes"], strict=True):
            talks = [[tuple(turn) for turn in talk] for talk in row["talks"]]
            pictures.append(Picture(row["name"], None, row["captions"], talks, codes))
        return pictures, dict(json.loads(shard["skipped"]))
    except Exception:       # torch.load raises whatever a damaged file makes it stumble over; it is made again
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The loader: an endless, mixed, packed stream that is a pure function of its seed and a few integers

class Batch(NamedTuple):
    """Examples side by side in full rows; none is cut, and none sees its neighbours."""
    ids: torch.Tensor           # (R, T) int64
    targets: torch.Tensor       # (R, T) int64, IGNORE where nothing is learned
    positions: torch.Tensor     # (R, T) int64, from 0 in each example
    documents: torch.Tensor     # (R, T) int64, number of the example in its row, -1 in padding
    tasks: torch.Tensor         # (R, T) int64, index into TASKS, -1 in padding

    def to(self, device):
        return Batch(*(x.to(device) for x in self))


class Loader:
    """Yields (Batch, state): `state` resumes the stream right after that batch.

    tasks    {task: list of Picture or str}; mix {task: weight}
    context  positions of a row; longer examples are left out and counted in `dropped`
    rows     of a batch over all ranks; every rank plans the whole batch and renders rows rank, rank + world, ...
    uncond   share of drawings without words, for guidance
    perturb  turns codes to draw, with a torch.Generator, into codes that look alike
    An example's choices (caption, question, what is dropped or perturbed) depend on (seed, task, epoch, index) alone.
    """
    PATIENCE = 64       # examples that may wait for the next batch before this one is closed

    def __init__(self, tasks, mix, vocab, tokenizer, rows, context, seed=0, rank=0, world=1, state=None,
                 uncond=0.1, perturb=None):
        self.tasks, self.vocab, self.tokenizer = tasks, vocab, tokenizer
        self.rows, self.context, self.seed, self.rank, self.world = rows, context, seed, rank, world
        self.uncond, self.perturb = uncond, perturb
        self.mix = {task: weight for task, weight in mix.items() if weight > 0 and tasks.get(task)}
        if not self.mix:
            raise ValueError(f"nothing to train on: the mix asks for {', '.join(mix)}, and there are no examples of it")
        state = state or {"drawn": dict.fromkeys(self.mix, 0), "waiting": [], "dropped": 0}
        # A resumed run may have another mix, or fewer examples:
        self.drawn = dict.fromkeys(self.mix, 0) | state["drawn"]
        self.waiting = [(task, epoch, i) for task, epoch, i in state["waiting"]
                        if task in self.mix and i < len(tasks[task])]
        self.dropped = state["dropped"]     # examples longer than a row

    def state(self):
        return {"drawn": dict(self.drawn), "waiting": [list(w) for w in self.waiting], "dropped": self.dropped}

    def __iter__(self):
        while True:
            yield self.batch(), self.state()

    @lru_cache(maxsize=8)
    def order(self, task, epoch):
        """A permutation of the task's examples: each comes once an epoch."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{task}/{epoch}".encode()).digest()[:8], "little")
        return np.random.default_rng(seed).permutation(len(self.tasks[task]))

    def draw(self):
        """The next example of the stream as (task, epoch, index)."""
        rng = random.Random(f"{self.seed}/{sum(self.drawn.values())}")
        task = rng.choices(list(self.mix), self.mix.values())[0]
        epoch, place = divmod(self.drawn[task], len(self.tasks[task]))
        self.drawn[task] += 1
        return task, epoch, int(self.order(task, epoch)[place])

    @lru_cache(maxsize=4 * PATIENCE)     # those that wait are asked for again
    def render(self, task, epoch, index):
        """(task, epoch, index) -> (ids, targets)"""
        rng = random.Random(f"{self.seed}/{task}/{epoch}/{index}")
        item = self.tasks[task][index]
        if task == "t2i":
            caption, codes = rng.choice(item.captions), item.codes
            words = None if rng.random() < self.uncond else caption
            if self.perturb:
                codes = self.perturb(codes, torch.Generator().manual_seed(rng.getrandbits(63)))
            return render_t2i(self.vocab, self.tokenizer, words, codes)
        if task == "i2t":
            return render_i2t(self.vocab, self.tokenizer, item.codes, rng.choice(item.captions))
        if task == "vqa":
            return render_vqa(self.vocab, self.tokenizer, item.codes, rng.choice(item.talks))
        return render_text(self.vocab, self.tokenizer, item)

    def plan(self):
        """Choose a batch's examples: each goes to the fullest row that has room; misfits wait for the next batch."""
        rows, free = [[] for _ in range(self.rows)], [self.context] * self.rows
        pending, misfits, too_long = self.waiting, [], 0
        while len(misfits) < self.PATIENCE:
            key = pending.pop(0) if pending else self.draw()
            ids, targets = self.render(*key)
            if len(ids) > self.context:
                self.dropped += 1
                too_long += 1
                if too_long > 10_000:
                    raise ValueError(f"no example fits into --context {self.context}: the last has {len(ids)} tokens")
                continue
            best = min((r for r in range(self.rows) if free[r] >= len(ids)), key=free.__getitem__, default=None)
            if best is None:
                misfits.append(key)
            else:
                rows[best].append((key[0], ids, targets))
                free[best] -= len(ids)
        self.waiting = misfits + pending
        return rows

    def batch(self) -> Batch:
        mine = self.plan()[self.rank::self.world]
        planes = Batch(*np.full((5, len(mine), self.context), -1, np.int64))
        planes.ids[:], planes.targets[:], planes.positions[:] = self.vocab.pad, IGNORE, 0
        for r, row in enumerate(mine):
            start = 0
            for number, (task, ids, targets) in enumerate(row):
                span = np.s_[r, start:start + len(ids)]
                planes.ids[span], planes.targets[span], planes.positions[span] = ids, targets, range(len(ids))
                planes.documents[span], planes.tasks[span] = number, TASKS.index(task)
                start += len(ids)
        return Batch(*map(torch.from_numpy, planes))


def ahead(iterator, depth=3):
    """Run an iterator in a thread, a few items ahead of who reads it."""
    pool, end = ThreadPoolExecutor(1), object()
    try:
        items = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := items.popleft().result()) is not end:
            items.append(pool.submit(next, iterator, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)      # and waits: a thread inside torch would abort the exit of its process


def show():
    """Print one example of every task; what the model learns to write is underlined."""
    train = built_in(0, train=1)["train"]
    tokenizer = WordTokenizer.learn([*train.pictures[0].captions * 3, *train.texts, CAPTION * 3, DRAW * 3])
    vocab = tokenizer.vocab(512)
    train.pictures[0].codes = torch.arange(16).view(4, 4)
    names = {v: f"<{k}>" for k, v in WordTokenizer.SPECIAL.items()}
    def name(i):
        return f"[{i - vocab.image_start}]" if i >= vocab.image_start else names.get(i) or tokenizer.decode([i])
    loader = Loader(train.tasks(), dict.fromkeys(TASKS, 1), vocab, tokenizer, 1, 256)
    for task in TASKS:
        ids, targets = loader.render(task, 0, 0)
        learned = [False] + [t != IGNORE for t in targets[:-1]]
        words = (f"\033[4m{name(i)}\033[0m" if learn else name(i) for i, learn in zip(ids, learned))
        print(f"{task}: {''.join(words)}\n")


if __name__ == "__main__":
    show()
