"""Train in three acts: a tokenizer of pictures, the codes of all pictures, one transformer for both.

    python train.py                                         # laptop: built-in scenes, all acts, runs/demo
    python train.py --data FOLDER --text FILE --out RUN     # your pictures (name.png + name.txt), your text
    python train.py --init google/gemma-3-270m --vqgan vqgan.ckpt --data FOLDER --out RUN   # real weights
    python train.py --preset gpu --data FOLDER --out RUN    # one GPU: 256x256 pixels, 256 codes
    torchrun --nproc_per_node 4 train.py --out RUN          # 4 processes: NCCL on GPUs, gloo on CPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --shard
                                                            # on each of 2 nodes that share --out; FSDP2

A run folder holds config.json, vqgan.pt, codes/, model.pt, log.jsonl and samples/; --resume goes on with it.
"""

import argparse
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections import ChainMap, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import sample
from model import ModelConfig, Transformer, read_config
from vqgan import (VQGAN, Discriminator, ResnetBlock, VQGANConfig, adaptive_weight, discriminator_loss,
                   generator_loss, nearest, read_checkpoint, sample_far)


@dataclass
class Config:
    """Each field is a flag, its comment the help; `resolve` replaces None by what suits the data."""
    out: str = "runs/demo"              # folder of the run
    withheld: int = data.WITHHELD       # pairs of color and shape kept from training
    data: str | None = None             # pictures: folder, .jsonl or .tar; none: scenes
    text: str | None = None             # texts: .txt or .jsonl; none: English, with scenes
    preset: str = "laptop"              # see PRESETS
    seed: int = 0                       # of weights, batches and noise
    device: str = "auto"                # cuda, mps or cpu; auto: the first there is
    resume: bool = False                # go on with the run in --out
    overwrite: bool = False             # delete the run in --out first
    eval_n: int = 200                   # held-out pictures to score at the end
    save_every: int = 500               # steps between checkpoints
    eval_every: int = 500               # steps between held-out losses and samples/
    log_every: int = 20                 # steps between lines of log.jsonl
    compile: bool = False               # torch.compile each block
    checkpointing: bool = False         # recompute activations in backward
    shard: bool = False                 # FSDP2
    accumulate: int = 1                 # parts of a batch, one after the other
    # act 1, the tokenizer
    vqgan: str | None = None            # a trained tokenizer; none: train one
    shards: str | None = None           # folder of codes; none: OUT/codes
    image_size: int | None = None       # pixels of a side
    pad: bool = False                   # pad pictures to a square; else: crop
    vq_steps: int | None = None         # steps of the tokenizer
    vq_batch: int = 32                  # pictures of a step, over all processes
    ch: int = 64                        # channels of the first level
    ch_mult: tuple[int, ...] | None = None  # channels of each level / ch
    res_blocks: int | None = None       # residual blocks of a level
    patch: int | None = None            # pixels of a side that enter as one
    z_channels: int = 64                # channels of the latents
    codes: int | None = None            # K, size of the codebook
    code_dim: int = 8                   # e, dimensions of a code vector
    l2_norm: bool = True                # compare code vectors as directions
    perceptual: bool = False            # add LPIPS (extra [perceptual])
    adversarial: float = 0.0            # weight of the discriminator's loss
    # act 3, the transformer
    init: str | None = None             # Hugging Face folder or hub name of Gemma, Qwen or Llama
    train: str = "all"                  # all, or with --init, rows: of codes and marks
    steps: int | None = None            # steps of the transformer
    mix: str = "t2i=6,i2t=2,vqa=9,edit=5,text=1"   # shares of the tasks
    rows: int = 8                       # of a batch, over all processes
    context: int | None = None          # positions of a row
    optimizer: str = "muon"             # muon (with AdamW for tables) or adamw
    lr: float = 0.006                   # of Muon
    lr_adam: float = 3e-3               # of AdamW
    lr_rows: float | None = None        # of AdamW for image rows; none: lr_adam
    z_loss: float = 0.0                 # weight of logsumexp squared
    code_noise: float | None = None     # on codes, in deviations of the codebook
    words: int | None = None            # size of the learned word vocabulary
    image_rows: str = "codebook"        # free, or made from the codebook
    hidden_size: int = 128              # D; with --init all sizes are the folder's
    layers: int = 4                     # blocks
    heads: int = 8                      # of attention in each block

    def __post_init__(self):
        for name in ("data", "text", "vqgan", "init"):      # --resume and eval may run elsewhere
            if os.path.exists(getattr(self, name) or ""):
                setattr(self, name, os.path.abspath(getattr(self, name)))


PRESETS = {
    "laptop": {},
    "gpu": dict(image_size=256, patch=2, ch=128, ch_mult=(1, 1, 2, 4), res_blocks=2, z_channels=256,
                codes=4096, vq_steps=40_000, adversarial=0.5, steps=50_000, rows=64, hidden_size=768,
                layers=12, heads=12, words=16_384, compile=True),
    "paper": dict(image_size=512, patch=1, ch=128, ch_mult=(1, 1, 2, 2, 4), res_blocks=2, z_channels=256,
                  codes=8192, code_dim=256, l2_norm=False, vq_steps=200_000, adversarial=0.5,
                  steps=100_000, rows=512, words=32_768, hidden_size=1024, layers=24, heads=16,
                  image_rows="free", code_noise=0.0, compile=True, checkpointing=True, accumulate=8),
}
# The paper's fine-tuning: with --init these replace the preset's values.
FINETUNE = dict(optimizer="adamw", lr_adam=2e-5, lr_rows=5e-3, rows=16, image_rows="free", code_noise=0.0)


