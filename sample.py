"""From a checkpoint to pictures, captions, answers and text.

    python sample.py t2i "a small red star at the top left on a navy background" --run runs/demo --out star.png
    python sample.py t2i --prompts prompts.txt --save-dir drawn --run runs/demo     # one picture a line
    python sample.py i2t picture.png --run runs/demo
    python sample.py i2t FOLDER --save-dir captions --run runs/demo                 # one .txt a picture
    torchrun --nproc_per_node 4 sample.py t2i --prompts ...                         # shared out; goes on if stopped
    python sample.py vqa picture.png "how many shapes are there?" --run runs/demo
    python sample.py text "A yield expression" --run runs/demo
    python sample.py eval --run runs/demo                                           # a table, and one JSON line last
    python sample.py export FOLDER --run runs/demo                                  # a Hugging Face folder

B rows   T positions   V rows of the table that may be chosen   k of them that top-k keeps   D hidden size
n tokens to sample   h, w code grid   K codes
"""

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from model import Cache, ModelConfig, Transformer
from vqgan import VQGAN, read_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Choosing tokens

def guide(logits, scale):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): logits (2B, V) of prompts, then of their
    negatives -> (B, V). A scale of 1 is what the prompts say alone; more leads further away from the negatives."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def choose(logits, points, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B, V), points (B,) uniform in [0, 1) -> choices (B,); temperature 0 is greedy.

    Of the top_k likeliest, only the fewest that together reach top_p can be chosen. A point falls into a choice's
    stretch of the cumulative sum as often as that choice is likely: no sync, as multinomial has on GPUs.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, V = logits.float() / temperature, logits.shape[-1]
    order = None                                                    # rows as they are, unless some are left out
    if 0 < top_k < V or top_p < 1:
        logits, order = logits.topk(min(top_k or V, V))             # (B, k), the likeliest first
    reached = logits.softmax(-1).cumsum(-1)                         # (B, V or k)
    last = (reached[:, :-1] < top_p).sum(-1, keepdim=True)          # (B, 1), the choice that reaches top_p
    chosen = torch.searchsorted(reached, points[:, None] * reached.gather(-1, last), right=True)     # (B, 1)
    return (chosen if order is None else order.gather(-1, chosen))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The one decode loop

def prefill(model, table, prompts, room, constant=False):
    """Read prompts (lists of ids of any lengths), equal ones once -> cache with room for more, x (B, D) of last ids.

    constant: give the cache a reach in steps of 64 slots: prompts of nearly equal lengths then decode in equal shapes.
    """
    unique = list(dict.fromkeys(map(tuple, prompts)))
    longest = max(map(len, unique))
    ids = torch.tensor([(0,) * (longest - len(p)) + p for p in unique], device=model.device)    # padded on the left
    padding = torch.tensor([longest - len(p) for p in unique], device=model.device)
    cache = Cache(model.config, len(unique), longest, model.device, model.dtype, padding)
    x = model.model(ids, table, cache=cache)[:, -1]                 # (unique, D)
    rows = torch.tensor([unique.index(tuple(p)) for p in prompts], device=model.device)
    slots = longest + room
    if constant:
        slots = math.ceil(slots / 64) * 64
    return cache.select(rows, slots, reach=slots if constant else None), x[rows]


def decode_one(model, table, ids, cache):
    """The ids chosen last (B,) -> x (B, D), from which the next logits follow."""
    return model.model(ids[:, None], table, cache=cache)[:, -1]


@functools.cache
def compiled(device_type):
    """decode_one as one program for each shape; on GPUs a CUDA graph, which Python does not slow."""
    return torch.compile(decode_one, dynamic=False, mode="reduce-overhead" if device_type == "cuda" else None)


