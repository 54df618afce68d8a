"""Speed and memory, as a table of ratios: each peer or limit is timed in turns with us, in the same run.

    python tests/bench.py                 # everything, some minutes; needs pip install -e ".[test]" diffusers
    python tests/bench.py drawing loss    # some of its parts: drawing, bandwidth, loss, products, vqgan,
                                          # loader, growth
    python tests/bench.py loader --tokenizer FOLDER     # a folder with the tokenizer.json of Gemma 3

Every model is random, in float32, on the CPU; the number of threads is torch's own (OMP_NUM_THREADS).
"""

import argparse
import io
import os
import random
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from vqgan import VQGAN, VQGANConfig  # noqa: E402

CODES = 8192


def row(name, value, target=None, note=""):
    met = "" if target is None else f"target {target:g}: {'met' if value >= target else 'NOT MET'}"
    print(f"{name:<85} {value:7.2f}  {met:<18} {note}", flush=True)


def seconds(*functions, repeats=3):
    """The median time of each after one call to warm up; in turns, so that a busy machine slows all alike."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, measured in zip(functions, times):
            start = time.perf_counter()
            function()
            measured += [time.perf_counter() - start] if turn else []
    return [statistics.median(measured) for measured in times]


# -----------------------------------------------------------------------------------------------------------
# Drawing, against the loop of the official inference_t2i.py

def gemma(words, **options):
    """A random Gemma of transformers with image rows behind its words, and the same weights in ours."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=words + CODES, hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
                 num_attention_heads=4, num_key_value_heads=1, head_dim=96)
    config = transformers.GemmaConfig(**sizes | options)
    theirs = transformers.GemmaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, Transformer.from_pretrained(folder).eval()


def keep(logits, top_k, top_p):
    """The official filter: every step is over the whole vocabulary."""
    logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    ordered, order = logits.sort(descending=True)
    past = ordered.softmax(-1).cumsum(-1) > top_p
    past[:, 1:], past[:, 0] = past[:, :-1].clone(), False
    logits[past.scatter(1, order, past)] = -torch.inf
    return logits