def train(cfg: Config, stop=None):
    """All three acts -> the scores, on rank 0."""
    started, out = time.time(), Path(cfg.out)
    process = start_process(cfg.device, stop or Stop())
    require(cfg.withheld < len(data.PAIRS), f"--withheld {cfg.withheld}: there are {len(data.PAIRS)} pairs")
    splits = data.load_source(cfg.data, cfg.text, cfg.image_size or 64, cfg.withheld, cfg.init, process.print)
    ready = VQGAN.load(cfg.vqgan, process.device) if cfg.vqgan else None
    cfg, vq_config = resolve(cfg, splits, ready and ready.config)
    check(cfg, vq_config, splits, process.world)
    log = start_run(cfg, ready, process)

    with process.stop.at_step_ends():
        vqgan = ready or train_tokenizer(cfg, vq_config, splits, process, log)
    if process.is_main:
        save_reconstructions(cfg, vqgan, splits["val"])
    encoded = encode_pictures(cfg, vqgan, splits, process, log)
    with process.stop.at_step_ends():
        train_transformer(cfg, encoded, vqgan, process, log)

    scores = None
    if process.is_main and cfg.eval_n:
        process.print(f"all acts took {time.time() - started:.0f} s; scores on held-out examples:")
        scores = sample.score(sample.load(out, device=cfg.device), splits, cfg.eval_n)
        log.rewind(4, -1)
        log.write(4, 0, scores=scores, seconds=time.time() - started)
        sample.print_scores(scores)
    process.wait()
    return scores


# ---- Act 1: the tokenizer ---------------------------------------------------------------------------------

VQ_LR, VQ_LR_ADAM = 0.03, 2e-3      # Muon for kernels, AdamW for the rest
CONTINUOUS = 0.04                   # share of the steps without a codebook
RESTART_EVERY = 50                  # steps after which unused codes restart elsewhere
RESTART_UNTIL = 0.75                # share of the steps in which they do


def train_tokenizer(cfg, vq_config, splits, process, log):
    """Act 1 -> the tokenizer: at first without a codebook, in the second half with --adversarial's judge."""
    path, pictures = Path(cfg.out) / "vqgan.pt", [p for p in splits["train"].pictures if p.open]

    # Networks and optimizers:
    torch.manual_seed(cfg.seed)
    layout = torch.channels_last if process.device.type == "cuda" else torch.preserve_format
    model, discriminator = VQGAN(vq_config).to(process.device, memory_format=layout), None
    kernels = [p for p in model.parameters() if p.ndim == 4]
    networks = {"model": (model, make_optimizers(kernels, model.named_parameters(), VQ_LR, VQ_LR_ADAM))}
    if cfg.adversarial:     # with taming's betas, at a constant rate
        discriminator = Discriminator().to(process.device)
        adam = torch.optim.AdamW(discriminator.parameters(), 2e-4, (0.5, 0.9), weight_decay=0.0)
        networks["discriminator"] = discriminator, [adam]
    perceptual = load_lpips().to(process.device) if cfg.perceptual else None
    optimizers = [optimizer for _, each in networks.values() for optimizer in each]
    counts, start = torch.zeros(cfg.codes, dtype=torch.long, device=process.device), 0

    if saved := read_saved(cfg, path, "nanoLiquid tokenizer 2"):
        start = restore(saved, path, networks)
        counts = saved["counts"].to(process.device)
    log.rewind(1, start)
    prepare([x for x in model.modules() if isinstance(x, ResnetBlock)], cfg.compile, cfg.checkpointing)

    # The loop; seed and step choose the pictures:
    def chosen(step):
        order = torch.randint(len(pictures), (cfg.vq_batch,), generator=seeded(cfg.seed, step))
        return order[process.rank::process.world].tolist()
    quantize_from = int(CONTINUOUS * cfg.vq_steps)
    batches = data.read_pixels(pictures, map(chosen, range(start, cfg.vq_steps)), cfg.image_size, cfg.pad)
    bar = process.bar(range(start, cfg.vq_steps), "1 tokenizer", start, cfg.vq_steps)
    for step, (pixels, errors) in zip(bar, batches):
        require(pixels is not None, f"no picture of a batch could be read: {[*errors.values()]}")
        done, pixels = step + 1, to_float(pixels, process.device)

        # Learn:
        if step == quantize_from:
            restart_codes(model, pixels, counts == 0, seeded(cfg.seed, step), process)      # all of them
        quantize = step >= quantize_from
        adversary = discriminator if step >= cfg.vq_steps / 2 else None
        out, loss = tokenizer_step(model, pixels, quantize, perceptual, adversary, cfg.adversarial, process)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        total = process.sum(loss).item() / process.world
        require_finite(1, done, path, {"the loss of the tokenizer": total, "the gradient": norm})
        step_all(optimizers, schedule(step, cfg.vq_steps, decay=0.6))

        # Restart unused codes:
        if quantize:
            counts += process.sum(out.codes.flatten().bincount(minlength=cfg.codes))
            if done % RESTART_EVERY == 0:
                report_usage(counts, process, log, step, last=done + RESTART_EVERY > cfg.vq_steps)
                if step < RESTART_UNTIL * cfg.vq_steps:
                    restart_codes(model, pixels, counts == 0, seeded(cfg.seed, step), process)
                counts.zero_()

        # Log, save, draw, stop:
        if done % cfg.log_every == 0:
            error = process.sum(nn.functional.mse_loss(out.pixels.detach(), pixels)).item() / process.world
            psnr = -10 * math.log10(error / 4 + 1e-10)      # of pixels in [0, 1]; ours are in [-1, 1]
            log.write(1, done, loss=total, psnr=psnr)
            bar.set_postfix_str(f"loss {total:.3f} psnr {psnr:.1f} dB")
        asked = process.asked_to_stop()
        if done % cfg.save_every == 0 or done == cfg.vq_steps or asked:
            save_checkpoint(path, process, networks, format="nanoLiquid tokenizer 2", step=done,
                            config=asdict(vq_config), train_config=asdict(cfg), counts=counts)
        if quantize and done % cfg.eval_every == 0 and process.is_main:
            save_reconstructions(cfg, model, splits["val"])
        if asked:
            raise Stopped(asked, f"stopped after step {done} of the tokenizer, which {path} holds")
    return model.eval()


