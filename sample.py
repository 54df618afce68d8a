"""From a checkpoint to pictures, captions, answers and text.

    python sample.py t2i "a small red star at the top left on a navy background" --out star.png
    python sample.py t2i --prompts prompts.txt --save-dir drawn             # one picture a line
    torchrun --nproc_per_node 4 sample.py t2i --prompts ...                 # skips pictures that exist
    python sample.py i2t picture.png more.png                               # one caption a line
    python sample.py vqa picture.png "how many shapes are there?"
    python sample.py text "A yield expression"
    python sample.py eval --run runs/demo                                   # a table, and one JSON line last
    python sample.py export FOLDER --run runs/demo                          # a Hugging Face folder

B rows   T positions   V rows of the table to choose from   k of them kept   D hidden size   h, w code grid
"""

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
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
             top_p=1.0, stop=None, generator=None, compile=False):
    """Continue prompts (lists of ids) by n tokens -> ids (B, n); after a token of `stop`, a row repeats it.

    allowed    (first, past_last) rows of the table to choose from; None: all
    negatives  what guidance leads away from, one for each prompt
    generator  a torch.Generator on the model's device, or one for each prompt
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


FORMAT = "nanoLiquid model 2"
LAYOUT = "nanoliquid.json"      # in an export: all of model.pt but the weights
MARKS = "<boi>", "<eoi>", "<unconditional>"     # in Liquid's own tokenizer
naming_file = functools.partial(data.naming, problem="does not fit")


def read_model(path) -> dict:
    """The dict in a model.pt."""
    checkpoint = read_checkpoint(path, mmap=True)       # the optimizer's state stays on the disk
    if checkpoint.get("format") != FORMAT or "model" not in checkpoint:
        raise ValueError(f"{path}: not a model of this version of the project; train it again")
    return checkpoint


def load(run, vqgan=None, device="auto", dtype=torch.float32) -> Run:
    """Open a run folder, an export, or Liquid's own folder; ValueError if something is missing."""
    folder, device = Path(run), choose_device(device)
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

def in_batches(run, prompts, n, allowed, s, numbers=None, negative=None, stop=None):
    """Yield the ids (B, n) that generate returns for s.batch prompts at a time."""
    longest, most = max(map(len, prompts), default=0), run.model.config.max_position_embeddings
    if longest + n > most:
        raise ValueError(f"a prompt of {longest} tokens is too long: {n} more, and the model reads {most}")
    numbers = numbers or range(len(prompts))
    for i in range(0, len(prompts), s.batch):
        part = prompts[i:i + s.batch]
        # An odd factor keeps seeds apart in the 32 bits that CPUs use.
        seeds = [s.seed * 1_000_003 + number for number in numbers[i:i + s.batch]]
        yield generate(run.model, part, n, allowed, negative and [negative] * len(part), s.guidance,
                       s.temperature, s.top_k, s.top_p, stop,
                       [torch.Generator(run.model.device).manual_seed(seed) for seed in seeds], run.compile)


def text_to_image(run, prompts, sampling=None, numbers=None):
    """Prompts -> images; each has a seed of its own from its number (0, 1, ... unless given)."""
    (h, w), rows, images = run.grid, run.vocab.image_rows, []
    negative, *positives = [data.render_t2i(run.vocab, run.tokenizer, p)[0] for p in (None, *prompts)]
    for ids in in_batches(run, positives, h * w, rows, sampling or run.sampling, numbers, negative):
        codes = run.vocab.ids_to_codes(ids).view(-1, h, w)
        images += [data.to_image(pixels) for part in codes.split(8) for pixels in run.vqgan.decode(part)]
    return images


def pixels_of(run, images):
    """Images of any size -> pixels (B, 3, side, side) as the run was trained on."""
    squares = [data.crop_square(image, run.side, run.config.get("pad")) for image in images]
    return torch.cat([data.to_pixels(image) for image in squares]).to(run.model.device)


def encode(run, images):
    """Images of any size -> codes (h, w) of each."""
    parts = [images[i:i + 8] for i in range(0, len(images), 8)]
    return [codes for part in parts for codes in run.vqgan.encode(pixels_of(run, part))]


def write(run, prompts, n, sampling=None):
    """Continue prompts (lists of ids) with up to n tokens of text, usually greedily."""
    room = run.model.config.max_position_embeddings - max(map(len, prompts), default=0)
    s, n = sampling or replace(run.sampling, temperature=0.0), max(1, min(n, room))
    stop, texts = {run.vocab.eos, *run.tokenizer.stops}, []
    for ids in in_batches(run, prompts, n, (0, run.vocab.image_start), s, stop=stop):
        for row in ids.tolist():
            texts.append(run.tokenizer.decode(list(itertools.takewhile(lambda i: i not in stop, row))))
    return texts


