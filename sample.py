"""From a checkpoint to pictures, captions, answers and text.

    python sample.py t2i "a small red star at the top left on a navy background" --out star.png
    python sample.py t2i --prompts prompts.txt --save-dir drawn             # one picture a line
    torchrun --nproc_per_node 4 sample.py t2i --prompts ...                 # skips pictures that exist
    python sample.py i2t picture.png more.png                               # one caption a line
    python sample.py vqa picture.png "how many shapes are there?"
    python sample.py text "A yield expression"
    python sample.py page "a small red star at the top left on a navy background" --out page.html
    python sample.py page picture.png "how many shapes are there?"          # how it came about, for a browser
    python sample.py page "a red star" --serve 8000                         # with a field for other prompts
    python sample.py eval --run runs/demo                                   # a table, and one JSON line last
    python sample.py export FOLDER --run runs/demo                          # a Hugging Face folder

B rows   T positions   V rows of the table to choose from   k of them kept   D hidden size   h, w code grid
"""

import argparse
import base64
import functools
import http.server
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import urllib.parse
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from model import Cache, ModelConfig, Transformer, read_config
from vqgan import VQGAN, read_checkpoint

# ---- Choosing tokens --------------------------------------------------------------------------------------

def guide(logits, scale):
    """Classifier-free guidance (arXiv 2207.12598): logits (2B, V) of prompts, then negatives -> (B, V)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B, V), uniform numbers (B,) in [0, 1) -> choices (B,); temperature 0 is greedy.

    Inverse-CDF sampling: take the first token whose cumulative probability exceeds the uniform number.
    Unlike torch.multinomial it does not wait for the GPU.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, V = logits.float() / temperature, logits.shape[-1]
    order = torch.arange(V, device=logits.device).expand_as(logits)
    if 0 < top_k < V or top_p < 1:
        logits, order = logits.topk(min(top_k or V, V))             # (B, k), the likeliest first
    reached = logits.softmax(-1).cumsum(-1)                         # (B, V or k)
    last = (reached[:, :-1] < top_p).sum(-1, keepdim=True)          # (B, 1), which reaches top_p
    chosen = torch.searchsorted(reached, uniform[:, None] * reached.gather(-1, last), right=True)   # (B, 1)
    return order.gather(-1, chosen)[:, 0]


# ---- The one decode loop ----------------------------------------------------------------------------------

def prefill(model, prompts, room, compile=False):
    """Read prompts (lists of ids) -> cache with room for more, x (B, D) of their last ids."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(p) for p in prompts], device=model.device)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=model.device)    # (B, T)
    # Prompts of nearly equal lengths share a program; CUDA graphs need the cache to keep its address.
    slots = math.ceil((longest + room) / 64) * 64 if compile else longest + room
    cache = Cache(model.config, len(prompts), slots, padding, model.device, model.dtype)
    for tensor in (*cache.k, *cache.v, cache.next) if compile else ():
        torch._dynamo.mark_static_address(tensor, guard=False)
    return cache, model.model(ids, cache=cache)[:, -1]


def decode_one(model, ids, cache):
    """The ids chosen last (B,) -> x (B, D)."""
    return model.model(ids[:, None], cache=cache)[:, -1]


@functools.cache
def compiled(device_type):
    mode = "reduce-overhead" if device_type == "cuda" else None     # a CUDA graph for each shape
    return torch.compile(decode_one, dynamic=False, mode=mode)