def tokenizer_step(model, pixels, quantize, perceptual, adversary, adversarial, process):
    """Gradients of all losses, summed here: DDP forbids adaptive_weight's autograd.grad -> output, loss."""
    with process.autocast():
        out = model(pixels, quantize)
    error = out.pixels - pixels
    reconstruction = error.abs().mean() + error.square().mean()
    if perceptual:
        reconstruction = reconstruction + perceptual(out.pixels, pixels).mean()
    loss = reconstruction + out.loss
    if not quantize:        # a gradient of zeros: the optimizer then has a state to save
        loss = loss + 0 * model.quantize.embedding.weight.sum()
    if adversary:
        g_loss = generator_loss(adversary, out.pixels)
        weight = adaptive_weight(reconstruction, g_loss, model.decoder.conv_out.weight)
        loss = loss + adversarial * weight * g_loss
    (loss / process.world).backward()
    if adversary:
        adversary.zero_grad(set_to_none=True)       # what the generator's loss left there
        (discriminator_loss(adversary, pixels, out.pixels) / process.world).backward()
    if process.world > 1:
        gradients = [p.grad for network in (model, adversary) if network for p in network.parameters()]
        whole = process.sum(torch.cat([g.flatten() for g in gradients]))    # one message
        nn.utils.vector_to_parameters(whole, gradients)
    return out, loss.detach()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def restart_codes(model, pixels, dead, generator, process):
    """Move unused codes to vectors of rank 0's batch that are far from codes."""
    dead = dead.nonzero().flatten()
    if len(dead):
        vectors = model.quantize.vectors(model.latents(pixels))
        far = sample_far(vectors, model.quantize.codebook(), len(dead), generator)
        # Summed on each rank, rounding would differ and the codebooks drift apart.
        model.quantize.replace(dead, process.broadcast(far))


def report_usage(counts, process, log, step, last):
    """Log the number of codes in use, and their perplexity: the exponential of their entropy."""
    p, used = counts.cpu().double() / counts.sum().item(), int((counts > 0).sum())      # MPS has no float64
    log.write(1, step + 1, codes_used=used, perplexity=float(torch.special.entr(p).sum().exp()))
    if last and used < len(counts) / 10:
        process.print(f"warning: the codebook has collapsed to {used} of {len(counts)} codes")


def load_lpips():
    """LPIPS (arXiv 1801.03924): distance of pictures in the features of VGG16."""
    try:
        import lpips
    except ImportError:
        raise ValueError('--perceptual: pip install -e ".[perceptual]"') from None
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)


@torch.compiler.set_stance("force_eager")
def save_reconstructions(cfg, vqgan, split):
    """Eight held-out pictures above what remains of them."""
    images = [data.crop_square(x, cfg.image_size, cfg.pad) for x in data.first_images(split.pictures, 8)]
    if images:
        pixels = torch.cat([data.to_pixels(image) for image in images])
        decoded = vqgan.decode(vqgan.encode(pixels.to(vqgan.quantize.embedding.weight.device)))
        sheet = data.contact_sheet(images + [data.to_image(x) for x in decoded], len(images))
        sheet.save(Path(cfg.out) / "samples" / "reconstructions.png")


# ---- Act 2: the codes -------------------------------------------------------------------------------------

SHARD = 4096    # pictures of a file


def encode_pictures(cfg, vqgan, splits, process, log) -> dict[str, data.Split]:
    """Act 2: splits of pictures -> splits of codes, which stay on the disk; good shards are kept."""
    folder, how = Path(cfg.shards or Path(cfg.out) / "codes"), (vqgan.fingerprint(), cfg.image_size, cfg.pad)
    encoded, skipped = {}, []
    for name, split in splits.items():
        parts = []
        for _, group in itertools.groupby(split.pictures, lambda picture: picture.key):
            group = list(group)             # the pictures of a dialogue share a shard
            if not parts or len(parts[-1]) + len(group) > SHARD:
                parts.append([])
            parts[-1] += group
        jobs = [(folder / f"{name}-{i:05d}.pt", fingerprint(how, part)) for i, part in enumerate(parts)]
        for i in process.bar(range(process.rank, len(parts), process.world), f"2 codes of {name}"):
            found = data.read_shard(*jobs[i])
            if not found or found["skipped"]:           # skipped pictures are tried again
                encode_shard(cfg, vqgan, parts[i], *jobs[i], process.device)
        process.wait()
        shards = [data.read_shard(*job) for job in jobs]
        require(None not in shards, f"{folder}: a new shard cannot be read; do all processes share --out?")
        encoded[name] = data.Split(data.Encoded(shards), split.texts)
        skipped += [why for shard in shards for why in shard["skipped"].values()]
    log.rewind(2, -1)
    if skipped:
        log.write(2, 0, skipped=skipped)
        process.print(f"{len(skipped)} pictures could not be read (see log.jsonl): {'; '.join(skipped[:3])}")
    require(len(encoded["train"].pictures), f"{cfg.data}: no picture could be read: {skipped[:1]}")
    return encoded


def fingerprint(how, pictures):
    """Of the VQGAN (`how`), the pictures' files or codes, and their words."""
    said = []
    for p in pictures:
        path = re.sub(r"(\.tar|\.tgz|\.tar\.\w+):.*", r"\1", p.name)
        file = os.stat(path) if os.path.isfile(path) else None
        codes = p.codes is not None and p.codes.tolist()
        seen = file and (file.st_size, file.st_mtime_ns), codes
        said.append((p.name, p.captions, p.dialogues, p.edits, *seen))
    return f"{data.digest(json.dumps([how, said], default=lambda picture: picture.name)):x}"