@torch.inference_mode()
def generate(model, prompts, n, allowed=None, negatives=None, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0,
             stop=None, generator=None, compile=False):
    """Continue each prompt by n tokens -> ids (B, n); after a token of `stop`, a row repeats it.

    prompts    lists of ids, of any lengths
    allowed    (first, past_last) rows of the table to choose from; None: all
    negatives  prompts that guidance leads away from, one for each prompt
    stop       ids that end a row
    generator  a torch.Generator on the model's device, or a list of one for each prompt
    compile    the decode step, which pays from many steps on
    """
    first, past_last = allowed or (0, model.config.vocab_size)
    if not 0 <= first < past_last <= model.config.vocab_size:
        raise ValueError(f"rows {first}..{past_last - 1} are not within the model's {model.config.vocab_size}")
    if negatives is not None and len(negatives) != len(prompts):
        raise ValueError(f"{len(negatives)} negatives for {len(prompts)} prompts")
    guided = negatives is not None and guidance != 1
    table = model.model.table()
    cache, x = prefill(model, table, [*prompts, *negatives] if guided else prompts, n - 1, compile)
    step = compiled(model.device.type) if compile else decode_one
    # With a generator of its own, a row's random numbers, and so its choices, do not depend on its batch
    generators = generator if isinstance(generator, list) else [generator]
    each = len(prompts) // len(generators)
    points = torch.cat([torch.rand(each, n, generator=g, device=model.device) for g in generators])     # (B, n)
    stops = torch.tensor(sorted(stop or ()), device=model.device, dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    out = torch.zeros(len(prompts), n, dtype=torch.long, device=model.device)
    for i in range(n):
        logits = model.logits(x, table, (first, past_last))         # (B, or 2B when guided, V)
        logits = guide(logits, guidance) if guided else logits      # (B, V)
        ids = first + choose(logits, points[:, i], temperature, top_k, top_p)
        ids = out[:, i] = torch.where(ended, out[:, i - 1], ids)    # nothing has ended at i = 0
        if stop:
            ended = torch.isin(ids, stops)
            if ended.all():
                out[:, i:] = ids[:, None]
                break
        if i + 1 < n:
            x = step(model, table, torch.cat([ids, ids]) if guided else ids, cache)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# A trained run

@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; text is greedy unless it is asked otherwise."""
    guidance: float = 1.5       # 1: none
    temperature: float = 1.0    # 0: always the likeliest
    top_k: int = 0              # 0: all
    top_p: float = 1.0          # 1: all
    seed: int = 0
    batch: int = 64             # prompts, or pictures, at a time

    def __post_init__(self):
        t = self.temperature
        for name, good in dict(guidance=math.isfinite(self.guidance), temperature=t == 0 or 1e-6 <= t < math.inf,
                               top_k=self.top_k >= 0, top_p=0 < self.top_p <= 1, seed=0 <= self.seed < 2 ** 31,
                               batch=self.batch > 0).items():
            if not good:
                raise ValueError(f"--{name} {getattr(self, name)}: out of range")


LIQUID = Sampling(guidance=7.0, temperature=0.99, top_k=4096, top_p=0.96)     # the official inference_t2i.py
GREEDY = Sampling(temperature=0.0)      # after train.py --code_noise: chance would draw the noise, too


@dataclass
class Run:
    """Everything needed to sample."""
    model: Transformer
    vqgan: VQGAN
    vocab: data.Vocab
    tokenizer: object
    grid: tuple[int, int]           # codes of a picture: rows, columns
    pad: bool                       # the aspect policy: pad to a square, or crop
    config: dict                    # what train.py was called with
    sampling: Sampling | None = None    # how pictures are drawn unless asked otherwise
    compile: bool = False           # the decode step

    def __post_init__(self):
        if self.sampling is None:
            trained = self.config
            self.sampling = LIQUID if trained.get("init") else GREEDY if trained.get("code_noise") else Sampling()

    @property
    def device(self):
        return self.model.device

    @property
    def side(self):
        """Pixels of a picture."""
        return self.grid[0] * self.vqgan.config.f


def device_of(name="auto"):
    """cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from None


@contextmanager
def fitting(path):
    """One ValueError, naming the file, for contents that do not fit together."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit: {' '.join(str(error).split())[:300]}") from None


LAYOUT = "nanoliquid.json"      # beside exported weights; says what model.pt says besides weights, under the same names


def read_model(path) -> dict:
    """A model.pt; what nobody asks for, such as the optimizer's state, stays on the disk."""
    checkpoint = read_checkpoint(path, mmap=True)
    if checkpoint.get("format") != "nanoLiquid model 1" or "model" not in checkpoint:
        raise ValueError(f"{path}: not a model of this project")
    return checkpoint


def load(run, vqgan=None, device="auto", dtype=torch.float32) -> Run:
    """Read a run folder, or a Hugging Face folder that `export` wrote or that Liquid published (with its VQGAN).

    Raises ValueError, naming the file, when something is missing or does not fit.
    """
    folder, device = Path(run), device_of(device)
    file, vqgan_path = folder / "model.pt", vqgan or folder / "vqgan.pt"
    if file.exists():                                   # a run of train.py
        layout = read_model(file)
        with fitting(file):
            with torch.device("meta"):                  # shapes alone: no random weights, which take a 7B minutes
                model = Transformer(ModelConfig(**layout["model_config"]))
            model = model.to(dtype).to_empty(device=device)
            model.load_state_dict(layout["model"])
    elif any(folder.glob("model*.safetensors")):        # an export, with a LAYOUT; or published by Liquid, without
        file, model = folder / LAYOUT, Transformer.from_pretrained(folder, dtype, device)
        with fitting(file):
            layout = json.loads(data.read_utf8(file)) if file.exists() else None
    else:
        raise ValueError(f"{file}: no such file; `python train.py --out {folder}` makes it")
    vqgan = VQGAN.load(vqgan_path, device)
    if not file.exists():   # as published: the image rows are the last ones, pictures are squares of 512 pixels
        tokenizer, codes = data.PretrainedTokenizer.load(folder), vqgan.config.n_embed
        hf_config = json.loads(data.read_utf8(folder / "config.json"))
        vocab = tokenizer.vocab(codes, hf_config, hf_config["vocab_size"] - codes)
        side = 512 // vqgan.config.f
        return Run(model.eval(), vqgan, vocab, tokenizer, (side, side), True, {"init": str(folder), "pad": True})
    with fitting(file):
        fingerprint, config = layout["fingerprint"], layout["config"]
        run = Run(model.eval(), vqgan, data.Vocab(**layout["vocab"]), data.load_tokenizer(layout["tokenizer"]),
                  tuple(layout["grid"]), config["pad"], config)
    if fingerprint != vqgan.fingerprint():
        raise ValueError(f"{vqgan_path}: not the VQGAN whose codes the model in {folder} was trained on")
    return run


def export(run, folder, source=None):
    """Write a folder that transformers, vLLM and lm-eval open, and that `--run` takes: weights, tokenizers, layout.

    source: the Hugging Face folder, or hub name, that training began with, whose tokenizer files are carried along.
    """
    folder, source = Path(folder), source and data.fetch(source)
    if source and not source.is_dir():
        raise ValueError(f"{source}: no such folder, and the export needs its tokenizer files")
    ids = {f"{name}_token_id": getattr(run.vocab, name) for name in ("bos", "eos", "pad")}
    run.model.save_pretrained(folder, **ids)
    carried = "tokenizer*", "special_tokens*", "generation_config*", "chat_template*", "vocab.json", "merges.txt"
    for pattern in carried if source else ():
        for file in source.glob(pattern):
            shutil.copy(file, folder / file.name)
    data.save_atomically({"config": asdict(run.vqgan.config), "model": run.vqgan.state_dict()}, folder / "vqgan.pt")
    layout = dict(vocab=asdict(run.vocab), tokenizer=run.tokenizer.state(), grid=run.grid, config=run.config,
                  fingerprint=run.vqgan.fingerprint())
    (folder / LAYOUT).write_text(json.dumps(layout))


# ---------------------------------------------------------------------------------------------------------------------
# The four tasks

def batches(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def in_batches(run, prompts, n, allowed, s, numbers=None, negative=None, stop=None):
    """generate, s.batch prompts at a time -> yields ids (B, n); numbers (0, 1, ...) seed each prompt apart."""
    numbers = range(len(prompts)) if numbers is None else numbers
    for part, own in zip(batches(prompts, s.batch), batches(numbers, s.batch)):
        # A seed for each, so that it comes out the same in any batch. CPUs keep 32 bits of a seed, in which an odd
        # factor lets no two of --seed fall together.
        seeded = [torch.Generator(run.device).manual_seed(s.seed * 1_000_003 + i) for i in own]
        yield generate(run.model, part, n, allowed, negative and [negative] * len(part), s.guidance, s.temperature,
                       s.top_k, s.top_p, stop, seeded, run.compile)


def require_room(run, prompts, n=1):
    """How many tokens fit behind the longest prompt; ValueError if fewer than n."""
    longest, most = max(map(len, prompts), default=0), run.model.config.max_position_embeddings
    if longest + n > most:
        raise ValueError(f"a prompt of {longest} tokens is too long: the model reads {most}, the answer's {n} included")
    return most - longest


def text_to_image(run, prompts, sampling=None, numbers=None):
    """Draw each prompt -> list of images; numbers (default 0, 1, ...) seed each of them apart, whatever their batch."""
    (h, w), images = run.grid, []
    negative, *positives = [data.render_t2i(run.vocab, run.tokenizer, p)[0] for p in (None, *prompts)]
    require_room(run, positives, h * w)
    for ids in in_batches(run, positives, h * w, run.vocab.image_rows, sampling or run.sampling, numbers, negative):
        images += map(data.to_image, run.vqgan.decode(run.vocab.ids_to_codes(ids).view(-1, h, w)))
    return images


def fitted(run, images):
    """Images of any size -> pixels (B, 3, side, side) as the run was trained on."""
    return torch.cat([data.to_pixels(data.fit(image, run.side, run.pad)) for image in images]).to(run.device)


def encode(run, images):
    """Images of any size -> codes (h, w) of each."""
    return [codes for part in batches(images, run.sampling.batch) for codes in run.vqgan.encode(fitted(run, part))]


def write(run, prompts, n, sampling=None, numbers=None):
    """Continue prompts (lists of ids) with up to n tokens of text, usually greedily; numbers as in text_to_image."""
    s, n = sampling or replace(run.sampling, temperature=0.0), min(n, require_room(run, prompts))
    stop = {run.vocab.eos, *run.tokenizer.stops}
    texts = []
    for ids in in_batches(run, prompts, n, run.vocab.text_rows, s, numbers, stop=stop):
        for row in ids.tolist():
            texts.append(run.tokenizer.decode(list(itertools.takewhile(lambda i: i not in stop, row))))
    return texts


def caption(run, images, sampling=None, n=80, numbers=None):
    """Images -> captions."""
    prompts = [data.render_i2t(run.vocab, run.tokenizer, codes)[0] for codes in encode(run, images)]
    return write(run, prompts, n, sampling, numbers)


def answer(run, images, questions, sampling=None, n=40):
    """Images and a question about each -> answers."""
    prompts = [data.render_vqa(run.vocab, run.tokenizer, codes, [(question, None)])[0]
               for codes, question in zip(encode(run, images), questions, strict=True)]
    return [text.strip() for text in write(run, prompts, n, sampling)]


def complete(run, texts, sampling=None, n=60):
    """Beginnings -> the text that follows each."""
    return write(run, [data.render_text(run.vocab, run.tokenizer, text, ended=False)[0] for text in texts], n, sampling)


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def mean(values):
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else None


@torch.inference_mode()
def losses(model, examples, batch=32):
    """examples, a list of (ids, targets) of any lengths -> summed nll of each, and the number of targets of each."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    sums, counts = torch.zeros(len(examples)), torch.zeros(len(examples))
    for part in batches(order, batch):
        ids = pad_sequence([torch.tensor(examples[i][0]) for i in part], True).to(model.device)
        targets = pad_sequence([torch.tensor(examples[i][1]) for i in part], True, data.IGNORE).to(model.device)
        sums[part] = model(ids, targets=targets).sum(1).cpu()       # what is padded on the right is seen by nobody
        counts[part] = (targets != data.IGNORE).sum(1).float().cpu()
    return sums, counts


@torch.inference_mode()
def code_accuracy(run, pictures):
    """How often the likeliest code is the true one, after a caption and the true codes before it; guessing: 1/K."""
    right, (first, past_last) = [], run.vocab.image_rows
    for p in pictures:
        example = data.render_t2i(run.vocab, run.tokenizer, p.captions[0], *encode(run, [p.open()]))
        ids, targets = (torch.tensor(x, device=run.device) for x in example)
        is_code = (first <= targets) & (targets < past_last)
        likeliest = first + run.model(ids[None])[0, is_code, first:past_last].argmax(-1)
        right += (likeliest == targets[is_code]).tolist()
    return mean(right)


def score_drawings(images, wanted):
    """Drawn images against scenes -> (share drawn exactly, share of the wanted objects found)."""
    found = [data.grade(image) for image in images]
    objects = [o in scene.objects for scene, want in zip(found, wanted) for o in want.objects]
    return mean(a == b for a, b in zip(found, wanted)), mean(objects)


def score_reconstructions(run, pictures):
    """-> images, mean PSNR in dB (over [0, 1]), number of codes used"""
    images, psnrs, used = [], [], set()
    for part in batches(pictures, run.sampling.batch):
        pixels = fitted(run, [p.open() for p in part])
        codes = run.vqgan.encode(pixels)
        decoded = run.vqgan.decode(codes)
        psnrs += (-10 * ((decoded - pixels) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()).tolist()
        images += map(data.to_image, decoded)
        used |= set(codes.flatten().tolist())
    return images, mean(psnrs), len(used)


def bits_per_byte(run, texts, train_texts):
    """Bits a byte that the model needs for texts and their ends, and those that byte frequencies in training need."""
    sums, _ = losses(run.model, [data.render_text(run.vocab, run.tokenizer, text) for text in texts])
    size = sum(len(text.encode()) for text in texts)
    counts = Counter(byte for text in train_texts for byte in text.encode())
    total = sum(counts.values()) + 256          # each byte counts once more than it was seen, lest one be impossible
    unigram = -sum(math.log2((counts[byte] + 1) / total) for text in texts for byte in text.encode())
    return float(sums.sum()) / math.log(2) / size, unigram / size


def score_answers(run, split, train, limit):
    """Exact answers to one question about each picture, and those of always giving a question's most common answer."""
    common, overall = defaultdict(Counter), Counter({"": 0})
    for question, reply in (talk[0] for p in train for talk in p.talks):
        common[question][reply] += 1
        overall[reply] += 1
    asked = [(p, *p.talks[i % len(p.talks)][0]) for i, p in enumerate(split) if p.talks][:limit]
    blank, most = torch.zeros(run.grid, dtype=torch.long), run.model.config.max_position_embeddings
    asked = [x for x in asked       # training has left longer ones out, too
             if len(data.render_vqa(run.vocab, run.tokenizer, blank, [(x[1], None)])[0]) < most]
    said = answer(run, [p.open() for p, _, _ in asked], [question for _, question, _ in asked])
    guesses = [(common.get(question) or overall).most_common(1)[0][0] for _, question, _ in asked]
    truth = [reply for _, _, reply in asked]
    return mean(a == b for a, b in zip(said, truth)), mean(a == b for a, b in zip(guesses, truth))


def score_cloze(run):
    """How often the true end of a sentence about a shape is likelier than three false ones, over all pairs."""
    texts = [f"Any {color} {shape} has {end}." for color, shape in data.PAIRS for end in data.CORNERS.values()]
    sums, _ = losses(run.model, [data.render_text(run.vocab, run.tokenizer, text) for text in texts])
    truth = [list(data.CORNERS).index(shape) for _, shape in data.PAIRS]
    return mean(a == b for a, b in zip(sums.view(len(truth), -1).argmin(1).tolist(), truth))


def score_scenes(run, pictures, reconstructions):
    """What is exact of built-in scenes when they are reconstructed, drawn from a caption, and captioned."""
    truth = [data.grade(p.open()) for p in pictures]
    exact, objects = score_drawings(text_to_image(run, [p.captions[0] for p in pictures]), truth)
    captions = caption(run, [p.open() for p in pictures])
    return {"reconstruction": score_drawings(reconstructions, truth)[0], "t2i": exact, "objects": objects,
            "caption": mean(data.read_description(c) == t for c, t in zip(captions, truth))}


def readable(picture) -> bool:
    try:
        return picture.open is not None and picture.open() is not None      # what came as codes has no file to open
    except ValueError:
        return False


def evaluate(run, splits, n=200) -> dict:
    """All scores of a run on pictures and texts that it never trained on; what a source cannot tell is None."""
    val, train = splits["val"], splits["train"]
    pictures, trained = (list(itertools.islice(filter(readable, split.pictures), n)) for split in (val, train))
    images, psnr, used = score_reconstructions(run, pictures)
    accuracy, majority = score_answers(run, pictures, train.pictures, n)
    bits, unigram = bits_per_byte(run, val.texts, train.texts) if val.texts else (None, None)
    seen, unseen = {}, {}       # scores of scenes
    if "unseen" in splits:
        withheld = splits["unseen"].pictures[:n]
        seen = score_scenes(run, pictures, images) | {"cloze": score_cloze(run)}
        unseen = score_scenes(run, withheld, score_reconstructions(run, withheld)[0]) if withheld else {}
    else:
        captioned = [p for p in pictures if p.captions]
        said = caption(run, [p.open() for p in captioned])
        seen["caption"] = mean(words in p.captions for words, p in zip(said, captioned))
    return {"n": len(pictures), "reconstruction_psnr": psnr, "codes_used": used,
            "reconstruction_exact": seen.get("reconstruction"),
            "t2i_code_accuracy": code_accuracy(run, [p for p in pictures if p.captions]),
            "t2i_code_accuracy_train": code_accuracy(run, [p for p in trained if p.captions]),
            "t2i_exact": seen.get("t2i"), "t2i_objects": seen.get("objects"), "caption_exact": seen.get("caption"),
            "vqa": accuracy, "vqa_majority": majority,
            "text_bits_per_byte": bits, "text_bits_per_byte_unigram": unigram, "text_cloze": seen.get("cloze"),
            "reconstruction_unseen_combinations": unseen.get("reconstruction"),
            "t2i_unseen_combinations": unseen.get("t2i"), "caption_unseen_combinations": unseen.get("caption")}


def print_scores(scores):
    for name, value in scores.items():
        print(f"{name:<38} {'-' if value is None else value if isinstance(value, int) else format(value, '.3f')}")
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in scores.items()}))


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def missing(paths):
    """Numbers of the files that are not there yet; torchrun's processes take every world-th of them each."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    return [i for i in range(rank, len(paths), world) if not paths[i].exists()]


def draw_command(run, args):
    lines = data.read_utf8(args.prompts).splitlines() if args.prompts else [args.prompt]
    prompts = [line for line in lines if line and line.strip()]
    if not prompts:
        raise ValueError("t2i needs a prompt, or --prompts FILE")
    if not args.prompts:
        text_to_image(run, prompts)[0].save(args.out)
        return print(args.out)
    paths = [Path(args.save_dir, f"{i:05d}.png") for i in range(len(prompts))]
    for part in tqdm(batches(missing(paths), run.sampling.batch), desc="draw"):
        for i, image in zip(part, text_to_image(run, [prompts[i] for i in part], numbers=part)):
            data.write_atomically(paths[i], lambda file: image.save(file, "PNG"))


def caption_command(run, args, words):
    if not Path(args.picture).is_dir():
        return print(caption(run, [data.load_image(args.picture)], words, args.n)[0])
    files = data.picture_files(args.picture)
    if not files:
        raise ValueError(f"{args.picture}: no pictures in it")
    paths = [Path(args.save_dir, file.relative_to(args.picture)).with_suffix(".txt") for file in files]
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{args.picture}: {times} pictures in it would share the caption {path}")
    for part in tqdm(batches(missing(paths), words.batch), desc="caption"):
        images = {}
        for i in part:
            try:
                images[i] = data.load_image(files[i])
            except ValueError as error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        captions = caption(run, list(images.values()), words, args.n, list(images)) if images else []
        for i, text in zip(images, captions):
            data.write_atomically(paths[i], lambda file: file.write(f"{text}\n".encode()))


def parser():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, positional in {"t2i": ["prompt"], "i2t": ["picture"], "vqa": ["picture", "question"],
                             "text": ["beginning"], "eval": [], "export": ["folder"]}.items():
        p = commands.add_parser(name)
        for argument in positional:
            optional, note = "?" if name == "t2i" else None, "or a folder" if name == "i2t" else None
            p.add_argument(argument, nargs=optional, help=note)
        p.add_argument("--run", default="runs/demo", help="a run folder")
        p.add_argument("--vqgan", help="where the run's VQGAN is, if not in its folder")
        p.add_argument("--device", default="auto")
        p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the transformer's weights")
        p.add_argument("--compile", action="store_true", help="the decode step: slow to start, then faster")
        if name not in ("t2i", "export"):
            p.add_argument("--n", type=int, default=200 if name == "eval" else 80, help="examples to score, or tokens")
        for key, default in vars(Sampling()).items():
            if name != "export" and (key != "guidance" or name in ("t2i", "eval")):
                usual = default if key in ("seed", "batch") else "what suits the run; words are greedy"
                p.add_argument(f"--{key.replace('_', '-')}", f"--{key}", type=type(default), help=f"left out: {usual}")
        if name in ("t2i", "i2t"):
            p.add_argument("--save-dir", "--save_dir", default="drawn" if name == "t2i" else "captions", metavar="DIR")
        if name == "t2i":
            p.add_argument("--out", default="out.png")
            p.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        if getattr(args, "n", 1) < 1:
            raise ValueError(f"--n {args.n}: expected a number from 1")
        run = load(args.run, args.vqgan, args.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype])
        given = {k: v for k in vars(run.sampling) if (v := getattr(args, k, None)) is not None}
        run = replace(run, sampling=replace(run.sampling, **given), compile=args.compile)
        words = replace(run.sampling, temperature=given.get("temperature", 0.0))    # text is greedy by default
        if args.command == "t2i":
            draw_command(run, args)
        elif args.command == "i2t":
            caption_command(run, args, words)
        elif args.command == "vqa":
            print(answer(run, [data.load_image(args.picture)], [args.question], words, args.n)[0])
        elif args.command == "text":
            print(args.beginning + complete(run, [args.beginning], words, args.n)[0])
        elif args.command == "export":
            export(run, args.folder, run.config.get("init"))
            print(args.folder)
        else:
            c = run.config
            if "data" not in c:
                raise ValueError(f"--run {args.run}: eval needs a run of train.py, which knows its data")
            splits = data.load_source(c["data"], c["text"], run.side, c["withheld"], c.get("passage", 160))
            print_scores(evaluate(run, splits, args.n))
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    torch.set_flush_denormal(True)      # as in train.py
    main()