def caption(run, images, sampling=None, n=80):
    """Images -> captions."""
    prompts = [data.render_i2t(run.vocab, run.tokenizer, codes)[0] for codes in encode(run, images)]
    return write(run, prompts, n, sampling)


def answer(run, images, questions, sampling=None, n=40):
    """Images and a question about each -> answers."""
    prompts = [data.render_vqa(run.vocab, run.tokenizer, codes, [(question, None)])[0]
               for codes, question in zip(encode(run, images), questions, strict=True)]
    return [text.strip() for text in write(run, prompts, n, sampling)]


def complete(run, texts, sampling=None, n=60):
    """Beginnings -> the text that follows each."""
    prompts = [data.render_text(run.vocab, run.tokenizer, text, ended=False)[0] for text in texts]
    return write(run, prompts, n, sampling)


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
    """The share of exact answers to one question about each picture."""
    asked = [(p, *p.dialogues[i % len(p.dialogues)][0]) for i, p in enumerate(pictures) if p.dialogues]
    blank, most = torch.zeros(run.grid, dtype=torch.long), run.model.config.max_position_embeddings
    asked = [x for x in asked                                       # training left out longer ones, too
             if len(data.render_vqa(run.vocab, run.tokenizer, blank, [(x[1], None)])[0]) < most]
    said = answer(run, [p.open() for p, _, _ in asked], [question for _, question, _ in asked])
    return mean(a == b for a, (_, _, b) in zip(said, asked))


def readable(picture) -> bool:
    with suppress(ValueError):
        return bool(picture.open and picture.open())                # codes alone have no file to open
    return False


def score(run, splits, n=200) -> dict:
    """All scores of a run on held-out examples; None for those that a source cannot give."""
    val, unseen = splits["val"], splits.get("unseen", data.Split([], []))       # built-in data have both
    pictures = list(itertools.islice(filter(readable, val.pictures), n))
    own, new = (score_pictures(run, some, "unseen" in splits) for some in (pictures, unseen.pictures[:n]))
    nll, _ = losses(run.model, [data.render_text(run.vocab, run.tokenizer, text) for text in val.texts])
    size = sum(len(text.encode()) for text in val.texts)
    return {"n": len(pictures), **own, "vqa": score_answers(run, pictures),
            "text_bits_per_byte": float(nll.sum()) / math.log(2) / size if size else None,
            "reconstruction_unseen_combinations": new["reconstruction_exact"],
            "t2i_unseen_combinations": new["t2i_exact"], "caption_unseen_combinations": new["caption_exact"]}


def print_scores(scores):
    for name, value in scores.items():
        print(f"{name:<38} {'-' if value is None else f'{value:.3f}' if isinstance(value, float) else value}")
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in scores.items()}))


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
    todo = [i for i in range(rank, len(paths), world) if lines[i].strip() and not paths[i].exists()]
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
    common.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights")
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
    add("i2t", help="caption").add_argument("pictures", nargs="+")
    p = add("vqa", help="answer a question")
    p.add_argument("picture")
    p.add_argument("question")
    add("text", help="continue").add_argument("beginning")
    add("eval", help="score on held-out examples").add_argument("--data", help="where they are now")
    add("export", help="write a Hugging Face folder").add_argument("folder")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        if args.n is not None and args.n < 1:
            raise ValueError(f"--n {args.n}: expected a number from 1")
        if args.command == "t2i" and not (args.prompt or args.prompts):
            raise ValueError("t2i needs a prompt, or --prompts FILE")
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        run = load(args.run, args.vqgan, args.device, dtype)
        given = {k: v for k in vars(run.sampling) if (v := getattr(args, k)) is not None}
        run = replace(run, sampling=replace(run.sampling, **given), compile=args.compile)
        words = replace(run.sampling, temperature=given.get("temperature", 0.0)), args.n or 80
        if args.command == "t2i" and args.prompts:
            draw_all(run, args.prompts, args.save_dir)
        elif args.command == "t2i":
            text_to_image(run, [args.prompt])[0].save(args.out)
            print(args.out)
        elif args.command == "i2t":
            for text in caption(run, [data.load_image(file) for file in args.pictures], *words):
                print(" ".join(text.split()))
        elif args.command == "vqa":
            print(answer(run, [data.load_image(args.picture)], [args.question], *words)[0])
        elif args.command == "text":
            print(args.beginning + complete(run, [args.beginning], *words)[0])
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