@torch.compiler.set_stance("force_eager")
def encode_shard(cfg, vqgan, pictures, path, shard_print, device):
    side = cfg.image_size // vqgan.config.f
    done, skipped = [p for p in pictures if p.codes is not None], {}
    for p in done:
        require(p.codes.shape == (side, side) and p.codes.max() < vqgan.config.n_embed,
                f"{p.name}: codes {tuple(p.codes.shape)} up to {p.codes.max()} are not of this VQGAN")
    todo = [p for p in pictures if p.codes is None]
    parts = [range(len(todo))[i:i + cfg.vq_batch] for i in range(0, len(todo), cfg.vq_batch)]
    for part, (pixels, errors) in zip(parts, data.read_pixels(todo, parts, cfg.image_size, cfg.pad)):
        codes = iter(() if pixels is None else vqgan.encode(to_float(pixels, device)).cpu())
        done += [replace(todo[i], codes=next(codes)) for i in part if i not in errors]
        skipped |= {todo[i].name: error for i, error in errors.items()}
    data.write_shard(path, done, shard_print, skipped)


# ---- Act 3: the transformer -------------------------------------------------------------------------------

def train_transformer(cfg, splits, vqgan, process, log):
    """Act 3 -> RUN/model.pt: one next-token loss for all tasks."""
    path, grid = Path(cfg.out) / "model.pt", tuple(splits["train"].pictures[0].codes.shape)
    saved, start, states = read_saved(cfg, path, sample.FORMAT), 0, None

    # The vocabulary, the model and its optimizers:
    torch.manual_seed(cfg.seed)
    if saved:
        require(saved["fingerprint"] == vqgan.fingerprint(), f"{path}: trained on codes of another VQGAN")
        tokenizer, vocab = data.load_tokenizer(saved["tokenizer"]), data.Vocab(**saved["vocab"])
    else:
        tokenizer, vocab = text_vocabulary(cfg, splits["train"], vqgan.config.n_embed)
    codebook = vqgan.quantize.codebook().detach()
    model = build_model(cfg, vocab, codebook, "cpu" if process.is_main else "meta")     # one reads --init
    wrapped = parallel(model, process, cfg.compile, cfg.checkpointing, cfg.shard)
    matrices = []
    if cfg.optimizer == "muon":     # not for tables, of which a batch looks up a few rows
        matrices = [p for name, p in model.model.named_parameters()
                    if p.ndim == 2 and not name.endswith(("embed_tokens.weight", "image_rows.weight"))]
    optimizers = make_optimizers(matrices, model.named_parameters(), cfg.lr, cfg.lr_adam, cfg.lr_rows)

    if saved:
        start, states = restore(saved, path, {"model": (model, optimizers)}), saved["data"]
        del saved       # as large as the model and its optimizers
    log.rewind(3, start)
    process.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")

    # The data:
    tasks, held_out = data.tasks_of(splits["train"]), data.tasks_of(splits["val"])
    run = sample.Run(model, vqgan, vocab, tokenizer, grid, asdict(cfg))
    noise = partial(perturb, codebook.cpu(), cfg.code_noise) if cfg.code_noise else None
    loader = data.Loader(tasks, parse_mix(cfg.mix), vocab, tokenizer, cfg.rows, cfg.context, cfg.seed,
                         process.rank, process.world, states, perturb=noise)
    for task in loader.mix:
        first = range(min(200, len(tasks[task])))
        if long := sum(len(loader.render(task, 0, i)[0]) > cfg.context for i in first):
            process.print(f"{task}: {long} of {len(first)} examples are longer than --context {cfg.context}")

    # The loop:
    bar, since = process.bar(range(start, cfg.steps), "3 transformer", start, cfg.steps), time.perf_counter()
    for step, (batch, states) in zip(bar, data.ahead(lambda _: loader.next(), range(start, cfg.steps))):
        # Learn, and wait for the GPU once; AdamW's rate falls from the start, as in the paper:
        done, totals = step + 1, forward_backward(wrapped, batch, cfg.accumulate, cfg.z_loss, process)
        norm = unshard(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        (sums, counts), norm = totals.tolist(), norm.item()
        losses = {task: s / c for task, s, c in zip(data.TASKS, sums, counts) if c}
        require_finite(3, done, path, losses | {"the gradient": norm})
        step_all(optimizers, schedule(step, cfg.steps, decay=0.7 if cfg.optimizer == "muon" else 1.0))

        # Log, evaluate, save, stop:
        if done % cfg.log_every == 0:
            loss, seconds = sum(sums) / sum(counts), (time.perf_counter() - since) / cfg.log_every
            speed, since = cfg.rows * cfg.context / seconds, time.perf_counter()    # with padding
            dropped = sum(row["dropped"] for row in states.values())    # the loader itself has read ahead
            log.write(3, done, loss=loss, norm=norm, dropped=dropped, tokens_per_s=speed, **losses)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed / 1000:.1f}k tokens/s")
        if done % cfg.eval_every == 0 or done == cfg.steps:
            paused = time.perf_counter()
            validate_and_draw(cfg, run, held_out, done, process, log)
            since += time.perf_counter() - paused
        asked = process.asked_to_stop()
        if done % cfg.save_every == 0 or done == cfg.steps or asked:
            states = dict(ChainMap(*process.gather(states)))        # of all loaders
            save_checkpoint(path, process, {"model": (model, optimizers)}, format=sample.FORMAT, step=done,
                            config=asdict(cfg), model_config=asdict(model.config), vocab=asdict(vocab),
                            tokenizer=tokenizer.state(), data=states, grid=grid,
                            fingerprint=vqgan.fingerprint())
        if asked:
            raise Stopped(asked, f"stopped after step {done} of the transformer, which {path} holds")
    if loader.dropped:
        process.print(f"{loader.dropped} times an example was left out: --context {cfg.context} is too short")


