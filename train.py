"""Train in three acts: a tokenizer of pictures, the codes of all pictures, and one transformer for words and codes.

    python train.py                                          # laptop: built-in scenes, all acts, scores, runs/demo
    python train.py --data FOLDER --text FILE --out RUN      # your pictures (name.png + name.txt) and your text
    python train.py --init google/gemma-3-270m --vqgan vqgan.ckpt --data FOLDER --out RUN      # start from real weights
    python train.py --preset gpu --data FOLDER --out RUN     # one GPU: 256x256 pixels, 256 codes
    torchrun --nproc_per_node 4 train.py --out RUN           # the same on 4 processes (NCCL on GPUs, gloo on CPUs)
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --shard --out RUN
                                                             # on each of 2 nodes that share RUN; weights cut up (FSDP2)

`python train.py --help` explains every flag. A run folder holds config.json, vqgan.pt, codes/, model.pt,
log.jsonl and samples/; `--resume` goes on with one that was interrupted.

On a first reading, begin with `train` near the end, then read the three acts. What stands before act 1 are tools:
flags, processes and faults, what wraps the model, optimizers.

B batch   R rows   T positions   K codes   e dimensions of a code   f pixels that a code is wide   h, w code grid
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import typing
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import sample
from model import ModelConfig, Transformer, read_config
from vqgan import (Discriminator, Perceptual, ResnetBlock, VQGAN, VQGANConfig, adaptive_weight, discriminator_loss,
                   draw_far, generator_loss, kmeans, perturb, read_checkpoint, usage)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass, turned into flags. None means: chosen by `resolve` from the data.

# From least to most, for the numbers of Config:
RANGES = {(1, math.inf): """passage save_every eval_every log_every image_size vq_steps vq_batch vq_restart_every ch
                            patch z_channels codes code_dim steps rows context accumulate hidden_size layers heads""",
          (0, math.inf): """workers res_blocks words eval_n skip_nonfinite vq_lr vq_lr_adam lr lr_adam weight_decay clip
                            z_loss adversarial code_noise""",
          (0, 1): "vq_continuous adversarial_start warmup uncond",
          (0, len(data.PAIRS) - 1): "withheld",
          (0, 2 ** 31 - 1): "seed"}
CHOICES = dict(train=("all", "embeddings"), optimizer=("muon", "adamw"), image_rows=("free", "codebook"))


def parse_mix(text) -> dict[str, float]:
    try:
        mix = {task: float(weight) for task, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        mix = {}
    if not mix or set(mix) - set(data.TASKS) or min(mix.values()) < 0 or not 0 < sum(mix.values()) < math.inf:
        raise ValueError(f"--mix {text}: expected something like t2i=6,i2t=2,vqa=3,text=1")
    return mix


@dataclass
class Config:
    # the run
    out: str = "runs/demo"              # folder of the run
    withheld: int = data.WITHHELD       # pairs of color and shape that the built-in scenes never show in training
    data: str | None = None             # folder, .jsonl or .tar of pictures; none: built-in scenes
    text: str | None = None             # .txt or .jsonl of texts; none: built-in English (with the built-in scenes)
    passage: int = 160                  # characters of the pieces that --text is cut into, each an example
    preset: str = "laptop"              # differences from these defaults, see PRESETS
    seed: int = 0                       # of first weights, batches and noise; the built-in scenes stay the same
    device: str = "auto"                # cuda, mps or cpu; auto takes the first there is
    workers: int | None = None          # processes that read pictures
    compile: bool = False               # torch.compile each block
    checkpointing: bool = False         # compute each block's activations again in backward, to save memory
    shard: bool = False                 # cut weights, gradients and optimizer states up among the processes (FSDP2)
    save_every: int = 500               # steps between checkpoints
    eval_every: int = 500               # steps between validation losses and pictures in samples/
    log_every: int = 20                 # steps between lines of log.jsonl
    init: str | None = None             # start from this Hugging Face folder, or hub name, of Gemma, Qwen or Llama
    train: str = "all"                  # all, or embeddings: only the rows that --init lacks or never used
    skip_nonfinite: int = 0             # steps of an act to leave out whose loss or gradient is not finite
    resume: bool = False                # go on with the run in --out
    overwrite: bool = False             # delete the run in --out first
    # act 1, the tokenizer
    image_size: int | None = None       # pixels of a side
    pad: bool = False                   # pad pictures to a square instead of cropping their centre
    vqgan: str | None = None            # take this tokenizer instead of training one
    shards: str | None = None           # folder of codes, filled by one run, that others share; none: OUT/codes
    vq_steps: int | None = None         # steps of the tokenizer
    vq_batch: int = 32                  # pictures of a step, over all processes
    vq_lr: float = 0.03                 # of Muon, for kernels
    vq_lr_adam: float = 2e-3            # of AdamW, for everything else
    vq_continuous: float = 0.04         # share of the steps before the codebook is made, by k-means, and used
    vq_restart_every: int = 50          # steps after which unused codes restart
    ch: int = 64                        # channels of the first level
    ch_mult: tuple[int, ...] | None = None  # channels of each level, in units of ch; all but the last halve h and w
    res_blocks: int | None = None       # residual blocks of a level
    patch: int | None = None            # pixels of a side that the first convolution sees as one
    z_channels: int = 64                # channels between the networks and the code vectors
    codes: int | None = None            # K, size of the codebook
    code_dim: int = 8                   # e, dimensions of a code vector
    l2_norm: bool = True                # compare code vectors as directions
    perceptual: str | None = None       # weights of VGG16 with linear heads, for a perceptual loss
    adversarial: float = 0.0            # weight of the discriminator's loss
    adversarial_start: float = 0.5      # share of the steps before it begins
    # act 3, the transformer
    steps: int | None = None            # steps of the transformer
    mix: str = "t2i=6,i2t=2,vqa=6,text=1"   # how often each task is drawn: drawing, captioning, questions, text
    rows: int = 8                       # of a batch, over all processes
    context: int | None = None          # positions of a row
    accumulate: int = 1                 # parts that a batch is computed in, to save memory
    optimizer: str = "muon"             # muon (AdamW for what is no matrix) or adamw
    lr: float = 0.014                   # of Muon, for matrices
    lr_adam: float = 3e-3               # of AdamW, for everything else
    weight_decay: float = 0.0           # of both
    warmup: float = 0.03                # share of the steps
    clip: float = 1.0                   # gradient norm
    z_loss: float = 0.0                 # weight of logsumexp squared, which keeps logits small
    uncond: float = 0.1                 # share of drawings whose words are dropped
    code_noise: float | None = None     # noise on the vectors of codes to draw, in standard deviations of the codebook
    words: int | None = None            # size of the learned word vocabulary
    image_rows: str = "codebook"        # rows of the table for codes: free, or a function of the VQGAN's codebook
    hidden_size: int = 128              # D; with --init all sizes are the folder's
    layers: int = 4                     # blocks
    heads: int = 4                      # of attention in each block
    eval_n: int = 200                   # held-out pictures to score at the end; 0: no scores

    def __post_init__(self):
        for (least, most), names in RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (least <= value <= most and math.isfinite(value)):
                    end = f" to {most}" if most < math.inf else ""
                    raise ValueError(f"--{name} {value}: expected a number from {least}{end}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: choose {' or '.join(known)}")
        if min(self.ch_mult or [1]) < 1:
            raise ValueError(f"--ch_mult {','.join(map(str, self.ch_mult))}: expected numbers from 1")
        parse_mix(self.mix)

    @property
    def f(self) -> int:
        """How many pixels a code is wide, once `resolve` has chosen patch and ch_mult."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