@torch.inference_mode()
def official(model, prompts, n, words, guidance, temperature, top_k=0, top_p=1.0):
    """Prompts, then their negatives -> codes' ids (B, n): a growing cache, the full head, masked words."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    positions, drawn = (mask.cumsum(-1) - 1).clamp(min=0), []
    cache = transformers.DynamicCache(config=model.config)
    for _ in range(n):
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (conditional - unconditional) * guidance
        logits[:, :words] = -torch.inf
        if temperature:
            new = keep(logits / temperature, top_k, top_p).softmax(-1).multinomial(1)
        else:
            new = logits.argmax(-1, keepdim=True)
        drawn.append(new)
        ids, positions = torch.cat([new, new]), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(drawn, dim=1)


def weights_read(model):
    """Bytes of weights that a step of drawing must read: blocks, and the image rows of the head."""
    return sum(p.nbytes for p in model.model.layers.parameters()) + 4 * CODES * model.config.hidden_size


def drawing(n=64):
    settings, block = {"temperature": 0.99, "top_k": 4096, "top_p": 0.96}, torch.ones(2 ** 28)
    for words, target in ((32_000, 6), (256_000, 40)):
        theirs, ours = gemma(words)
        prompts, negatives = [list(range(10, 30 + 3 * i)) for i in range(4)], [[2, 9, 7]] * 4

        def draw_theirs(n=n, **options):
            return official(theirs, prompts + negatives, n, words, 7.0, **options)

        def draw_ours(n=n, **options):
            return sample.generate(ours, prompts, n, (words, words + CODES), negatives, 7.0, **options)

        name = f"{words:,} + {CODES:,} rows: "
        same = torch.equal(draw_theirs(32, temperature=0), draw_ours(32, temperature=0))
        row(name + "greedy codes equal to the official loop's", same, 1)
        peer, eager, compiled, summing = seconds(
            lambda: draw_theirs(**settings), lambda: draw_ours(**settings),
            lambda: draw_ours(**settings, compile=True), block.sum)
        limit = n * weights_read(ours) * summing / block.nbytes
        row(name + "codes/s over the official loop's", peer / eager, target, f"{4 * n / eager:.0f} codes/s")
        row(name + "the same with --compile", peer / compiled, target, f"{4 * n / compiled:.0f} codes/s")
        row(name + "the same if a step did nothing but read its weights", peer / limit)


# -----------------------------------------------------------------------------------------------------------
# Drawing, against what the memory can deliver

@torch.inference_mode()
def bandwidth(n=32):
    """Bytes of weights, image rows and cache that a step reads, over those that a plain sum reads."""
    torch.manual_seed(0)
    words, block = 32_000, torch.ones(2 ** 28)
    config = ModelConfig(vocab_size=words + CODES, hidden_size=896, intermediate_size=4864,   # Qwen2.5-0.5B's
                         num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, head_dim=64)
    of_cache = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    model = Transformer(config).eval()
    for batch in (1, 16):
        def draw(n):
            sample.generate(model, [[1, 2, 3]] * batch, n, (words, words + CODES), temperature=0)
        summing, short, long = seconds(block.sum, lambda: draw(8), lambda: draw(8 + n))
        cache = of_cache * batch * (10 + n // 2)
        share = (weights_read(model) + cache) / ((long - short) / n) / (block.nbytes / summing)
        row(f"share of the memory bandwidth that a step of batch {batch} reaches", share, None,
            f"{block.nbytes / summing / 1e9:.1f} GB/s, {1000 * (long - short) / n:.0f} ms a step")


# -----------------------------------------------------------------------------------------------------------
# Forward and backward with a large vocabulary, against transformers

LARGE = dict(hidden_size=384, intermediate_size=1536, max_position_embeddings=2048)


def loss_step(side, words, share=1.0, tokens=2048):
    """-> a function that runs forward and backward on `tokens` positions, of which `share` have a target."""
    options = dict(LARGE, vocab_size=words + CODES, num_hidden_layers=6, num_attention_heads=4,
                   num_key_value_heads=1, head_dim=96)
    torch.manual_seed(0)
    ids = torch.randint(words, (1, tokens))
    learned = torch.arange(tokens) >= tokens * (1 - share)
    if side == "ours":
        model = Transformer(ModelConfig(model_type="gemma", hidden_act="gelu_pytorch_tanh", **options))
        targets = ids.roll(-1, 1).where(learned, -100)
        return lambda: (model.zero_grad(), model(ids, targets=targets).mean().backward())
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**options))
    labels = ids.where(learned, -100)
    return lambda: (model.zero_grad(), model(ids, labels=labels).loss.backward())


def peak(side, words):
    """Bytes by which forward and backward raise the resident memory of a fresh process above its weights."""
    command = [sys.executable, "-c", f"import bench; bench.print_peak({side!r}, {words})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def resident(name="VmRSS"):         # on Linux; VmHWM: the peak
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def print_peak(side, words):
    step = loss_step(side, words)
    Path("/proc/self/clear_refs").write_text("5")       # forget the peak of building the model
    before = resident()
    step()
    print(resident("VmHWM") - before)


def loss():
    for words, target in ((32_000, 1.1), (256_000, 1.3)):
        name = f"{words:,} + {CODES:,} rows, 2,048 tokens: "
        theirs, ours = peak("theirs", words), peak("ours", words)
        row(name + "peak memory of transformers over ours", theirs / ours, 2 if words > 99_999 else None,
            f"{theirs / 1e9:.2f} and {ours / 1e9:.2f} GB")
        theirs, ours = seconds(loss_step("theirs", words), loss_step("ours", words), repeats=9)
        row(name + "forward + backward of transformers over ours", theirs / ours, target,
            f"{theirs:.2f} and {ours:.2f} s")
        theirs, ours = seconds(loss_step("theirs", words, 0.5), loss_step("ours", words, 0.5))
        row(name + "the same with targets on the later half", theirs / ours, None,
            f"{theirs:.2f} and {ours:.2f} s")


# -----------------------------------------------------------------------------------------------------------
# Training, against the machine's matrix products

def products(context=512, rows=4):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    ids, a = torch.randint(8192, (rows, context)), torch.randn(2048, 2048)
    documents = (torch.arange(context) // (context // 2)).expand(rows, -1)
    plain, compiled = Transformer(config), Transformer(config)
    for block in compiled.model.layers:
        block.forward = torch.compile(block.forward)        # as train.py --compile

    def step(model):
        model.zero_grad()
        model(ids, ids, documents=documents).mean().backward()

    product, *training = seconds(lambda: a @ a, lambda: step(plain), lambda: step(compiled), repeats=5)
    attention = 8 * 512 * context // 2
    matrices = sum(p.numel() for p in plain.parameters() if p.ndim == 2) + attention
    flops, limit = 6 * matrices * ids.numel(), 2 * 2048 ** 3 / product
    for name, taken in zip(("", ", with --compile"), training):
        row("share of a 2048x2048 product's speed in training, width 512, 8 layers" + name,
            flops / taken / limit, 0.6, f"{limit / 1e9:.0f} GFLOP/s in a product")


# -----------------------------------------------------------------------------------------------------------
# The tokenizer, against the same shapes elsewhere

def vqgan(size=128, batch=4):
    import diffusers
    torch.manual_seed(0)
    widths, pixels = (1, 1, 2, 2, 4), torch.rand(batch, 3, size, size) * 2 - 1
    ours = VQGAN(VQGANConfig(ch=64, ch_mult=widths))
    chameleon = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(
        base_channels=64, channel_multiplier=list(widths), num_res_blocks=2, num_embeddings=8192,
        embed_dim=256, latent_channels=256, resolution=size, attn_resolutions=None)).eval()
    peer = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=tuple(64 * w for w in widths), layers_per_block=2, latent_channels=256,
        num_vq_embeddings=8192, vq_embed_dim=256)

    @torch.inference_mode()
    def encode(model):
        model.encode(pixels)

    def train_ours():
        out = ours(pixels)
        (F.mse_loss(out.pixels, pixels) + out.loss).backward()

    def train_peer():
        out = peer(pixels)
        (F.mse_loss(out.sample, pixels) + out.commit_loss.mean()).backward()

    theirs, mine = seconds(lambda: encode(chameleon), lambda: encode(ours), repeats=15)
    name = f"VQGAN of half Chameleon's width, {size} pixels: "
    row(name + "images/s over transformers'", theirs / mine, 1, f"{batch / mine:.1f} images/s")
    theirs, mine = seconds(train_peer, train_ours)
    row(name + "forward + backward of diffusers over ours", theirs / mine, 1,
        f"{mine:.2f} s for {batch} images")


# -----------------------------------------------------------------------------------------------------------
# The loader, and what it opens

SHARD = 4096


def said():
    """-> English, and a function that makes captions of 20 of its words."""
    from pydoc_data.topics import topics
    text, rng = "\n\n".join(topics[key] for key in sorted(topics)), random.Random(0)
    words = sorted(set(re.findall("[a-z]{3,}", text)))
    return text, lambda: " ".join(rng.choices(words, k=20))


def encode_at_random(folder, codes, number, of=8192):
    """-> `number` encoded pictures in shards; all shards are one file, as what opens them reads no codes."""
    side, (_, caption) = int(codes ** 0.5), said()
    drawn = torch.randint(of, (min(number, SHARD), side, side), generator=torch.Generator().manual_seed(0))
    pictures = [data.Picture(str(i), None, [caption()], codes=x) for i, x in enumerate(drawn)]
    data.write_shard(folder / "0.pt", pictures, "bench")
    for i in range(1, -(-number // SHARD)):
        os.link(folder / "0.pt", folder / f"{i}.pt")
    return [folder / f"{i}.pt" for i in range(-(-number // SHARD))]


def opened(paths):
    return data.Encoded([data.read_shard(path, "bench") for path in paths])


def context_for(codes):
    """What train.py chooses for pictures of so many codes."""
    cfg = train.Config(data="own", image_size=int(codes ** 0.5))
    one = VQGANConfig(ch_mult=(1,))
    return train.resolve(cfg, {"train": data.Split([data.Picture("x")], [])}, one)[0].context


def print_opening(folder):
    started, before = time.perf_counter(), resident()
    pictures = opened(sorted(Path(folder).glob("*.pt")))
    tasks = data.tasks_of(data.Split(pictures, []))
    taken, grown = time.perf_counter() - started, resident() - before
    assert len(tasks["t2i"]) == len(pictures)
    print(len(pictures), taken, grown)


def loader(tokenizer_folder=None, rows=512):
    text, caption = said()
    own = data.WordTokenizer.learn([text, *(caption() for _ in range(1000))])
    kinds = {"drawings of 1024 codes, own words": (own, {"t2i": 1}, None)}
    if tokenizer_folder:
        kinds["half texts of 4,000 characters, Gemma 3's tokenizer"] = (
            data.PretrainedTokenizer.load(tokenizer_folder), {"t2i": 1, "text": 1}, 400_000)
    else:
        print("half text: no --tokenizer, a folder with the tokenizer.json of Gemma 3")
    with tempfile.TemporaryDirectory() as folder:
        pictures = opened(encode_at_random(Path(folder), 1024, 20_000))
        for name, (tokenizer, mix, target) in kinds.items():
            tasks = data.tasks_of(data.Split(pictures, data.passages(text, 4000)))
            vocab, context = data.Vocab.extend(262_144, 8192, 2, 1, 0), context_for(1024)
            loaders = [data.Loader(tasks, mix, vocab, tokenizer, rows, context, world=world)
                       for world in (1, 8, 64)]
            batches = (1, 8, 64)            # as many positions for each
            times = seconds(*(lambda one=one, n=n: [one.batch() for _ in range(n)]
                              for one, n in zip(loaders, batches)), repeats=3)
            speeds = [rows * context / taken for taken in times]
            note = " / ".join(f"{speed:,.0f}" for speed in speeds) + " positions/s with 1 / 8 / 64"
            row(f"{name}: 64 processes, each over one alone", speeds[2] / speeds[0], 0.8, note)
            if target:
                row(f"{name}: 64 processes, million positions/s of each", speeds[2] / 1e6, target / 1e6)
    for codes in (16, 64, 256, 1024):
        with tempfile.TemporaryDirectory() as folder:
            tasks = data.tasks_of(data.Split(opened(encode_at_random(Path(folder), codes, SHARD)), []))
            context = context_for(codes)
            batch = data.Loader(tasks, {"t2i": 1}, own.vocab(8192), own, 64, context).batch()
            row(f"share of a batch that is no padding, {codes} codes, captions of 20 words, context {context}",
                (batch.tasks >= 0).float().mean(), 0.9)
    for number in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            paths = encode_at_random(Path(folder), 1024, number)
            size = paths[0].stat().st_size / SHARD
            command = [sys.executable, "-c", f"import bench; bench.print_opening({folder!r})"]
            done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE)
            found, taken, grown = map(float, done.stdout.split())
            row(f"seconds to open {found:,.0f} encoded pictures", taken, None,
                f"{grown / 1e6:.0f} MB of memory; {size:.0f} bytes a picture on the disk")


# -----------------------------------------------------------------------------------------------------------
# What a process needs to list pictures before they are encoded, and to read texts

def make_source(folder, kind, number):
    """-> a source of `number` captioned pictures, of which none is one; or so many passages of text."""
    _, caption = said()
    caption = caption()
    if kind == "texts":
        (folder / "x.txt").write_text("".join(f"{i} {caption}.\n" for i in range(number)))
        return folder / "x.txt"
    if kind == "rows of a .jsonl":
        (folder / "x.jsonl").write_text("".join(f'{{"image": "{i}.png", "text": "{i} {caption}"}}\n'
                                                for i in range(number)))
        return folder / "x.jsonl"
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i in range(number):
            for suffix, raw in (("png", b"0"), ("txt", f"{i} {caption}".encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return folder / "x.tar"


def print_growth(kind, path):
    started, before = time.perf_counter(), resident()
    items = data.read_texts(path) if kind == "texts" else data.read_pictures(path)
    listed, peak = time.perf_counter() - started, resident("VmHWM") - before
    started = time.perf_counter()
    if kind != "texts":
        train.fingerprint("bench", items)
    print(len(items), listed, time.perf_counter() - started, peak)


def growth():
    for kind, most in (("rows of a .jsonl", 1_000_000), ("members of a .tar", 100_000), ("texts", 1_000_000)):
        for number in (n for n in (10_000, 100_000, 1_000_000) if n <= most):
            with tempfile.TemporaryDirectory() as folder:
                path = make_source(Path(folder), kind, number)
                command = [sys.executable, "-c", f"import bench; bench.print_growth({kind!r}, bench.Path({str(path)!r}))"]
                done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE)
                found, listed, printed, peak = map(float, done.stdout.split())
                row(f"seconds to list {found:,.0f} {kind}", listed, None,
                    f"{1e6 * listed / found:.0f} us and {peak / found:,.0f} bytes each; fingerprint "
                    f"{1e6 * printed / found:.0f} us each; the file has {path.stat().st_size / found:,.0f} bytes each")


PARTS = {f.__name__: f for f in (drawing, bandwidth, loss, products, vqgan, loader, growth)}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--tokenizer", help="a folder with the tokenizer of Gemma 3, for loader")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{torch.get_num_threads()} threads, {versions}")
    args = parser.parse_args(argv)
    for name in args.parts or PARTS:
        PARTS[name](args.tokenizer) if name == "loader" else PARTS[name]()


torch.set_flush_denormal(True)      # denormal tails of a softmax are up to 100 times slower on CPUs

if __name__ == "__main__":
    main()