def text_vocabulary(cfg, train, codes):
    """-> text tokenizer, vocabulary: of --init, or learned from the training split."""
    if cfg.init:
        return sample.read_vocabulary(data.fetch(cfg.init), codes)
    chat, said = data.WordTokenizer.chat, list(train.texts)
    for p in train.pictures:
        said += p.captions
        for dialogue in p.dialogues + p.edits:
            replies = [chat.lead + part for part in data.parts_of(dialogue, [1]) if isinstance(part, str)]
            said += replies + [part for part in data.parts_of(dialogue, [0]) if isinstance(part, str)]
    said += [data.DRAW, data.CAPTION, *chat] * 3        # rarer words are not learned
    tokenizer = data.WordTokenizer.learn(said, cfg.words)
    return tokenizer, tokenizer.vocab(codes)


def build_model(cfg, vocab, codebook, device="cpu") -> Transformer:
    if cfg.init:
        folder = data.fetch(cfg.init)
        there = read_config(folder).vocab_size - vocab.image_start      # image rows of an export, or Liquid's
        model = Transformer.from_pretrained(folder, device=device, image_rows=there)
        if not there:
            model.extend_vocab(vocab.new_rows, seeded(cfg.seed, 0))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(cfg.train == "all" or "image_rows" in name)
        return model
    shape = tuple(codebook.shape) if cfg.image_rows == "codebook" else None
    model = Transformer(ModelConfig(
        vocab_size=vocab.image_start, image_rows=vocab.new_rows, codebook=shape, hidden_size=cfg.hidden_size,
        intermediate_size=3 * cfg.hidden_size, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads, head_dim=cfg.hidden_size // cfg.heads,
        max_position_embeddings=cfg.context))
    if shape:
        model.model.embed_tokens.image_rows.start(codebook)
    return model


def perturb(codebook, noise, codes, generator):
    """Codes (h, w) -> the codes nearest to their vectors plus noise: similar codes are learned together.

    noise: in standard deviations. RQ-Transformer (arXiv 2203.01941) samples its training codes, too.
    """
    vectors = codebook[codes.flatten()]                             # (h * w, e)
    vectors = vectors + noise * codebook.std(0) * torch.randn(vectors.shape, generator=generator)
    return nearest(vectors, codebook).view(codes.shape)


def forward_backward(model, batch, parts, z_loss, process):
    """Gradients of a batch, in parts -> (2, tasks): summed losses and numbers of targets, over all ranks."""
    counts = batch.tasks[batch.targets != data.IGNORE].bincount(minlength=len(data.TASKS))
    totals = data.to_device(torch.stack([0 * counts, counts]).float(), process.device)
    # In a mean of means, a caption's 20 targets would weigh as much as a drawing's 1024.
    number = process.sum(totals[1].sum())
    for part in range(parts):
        some = [x.chunk(parts)[part] for x in batch]
        some.append((some[1] != data.IGNORE).flatten().nonzero()[:, 0])     # a GPU would wait
        ids, targets, positions, documents, tasks, where = (data.to_device(x, process.device) for x in some)
        model.require_backward_grad_sync = part == parts - 1        # as DDP's no_sync does
        with process.autocast():
            nll = model(ids, targets, positions, documents, z_loss=z_loss, where=where)
        (nll.sum() * process.world / number).backward()             # averaged over the processes: a sum
        totals[0].index_add_(0, tasks.flatten()[where], nll.detach().flatten()[where])
    return process.sum(totals)


@torch.compiler.set_stance("force_eager")
def validate_and_draw(cfg, run, held_out, step, process, log):
    """Held-out losses to the log, drawings to RUN/samples."""
    run.model.eval()
    losses, common = {}, (run.vocab, run.tokenizer)
    with unsharded(run.model), process.autocast():
        for task, items in held_out.items():
            if len(items):
                loader = data.Loader({task: items}, {task: 1}, *common, 1, cfg.context, uncond=0.0)
                mine = range(process.rank, min(96, len(items)), process.world)      # the same every time
                examples = [e for i in mine if len((e := loader.render(task, 0, i))[0]) <= cfg.context]
                sums = torch.stack(sample.losses(run.model, examples)).sum(1).to(process.device)
                total, number = process.sum(sums).tolist()
                losses |= {task: total / number} if number else {}
        pictures, room = held_out["t2i"], cfg.context - math.prod(run.grid) - 2         # <eoi>, eos
        captions = [pictures[i].captions[0] for i in range(min(16, len(pictures)))]
        captions = [c for c in captions if len(data.render_t2i(*common, c)[0]) <= room]
        mine = range(process.rank, len(captions), process.world)
        drawn = sum(process.gather(sample.text_to_image(run, [captions[i] for i in mine], numbers=mine)), [])
        if process.is_main and drawn:
            data.contact_sheet(drawn, 8).save(Path(cfg.out) / "samples" / f"drawn-{step:06d}.png")
    run.model.train()
    log.write(3, step, **{f"val_{task}": loss for task, loss in losses.items()})
    process.print(f"step {step}: held-out loss", *(f"{task} {loss:.3f}" for task, loss in losses.items()))


# ---- Optimizers and their schedule ------------------------------------------------------------------------

def schedule(step, steps, decay=1.0, warmup=0.03):
    """Factor of the rate: up over the share `warmup`, then 1, then a cosine to 0 over the share `decay`."""
    rise = min(1.0, (step + 1) / max(1, warmup * steps))
    past = max(0.0, (step / steps - (1 - decay)) / decay)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, past)))