PRESETS = {
    "laptop": {},
    "gpu": dict(image_size=256, patch=2, ch=128, ch_mult=(1, 1, 2, 4), res_blocks=2, z_channels=256, codes=4096,
                vq_steps=40_000, adversarial=0.5, steps=50_000, rows=64, hidden_size=768, layers=12, heads=12,
                words=16_384, compile=True),
    "paper": dict(image_size=512, patch=1, ch=128, ch_mult=(1, 1, 2, 2, 4), res_blocks=2, z_channels=256, codes=8192,
                  code_dim=256, l2_norm=False, vq_steps=200_000, adversarial=0.5, steps=100_000, rows=512, context=2048,
                  words=32_768, hidden_size=1024, layers=24, heads=16, image_rows="free", code_noise=0.0, compile=True),
}


# The paper's fine-tuning: with --init these replace the preset's values, and flags replace both.
FINETUNE = dict(optimizer="adamw", lr_adam=2e-5, rows=16, context=2048, passage=4000, image_rows="free", code_noise=0.0)


def add_flags(parser):
    """A flag for each field of Config, explained by its comment; what the user leaves out stays out of the result."""
    comments = dict(re.findall(r"^ +(\w+): .*  # (.*)", inspect.getsource(Config), re.MULTILINE))
    for f in dataclasses.fields(Config):
        kind = (typing.get_args(f.type) or [f.type])[0]     # without its `| None`
        known = "none, or chosen from the data" if f.default is None else f.default
        options = dict(default=argparse.SUPPRESS, help=f"{comments.get(f.name, '')} (default: {known})".strip())
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float, str):
            options["type"] = kind
        else:
            options["type"] = lambda text: tuple(int(x) for x in text.split(","))
        if f.name == "preset":
            options["choices"] = PRESETS
        parser.add_argument(f"--{f.name}", **options)


def first_images(pictures, most):
    """Images of the first pictures that have files; encode_pictures names and counts those that cannot be read."""
    for p in [p for p in pictures if p.open][:most]:
        try:
            yield p.open()
        except ValueError:
            continue