@torch.inference_mode()
def generate(model, prompts, n, allowed=None, negatives=None, guidance=1.0, temperature=1.0, top_k=0,
             top_p=1.0, stop=None, generator=None, compile=False, forbidden=None):
    """Continue prompts (lists of ids) by n tokens -> ids (B, n); after a token of `stop`, a row repeats it.

    allowed    (first, past_last) rows of the table to choose from; None: all
    negatives  what guidance leads away from, one for each prompt
    generator  a torch.Generator on the model's device, or one for each prompt
    forbidden  (first, past_last) of the allowed rows that are not to be chosen
    """
    table = model.config.vocab_size + model.config.image_rows
    first, past_last = allowed or (0, table)
    if not 0 <= first < past_last <= table:
        raise ValueError(f"rows {first}..{past_last - 1} are not within the model's {table}")
    guided = negatives is not None and guidance != 1
    step = compiled(model.device.type) if compile else decode_one
    # With a generator of its own, a row's choices do not depend on its batch.
    generators = generator if isinstance(generator, list) else [generator]
    each = len(prompts) // len(generators)
    uniform = torch.cat([torch.rand(each, n, generator=g, device=model.device) for g in generators])  # (B, n)
    stops = torch.tensor(sorted(stop or ()), device=model.device, dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    out = torch.zeros(len(prompts), n, dtype=torch.long, device=model.device)
    with model.constant_rows():
        cache, x = prefill(model, [*prompts, *negatives] if guided else prompts, n - 1, compile)
        for i in range(n):
            logits = model.logits(x, (first, past_last))            # (B, V), or (2B, V) when guided
            logits = guide(logits, guidance) if guided else logits  # (B, V)
            if forbidden:
                logits[:, max(0, forbidden[0] - first):max(0, forbidden[1] - first)] = -math.inf
            ids = first + choose(logits, uniform[:, i], temperature, top_k, top_p)
            ids = out[:, i] = torch.where(ended, out[:, i - 1], ids)    # nothing has ended at i = 0
            if stop:
                ended = torch.isin(ids, stops)
                if ended.all():
                    out[:, i:] = ids[:, None]
                    break
            if i + 1 < n:
                x = step(model, torch.cat([ids, ids]) if guided else ids, cache)
    return out


# ---- A trained run ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""
    guidance: float = 1.5       # 1: none
    temperature: float = 1.0    # 0: always the likeliest
    top_k: int = 0              # 0: all
    top_p: float = 1.0          # 1: all
    seed: int = 0
    batch: int = 64             # prompts, or pictures, at a time

    def __post_init__(self):
        ranges = dict(guidance=(-1e6, 1e6), temperature=(0, 1e6), top_k=(0, math.inf), top_p=(1e-9, 1),
                      seed=(0, 2 ** 31 - 1), batch=(1, math.inf))
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number from {least} to {most}")


LIQUID = Sampling(guidance=7.0, temperature=0.99, top_k=4096, top_p=0.96)   # the official inference_t2i.py
GREEDY = Sampling(temperature=0.0)      # after train.py --code_noise, whose noise sampling would draw


@dataclass
class Run:
    """Everything needed to sample."""
    model: Transformer
    vqgan: VQGAN
    vocab: data.Vocab
    tokenizer: object
    grid: tuple[int, int]           # h, w
    config: dict                    # train.py's flags
    sampling: Sampling | None = None    # None: as suits its training
    compile: bool = False

    def __post_init__(self):
        if self.sampling is None:
            usual = GREEDY if self.config.get("code_noise") else Sampling()
            self.sampling = LIQUID if self.config.get("init") else usual

    @property
    def side(self):
        """Pixels of a picture."""
        return self.grid[0] * self.vqgan.config.f


def choose_device(name="auto"):
    """cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from None


FORMAT = "nanoLiquid model 3"
LAYOUT = "nanoliquid.json"      # in an export: all of model.pt but the weights
MARKS = "<boi>", "<eoi>", "<unconditional>"     # in Liquid's own tokenizer
naming_file = functools.partial(data.naming, problem="does not fit")


def read_model(path) -> dict:
    """The dict in a model.pt."""
    checkpoint = read_checkpoint(path, mmap=True)       # the optimizer's state stays on the disk
    if checkpoint.get("format") != FORMAT or "model" not in checkpoint:
        raise ValueError(f"{path}: not a model of this version of the project; train it again")
    return checkpoint


def load(run, vqgan=None, device="auto", dtype=None) -> Run:
    """Open a run folder, an export, or Liquid's own folder; dtype None: bf16 on CUDA, else float32."""
    folder, device = Path(run), choose_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    file, vqgan_path = folder / "model.pt", vqgan or folder / "vqgan.pt"
    if exported := not file.exists():
        if not any(folder.glob("model*.safetensors")):
            raise ValueError(f"{file}: no such file; `python train.py --out {folder}` makes it")
        file = folder / LAYOUT
    vqgan = VQGAN.load(vqgan_path, device)
    if not file.exists():
        return load_liquid(folder, vqgan, device, dtype)
    with naming_file(file):
        layout = json.loads(data.read_utf8(file)) if exported else read_model(file)
        vocab, tokenizer = data.Vocab(**layout["vocab"]), data.load_tokenizer(layout["tokenizer"])
        if exported:
            model = Transformer.from_pretrained(folder, dtype, device, vocab.new_rows)
        else:
            with torch.device("meta"):          # random weights of a 7B would take minutes
                model = Transformer(ModelConfig(**layout["model_config"]))
            model = model.to(dtype).to_empty(device=device)
            model.load_state_dict(layout["model"])
        run = Run(model.eval(), vqgan, vocab, tokenizer, tuple(layout["grid"]), layout["config"])
        fingerprint = layout["fingerprint"]
    if fingerprint != vqgan.fingerprint():
        raise ValueError(f"{vqgan_path}: not the VQGAN whose codes the model in {folder} was trained on")
    return run


def read_vocabulary(folder, codes):
    """-> tokenizer, Vocab: of an export, of Liquid's own folder, or of words, with rows for codes to come."""
    if (folder / LAYOUT).exists():
        layout = json.loads(data.read_utf8(folder / LAYOUT))
        return data.load_tokenizer(layout["tokenizer"]), data.Vocab(**layout["vocab"])
    tokenizer, ids = data.PretrainedTokenizer.load(folder), data.special_ids(folder)
    rows, marks = read_config(folder).vocab_size, [tokenizer.id(mark) for mark in MARKS]
    if None in marks:
        return tokenizer, data.Vocab.extend(rows, codes, **ids)
    return tokenizer, data.Vocab(*ids.values(), *marks, marks[1], rows - codes, codes)


def load_liquid(folder, vqgan, device, dtype) -> Run:
    """Liquid's own folder: the last rows are codes, marks are words, pictures are padded."""
    tokenizer, vocab = read_vocabulary(folder, vqgan.config.n_embed)
    if vocab.boi >= vocab.image_start:
        raise ValueError(f"{folder}: neither {LAYOUT} of an export nor the marks of Liquid's tokenizer")
    model, side = Transformer.from_pretrained(folder, dtype, device, vocab.image_size), 512 // vqgan.config.f
    return Run(model.eval(), vqgan, vocab, tokenizer, (side, side), {"init": str(folder), "pad": True})


def export(run, folder):
    """Write a Hugging Face folder, which `--run` opens, too."""
    folder, source = Path(folder), run.config.get("init")
    if (folder / "model.pt").exists() or source and folder.resolve() == Path(source).resolve():
        raise ValueError(f"{folder}: holds a run, or the model of --init, which an export would overwrite")
    if source:
        run.model.save_pretrained(folder)
        patterns = "tokenizer* special_tokens* generation_config* chat_template* vocab.json merges.txt"
        for pattern in patterns.split():
            for file in data.fetch(source).glob(pattern):
                shutil.copy(file, folder / file.name)
    else:
        ids = {f"{name}_token_id": getattr(run.vocab, name) for name in ("bos", "eos", "pad")}
        run.model.save_pretrained(folder, **ids)
        run.tokenizer.save_pretrained(folder)
    vqgan = {"config": asdict(run.vqgan.config), "model": run.vqgan.state_dict()}
    data.save_atomically(vqgan, folder / "vqgan.pt")
    layout = dict(vocab=asdict(run.vocab), tokenizer=run.tokenizer.state(), grid=run.grid, config=run.config,
                  fingerprint=run.vqgan.fingerprint())
    (folder / LAYOUT).write_text(json.dumps(layout))


# ---- The tasks --------------------------------------------------------------------------------------------

def rows_within(budget, c, slots, itemsize) -> int:
    """Rows whose keys and values take `budget` bytes."""
    return budget // (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize * slots)


def in_batches(run, prompts, n, allowed, s, numbers=None, negatives=None, **options):
    """Yield the ids (B, n) that generate returns for s.batch prompts at a time, or as many as fit."""
    longest, most = max(map(len, prompts), default=0), run.model.config.max_position_embeddings
    if longest + n > most:
        raise ValueError(f"a prompt of {longest} tokens is too long: {n} more, and the model reads {most}")
    numbers, model = numbers or range(len(prompts)), run.model
    budget = torch.cuda.mem_get_info(model.device)[1] // 4 if model.device.type == "cuda" else 2 ** 33
    most = rows_within(budget, model.config, longest + n, model.dtype.itemsize)
    size = max(1, min(s.batch, most // 2 if negatives else most))
    for i in range(0, len(prompts), size):
        part = prompts[i:i + size]
        # An odd factor keeps seeds apart in the 32 bits that CPUs use.
        seeds = [s.seed * 1_000_003 + number for number in numbers[i:i + size]]
        generators = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]
        yield generate(model, part, n, allowed, negatives and negatives[i:i + size], s.guidance,
                       s.temperature, s.top_k, s.top_p, generator=generators, compile=run.compile, **options)


def text_to_image(run, prompts, sampling=None, numbers=None, begin=None, rows=0):
    """Prompts -> images; each has a seed of its own from its number (0, 1, ... unless given).

    Begun with the first `rows` rows of codes of the image `begin`; None for a prompt goes on freely.
    """
    if not 0 <= rows < run.grid[0]:
        raise ValueError(f"--rows {rows}: a picture has {run.grid[0]} rows of codes")
    begun = run.vocab.codes_to_ids(encode(run, [begin])[0][:rows]).flatten().tolist() if begin else []
    negative, *positives = [data.render_t2i(run.vocab, run.tokenizer, p)[0] + begun for p in (None, *prompts)]
    images = []
    for ids in in_batches(run, positives, math.prod(run.grid) - len(begun), run.vocab.image_rows,
                          sampling or run.sampling, numbers, [negative] * len(positives)):
        images += decode(run, torch.cat([ids.new_tensor(begun).expand(len(ids), -1), ids], dim=1))
    return images


def decode(run, ids):
    """Ids of pictures (B, h * w) -> images."""
    codes = run.vocab.ids_to_codes(ids).view(-1, *run.grid)
    return [data.to_image(pixels) for part in codes.split(8) for pixels in run.vqgan.decode(part)]


def pixels_of(run, images):
    """Images of any size -> pixels (B, 3, side, side) as the run was trained on."""
    squares = [data.crop_square(image, run.side, run.config.get("pad")) for image in images]
    return torch.cat([data.to_pixels(image) for image in squares]).to(run.model.device)


def encode(run, images):
    """Images of any size -> codes (h, w) of each."""
    parts = [images[i:i + 8] for i in range(0, len(images), 8)]
    return [codes for part in parts for codes in run.vqgan.encode(pixels_of(run, part))]


def write(run, prompts, n, sampling=None, draw=False):
    """Continue prompts (lists of ids), usually greedily -> ids of words, up to the end; draw: or to <boi>."""
    v, room = run.vocab, run.model.config.max_position_embeddings - max(map(len, prompts), default=0)
    s, stop = sampling or replace(run.sampling, temperature=0.0), {v.eos, v.boi, *run.tokenizer.stops}
    rows, n = (0, max(v.image_start, v.boi + 1) if draw else v.image_start), max(1, min(n, room))
    for ids in in_batches(run, prompts, n, rows, s, stop=stop, forbidden=v.image_rows if draw else None):
        for row in ids.tolist():
            yield row[:1 + next((i for i, token in enumerate(row) if token in stop), n)]


def texts(run, prompts, n, sampling):
    said = write(run, prompts, n, sampling)
    return [run.tokenizer.decode([i for i in ids if i not in (run.vocab.eos, run.vocab.boi)]) for ids in said]


def caption(run, images, sampling=None, n=80):
    """Images -> captions."""
    prompts = [data.render_i2t(run.vocab, run.tokenizer, codes)[0] for codes in encode(run, images)]
    return texts(run, prompts, n, sampling)


def complete(run, beginnings, sampling=None, n=60):
    """Beginnings -> the text that follows each."""
    prompts = [data.render_text(run.vocab, run.tokenizer, text, ended=False)[0] for text in beginnings]
    return texts(run, prompts, n, sampling)


def replies(run, dialogues, sampling=None, n=80, draw=False):
    """Dialogues of turns (question, reply), the last reply None -> its parts: words and images.

    The parts of a question are words, images and data.Pictures. draw: a reply begins with an image.
    """
    v, number, s = run.vocab, math.prod(run.grid), sampling or run.sampling
    seen = {id(p): p for turns in dialogues for p in data.parts_of(turns) if not isinstance(p, str)}
    opened = [p.open() if isinstance(p, data.Picture) else p for p in seen.values()]
    codes = dict(zip(seen, encode(run, opened)))
    coded = [[[side and [codes.get(id(p), p) for p in side] for side in turn] for turn in turns]
             for turns in dialogues]
    prompts = [data.render_dialogue(v, run.tokenizer, turns)[0] for turns in coded]
    parts, rows, most = [[] for _ in prompts], range(len(prompts)), run.model.config.max_position_embeddings
    while rows:
        if draw:
            begun = [prompts[i] + [v.boi] for i in rows]
            drawn = torch.cat([*in_batches(run, begun, number, v.image_rows, s)])
            for i, ids, image in zip(rows, drawn.tolist(), decode(run, drawn)):
                prompts[i] += [v.boi, *ids, v.eoi]
                parts[i].append(image)
        said, rows, draw = zip(rows, write(run, [prompts[i] for i in rows], n, sampling, True)), [], True
        for i, ids in said:
            if words := run.tokenizer.decode([j for j in ids if j not in (v.eos, v.boi)]).strip():
                parts[i].append(words)
            prompts[i] += ids[:-1]
            if ids[-1] == v.boi and len(prompts[i]) + number + 2 < most:
                rows.append(i)
    return parts


def reply(run, messages, sampling=None, n=80):
    """Messages in the layout of transformers' chat templates -> the reply's parts: words and images."""
    turns = data.read_dialogue(messages, lambda x: data.load_image(x) if isinstance(x, (str, Path)) else x)
    if not turns or turns[-1][1] is not None:
        raise ValueError("messages: the last one is not a user's")
    return replies(run, [turns], sampling, n)[0]


def answer(run, images, questions, sampling=None, n=40):
    """Images, or lists of them, and a question about each -> answers."""
    dialogues = [[([*(image if isinstance(image, list) else [image]), question], None)]
                 for image, question in zip(images, questions, strict=True)]
    said = replies(run, dialogues, sampling, n)
    return [" ".join(part for part in parts if isinstance(part, str)) for parts in said]


def edit(run, images, instructions, sampling=None):
    """Images and an instruction for each -> the images that it makes of them.

    The instruction comes first, so that a code and its like in the answer are always as far apart.
    """
    dialogues = [[([words, image], None)] for image, words in zip(images, instructions, strict=True)]
    return [parts[0] for parts in replies(run, dialogues, sampling, draw=True)]


# ---- Scores -----------------------------------------------------------------------------------------------

def mean(values):
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else None


@torch.inference_mode()
def losses(model, examples, batch=32):
    """Examples (ids, targets) -> summed nll of each, number of targets of each."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    sums, counts = torch.zeros(len(examples)), torch.zeros(len(examples))
    for i in range(0, len(order), batch):
        part = order[i:i + batch]
        ids, targets = ([torch.tensor(examples[i][side]) for i in part] for side in (0, 1))
        ids, targets = pad_sequence(ids, True), pad_sequence(targets, True, data.IGNORE)    # seen by nobody
        sums[part] = model(ids.to(model.device), targets.to(model.device)).sum(1).cpu()
        counts[part] = (targets != data.IGNORE).sum(1).float()
    return sums, counts


def score_drawings(images, wanted):
    """Images against scenes -> (share of exact ones, share of the wanted objects found)."""
    pairs = [(data.grade(image), scene) for image, scene in zip(images, wanted)]
    objects = [o in found.objects for found, scene in pairs for o in scene.objects]
    return mean(found == scene for found, scene in pairs), mean(objects)


def score_pictures(run, pictures, graded):
    """Scores of each picture reconstructed, drawn and captioned; graded: as a built-in scene."""
    rebuilt, psnrs, used = [], [], set()
    for i in range(0, len(pictures), 8):
        pixels = pixels_of(run, [p.open() for p in pictures[i:i + 8]])                  # (B, 3, H, W)
        codes = run.vqgan.encode(pixels)                                                # (B, h, w)
        decoded = run.vqgan.decode(codes)
        error = ((decoded - pixels) / 2).square().mean((1, 2, 3))                       # of values in [0, 1]
        psnrs += (-10 * error.clamp(min=1e-10).log10()).tolist()                        # dB
        rebuilt += map(data.to_image, decoded)
        used |= set(codes.flatten().tolist())
    scenes = [p.scene for p in pictures if graded]
    drawn = text_to_image(run, [p.captions[0] for p in pictures if graded])
    exact, objects = score_drawings(drawn, scenes)
    captioned = [p for p in pictures if p.captions]
    said = zip(captioned, caption(run, [p.open() for p in captioned]))
    right = [data.read_description(words) == p.scene if graded else words in p.captions for p, words in said]
    return {"reconstruction_psnr": mean(psnrs), "codes_used": len(used),
            "reconstruction_exact": score_drawings(rebuilt, scenes)[0],
            "t2i_exact": exact, "t2i_objects": objects, "caption_exact": mean(right)}


def score_answers(run, pictures):
    """The share of exact answers to the first question of a dialogue about each picture."""
    asked = [p.dialogues[i % len(p.dialogues)][0] for i, p in enumerate(pictures) if p.dialogues]
    blank, most = torch.zeros(run.grid, dtype=torch.long), run.model.config.max_position_embeddings
    def fits(question):                 # training left out longer ones, too
        parts = [part if isinstance(part, str) else blank for part in question]
        return len(data.render_dialogue(run.vocab, run.tokenizer, [(parts, None)])[0]) < most
    asked = [(question, " ".join(reply)) for question, reply in asked if fits(question)]
    said = replies(run, [[(question, None)] for question, _ in asked], n=40)
    return mean(parts == [right] for parts, (_, right) in zip(said, asked))


def score_scenes(run, pictures):
    """Shares of exact answers, by kind of question."""
    scores, rngs = {}, [random.Random(p.key) for p in pictures]
    for kind in ("place", "named", "exists"):
        asked = [rng.choice(data.questions(p.scene, rng)[kind]) for p, rng in zip(pictures, rngs)]
        said = answer(run, [p.open() for p in pictures], [question for question, _ in asked])
        scores[f"vqa_{kind}"] = mean(a == reply for a, (_, reply) in zip(said, asked))
    return scores


def score_edits(run, pictures):
    """Shares of pictures that are edited exactly, and in which all else is as before."""
    edits = [(*question, *reply) for p in pictures for (question, reply), in p.edits[:1]]
    drawn = edit(run, [before.open() for _, before, _ in edits], [words for words, _, _ in edits])
    scenes = [(data.grade(image), a.scene, b.scene) for image, (_, a, b) in zip(drawn, edits)]
    return (mean(found == wanted for found, _, wanted in scenes),
            mean(before.facts() & wanted.facts() <= found.facts() for found, before, wanted in scenes))


def readable(picture) -> bool:
    with suppress(ValueError):
        return bool(picture.open and picture.open())                # codes alone have no file to open
    return False


def score(run, splits, n=200) -> dict:
    """All scores of a run on held-out examples; None for those that a source cannot give."""
    val, unseen = splits["val"], splits.get("unseen", data.Split([], []))       # built-in data have both
    built_in = "unseen" in splits
    pictures = (p for p in val.pictures if p.captions or not built_in)
    pictures = list(itertools.islice(filter(readable, pictures), n))
    new = [p for p in unseen.pictures if p.captions][:n]
    own, new = (score_pictures(run, some, built_in) for some in (pictures, new))
    edited, unchanged = score_edits(run, pictures if built_in else [])
    new_edits, _ = score_edits(run, [p for p in unseen.pictures if not p.captions][:n])
    pairs = data.PAIRS[run.config.get("withheld", 0):] if built_in else []
    colors = complete(run, [f"The color of every {color} {shape} is" for color, shape in pairs], n=4)
    nll, _ = losses(run.model, [data.render_text(run.vocab, run.tokenizer, text) for text in val.texts])
    size = sum(len(text.encode()) for text in val.texts)
    return {"n": len(pictures), **own, "edit_exact": edited, "edit_unchanged": unchanged,
            "vqa": score_answers(run, pictures), **score_scenes(run, pictures if built_in else []),
            "text_color": mean(said.startswith(f" {color}.") for said, (color, _) in zip(colors, pairs)),
            "text_bits_per_byte": float(nll.sum()) / math.log(2) / size if size else None,
            "reconstruction_unseen_combinations": new["reconstruction_exact"],
            "t2i_unseen_combinations": new["t2i_exact"], "caption_unseen_combinations": new["caption_exact"],
            "edit_unseen_combinations": new_edits}


def print_scores(scores):
    for name, value in scores.items():
        print(f"{name:<38} {'-' if value is None else f'{value:.3f}' if isinstance(value, float) else value}")
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in scores.items()}))


# ---- The page: how a drawing, a caption or an answer came about, as one file for any browser --------------

PAGE = Path(__file__).parent / "assets" / "page.html"
SHOWN, LETTERS = 6, 300         # candidates for each token; the longest words that --serve takes


def as_url(pixels, **options):
    """pixels (3, H, W) -> a URL that holds the picture."""
    image, file = data.to_image(pixels), io.BytesIO()
    image.thumbnail((256, 256))
    image.save(file, "WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def rounded(x):
    return x.cpu().double().round(decimals=4).tolist()


def name_ids(run, ids):
    """Ids -> [id, its text, or its code as a number] of each."""
    v, (first, past_last) = run.vocab, run.vocab.image_rows
    texts = {i: i - first for i in range(first, past_last)} | {
        v.bos: "bos", v.eos: "eos", v.boi: "<boi>", v.eoi: "<eoi>", v.uncond: "<unconditional>"}
    return [[i, texts[i] if i in texts else run.tokenizer.decode([i])] for i in ids]


def logits_behind(run, prompt, ids, rows):
    """Logits (T, V) of the rows from which ids (T,) were chosen behind a prompt; one pass gives all."""
    whole = torch.tensor([[*prompt, *ids.tolist()]], device=run.model.device)
    return run.model.logits(run.model.model(whole)[0, len(prompt) - 1:-1], rows)


def candidates(run, ids, first, temperature, *kinds):
    """The chosen ids (T,) and the likeliest others; kinds of logits (T, V), the last of which decide."""
    z, chosen = torch.stack(kinds), ids[:, None] - first                                    # (S, T, V)
    shown = z[-1].scatter(1, chosen, math.inf).topk(min(SHOWN, z.shape[-1])).indices        # (T, k)
    p, at = (z / (temperature or 1)).softmax(-1), shown.expand(len(z), -1, -1)
    numbers = dict(logits=z.gather(-1, at), p=p.gather(-1, at), others=p.scatter(-1, at, 0).sum(-1))
    return {"shown": [name_ids(run, row) for row in (shown + first).tolist()],
            "ids": name_ids(run, ids.tolist()), **{k: rounded(x.transpose(0, 1)) for k, x in numbers.items()}}


@torch.inference_mode()
def explain_drawing(run, prompt):
    """All that the page shows of how a prompt is drawn."""
    (h, w), rows, s, f = run.grid, run.vocab.image_rows, run.sampling, run.vqgan.config.f
    words, t = prompt.split(), s.temperature or 1
    texts = [prompt, None, *(" ".join(words[:i] + words[i + 1:]) for i in range(len(words)))]
    given, negative, *shorter = [data.render_t2i(run.vocab, run.tokenizer, text)[0] for text in texts]
    ids = next(in_batches(run, [given], h * w, rows, s, negatives=[negative]))[0]           # (T,)
    with run.model.constant_rows():
        c, u = (logits_behind(run, x, ids, rows) for x in (given, negative))                # (T, V)
        p = (c / t).softmax(-1)
        moved = [((logits_behind(run, x, ids, rows) / t).softmax(-1) - p).abs().sum(-1) / 2 for x in shorter]
    found = candidates(run, ids, rows[0], t, u, c, guide(torch.cat([c, u]), s.guidance))
    codes, k = run.vocab.ids_to_codes(ids), torch.arange(h * w, device=ids.device)
    # The decoder looks at neighbors: in place of a code to come stands the one above it, or the last one.
    done = k[:, None] if h * w <= 256 else k[w - 1::w, None]        # a larger grid comes row by row
    above = k - (k - done + w - 1).clamp(min=0) // w * w
    so_far = codes[torch.where(above < 0, done, above)].view(-1, h, w)
    hidden = (k > done).view(-1, 1, h, w).repeat_interleave(f, 2).repeat_interleave(f, 3)
    frames = torch.cat([run.vqgan.decode(part) for part in so_far.split(8)]).masked_fill(hidden, 1)
    patches = []                        # of the candidates, each in its place in the finished picture
    for (y, x), row in zip(itertools.product(range(h), range(w)), found["shown"]):
        top, left = max(0, min(y - 3, h - 7)), max(0, min(x - 3, w - 7))
        around = codes.view(h, w)[top:top + 7, left:left + 7].repeat(len(row), 1, 1)        # (k, 7, 7)
        around[:, y - top, x - left] = torch.tensor([code for _, code in row])
        patches.append(run.vqgan.decode(around).unfold(2, f, f).unfold(3, f, f)[:, :, y - top, x - left])
    scales = sorted({1.0, 1.5, 3.0, 7.0, s.guidance})
    drawn = [data.to_pixels(text_to_image(run, [prompt], replace(s, guidance=g))[0]) for g in scales]
    small = functools.partial(as_url, **{"lossless": True} if h * w <= 64 else {"quality": 75})
    return found | dict(
        task="t2i", words=words, grid=run.grid, s=asdict(s), first=rows[0], moved=[rounded(x) for x in moved],
        frames=[small(x) for x in frames], patches=[[small(x) for x in row] for row in patches],
        scales=[[g, small(x)] for g, x in zip(scales, drawn)], prompt=name_ids(run, given),
        negative=name_ids(run, negative), end=name_ids(run, [run.vocab.eoi, run.vocab.eos]))


@torch.inference_mode()
def explain_words(run, image, question, s, n):
    """All that the page shows of how an image gets its caption, or a question its answer."""
    codes, common, rows = encode(run, [image])[0], (run.vocab, run.tokenizer), (0, run.vocab.image_start)
    prompt = (data.render_dialogue(*common, [([codes, question], None)]) if question else
              data.render_i2t(*common, codes))[0]
    ids = torch.tensor(next(write(run, [prompt], n, s)), device=run.model.device)
    seen = pixels_of(run, [image])[0], run.vqgan.decode(codes[None])[0]
    return candidates(run, ids, 0, s.temperature, logits_behind(run, prompt, ids, rows)) | dict(
        task="vqa" if question else "i2t", words=question.split(), grid=run.grid, s=asdict(s),
        frames=[as_url(x, lossless=True) for x in seen], prompt=name_ids(run, prompt), first=rows[1])


def page(found) -> bytes:
    """The page with what was found as JSON, in which no text can end the script."""
    if not PAGE.exists():
        raise ValueError(f"{PAGE}: no such file; `page` needs a clone of the repository")
    return data.read_utf8(PAGE).replace("PAGE_DATA", json.dumps(found).replace("<", "\\u003c")).encode()


def server(explain, words, port):
    """For browsers on this machine: one thread explains `words`, or those in the text field."""
    page({})            # says at once if its file is missing

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 2     # browsers open connections in advance, and each would hold up the next request

        def do_GET(self):
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query, keep_blank_values=True)
            asked = query.get("words", [words])[0]
            try:
                if len(asked) > LETTERS:
                    raise ValueError(f"{len(asked)} letters are too many: at most {LETTERS} fit here")
                found = explain(asked)
            except (ValueError, RuntimeError) as error:
                found = {"error": " ".join(str(error).split())[:300]}
            self.send_response(400 if "error" in found else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page(found | {"asked": asked, "letters": LETTERS}))
    try:
        return http.server.HTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--serve {port}: {error}") from None


# ---- The command line -------------------------------------------------------------------------------------

def draw_all(run, file, folder):
    """Draw line i of a file into folder/0000i.png; torchrun's processes share them."""
    lines, note = data.read_utf8(file).split("\n"), Path(folder, ".drawn.json")
    paths = [Path(folder, f"{i:05d}.png") for i in range(len(lines))]
    weights = data.digest(str([p.flatten()[:9].tolist() for p in run.model.parameters()]))
    made = json.dumps({**vars(run.sampling), "batch": 0, "model": weights, "prompts": lines})
    drawn = any(path.exists() for path in paths)
    if drawn if not note.exists() else data.read_utf8(note) != made:
        raise ValueError(f"--save-dir {folder}: drawings of another run, prompt list, seed or setting")
    rank, world = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if "RANK" in os.environ else (0, 1)
    if rank == 0:
        data.write_atomically(note, lambda file: file.write(made.encode()))
    wanted = [i for i, line in enumerate(lines) if line.strip()]
    todo = [i for i in wanted[rank::world] if not paths[i].exists()]
    room = run.model.config.max_position_embeddings - math.prod(run.grid)
    long = {i for i in todo if len(data.render_t2i(run.vocab, run.tokenizer, lines[i])[0]) > room}
    todo = sorted({*todo} - long)
    for k in tqdm(range(0, len(todo), run.sampling.batch), desc="draw"):
        part = todo[k:k + run.sampling.batch]
        for i, image in zip(part, text_to_image(run, [lines[i] for i in part], numbers=part)):
            data.write_atomically(paths[i], lambda file: image.save(file, "PNG"))
    if long:
        raise ValueError(f"{file}: too long, not drawn: lines {sorted(i + 1 for i in long)}")


def parser():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", default="runs/demo", help="a run folder")
    common.add_argument("--vqgan", help="its VQGAN, if elsewhere")
    common.add_argument("--device", default="auto")
    common.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights; bf16 on CUDA")
    common.add_argument("--compile", action="store_true", help="the decode step")
    common.add_argument("--n", type=int, help="tokens of text (80), or examples of eval (200)")
    for name, default in vars(Sampling()).items():
        common.add_argument(f"--{name.replace('_', '-')}", f"--{name}", type=type(default),
                            help="as trained, unless given; text is greedy")
    commands = top.add_subparsers(dest="command", required=True)
    add = functools.partial(commands.add_parser, parents=[common])
    p = add("t2i", help="draw")
    p.add_argument("prompt", nargs="?")
    p.add_argument("--out", default="out.png")
    p.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    p.add_argument("--save-dir", "--save_dir", default="drawn", metavar="DIR")
    p.add_argument("--begin", metavar="PICTURE", help="keep its first --rows of codes and draw the rest")
    p.add_argument("--rows", type=int, default=1)
    add("i2t", help="caption").add_argument("pictures", nargs="+")
    p = add("edit", help="edit a picture by words")
    p.add_argument("picture")
    p.add_argument("instruction")
    p.add_argument("--out", default="out.png")
    p = add("vqa", help="answer a question")
    p.add_argument("pictures", nargs="+")
    p.add_argument("question")
    add("text", help="continue").add_argument("beginning")
    p = add("page", help="show in a browser how a drawing, a caption or an answer came about")
    p.add_argument("parts", nargs="+", help="a prompt; a picture to caption; a picture and a question")
    p.add_argument("--out", default="page.html")
    p.add_argument("--serve", type=int, metavar="PORT", help="with a text field, to this machine's browsers")
    add("eval", help="score on held-out examples").add_argument("--data", help="where they are now")
    add("export", help="write a Hugging Face folder").add_argument("folder")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        if args.n is not None and args.n < 1:
            raise ValueError(f"--n {args.n}: expected a number from 1")
        if args.command == "t2i" and not (args.prompt or args.prompts or args.begin):
            raise ValueError("t2i needs a prompt, --prompts FILE or --begin PICTURE")
        name = "fp32" if args.command == "export" else None         # an export is exact
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.dtype or name)
        run = load(args.run, args.vqgan, args.device, dtype)
        given = {k: v for k in vars(run.sampling) if (v := getattr(args, k)) is not None}
        run = replace(run, sampling=replace(run.sampling, **given), compile=args.compile)
        words = replace(run.sampling, temperature=given.get("temperature", 0.0)), args.n or 80
        if args.command == "t2i" and args.prompts:
            draw_all(run, args.prompts, args.save_dir)
        elif args.command == "t2i":
            begin = data.load_image(args.begin) if args.begin else None
            text_to_image(run, [args.prompt], begin=begin, rows=args.rows if begin else 0)[0].save(args.out)
            print(args.out)
        elif args.command == "edit":
            edit(run, [data.load_image(args.picture)], [args.instruction])[0].save(args.out)
            print(args.out)
        elif args.command == "i2t":
            for text in caption(run, [data.load_image(file) for file in args.pictures], *words):
                print(" ".join(text.split()))
        elif args.command == "vqa":
            images = [data.load_image(file) for file in args.pictures]
            print(answer(run, [images], [args.question], *words)[0])
        elif args.command == "text":
            print(args.beginning + complete(run, [args.beginning], *words)[0])
        elif args.command == "page":
            files = [part for part in args.parts if os.path.isfile(part)]
            asked = " ".join(part for part in args.parts if part not in files)
            if len(files) > 1 or asked.lower().endswith(data.SUFFIXES):
                raise ValueError("page needs a prompt, or one picture that exists, perhaps with a question")
            explain = functools.partial(explain_drawing, run)
            if files:
                image = data.load_image(files[0])
                explain = lambda question: explain_words(run, image, question, *words)      # noqa: E731
            if args.serve is None:
                data.write_atomically(args.out, lambda file: file.write(page(explain(asked))))
                print(args.out)
            else:
                with server(explain, asked, args.serve) as serving, suppress(KeyboardInterrupt):
                    print(f"http://127.0.0.1:{serving.server_port}", flush=True)
                    serving.serve_forever()
        elif args.command == "export":
            export(run, args.folder)
            print(args.folder)
        else:
            c = run.config
            if "data" not in c:
                raise ValueError(f"--run {args.run}: eval needs a run of train.py, which knows its data")
            splits = data.load_source(args.data or c["data"], c["text"], run.side, c["withheld"], c["init"])
            print_scores(score(run, splits, args.n or 200))
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"sample.py: {str(error) or 'stopped'}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    signal.signal(getattr(signal, "SIGQUIT", signal.SIGINT), signal.default_int_handler)    # as Ctrl-C
    torch.set_flush_denormal(True)      # softmax's denormal tails take CPUs 100 times longer
    main()