def orthogonalize(g, steps=5):
    """The nearest semi-orthogonal matrices to g (n, r, c), roughly: Newton-Schulz (Jordan et al. 2024).

    A step multiplies x by a polynomial of x x^T, so that small matrix takes all steps (Gram Newton-Schulz,
    Zhang et al. 2026): singular values from 0.006 to 1 end between 0.68 and 1.14.
    """
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    one = product = torch.eye(x.shape[1], device=x.device)
    gram = x @ x.mT
    for _ in range(steps):
        factor = 3.4445 * one + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        gram, product = factor @ gram @ factor, factor @ product
    x = product @ x
    return x.mT if tall else x


def orthogonalize_all(g):
    """orthogonalize, a share on each process."""
    if not dist.is_initialized():
        return orthogonalize(g)
    whole = nn.functional.pad(g, (0, 0, 0, 0, 0, -len(g) % dist.get_world_size()))
    share = orthogonalize(whole.chunk(dist.get_world_size())[dist.get_rank()])
    dist.all_gather_into_tensor(whole, share.contiguous())
    return whole[:len(g)]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for matrices and kernels; torch.optim.Muon takes no kernels, in bf16."""
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            updates = defaultdict(dict)         # {shape: {parameter: update}}, to stack equal shapes
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(momentum, group["momentum"])           # Nesterov
                    update = unshard(update).flatten(1)                         # kernels as matrices
                    updates[update.shape][p] = update
            for (rows, columns), alike in updates.items():
                for p, update in zip(alike, orthogonalize_all(torch.stack(list(alike.values())))):
                    size = max(1, rows / columns) ** 0.5        # a tall matrix has more outputs to move
                    update = update.reshape(p.shape)
                    if isinstance(p, DTensor):                  # to its shards again
                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                    p.add_(update, alpha=-group["lr"] * size)


def make_optimizers(matrices, named_parameters, lr, lr_adam, lr_rows=None):
    """Muon for `matrices`, AdamW for all else, image rows at lr_rows; groups keep their peak rates."""
    chosen, groups = set(matrices), defaultdict(list)
    for name, p in named_parameters:
        if p.requires_grad and p not in chosen:
            groups[lr_rows or lr_adam if "image_rows" in name else lr_adam].append(p)
    groups = [dict(params=params, lr=rate) for rate, params in groups.items()]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.insert(0, Muon(matrices, lr))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def step_all(optimizers, factor):
    """A step at `factor` of the peak rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor if "peak" in group else group["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---- Several devices: what wraps the model, which knows nothing of it -------------------------------------

def prepare(blocks, compile, checkpointing):
    """Compile blocks, recompute activations."""
    def again(self, *args):
        return checkpoint(type(self).forward, self, *args, use_reentrant=False)
    for block in blocks:
        if checkpointing:
            block.forward = again.__get__(block)            # one program for all
        if compile:
            block.forward = torch.compile(block.forward)


def parallel(model, process, compile=False, checkpointing=False, shard=False):
    """-> the model to call: checkpointed, compiled, then DDP or FSDP2, which average gradients."""
    layers = list(model.model.layers)
    prepare(layers, compile, checkpointing)
    if process.world == 1:
        return model.to(process.device)
    if not shard:                           # which gives rank 0's weights to the others
        (model.to_empty if model.device.type == "meta" else model.to)(device=process.device)
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    mesh = init_device_mesh(process.device.type, (process.world,))
    dtype = torch.bfloat16 if process.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)      # float32 angles
    full, options = model.state_dict(), replace(WHOLE, cpu_offload=False, broadcast_from_rank0=True)
    model.to("meta")
    for part in (*layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=process.device)
    dcp.set_model_state_dict(model, full if process.is_main else {}, options=options)
    # The default, the order of the last forwards, differs between ranks that drew: they would hang.
    for before, part in zip([model, *layers], [*layers, model]):
        part.set_modules_to_backward_prefetch([before])
    return model


@contextmanager
def unsharded(model):
    """Within it every rank holds all weights and may run on its own."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def unshard(x):
    """The whole of a sharded tensor; a collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- Checkpoints and the log ------------------------------------------------------------------------------

WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(path, process, networks, **values):
    """{name: (network, its optimizers)} and values -> a file; a collective."""
    for name, (network, optimizers) in networks.items():
        values[name], values[f"{name}_optimizer"] = dcp.get_state_dict(network, optimizers, options=WHOLE)
    if process.is_main:
        data.save_atomically(values, path)


def read_saved(cfg, path, kind) -> dict | None:
    """The checkpoint that --resume goes on with, or None."""
    if not (cfg.resume and path.exists()):
        return None
    saved = read_checkpoint(path, mmap=cfg.shard)       # the processes of a node share its pages
    require(saved.get("format") == kind, f"{path}: not a checkpoint of this version of train.py")
    return saved


def restore(saved, path, networks) -> int:
    """The inverse of save_checkpoint -> steps done."""
    with sample.naming_file(path):
        for name, (network, optimizers) in networks.items():
            dcp.set_state_dict(network, optimizers, model_state_dict=saved[name],
                               optim_state_dict=saved[f"{name}_optimizer"], options=WHOLE)
        return saved["step"]


@dataclass
class Log:
    """One JSON object a line."""
    path: Path
    process: "Process"

    def rewind(self, act, step):
        """Drop broken lines, and those of an act from after a step."""
        lines = []
        if self.process.is_main and self.path.exists():
            for text in self.path.read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(text))
            kept = [json.dumps(x) + "\n" for x in lines if x["act"] != act or x["step"] <= step]
            data.write_atomically(self.path, lambda file: file.write("".join(kept).encode()))

    def write(self, act, step, **values):
        if self.process.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(act=act, step=step, **values)) + "\n")


def require_finite(act, step, path, values):
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    good = f"{path} holds the last good one" if path.exists() else "there is no checkpoint yet"
    require(not wrong, f"act {act}, step {step}: {', '.join(wrong)} not finite; {good}")


# ---- Processes and signals --------------------------------------------------------------------------------

class Stopped(Exception):
    """(number of the signal, what is safe)"""