def typical_size(pictures, f, most=128):
    """The median shorter side of the first readable pictures, between 64 and most, rounded down to a multiple of f."""
    sides = sorted(min(image.size) for image in first_images(pictures, 50))
    side = sides[len(sides) // 2] if sides else 64
    return max(f, min(max(side, 64), most) // f * f)


def resolve(cfg, splits, vqgan=None) -> Config:
    """Fill in what depends on the data: scenes are simple and get 16 codes each, other pictures 64 or more."""
    scenic, pictures = cfg.data is None, len(splits["train"].pictures)
    if vqgan:
        c = vqgan.config
        cfg = dataclasses.replace(cfg, patch=c.patch, ch_mult=c.ch_mult, res_blocks=c.num_res_blocks, codes=c.n_embed)
    if scenic:
        chosen = dict(patch=8, ch_mult=(1, 1), res_blocks=1, codes=512, words=1024, vq_steps=1000, steps=1150,
                      code_noise=0.3, workers=0)
    else:
        chosen = dict(patch=4, ch_mult=(1, 2), res_blocks=2, codes=1024, words=4096,
                      vq_steps=min(20_000, 600 + pictures // 4), steps=min(50_000, 600 + pictures // 2),
                      code_noise=0.0, workers=min(4, os.cpu_count() or 1))
    cfg = dataclasses.replace(cfg, **{k: v for k, v in chosen.items() if getattr(cfg, k) is None})
    if cfg.image_size is None:
        cfg.image_size = 64 if scenic else typical_size(splits["train"].pictures, cfg.f)
    if cfg.context is None:
        cfg.context = 2 ** math.ceil(math.log2(max(256, 2 * (cfg.image_size // cfg.f) ** 2)))
    return cfg


def check(cfg, splits, world):
    """ValueError, naming the flag, for what could not work with this data; nothing has been written yet."""
    def require(good, name, wanted):
        if not good:
            raise ValueError(f"--{name} {getattr(cfg, name)}: {wanted}")
    f, mix, tasks = cfg.f, parse_mix(cfg.mix), splits["train"].tasks()
    codes, pictured = (cfg.image_size // f) ** 2, any(mix.get(task) for task in ("t2i", "i2t", "vqa"))
    require(cfg.ch % 32 == 0 or cfg.vqgan, "ch", "group norm needs a multiple of 32")
    require(cfg.image_size % f == 0, "image_size", f"a code is {f}x{f} pixels: choose a multiple of {f}")
    require(cfg.hidden_size % (2 * cfg.heads) == 0 or cfg.init, "hidden_size",
            f"choose a multiple of twice --heads {cfg.heads}")
    require(cfg.vq_batch >= world or cfg.vqgan, "vq_batch", f"each of {world} processes needs a picture")
    require(cfg.rows % (world * cfg.accumulate) == 0, "rows",
            f"not a multiple of {world} processes times --accumulate {cfg.accumulate}")
    require(any(tasks[task] for task, weight in mix.items() if weight), "mix", "there are no examples of it")
    require(cfg.context > codes or not pictured, "context", f"a picture alone has {codes} codes")
    require(cfg.vqgan or all(p.open for split in splits.values() for p in split.pictures), "data",
            "codes without pictures need the --vqgan that made them")
    require(not cfg.data or not Path(cfg.out).resolve().is_relative_to(Path(cfg.data).resolve()), "out",
            f"lies in --data {cfg.data}, and what the run draws would become its data")
    require(not cfg.perceptual or Path(cfg.perceptual).is_file(), "perceptual", "no such file")
    require(cfg.train == "all" or cfg.init and not cfg.weight_decay, "train",
            "needs --init, and no --weight_decay, which would shrink the other rows")
    require(cfg.image_rows == "free" or not cfg.init, "image_rows", "the model of --init has rows of its own")
    if cfg.init:                    # what is wrong with the folder is found now, not after act 1
        folder = data.fetch(cfg.init)
        data.PretrainedTokenizer.load(folder)
        read_config(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Processes, faults and logs

class Stopped(Exception):
    """Somebody asked the program to end."""
    def __init__(self, number, where="stopped"):
        super().__init__(where)
        self.number = number or signal.SIGTERM      # the signal; another process may have got it


class Stop:
    """Within it, SIGTERM and SIGINT end the program by Stopped: at once or, if it `waits`, when the loop reads it.

    A second SIGINT, an impatient Ctrl-C, does not wait. A second SIGTERM does: torchrun sends it again to who had it.
    """
    asked, waits = 0, False

    def __enter__(self):
        mine = threading.current_thread() is threading.main_thread()    # no other may set handlers
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT) if mine}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_the_end_of_a_step(self):
        """Within it, wait for the loop to read `asked`; at its end, stop if that came after the loop's last look."""
        self.waits = True
        yield
        self.waits = False
        if self.asked:
            raise Stopped(self.asked)

    def note(self, number, frame):
        impatient = self.asked and number == signal.SIGINT
        self.asked = number
        if impatient or not self.waits:
            raise Stopped(number)


@dataclass
class Process:
    """Which of the `world` processes this is."""
    rank: int
    world: int
    device: torch.device
    stop: Stop = field(default_factory=Stop)

    @property
    def first(self):
        return self.rank == 0

    def print(self, *words):
        if self.first:
            tqdm.write(" ".join(map(str, words)), file=sys.stdout)

    def sum(self, tensor):
        """In place, over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, tensor):
        """In place, what the first process has: sums in no fixed order would let copies of a codebook drift apart."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def sum_gradients(self, parameters):
        """In place, over all processes, as one message."""
        if self.world > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            nn.utils.vector_to_parameters(self.sum(nn.utils.parameters_to_vector(gradients)), gradients)

    def autocast(self, wanted=True):
        """bf16 on CUDA."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted and self.device.type == "cuda")

    def wait(self):
        if self.world > 1:
            dist.barrier()


def set_up(cfg) -> Process:
    """Join the processes that torchrun started, if it did, and choose the device."""
    device, world = sample.device_of(cfg.device), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            store, rank, _ = next(rendezvous("env://"))
            # A name for each restart, or the store would hold the addresses of the dead.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                    timeout=timedelta(hours=6))     # the others wait while one draws or encodes
    return Process(dist.get_rank() if world > 1 else 0, world, device)


class Log:
    """One JSON object a line; a resumed act first drops what was written after its checkpoint, and broken lines."""
    def __init__(self, path, process):
        self.path, self.process = Path(path), process

    def rewind(self, act, step):
        if self.process.first and self.path.exists():
            kept = [line for line in self.lines() if line["act"] != act or line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in sorted(kept, key=lambda line: line["act"]))
            data.write_atomically(self.path, lambda file: file.write(text.encode()))

    def lines(self):
        for text in self.path.read_text(errors="replace").splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                continue

    def write(self, act, step, **values):
        if self.process.first:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(act=act, step=step, **values)) + "\n")


class Guard:
    """Decides, alike on all processes, whether a step may be taken: its losses and its gradient have to be finite."""
    def __init__(self, cfg, act, path, log):
        self.allowed, self.act, self.path, self.log, self.skipped = cfg.skip_nonfinite, act, path, log, 0

    def passes(self, step, values) -> bool:
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong and self.skipped >= self.allowed:
            good = f"{self.path} holds the last good one" if self.path.exists() else "there is no checkpoint yet"
            raise ValueError(f"act {self.act}, step {step}: {', '.join(wrong)} not finite, and the step is not taken; "
                             f"{good}; --resume --skip_nonfinite {self.skipped + 1} goes on without this step")
        if wrong:
            self.skipped += 1
            self.log.write(self.act, step, nonfinite=wrong)
        return not wrong


def resumed(cfg, path, kind) -> dict | None:
    """The checkpoint to go on with; None for a fresh start. ValueError, naming the file, if it is something else."""
    if not (cfg.resume and path.exists()):
        return None
    saved = read_checkpoint(path, mmap=cfg.shard)       # the processes of a node then share what each takes a part of
    if saved.get("format") != kind or not {"step", "skipped", "model", "optimizer", "random_state"} <= saved.keys():
        raise ValueError(f"{path}: not a checkpoint that this project can go on with")
    return saved


# ---------------------------------------------------------------------------------------------------------------------
# Several devices: what wraps the model, which knows nothing of it

def parallel(cfg, model, process):
    """Activation checkpointing, then compilation of each block, then data parallelism with whole or cut-up weights.

    -> what to call in place of the model; in backward it averages gradients over the processes.
    """
    for block in model.model.layers:
        if cfg.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.forward = torch.compile(block.forward)
    if process.world == 1:
        return model.to(process.device)
    if not cfg.shard:
        return DistributedDataParallel(model.to(process.device), gradient_as_bucket_view=True, broadcast_buffers=False)
    mesh = init_device_mesh(process.device.type, (process.world,))
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)     # angles stay in float32
    policy = bf16 if process.device.type == "cuda" else MixedPrecisionPolicy()
    for part in (*model.model.layers, model):       # each moves to the device and is cut up before the next
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


@contextmanager
def gathered_weights(model):
    """Whole weights on every process, each of which may then run what it likes; a model not cut up has them anyway."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def full(x):
    """The whole of a tensor that is cut up; all processes call this together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(p, x):
    """This process's part of a whole tensor x, cut up as p is: the inverse of `full`."""
    # src_data_rank=None: every process has x already, none needs it sent
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


def gathered_state(state, process):
    """A state dict of whole tensors, those that were cut up on the first process's CPU; all call this together."""
    if isinstance(state, dict):
        return {k: gathered_state(v, process) for k, v in state.items()}
    if isinstance(state, DTensor):
        state = full(state)
        return state.cpu() if process.first else None
    return state


def load_optimizers(optimizers, states):
    """Load what gathered_state made of the optimizers' states, cut up again as the parameters are."""
    for optimizer, state in zip(optimizers, states, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in state["state"].items():
            for key, value in values.items():
                if value.shape == parameters[i].shape:          # not AdamW's count of steps
                    values[key] = shard_like(parameters[i], value)
        optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and optimizers

def schedule(step, steps, warmup, decay=1.0):
    """Factor of the learning rate: up over the share `warmup`, then 1, then a cosine to 0 over the share `decay`."""
    rise = min(1.0, (step + 1) / max(1, warmup * steps))
    past = max(0.0, (step / steps - (1 - decay)) / decay)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, past)))


def orthogonalize(g, steps=5):
    """The nearest semi-orthogonal matrices to g (n, r, c), roughly: Newton-Schulz in float32 (Jordan et al. 2024).

    A step multiplies x by a polynomial of x x^T and leaves its singular vectors alone: so the small matrix x x^T takes
    all steps, and x their product at the end (Zhang, Amsel, Chen and Dao 2026, Gram Newton-Schulz).
    """
    # Five steps with Jordan's coefficients take singular values from 0.006 to 1 to between 0.68 and 1.14.
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    one = torch.eye(x.shape[1], device=x.device)

    def polynomial(gram):
        return 3.4445 * one + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)

    gram = x @ x.mT
    product = factor = polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for matrices and kernels; torch.optim.Muon computes in bf16, which is slow on CPUs."""
    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = defaultdict(dict)         # {shape: {parameter: update}}: matrices of one shape go together
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = full(p.grad.lerp(momentum, group["momentum"])).flatten(1)  # Nesterov; kernels as matrices
                    updates[update.shape][p] = update
            for (rows, columns), alike in updates.items():
                for p, update in zip(alike, orthogonalize(torch.stack(list(alike.values())))):
                    size = max(1, rows / columns) ** 0.5        # a tall matrix has more outputs to move (Jordan et al.)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(shard_like(p, update.reshape(p.shape)), alpha=-group["lr"] * size)


def make_optimizers(matrices, parameters, lr, lr_adam, weight_decay=0.0, betas=(0.9, 0.95)):
    """Muon for `matrices`, AdamW for the other parameters; each group remembers its peak learning rate."""
    chosen = set(matrices)
    rest, optimizers = [p for p in parameters if p.requires_grad and p not in chosen], []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr_adam, betas, weight_decay=weight_decay, fused=True))
    if matrices:
        optimizers.append(Muon(matrices, lr, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rate(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def step_all(optimizers, take=True):
    for optimizer in optimizers:
        if take:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def restore(saved, path, networks, optimizers):
    """Load a checkpoint's networks {key: module}, optimizers and random state; ValueError if they do not fit."""
    with sample.fitting(path):
        for key, network in networks.items():
            network.load_state_dict(saved[key])
        load_optimizers(optimizers, saved["optimizer"])
        torch.set_rng_state(saved["random_state"])


# ---------------------------------------------------------------------------------------------------------------------
# Act 1: the tokenizer

def collate(items):
    """uint8 tensors of what could be read -> (B, 3, H, W) or None; for each item None, or why it could not be read."""
    pixels = [x for x in items if torch.is_tensor(x)]
    return torch.stack(pixels) if pixels else None, [x if isinstance(x, str) else None for x in items]


def leave_signals(_):
    """A Ctrl-C reaches the processes that read pictures, too; the one that trains answers it and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pixel_batches(cfg, pictures, indices, spares=0):
    """Lists of indices -> (pixels (B, 3, H, W) in [-1, 1] or None; for each index None or an error), by workers."""
    loader = torch.utils.data.DataLoader(data.Pixels(pictures, cfg.image_size, cfg.pad, spares), batch_sampler=indices,
                                         num_workers=cfg.workers, collate_fn=collate, worker_init_fn=leave_signals)
    for pixels, errors in loader:
        yield pixels if pixels is None else pixels.float() / 127.5 - 1, errors


def seeded(cfg, step):
    return torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)


def random_indices(cfg, count, start, process):
    """The pictures of each step from `start` on: a function of seed and step, shared out among the processes."""
    for step in range(start, cfg.vq_steps):
        chosen = torch.randint(count, (cfg.vq_batch,), generator=seeded(cfg, step))
        yield chosen[process.rank::process.world].tolist()


def gathered(process, x):
    """(n, ...) with any n on each process -> those of all in the order of one: rank r has items r, r + world, ..."""
    if process.world == 1:
        return x
    parts = [None] * process.world
    dist.all_gather_object(parts, x.cpu())      # the first of each, the second of each, ...
    return torch.stack([item for row in zip_longest(*parts) for item in row if item is not None]).to(x.device)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def start_codebook(cfg, model, pictures, process):
    """k-means of the encoder's vectors of some pictures: 256, or as many as have 8 vectors a code."""
    count = min(len(pictures), max(256, 8 * cfg.codes // ((cfg.image_size // model.config.f) ** 2)))
    order = torch.randperm(len(pictures), generator=seeded(cfg, 0))[:count].tolist()
    parts = [order[i:i + cfg.vq_batch] for i in range(0, count, cfg.vq_batch)]
    vectors = torch.cat([model.quantize.vectors(model.latents(pixels.to(process.device)))
                         for pixels, _ in pixel_batches(cfg, pictures, parts) if pixels is not None])
    centres = kmeans(vectors, cfg.codes, generator=seeded(cfg, 0))
    model.quantize.replace(torch.arange(cfg.codes, device=process.device), process.agree(centres))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def restart_codes(cfg, model, pixels, counts, step, process):
    """Codes that nothing was assigned to move to badly served vectors of the batch, the same ones on every process."""
    dead = (counts == 0).nonzero().flatten()
    if len(dead):
        vectors = model.quantize.vectors(gathered(process, model.latents(pixels)))
        far = draw_far(vectors, model.quantize.codebook(), len(dead), seeded(cfg, step))
        model.quantize.replace(dead, process.agree(far))


RESTARTS = 0.75     # share of the steps in which unused codes restart


def report_usage(cfg, counts, step, process, log):
    """Log how many codes are in use, and warn at the end of fewer than a tenth: healthy tokenizers use nearly all."""
    used, perplexity = usage(counts)
    log.write(1, step + 1, codes_used=used, perplexity=perplexity)
    if step >= RESTARTS * cfg.vq_steps and step + cfg.vq_restart_every >= cfg.vq_steps and used < cfg.codes / 10:
        process.print(f"warning: the codebook has collapsed, only {used} of {cfg.codes} codes are in use; "
                      "try fewer --codes, more pictures or a larger --vq_continuous")


@torch.compiler.set_stance("force_eager")
def save_reconstructions(cfg, vqgan, splits, process):
    """Eight held-out pictures above what remains of them."""
    if process.first:
        images = [data.fit(image, cfg.image_size, cfg.pad) for image in first_images(splits["val"].pictures, 8)]
        if images:
            pixels = torch.cat([data.to_pixels(image) for image in images]).to(process.device)
            decoded = map(data.to_image, vqgan.decode(vqgan.encode(pixels)))
            data.grid(images + list(decoded), len(images)).save(Path(cfg.out) / "samples" / "reconstructions.png")


def tokenizer_loss(cfg, model, out, pixels, perceptual, adversary):
    """Errors of the pixels, what the quantizer adds and, if they are there, what VGG16 and the adversary see."""
    error = out.pixels - pixels
    reconstruction = error.abs().mean() + error.square().mean()
    if perceptual:
        reconstruction = reconstruction + perceptual(out.pixels, pixels)
    loss = reconstruction + out.loss
    if adversary:
        g_loss = generator_loss(adversary, out.pixels)
        loss = loss + cfg.adversarial * adaptive_weight(reconstruction, g_loss, model.decoder.conv_out.weight) * g_loss
    return loss


def learn_pictures(cfg, model, pixels, quantize, perceptual, adversary, process):
    """Add a batch's gradients -> output, loss, this process's share of the pictures, norm of the gradients.

    They are summed by hand, for adaptive_weight takes gradients on the side, which DDP would not survive.
    """
    share = len(pixels) / process.sum(torch.tensor(float(len(pixels)), device=process.device))
    out, learning = model(pixels, quantize), list(model.parameters())
    loss = tokenizer_loss(cfg, model, out, pixels, perceptual, adversary)
    (loss * share).backward()
    if adversary:
        adversary.zero_grad(set_to_none=True)       # what the generator's loss left there
        (discriminator_loss(adversary, pixels, out.pixels) * share).backward()
        learning += adversary.parameters()
    process.sum_gradients(learning)
    return out, loss.detach(), share, nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])


def train_tokenizer(cfg, splits, process, log):
    """Act 1 -> the tokenizer, which RUN/vqgan.pt holds, too.

    At first vectors pass unquantized; then k-means of them makes the codebook, whose unused codes restart elsewhere
    while the rate is high; with --adversarial, a discriminator judges what is drawn from half of the steps on.
    """
    path, pictures = Path(cfg.out) / "vqgan.pt", [p for p in splits["train"].pictures if p.open]

    # The networks:
    torch.manual_seed(cfg.seed)
    model = VQGAN(VQGANConfig(ch=cfg.ch, ch_mult=cfg.ch_mult, num_res_blocks=cfg.res_blocks, z_channels=cfg.z_channels,
                              n_embed=cfg.codes, embed_dim=cfg.code_dim, l2_norm=cfg.l2_norm, patch=cfg.patch))
    model = model.to(process.device)
    perceptual = Perceptual(cfg.perceptual).to(process.device) if cfg.perceptual else None
    discriminator = Discriminator().to(process.device) if cfg.adversarial else None

    # The optimizers:
    kernels = [p for p in model.parameters() if p.ndim == 4]
    optimizers = make_optimizers(kernels, model.parameters(), cfg.vq_lr, cfg.vq_lr_adam)
    d_optimizers = []
    if discriminator:       # taming's betas, at a constant rate
        d_optimizers = make_optimizers([], discriminator.parameters(), 0, 2e-4, betas=(0.5, 0.9))
    counts, start = torch.zeros(cfg.codes, dtype=torch.long, device=process.device), 0

    # Where it was interrupted:
    guard, networks = Guard(cfg, 1, path, log), {"model": model}
    if discriminator:
        networks["discriminator"] = discriminator
    if saved := resumed(cfg, path, "nanoLiquid tokenizer 1"):
        restore(saved, path, networks, optimizers + d_optimizers)
        start, counts, guard.skipped = saved["step"], saved["counts"].to(process.device), saved["skipped"]
    log.rewind(1, start)
    if start == cfg.vq_steps:
        return model.eval()

    def save(step):
        if process.first:
            data.save_atomically(dict(
                format="nanoLiquid tokenizer 1", **{key: network.state_dict() for key, network in networks.items()},
                optimizer=[o.state_dict() for o in optimizers + d_optimizers], step=step, skipped=guard.skipped,
                config=asdict(model.config), train_config=asdict(cfg), counts=counts,
                random_state=torch.get_rng_state()), path)

    # The loop:
    if cfg.compile:
        for block in model.modules():
            if isinstance(block, ResnetBlock):
                block.compile()
    quantize_from = min(int(cfg.vq_continuous * cfg.vq_steps), cfg.vq_steps - 1)
    bar = tqdm(range(start, cfg.vq_steps), "1 tokenizer", initial=start, total=cfg.vq_steps, disable=not process.first)
    batches = pixel_batches(cfg, pictures, random_indices(cfg, len(pictures), start, process), spares=8)
    for step, (pixels, errors) in zip(bar, batches):
        if pixels is None:
            raise ValueError(f"no picture of a whole batch, nor any behind them, could be read; the first: {errors[0]}")
        done, pixels = step + 1, pixels.to(process.device)

        # What takes part in this step, the codebook and the adversary:
        if step == quantize_from:
            start_codebook(cfg, model, pictures, process)
        quantize = step >= quantize_from
        adversary = discriminator if step >= cfg.adversarial_start * cfg.vq_steps else None

        # Learn, unless a number is not finite on any process:
        set_rate(optimizers, schedule(step, cfg.vq_steps, warmup=0.03, decay=0.6))
        out, loss, share, norm = learn_pictures(cfg, model, pixels, quantize, perceptual, adversary, process)
        total, asked = process.sum(torch.stack([loss * share, loss.new_tensor(process.stop.asked)])).tolist()
        sound = guard.passes(done, {"the loss of the tokenizer": total, "the gradient": norm.item()})
        step_all(optimizers + d_optimizers, sound)

        # Restart codes that nothing is assigned to:
        if sound and quantize:
            counts += process.sum(out.codes.flatten().bincount(minlength=cfg.codes))
            if done % cfg.vq_restart_every == 0:
                report_usage(cfg, counts, step, process, log)
                if step < RESTARTS * cfg.vq_steps:
                    restart_codes(cfg, model, pixels, counts, step, process)
                counts.zero_()

        # Log, save, draw, stop:
        if sound and done % cfg.log_every == 0:
            error = process.sum(F.mse_loss(out.pixels.detach(), pixels) * share).item()
            psnr = -10 * math.log10(error / 4 + 1e-10)      # of pixels in [0, 1], as usual; ours are in [-1, 1]
            log.write(1, done, loss=total, psnr=psnr)
            bar.set_postfix_str(f"loss {total:.3f} psnr {psnr:.1f} dB")
        if done % cfg.save_every == 0 or done == cfg.vq_steps or asked:
            save(done)
        if quantize and done % cfg.eval_every == 0:
            save_reconstructions(cfg, model, splits, process)
        if asked:
            raise Stopped(process.stop.asked, f"stopped after step {done} of the tokenizer, which {path} holds")
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Act 2: the codes

SHARD = 4096    # pictures of a file


def holds(path, pictures, fingerprint):
    """Does a shard account for exactly these pictures, and for all that is said about them?"""
    def content(pictures):
        return sorted((p.name, p.captions, p.talks) for p in pictures)
    encoded, skipped = data.read_shard(path, fingerprint) or ([], {})
    rest = [p for p in pictures if p.name not in skipped]
    return content(encoded) == content(rest) and skipped.keys() <= {p.name for p in pictures}


@torch.compiler.set_stance("force_eager")
def encode_shard(cfg, vqgan, pictures, path, fingerprint, device):
    skipped, done = {}, [p for p in pictures if p.codes is not None]
    side = cfg.image_size // vqgan.config.f
    for p in done:
        if p.codes.shape != (side, side) or p.codes.max() >= vqgan.config.n_embed:
            shape, most = "x".join(map(str, p.codes.shape)), vqgan.config.n_embed - 1
            raise ValueError(f"{p.name}: {shape} codes up to {p.codes.max()} are not of this VQGAN, which makes "
                             f"{side}x{side} up to {most} of --image_size {cfg.image_size}")
    todo = [p for p in pictures if p.codes is None]
    parts = sample.batches(range(len(todo)), cfg.vq_batch)
    for part, (pixels, errors) in zip(parts, pixel_batches(cfg, todo, parts)):
        codes = iter(() if pixels is None else vqgan.encode(pixels.to(device)).cpu())
        done += [dataclasses.replace(todo[i], codes=next(codes)) for i, error in zip(part, errors) if error is None]
        skipped |= {todo[i].name: error for i, error in zip(part, errors) if error}
    data.write_shard(path, done, fingerprint, skipped)


def encode_pictures(cfg, vqgan, splits, process, log) -> dict[str, data.Split]:
    """Splits of pictures -> the same with codes, from the shards where they are there already."""
    fingerprint = f"{vqgan.fingerprint()} {cfg.image_size}{' padded' * cfg.pad}"
    encoded, skipped = {}, []
    for name, split in splits.items():
        parts = sample.batches(split.pictures, SHARD)
        paths = [Path(cfg.shards or Path(cfg.out) / "codes") / f"{name}-{i:05d}.pt" for i in range(len(parts))]
        bar = tqdm(total=len(split.pictures), desc=f"2 codes of {name}", disable=not process.first)
        for i, (path, part) in enumerate(zip(paths, parts)):
            if i % process.world == process.rank and not holds(path, part, fingerprint):
                encode_shard(cfg, vqgan, part, path, fingerprint, process.device)
            bar.update(len(part))
        bar.close()
        process.wait()
        shards = [data.read_shard(path, fingerprint) for path in paths]
        if None in shards:
            path = paths[shards.index(None)]
            raise ValueError(f"{path}: was just written and cannot be read; do all processes share --out?")
        encoded[name] = data.Split([p for pictures, _ in shards for p in pictures], split.texts)
        skipped += [why for _, bad in shards for why in bad.values()]
    log.rewind(2, -1)
    if skipped:
        log.write(2, 0, skipped=skipped)
        process.print(f"{len(skipped)} pictures, all in log.jsonl, could not be read: {'; '.join(skipped[:3])}")
    if not encoded["train"].pictures:
        raise ValueError(f"{cfg.data}: no picture in it could be read; the first: {skipped[0]}")
    return encoded


# ---------------------------------------------------------------------------------------------------------------------
# Act 3: the transformer

def learn_words(cfg, train) -> data.WordTokenizer:
    """A text tokenizer from all words of the training split and of the templates, as they stand in there."""
    chat = data.WordTokenizer.chat
    said = [*train.texts, *(caption for p in train.pictures for caption in p.captions)]
    for question, answer in (turn for p in train.pictures for talk in p.talks for turn in talk):
        said += [question, chat.lead + answer]
    said += [data.DRAW, data.CAPTION, *chat] * 3        # a word is learned from three times on
    return data.WordTokenizer.learn(said, cfg.words)


def text_vocabulary(cfg, train, vqgan):
    """-> text tokenizer, vocabulary: learned from the data, or those of the model to start from."""
    codes = vqgan.config.n_embed
    if cfg.init:
        folder = data.fetch(cfg.init)
        tokenizer = data.PretrainedTokenizer.load(folder)
        return tokenizer, tokenizer.vocab(codes, json.loads(data.read_utf8(folder / "config.json")))
    tokenizer = learn_words(cfg, train)
    return tokenizer, tokenizer.vocab(codes)


def build_model(cfg, vocab, vqgan) -> Transformer:
    if cfg.init:
        model = Transformer.from_pretrained(data.fetch(cfg.init))
        old = model.config.vocab_size
        model.extend_vocab(vocab.size - old, seeded(cfg, 0))
        if cfg.train == "embeddings":
            model.train_only_rows([*range(old, vocab.size), vocab.boi, vocab.eoi, vocab.uncond])
        return model
    codebook, from_codebook = vqgan.quantize.codebook().detach(), cfg.image_rows == "codebook"
    model = Transformer(ModelConfig(
        vocab_size=vocab.size, hidden_size=cfg.hidden_size, intermediate_size=3 * cfg.hidden_size,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, num_key_value_heads=cfg.heads,
        head_dim=cfg.hidden_size // cfg.heads, max_position_embeddings=cfg.context,
        codebook_dim=codebook.shape[1] * from_codebook, codebook_size=len(codebook) * from_codebook))
    if from_codebook:
        model.model.image_rows.start(codebook)
    return model


def validate(cfg, run, tasks, process, most=96) -> dict[str, float]:
    """Mean loss a target of each task, on the same held-out examples every time, shared out among the processes."""
    result = {}
    for task, items in tasks.items():
        if items:
            loader = data.Loader({task: items}, {task: 1}, run.vocab, run.tokenizer, 1, cfg.context, uncond=0.0)
            examples = [loader.render(task, 0, i) for i in range(min(most, len(items)))][process.rank::process.world]
            sums, counts = sample.losses(run.model, [e for e in examples if len(e[0]) <= cfg.context])
            total, count = process.sum(torch.tensor([sums.sum(), counts.sum()], device=process.device)).tolist()
            if count:
                result[task] = total / count
    return result


@torch.compiler.set_stance("force_eager")
def evaluate(cfg, run, held_out, step, process, log):
    """Held-out losses to the log, and drawings of held-out captions to RUN/samples."""
    losses = validate(cfg, run, held_out, process)
    log.write(3, step, **{f"val_{task}": loss for task, loss in losses.items()})
    process.print(f"step {step}: held-out loss " + ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items()))
    captions = [p.captions[0] for p in held_out["t2i"][:16]
                if len(data.render_t2i(run.vocab, run.tokenizer, p.captions[0], p.codes)[0]) <= cfg.context]
    if process.first and captions:
        data.grid(sample.text_to_image(run, captions), 8).save(Path(cfg.out) / "samples" / f"drawn-{step:06d}.png")


@lru_cache
def peak_flops(device) -> float:
    """FLOP/s of a large matrix product in the precision of training: the best of four."""
    n, dtype, times = (8192, torch.bfloat16, []) if device.type == "cuda" else (2048, torch.float32, [])
    a = torch.linspace(-1, 1, n * n, device=device).to(dtype).view(n, n)
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()        # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times)


class Meter:
    """What training achieves: tokens/s, MFU (PaLM, appendix B), and the shares of time spent waiting and of padding.

    MFU counts what the mathematics needs: no padding, nothing computed twice, a head for targets only, keys seen.
    A multiply-add is 2 FLOP, and backward takes twice as many as forward: 6. Tokens/s are positions, padded or not.
    """
    def __init__(self, model, process):
        c, self.peak, self.world = model.config, peak_flops(process.device), process.world
        self.block = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
        self.head, self.key = c.vocab_size * c.hidden_size, 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        self.flops = self.waited = self.tokens = self.slots = 0
        self.since = time.perf_counter()

    def count(self, batch, waited):
        """A batch of this process, and the seconds that it was late."""
        real, learned = batch.documents >= 0, (batch.targets != data.IGNORE).sum().item()
        tokens, keys = real.sum().item(), (batch.positions[real] + 1).sum().item()
        self.flops += 6 * (self.block * tokens + self.head * learned + self.key * keys)
        self.waited, self.tokens, self.slots = self.waited + waited, self.tokens + tokens, self.slots + real.numel()

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        return dict(tokens_per_s=self.slots * self.world / seconds, mfu=self.flops / seconds / self.peak,
                    waiting=self.waited / seconds, padding=1 - self.tokens / self.slots)


def learn(cfg, wrapped, batch, process):
    """Add a batch's gradients, in --accumulate parts -> this process's sums of losses, and of targets, by task."""
    sums, counts = torch.zeros(2, len(data.TASKS), device=process.device)
    # Divide by the targets of the whole batch on all processes: in a mean of means, a caption's 20 would weigh as much
    # as a drawing's 1024.
    count = process.sum((batch.targets != data.IGNORE).sum())
    parts = zip(*(x.chunk(cfg.accumulate) for x in batch))
    for part, (ids, targets, positions, documents, kinds) in enumerate(parts, 1):
        wrapped.require_backward_grad_sync = part == cfg.accumulate     # what DDP's no_sync sets; others do not look
        with process.autocast():
            nll = wrapped(ids, targets, positions, documents, z_loss=cfg.z_loss)
        (nll.sum() * process.world / count).backward()                  # averaged over the processes: a sum
        learned = targets != data.IGNORE
        sums.index_add_(0, kinds[learned], nll.detach()[learned])
        counts += kinds[learned].bincount(minlength=len(data.TASKS))
    return sums, counts


def train_transformer(cfg, splits, vqgan, process, log):
    """Act 3 -> RUN/model.pt: one next-token loss for all tasks, --rows rows of --context positions a step."""
    path, grid = Path(cfg.out) / "model.pt", tuple(splits["train"].pictures[0].codes.shape)
    saved = resumed(cfg, path, "nanoLiquid model 1")
    if saved and saved["fingerprint"] != vqgan.fingerprint():
        raise ValueError(f"{path}: trained on the codes of another VQGAN than {Path(cfg.out) / 'vqgan.pt'}")

    # The vocabulary and the model:
    torch.manual_seed(cfg.seed)
    if saved:
        tokenizer, vocab = data.load_tokenizer(saved["tokenizer"]), data.Vocab(**saved["vocab"])
    else:
        tokenizer, vocab = text_vocabulary(cfg, splits["train"], vqgan)
    model = build_model(cfg, vocab, vqgan)
    if saved:
        with sample.fitting(path):
            model.load_state_dict(saved["model"])       # before it is cut up
    wrapped = parallel(cfg, model, process)

    # The optimizers:
    matrices = []
    if cfg.optimizer == "muon":     # not for a table, of which a batch looks up a few rows
        matrices = [p for name, p in model.model.named_parameters() if p.ndim == 2 and name != "embed_tokens.weight"]
    optimizers = make_optimizers(matrices, model.parameters(), cfg.lr, cfg.lr_adam, cfg.weight_decay)

    # Where it was interrupted:
    start, stream, guard = 0, None, Guard(cfg, 3, path, log)
    if saved:
        restore(saved, path, {}, optimizers)
        start, stream, guard.skipped = saved["step"], saved["data"], saved["skipped"]
    del saved       # weights and optimizer states, which are in their places now
    log.rewind(3, start)
    process.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {vocab.image_start} rows for "
                  f"text, {vocab.image_size} for codes, {grid[0]}x{grid[1]} codes a picture")

    # The data:
    tasks, held_out = splits["train"].tasks(), splits["val"].tasks()
    run = sample.Run(model, vqgan, vocab, tokenizer, grid, cfg.pad, asdict(cfg))
    perturbed = partial(perturb, vqgan.quantize.codebook().detach().cpu(), cfg.code_noise) if cfg.code_noise else None
    loader = data.Loader(tasks, parse_mix(cfg.mix), vocab, tokenizer, cfg.rows, cfg.context, cfg.seed, process.rank,
                         process.world, stream, cfg.uncond, perturbed)

    def save(step, stream):
        weights, *states = [gathered_state(x.state_dict(), process) for x in (model, *optimizers)]
        if process.first:
            data.save_atomically(dict(
                format="nanoLiquid model 1", model=weights, optimizer=states, step=step, skipped=guard.skipped,
                config=asdict(cfg), model_config=asdict(model.config), vocab=asdict(vocab), tokenizer=tokenizer.state(),
                data=stream, random_state=torch.get_rng_state(), fingerprint=vqgan.fingerprint(), grid=grid), path)

    # The loop:
    batches, recent, overall = data.ahead(iter(loader)), Meter(model, process), Meter(model, process)
    bar = tqdm(range(start, cfg.steps), "3 transformer", initial=start, total=cfg.steps, disable=not process.first)
    for step in bar:
        # A batch, and how long this process waited for it:
        done, began = step + 1, time.perf_counter()
        batch, stream = next(batches)
        for meter in (recent, overall):
            meter.count(batch, time.perf_counter() - began)
        batch = batch.to(process.device)

        # Learn. Muon holds its rate for a while; AdamW falls from the start, as in the paper:
        set_rate(optimizers, schedule(step, cfg.steps, cfg.warmup, decay=0.7 if cfg.optimizer == "muon" else 1.0))
        sums, counts = learn(cfg, wrapped, batch, process)
        norm = full(nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)).item()
        asked = torch.full_like(sums, process.stop.asked)
        sums, counts, (asked, *_) = process.sum(torch.stack([sums, counts, asked])).tolist()    # of all, in one message
        losses = {f"the loss of {task}": total for task, total in zip(data.TASKS, sums)}
        sound = guard.passes(done, losses | {"the gradient": norm})
        step_all(optimizers, sound)

        # Log, evaluate, save, stop:
        if sound and done % cfg.log_every == 0:
            speed, recent = recent.read(), Meter(model, process)
            each = {task: s / c for task, s, c in zip(data.TASKS, sums, counts) if c}
            log.write(3, done, loss=sum(sums) / sum(counts), norm=norm, dropped=stream["dropped"], **each, **speed)
            bar.set_postfix_str(f"loss {sum(sums) / sum(counts):.3f}, {speed['tokens_per_s'] / 1000:.1f}k tokens/s")
        if done % cfg.eval_every == 0 or done == cfg.steps:
            paused = time.perf_counter()
            model.eval()
            with gathered_weights(model), process.autocast(cfg.shard and process.world > 1):    # gathered in bf16
                evaluate(cfg, run, held_out, done, process, log)
            model.train()
            for meter in (recent, overall):
                meter.since += time.perf_counter() - paused
        if done % cfg.save_every == 0 or done == cfg.steps or asked:
            save(done, stream)
        if asked:
            raise Stopped(process.stop.asked, f"stopped after step {done} of the transformer, which {path} holds")
    if start < cfg.steps:
        process.print("{tokens_per_s:.0f} tokens/s, MFU {mfu:.1%}, waiting for data {waiting:.2%} of the time, "
                      "padding {padding:.1%} of the positions".format(**overall.read()))
    if loader.dropped:
        process.print(f"{loader.dropped} examples were longer than --context {cfg.context} and left out")


# ---------------------------------------------------------------------------------------------------------------------
# The whole

def delete_run(out):
    """What this file writes into a run folder, and nothing that a user may have put there."""
    for pattern in ("config.json", "vqgan.pt", "model.pt", "log.jsonl", "*.partial", "codes/*.pt", "codes/*.partial",
                    "samples/reconstructions.png", "samples/drawn-*.png"):
        for file in out.glob(pattern):
            file.unlink()


def train(cfg: Config, stop=None):
    """All three acts, then the scores -> the scores, or None on all processes but the first."""
    started, process, out = time.time(), set_up(cfg), Path(cfg.out)
    process.stop = stop or process.stop
    splits = data.load_source(cfg.data, cfg.text, cfg.image_size or 64, cfg.withheld, cfg.passage)
    ready = VQGAN.load(cfg.vqgan, process.device) if cfg.vqgan else None
    cfg = resolve(cfg, splits, ready)
    check(cfg, splits, process.world)
    process.wait()                  # all have looked for a run that is there already; from here on, there is one
    if process.first:
        if cfg.overwrite and not cfg.resume:
            delete_run(out)
        (out / "samples").mkdir(parents=True, exist_ok=True)
        data.write_atomically(out / "config.json", lambda file: file.write(json.dumps(asdict(cfg), indent=1).encode()))
        if ready:
            data.save_atomically(dict(config=asdict(ready.config), model=ready.state_dict()), out / "vqgan.pt")
    log = Log(out / "log.jsonl", process)
    process.wait()

    with process.stop.at_the_end_of_a_step():       # encoding may stop anywhere: a shard is whole or not there
        vqgan = ready or train_tokenizer(cfg, splits, process, log)
    save_reconstructions(cfg, vqgan, splits, process)
    acted = time.time()
    encoded = encode_pictures(cfg, vqgan, splits, process, log)
    process.print(f"the tokenizer took {acted - started:.0f} s, the codes {time.time() - acted:.0f} s")
    with process.stop.at_the_end_of_a_step():
        train_transformer(cfg, encoded, vqgan, process, log)

    scores = None
    if process.first and cfg.eval_n:
        run = sample.load(out, device=cfg.device)
        process.print(f"all acts took {time.time() - started:.0f} s; scores on held-out examples:")
        scores = sample.evaluate(run, splits, cfg.eval_n)
        log.rewind(4, -1)
        log.write(4, 0, scores=scores, seconds=time.time() - started)
        sample.print_scores(scores)
    process.wait()
    return scores


FREE = ("out", "shards", "resume", "overwrite", "device", "workers", "compile", "checkpointing", "shard", "save_every",
        "eval_every", "log_every", "eval_n", "skip_nonfinite", "mix", "accumulate")     # flags that --resume may change


def stored_config(path, given) -> Config:
    try:
        stored = json.loads(data.read_utf8(path))
        cfg = Config(**{**stored, "ch_mult": tuple(stored["ch_mult"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the configuration of a run ({error})") from None
    clash = [f"--{k}" for k, v in given.items() if k not in FREE and getattr(cfg, k) != v]
    if clash:
        raise ValueError(f"--resume: {', '.join(clash)} differ from the run in {path.parent} (see its config.json)")
    return dataclasses.replace(cfg, **{**given, "overwrite": False})


def configure(argv=None) -> Config:
    """Flags -> Config; with --resume, the run's own configuration, which flags may repeat but not change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):    # torchrun --max-restarts: the same command goes on
        given = {**given, "resume": True, "overwrite": False}
    out = Path(given.get("out", Config.out))
    there = [name for name in ("config.json", "vqgan.pt", "model.pt") if (out / name).exists()]
    if given.get("resume") and given.get("overwrite"):
        raise ValueError("--resume goes on with the run that --overwrite deletes: choose one")
    if there and not given.get("resume") and not given.get("overwrite"):
        raise ValueError(f"--out {out}: there is a run already; go on with --resume, or delete it with --overwrite")
    if given.get("resume") and (out / "config.json").exists():
        return stored_config(out / "config.json", given)
    return Config(**{**PRESETS[given.get("preset", "laptop")], **(FINETUNE if given.get("init") else {}), **given})


def main(argv=None):
    """The command line: every expected end is one sentence that says what is safe, and an exit code that is not 0."""
    out, rank = None, int(os.environ.get("RANK", 0))
    try:
        with Stop() as stop:
            cfg = configure(argv)
            out = Path(cfg.out)
            train(cfg, stop)
    except Stopped as stopped:
        if rank == 0:
            print(f"train.py: {stopped}; go on with --resume", file=sys.stderr)
        sys.exit(128 + stopped.number)      # as shells report a signal
    except OSError as error:
        time.sleep(2 * (rank > 0))          # the first speaks for all who fail alike, until torchrun ends the others
        begun = out and (out / "config.json").is_file()
        safe = f"what {out} holds is whole: go on with --resume" if begun else "nothing was written"
        sys.exit(f"train.py: {error}; {safe}")
    except ValueError as error:
        time.sleep(2 * (rank > 0))
        sys.exit(f"train.py: {error}")
    except RuntimeError:
        time.sleep(2 * dist.is_initialized())       # a lost peer? torchrun names the one that died and ends this one
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_flush_denormal(True)      # softmax's denormal tails take CPUs 100 times longer; before threads start
    main()