class Stop:
    """A signal stops a run after its step if `patient`; else, or the second time, at once."""
    asked, when, patient = 0, math.inf, False

    @contextmanager
    def listening(self):
        names = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
        before = {name: signal.signal(getattr(signal, name), self.note) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def note(self, number, frame):
        again = time.monotonic() - self.when > 0.3      # a shell and torchrun may both deliver the first
        self.asked, self.when = self.asked or number, min(self.when, time.monotonic())
        if again or not self.patient:
            raise Stopped(number, "stopped")

    @contextmanager
    def at_step_ends(self):
        self.patient = True
        yield
        self.patient = False
        if self.asked:
            raise Stopped(self.asked, "stopped")


@dataclass
class Process:
    """Which of the `world` processes this is."""
    rank: int
    world: int
    device: torch.device
    stop: Stop = field(default_factory=Stop)

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *words):
        if self.is_main:
            tqdm.write(" ".join(map(str, words)), file=sys.stdout)

    def bar(self, items, name, start=0, total=None):
        return tqdm(items, name, initial=start, total=total, disable=not self.is_main)

    def sum(self, tensor):
        """In place, over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor):
        """In place, from rank 0."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, value) -> list:
        """The value of each process."""
        every = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(every, value)
        return every

    def asked_to_stop(self) -> int:
        """The signal that a process got, or 0."""
        if self.world == 1:
            return self.stop.asked
        asked = torch.tensor(self.stop.asked, device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return asked.item()

    def autocast(self):
        """bf16 on CUDA."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def wait(self):
        if self.world > 1:
            dist.barrier()


def start_process(device, stop) -> Process:
    """Join torchrun's processes, if any."""
    device = sample.choose_device(device)
    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1    # it may be left over
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32, for Muon, which would overshoot in bf16
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(hours=6))     # others wait while one draws or encodes
    return Process(dist.get_rank() if world > 1 else 0, world, device, stop)


def seeded(seed, step):
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def to_float(pixels, device):
    return data.to_device(pixels, device).float() / 127.5 - 1       # uint8 -> [-1, 1]


# ---- The command line -------------------------------------------------------------------------------------

CHOICES = {"preset": PRESETS, "train": ("all", "rows"), "optimizer": ("muon", "adamw"),
           "image_rows": ("free", "codebook")}
FROM_ZERO = "seed withheld eval_n res_blocks words adversarial lr lr_adam lr_rows z_loss code_noise".split()
OURS = ["config.json", "vqgan.pt", "model.pt"]      # --overwrite deletes these and the rest
REST = """log.jsonl *.partial codes/*.pt codes/*.partial samples/reconstructions.png
          samples/drawn-*.png""".split()
FREE = """out data text shards resume overwrite device compile checkpointing shard accumulate save_every
          eval_every log_every eval_n mix""".split()        # flags that --resume may change


def require(good, message):
    if not good:
        raise ValueError(message)


def parse_mix(text) -> dict[str, float]:
    part = rf"({'|'.join(data.TASKS)})=\d+\.?\d*"
    require(re.fullmatch(f"{part}(,{part})*", text), f"--mix {text}: expected something like t2i=6,text=1")
    return {task: float(weight) for task, weight in (part.split("=") for part in text.split(","))}


def resolve(cfg, splits, vq_config=None) -> tuple[Config, VQGANConfig]:
    """Fill in what depends on the data."""
    pictures, n = splits["train"].pictures, len(splits["train"].pictures)
    if cfg.data is None:
        chosen = dict(patch=8, ch_mult=(1, 1), res_blocks=1, codes=512, words=1024, vq_steps=1000, steps=1300,
                      code_noise=0.3, image_size=64)
    else:
        chosen = dict(patch=4, ch_mult=(1, 2), res_blocks=2, codes=1024, words=4096, code_noise=0.0,
                      vq_steps=min(20_000, 600 + n // 4), steps=min(50_000, 600 + n // 2))
    if vq_config:
        c = vq_config
        cfg = replace(cfg, patch=c.patch, ch_mult=c.ch_mult, res_blocks=c.num_res_blocks, codes=c.n_embed)
    cfg = replace(cfg, **{k: v for k, v in chosen.items() if getattr(cfg, k) is None})
    vq_config = vq_config or VQGANConfig(
        ch=cfg.ch, ch_mult=cfg.ch_mult, num_res_blocks=cfg.res_blocks, z_channels=cfg.z_channels,
        n_embed=cfg.codes, embed_dim=cfg.code_dim, l2_norm=cfg.l2_norm, patch=cfg.patch)
    f = vq_config.f or 1                # pixels that a code is wide; check refuses 0
    if cfg.image_size is None:          # the median shorter side, from 64 to 128
        sides = sorted(min(image.size) for image in data.first_images(pictures, 50)) or [64]
        cfg.image_size = min(max(sides[len(sides) // 2], 64), 128) // f * f or f
    if cfg.context is None:             # two pictures and their words
        cfg.context = max(256, 2 * ((cfg.image_size // f) ** 2 + 64))
    return cfg, vq_config


def check(cfg, vq_config, splits, world):
    """ValueError, naming the flag, before anything is written."""
    def flag(name, good, wanted):
        require(good, f"--{name} {getattr(cfg, name)}: {wanted}")
    for name, value in asdict(cfg).items():
        least, values = int(name not in FROM_ZERO), value if isinstance(value, tuple) else [value]
        good = all(least <= x < 2 ** 31 for x in values if type(x) in (int, float))
        flag(name, good, f"expected a number from {least}")
    f, mix, tasks = vq_config.f, parse_mix(cfg.mix), data.tasks_of(splits["train"])
    codes = (cfg.image_size // f) ** 2
    flag("image_size", cfg.image_size % f == 0, f"not a multiple of a code's {f} pixels")
    flag("hidden_size", cfg.hidden_size % (2 * cfg.heads) == 0 or cfg.init, "not a multiple of twice --heads")
    flag("vq_batch", cfg.vq_batch >= world or cfg.vqgan, f"each of {world} processes needs a picture")
    flag("rows", cfg.rows % (world * cfg.accumulate) == 0, f"not a multiple of {world} x --accumulate")
    flag("mix", any(len(tasks[task]) for task in mix if mix[task]), "there are no examples of it")
    flag("context", cfg.context > codes, f"a picture alone has {codes} codes")
    coded = any(not p.open for split in splits.values() for p in split.pictures)
    flag("data", cfg.vqgan or not coded, "codes need the --vqgan that made them")
    for place in filter(None, (cfg.data, cfg.init)):
        flag("out", not Path(cfg.out).resolve().is_relative_to(Path(place).resolve()), f"lies in {place}")
    flag("train", cfg.train == "all" or cfg.init, "needs --init")
    flag("image_rows", cfg.image_rows == "free" or not cfg.init, "the rows of --init are free")
    if cfg.perceptual:
        load_lpips()
    if cfg.init:
        folder = data.fetch(cfg.init)
        flag("init", any(folder.glob("*.safetensors")), "no .safetensors in it")
        most = read_config(folder).max_position_embeddings
        flag("context", cfg.context <= most, f"the model of --init reads {most}")
        tokenizer, v = sample.read_vocabulary(folder, vq_config.n_embed)
        ids = tokenizer.size - 1, v.bos, v.eos, v.pad
        flag("init", 0 <= min(ids) <= max(ids) < v.image_start, f"its table has no row for id {max(ids)}")
        Transformer.from_pretrained(folder, device="meta")      # headers alone
        its = folder / "vqgan.pt"       # an export's
        codes = {VQGAN.load(x).fingerprint() for x in (its, cfg.vqgan) if x and os.path.exists(x)}
        fits = len(codes) == 1 and cfg.vqgan or v.image_start == read_config(folder).vocab_size
        flag("vqgan", fits, "not that of the image rows of --init")


def start_run(cfg, ready, process) -> Log:
    """Make the run folder; --overwrite deletes the files of a run, and no others."""
    out = Path(cfg.out)
    process.wait()                      # until all have looked for an earlier run
    if process.is_main:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        with suppress(ImportError):     # Windows
            import fcntl
            lock = os.open(out / ".lock", os.O_WRONLY | os.O_CREAT)     # held while this process lives
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"--out {out}: another process is running in it") from None
        if cfg.overwrite and not cfg.resume:
            for file in [file for pattern in OURS + REST for file in out.glob(pattern)]:
                file.unlink()
        (out / "samples").mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(cfg), indent=1).encode()
        data.write_atomically(out / "config.json", lambda file: file.write(text))
        if ready:
            made = dict(config=asdict(ready.config), model=ready.state_dict())
            data.save_atomically(made, out / "vqgan.pt")
    process.wait()
    return Log(out / "log.jsonl", process)


def parser():
    """A flag for each field of Config; the result leaves out those not given."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^ +(\w+): .*  # (.*)", inspect.getsource(Config), re.MULTILINE))
    kinds = {bool: dict(action=argparse.BooleanOptionalAction), int: dict(type=int), float: dict(type=float),
             tuple[int, ...]: dict(type=lambda text: tuple(int(x) for x in text.split(",")))}
    kinds |= {kind | None: options for kind, options in kinds.items()}
    for f in fields(Config):
        default = "" if f.default is None else f" (default: {f.default})"
        top.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=comments[f.name] + default,
                         **kinds.get(f.type, dict(choices=CHOICES.get(f.name))))
    return top


def configure(argv=None) -> Config:
    """Flags -> Config; with --resume, that of the run, which flags may repeat."""
    given = vars(parser().parse_args(argv))
    out, resume, overwrite = Path(given.get("out", Config.out)), given.get("resume"), given.get("overwrite")
    path, there = out / "config.json", any((out / name).exists() for name in OURS)
    require(not (resume and overwrite), "--resume, --overwrite: choose one")
    require(not there or resume or overwrite, f"--out {out}: a run already; choose --resume or --overwrite")
    if not (resume and path.exists()):
        preset = PRESETS[given.get("preset", Config.preset)] | (FINETUNE if given.get("init") else {})
        return Config(**(preset | given))
    try:
        cfg = Config(**json.loads(data.read_utf8(path)))
        cfg.ch_mult = tuple(cfg.ch_mult)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not of a run of this version ({error})") from None
    now = Config(**given)
    clash = [f"--{k}" for k in given if k not in FREE and getattr(cfg, k) != getattr(now, k)]
    require(not clash, f"--resume: {', '.join(clash)} differ from {path}")
    return replace(cfg, **{**given, "overwrite": False})


def main(argv=None):
    """Every expected end is one sentence, and an exit code other than 0."""
    out, rank = None, int(os.environ.get("RANK", 0))
    try:
        stop = Stop()
        with stop.listening():
            cfg = configure(argv)
            out = Path(cfg.out)
            train(cfg, stop)
    except Stopped as stopped:
        number, where = stopped.args
        if rank == 0:
            print(f"train.py: {where}; go on with --resume", file=sys.stderr)
        sys.exit(128 + number)              # as shells report a signal
    except (ValueError, OSError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError)      # a peer, or a mistake of ours
        time.sleep(2 * (rank > 0 or lost and dist.is_initialized()))    # torchrun ends all if one fails
        if lost:
            raise
        begun = out and (out / "config.json").is_file()
        safe = f"; {out} is whole: go on with --resume" if begun else "; nothing was written"
        sys.exit(f"train.py: {error}{safe if isinstance(error, OSError) else ''}")
    if dist.is_initialized():               # not after an error: NCCL would wait for the others
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    torch.set_flush_denormal(True)      # softmax's denormal tails take CPUs 100 times longer
    main()
