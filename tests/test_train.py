"""The three acts on settings so small that they take half a second, and once, slowly, the whole story."""

import json
import math
import os
import sys
import tarfile
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import data
import sample
import train
from model import ModelConfig, Transformer
from vqgan import VQGAN, Discriminator, VQGANConfig

TINY = dict(vq_steps=5, vq_batch=4, ch=32, ch_mult=(1,), patch=16, res_blocks=1, z_channels=8, codes=16,
            steps=6, rows=4, hidden_size=32, layers=1, heads=2, words=64, eval_n=0, device="cpu",
            save_every=3, eval_every=6, log_every=1)


def few_scenes(*source, full=data.built_in):
    """The built-in scenes, but few of them."""
    splits = full(*source, train=40, val=4, unseen=2)
    return {name: split._replace(texts=split.texts[::40]) for name, split in splits.items()}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(data, "built_in", few_scenes)


def run(out, **options):
    return train.train(train.Config(**{**TINY, "out": str(out), **options}))


def flags(out, **options):
    """The same as arguments of the command line."""
    values = {"out": out, **TINY, **options}
    text = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in values.items()}
    return [part for name, value in text.items() for part in (f"--{name}", value)]


def saved(run, name="model.pt"):
    return torch.load(Path(run) / name, weights_only=True)


def log_of(out):
    """The lines of a log, without what a clock measures."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "seconds")} for line in lines]


def losses_of(out):
    """Of act 3, and the norms of its gradients, step by step."""
    return [value for line in log_of(out) if line["act"] == 3
            for key, value in line.items() if key in ("loss", "norm", *data.TASKS) or key.startswith("val")]


def equal(x, y):
    """Bit for bit."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if torch.is_tensor(x) else x == y


def same_file(a, b):
    """Two checkpoints hold the same, besides the flags that they were made with."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k not in ("config", "train_config"))


def same_run(a, b):
    assert same_file(a / "vqgan.pt", b / "vqgan.pt") and same_file(a / "model.pt", b / "model.pt")
    assert log_of(a) == log_of(b) and not list(b.rglob("*.partial"))


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def own_pictures(folder, n=8):
    for i, p in enumerate(data.scenes(n, 0, "own")):
        put(folder / f"{i}.txt", p.captions[0])
        p.open().save(folder / f"{i}.png")
    return folder


# -----------------------------------------------------------------------------------------------------------
# All acts

def test_a_run_fills_its_folder(few, tmp_path, capsys):
    """A file or a score that the README names is not written, or sampling needs more than the folder."""
    scores = run(tmp_path, eval_n=2)
    wanted = "format step config model_config vocab tokenizer data grid fingerprint model model_optimizer"
    assert set(wanted.split()) <= saved(tmp_path).keys() and saved(tmp_path)["step"] == 6
    samples = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert samples == ["drawn-000006.png", "reconstructions.png"]
    log = log_of(tmp_path)
    assert {line["act"] for line in log} == {1, 3, 4} and log[-1]["scores"] == scores
    assert {"val_t2i", "val_i2t", "val_vqa", "val_edit", "val_text"} <= set().union(*log)
    capsys.readouterr()
    sample.main(["eval", "--run", str(tmp_path), "--n", "2", "--device", "cpu"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {k: round(v, 4) if type(v) is float else v for k, v in scores.items()}


def test_pad_reaches_all_pictures_and_noise_nothing_that_is_scored(few, tmp_path, monkeypatch):
    """Pictures are padded in training and cropped afterwards; held-out losses see noise or miss captions."""
    loaders, padded, loader, crop = [], [], data.Loader, data.crop_square
    monkeypatch.setattr(data, "Loader",
                        lambda *args, **options: loaders.append(loader(*args, **options)) or loaders[-1])
    monkeypatch.setattr(data, "crop_square",
                        lambda image, size, pad=False: padded.append(pad) or crop(image, size, pad))
    run(tmp_path, pad=True, eval_n=2)
    training, *others = loaders
    assert padded and all(padded) and training.perturb and training.uncond == 0.1
    assert len(others) == 5 and not any(other.perturb or other.uncond for other in others)


def test_a_run_is_not_overwritten_and_resume_refuses_other_flags(few, tmp_path):
    """A good run is lost to a repeated command, or resumed at a width that it does not have."""
    train.main(flags(tmp_path))
    for argv, words in (([], "--overwrite"), (["--resume", "--hidden_size", "64"], "--hidden_size")):
        with pytest.raises(SystemExit, match=words):
            train.main([*flags(tmp_path), *argv])
    before = (tmp_path / "model.pt").read_bytes()
    train.main(["--out", str(tmp_path), "--resume", "--accumulate", "2"])       # all acts are done
    assert (tmp_path / "model.pt").read_bytes() == before


def test_own_pictures_train_and_unreadable_ones_are_named_once(tmp_path, monkeypatch, capsys):
    """One unreadable file ends the run or goes without a word, is never tried again, or costs good shards."""
    source, out, load = own_pictures(tmp_path / "own", 12), tmp_path / "run", data.load_image
    options = dict(data=str(source), mix="t2i=1,i2t=1", eval_n=2)

    def hiccups(file):
        if file.name == "3.png":
            raise ValueError(f"{file}: not a readable picture")
        return load(file)
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_image", hiccups)
        scores = run(out, **options)
        assert scores["t2i_exact"] is None and scores["reconstruction_psnr"] > 0
        before = (out / "codes" / "val-00000.pt").stat().st_mtime_ns
        run(out, **options, resume=True)
    named, = (line["skipped"] for line in log_of(out) if "skipped" in line)
    assert len(named) == 1 and "3.png" in named[0] and "3.png" in capsys.readouterr().out
    run(out, **options, resume=True)
    assert not any("skipped" in line for line in log_of(out))
    assert sum(len(saved(out, f"codes/{name}-00000.pt")["codes"]) for name in ("train", "val")) == 12
    assert (out / "codes" / "val-00000.pt").stat().st_mtime_ns == before


def test_the_fingerprint_of_a_shard_sees_what_changed(tmp_path):
    """Codes of a picture that its owner replaced are trained on, or a mended caption is never read."""
    def print_of(second=0, caption="a"):
        """Of a folder and of a tar with a picture that was made in that second."""
        Image.new("RGB", (8, 8)).save(put(tmp_path / "own" / "0.bmp", ""))
        put(tmp_path / "own" / "0.txt", caption)
        with tarfile.open(tmp_path / "own.tar", "w") as tar:
            tar.add(tmp_path / "own", ".")
        for name in ("own/0.bmp", "own.tar"):
            os.utime(tmp_path / name, (second, second))
        return [train.fingerprint("how", data.read_pictures(tmp_path / name)) for name in ("own", "own.tar")]
    assert print_of() == print_of() and len({*print_of(), *print_of(second=1), *print_of(caption="b")}) == 6
    picture = data.Picture("x", codes=torch.zeros(2, 2, dtype=torch.long))
    changes = [{}, {"name": "y"}, {"dialogues": [[(["q"], ["a"])]]},
               {"edits": [[(["q"], [data.Picture("z")])]]}, {"codes": picture.codes + 1}]
    prints = {train.fingerprint(how, [replace(picture, **each)]) for each in changes for how in ("a", "b")}
    assert len(prints) == 10


@pytest.mark.parametrize("argv", [[], *(["--data", "own", "--preset", name] for name in train.PRESETS)],
                         ids=" ".join)
def test_every_preset_fits_together(argv):
    """A preset stops, hours after it was started on a rented machine, at sizes that do not fit."""
    picture = data.Picture("x", lambda: Image.new("RGB", (600, 500)), ["a"])
    picture.ask(("q", "a"))
    splits = {"train": data.Split([picture] * 50, ["text"]), "val": data.Split([picture], ["text"])}
    cfg, vq_config = train.resolve(train.configure(["--out", "nowhere", *argv]), splits)
    for world in (1, 8):
        train.check(cfg, vq_config, splits, world)
    vocab = data.WordTokenizer([]).vocab(cfg.codes)
    with torch.device("meta"):
        vqgan = VQGAN(vq_config)
        out = vqgan(torch.zeros(1, 3, cfg.image_size, cfg.image_size))
        model = train.build_model(cfg, vocab, vqgan.quantize.codebook().detach())
        logits = model(torch.zeros(1, out.codes.numel(), dtype=torch.long))
    assert out.pixels.shape[-1] == cfg.image_size and out.codes.numel() < cfg.context
    assert logits.shape[2] == vocab.size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_training_steps_are_compiled(few, tmp_path, monkeypatch, checkpointing):
    """Drawing and restarted codes ask for programs of their own, and past a limit training is not compiled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(train, "RESTART_EVERY", 2)
    run(tmp_path, compile=True, layers=3, eval_every=2, checkpointing=checkpointing)
    assert counter.frame_count == 2                 # one for all residual blocks, one for all layers


@pytest.mark.slow
def test_the_whole_story(tmp_path, monkeypatch):
    """An act does not learn: the README's first command with less of everything, without noise on codes."""
    monkeypatch.setattr(data, "built_in", partial(data.built_in, train=3000))
    train.main(["--out", str(tmp_path), "--ch", "32", "--vq_steps", "400", "--hidden_size", "96", "--steps",
                "400", "--mix", "t2i=8,i2t=1,vqa=2,text=1", "--code_noise", "0", "--eval_n", "50"])
    *_, held_out, last = log_of(tmp_path)
    scores = last["scores"]
    assert scores["reconstruction_psnr"] > 20 and scores["codes_used"] > 200
    assert held_out["val_t2i"] < 2.5 and scores["t2i_objects"] > 0.1        # guessed: ln 512 = 6.2, and 1/100
    assert scores["vqa"] > 0.2


# -----------------------------------------------------------------------------------------------------------
# Act 1 alone

def first_act(out, **options):
    """-> the tokenizer after act 1 on 40 pictures of 32x32 pixels."""
    splits = {"train": data.Split(data.scenes(40, 0, "own", 32), [])}
    cfg = train.Config(**{**TINY, "out": str(out), "image_size": 32, "eval_every": 1000, **options})
    cfg, vq_config = train.resolve(cfg, splits)
    process = train.start_process("cpu", train.Stop())
    out.mkdir(exist_ok=True)
    return train.train_tokenizer(cfg, vq_config, splits, process, train.Log(out / "log.jsonl", process))


def test_codes_start_at_vectors_and_unused_ones_come_back(tmp_path, monkeypatch):
    """A codebook far from every vector, or codes that nothing is assigned to and that stay so."""
    events, restart, forward = [], train.restart_codes, VQGAN.forward

    def restarts(model, pixels, dead, *rest):
        before = model.quantize.embedding.weight.detach().clone()
        restart(model, pixels, dead, *rest)
        moved = model.quantize.embedding.weight.detach()
        events.append("restart")
        assert dead.any() and torch.equal((moved != before).any(1), dead)
        near = torch.cdist(moved[dead], model.quantize.vectors(model.latents(pixels))).min(1).values
        assert near.max() < 1e-3        # of the batch

    def step(self, pixels, quantize=True):
        events.append("codes" if quantize else "vectors")
        return forward(self, pixels, quantize)
    for name, value in (("restart_codes", restarts), ("CONTINUOUS", 0.25), ("RESTART_EVERY", 2)):
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(VQGAN, "forward", step)
    first_act(tmp_path, codes=64, vq_steps=8)
    wanted = "vectors vectors restart codes codes restart codes codes restart codes codes"
    assert events == wanted.split()     # none restarts in the last quarter, which would leave it untrained


def test_usage_is_logged_and_a_codebook_that_collapses_reported(tmp_path, capsys):
    """A tokenizer says everything with a handful of codes, and nobody notices before the drawings."""
    process = train.Process(0, 1, torch.device("cpu"))
    log = train.Log(tmp_path / "log.jsonl", process)
    for counts, last, perplexity in (([7], True, 1), ([7], False, 1), ([5] * 4, True, 4),
                                     ([3, 1], True, 2 ** 0.8112781)):       # entropy of (3/4, 1/4) in bits
        used = len(counts)
        train.report_usage(torch.tensor(counts + [0] * (16 - used)), process, log, 4, last)
        assert ("collapsed" in capsys.readouterr().out) == (used == 1 and last)
        assert log_of(tmp_path)[-1] == {"act": 1, "step": 5, "codes_used": used,
                                        "perplexity": pytest.approx(perplexity)}


class Likes(torch.nn.Module):
    """A discriminator, or a perceptual loss, for which bright pictures are right, or dark ones."""
    def __init__(self, sign, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(sign)))

    def forward(self, pixels, real=None):
        return pixels.mean((1, 2, 3)) * self.weight


def test_the_generator_is_pulled_to_what_the_discriminator_likes_and_lpips_finds_near(tmp_path, monkeypatch):
    """A sign: a generator that learns to be found out; or --adversarial or --perceptual are passed over."""
    biases = {"adversarial": [], "perceptual": []}
    for sign in (99, -99):
        monkeypatch.setattr(train, "Discriminator", partial(Likes, sign))
        monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=partial(Likes, sign)))
        for name, value in (("adversarial", 10.0), ("perceptual", True)):   # the adversary comes in step 2
            model = first_act(tmp_path / f"{name}{sign}", vq_steps=2, **{name: value})
            biases[name].append(model.decoder.conv_out.bias)
    up, down = biases["adversarial"]
    assert (up > down).all()                    # its logits are to rise
    up, down = biases["perceptual"]
    assert (up < down).all()                    # distances are to fall


def test_a_missing_lpips_is_named_before_anything_is_written(few, tmp_path, monkeypatch):
    """--perceptual ends in an ImportError, without the command that installs the package."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SystemExit, match=r'pip install -e "\.\[perceptual\]"'):
        train.main([*flags(tmp_path / "run"), "--perceptual"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [1, 3, 5])
def test_act_1_goes_on_bit_for_bit_from_any_of_its_phases(tmp_path, monkeypatch, step):
    """A checkpoint from before the codebook or the adversary cannot be opened, or their optimizers forget."""
    monkeypatch.setattr(train, "Discriminator", partial(Discriminator, ch=8, layers=2))
    monkeypatch.setattr(train, "CONTINUOUS", 0.34)      # the codebook from the third step of 6 on
    options, save = dict(adversarial=0.5, vq_steps=6, save_every=1), data.save_atomically

    def dies(value, path):
        save(value, path)
        if value["step"] == step:
            raise KeyboardInterrupt
    first_act(tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "save_atomically", dies)
        first_act(tmp_path / "cut", **options)
    first_act(tmp_path / "cut", **options, resume=True)
    assert same_file(tmp_path / "whole" / "vqgan.pt", tmp_path / "cut" / "vqgan.pt")
    whole = saved(tmp_path / "whole", "vqgan.pt")
    adam = whole["discriminator_optimizer"]
    assert adam["state"]["main.0.weight"]["step"] > 2 and adam["param_groups"][0]["lr"] == 2e-4     # constant


# -----------------------------------------------------------------------------------------------------------
# Act 3 alone

def third_act(out, **options):
    """-> weights and the loss of the first step of act 3, on random codes."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4))
    pictures = [data.Picture(f"{i}", captions=[f"{i}"], codes=torch.randint(0, 16, (2, 2))) for i in range(9)]
    splits = {"train": data.Split(pictures, ["hello"]), "val": data.Split(pictures[:0], ["hello"])}
    cfg = train.Config(**{**TINY, "out": str(out), "steps": 1, "context": 64, **options})
    process = train.start_process("cpu", train.Stop())
    out.mkdir()
    train.train_transformer(cfg, splits, vqgan, process, train.Log(out / "log.jsonl", process))
    return saved(out)["model"], log_of(out)[0]["loss"]


def test_flags_of_the_loss_and_the_optimizers_reach_the_step(tmp_path):
    """A flag that --help explains and training ignores."""
    plain, loss = third_act(tmp_path / "plain")
    table, marks = "model.embed_tokens.weight", "model.embed_tokens.image_rows.weight"
    stable, other = third_act(tmp_path / "z", z_loss=0.1)
    assert other - loss == pytest.approx(0.1 * math.log(len(plain[table]) + 20) ** 2, rel=0.02)
    assert not torch.equal(stable[table], plain[table])
    for options, *same in ((dict(lr_rows=1.0), True, False, True),
                           (dict(lr_adam=1e-4, lr_rows=3e-3), False, True, True),
                           (dict(lr=1.0), True, True, False),
                           (dict(optimizer="adamw", lr=9.0), True, True, False)):
        changed, _ = third_act(tmp_path / str(options), **options)
        names = table, marks, "model.layers.0.mlp.down_proj.weight"
        assert [torch.equal(plain[name], changed[name]) for name in names] == same, options


def test_parts_of_a_batch_add_up_to_the_whole():
    """A mean of means weighs the targets of a short caption more than those of a drawing."""
    tokenizer = data.WordTokenizer(["a", " a"])
    vocab, process = tokenizer.vocab(8), train.Process(0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=vocab.size, hidden_size=32, num_hidden_layers=1))
    texts = ["a " * n for n in range(1, 30)]
    batch = data.Loader({"text": texts}, {"text": 1}, vocab, tokenizer, 4, 64).batch()
    batch.targets[0, 5:] = data.IGNORE          # rows with unlike numbers of targets
    batch.tasks[0] = 0
    ids, targets, positions, documents, tasks = batch
    nll, learned = model(ids, targets, positions, documents), targets != data.IGNORE
    (nll.sum() / learned.sum()).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    for parts in (1, 2, 4):
        model.zero_grad()
        sums, counts = train.forward_backward(model, batch, parts, 0.0, process).tolist()
        assert counts == [learned[0].sum().item(), 0, 0, 0, learned[1:].sum().item()]
        assert sums == pytest.approx([nll[0].sum().item(), 0, 0, 0, nll[1:].sum().item()], rel=1e-5)
        for p, grad in zip(model.parameters(), wanted):
            torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


def test_noise_swaps_codes_that_look_alike():
    """Noise reaches codes of another look, is repeated by no seed, or depends on the codebook's scale."""
    codebook = 7 * torch.tensor([[0.0, 0.0], [0.1, 0.1], [10.0, 10.0], [10.1, 10.1]])   # two pairs of twins
    codes = torch.arange(4).repeat(100).view(20, 20)

    def noisy(noise, seed=1):
        return train.perturb(codebook, noise, codes, torch.Generator().manual_seed(seed))
    assert torch.equal(noisy(0), codes) and 0.1 < (noisy(0.05) != codes).float().mean() < 0.5
    assert torch.equal(noisy(0.05) // 2, codes // 2) and not torch.equal(noisy(2.0) // 2, codes // 2)
    assert torch.equal(noisy(0.05), noisy(0.05)) and not torch.equal(noisy(0.05), noisy(0.05, seed=2))


# -----------------------------------------------------------------------------------------------------------
# Optimizers

def test_every_parameter_has_one_optimizer_at_its_rate():
    """A weight is stepped twice or never, a frozen one moves, or image rows learn at the rate of words."""
    model = Transformer(ModelConfig(image_rows=20, codebook=(16, 4)))
    model.model.norm.weight.requires_grad_(False)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    optimizers = train.make_optimizers(matrices, model.named_parameters(), 0.02, 1e-3, 0.5)
    rates = [(p, group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(rates) == len(dict(rates)) and dict(rates) == {
        p: 0.02 if any(p is m for m in matrices) else 0.5 if "image_rows" in name else 1e-3
        for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rows, columns, rank", [(20, 50, 20), (50, 20, 5), (20, 20, 1)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_their_vectors(rows, columns, rank):
    """Any other orthogonal matrix, a transposed one, or noise where a gradient has no rank."""
    torch.manual_seed(0)
    (u, _), (v, _) = (torch.linalg.qr(torch.randn(2, n, rank)) for n in (rows, columns))
    g = u @ torch.diag(torch.linspace(3, 0.3, rank)) @ v.mT
    x = train.orthogonalize(g)
    values = (u.mT @ x @ v).diagonal(dim1=1, dim2=2)                # (2, rank)
    assert 0.6 < values.min() and values.max() < 1.25
    torch.testing.assert_close(u @ torch.diag_embed(values) @ v.mT, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(train.orthogonalize(g[:1]), x[:1], atol=1e-5, rtol=0)    # alone as well


def test_muon_moves_along_its_momentum(monkeypatch):
    """The last gradient alone counts, a tall matrix moves too little, or at another rate than its group's."""
    monkeypatch.setattr(train, "orthogonalize", lambda g: g)
    for shape, size in (((4, 2), 2 ** 0.5), ((2, 4), 1.0), ((8, 1, 1, 2), 2.0)):
        p, momentum, wanted = torch.nn.Parameter(torch.zeros(shape)), torch.zeros(shape), torch.zeros(shape)
        muon = train.Muon([p], lr=0.1, momentum=0.9)
        for step in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            momentum = 0.9 * momentum + 0.1 * p.grad
            wanted -= 0.1 * size * (0.1 * p.grad + 0.9 * momentum)
            muon.step()
        torch.testing.assert_close(p.detach(), wanted)


@pytest.mark.schedule
def test_schedule_rises_stays_and_falls_to_zero():
    """A first step at full speed, a rate that falls too early, or a run that never settles at its end."""
    rates = [train.schedule(step, 100, decay=0.5, warmup=0.1) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == 1 and rates[100] == pytest.approx(0)
    assert rates[50:] == sorted(rates[50:], reverse=True)


# -----------------------------------------------------------------------------------------------------------
# Published models

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""


def published(folder, tied):
    """A tiny random Qwen 2 with a byte-level tokenizer, as transformers writes it; 11 rows are padding."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                         chat_template=CHATML).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=tied, eos_token_id=258,
        bos_token_id=256)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part, tied", [("all", True), ("rows", False)])
def test_a_published_model_is_extended_trained_exported_and_sampled(few, tmp_path, part, tied):
    """Words move with --train rows, image rows do not learn, or nobody else can open what is exported."""
    transformers = pytest.importorskip("transformers")
    source, out, folder = published(tmp_path / "qwen", tied), tmp_path / "run", tmp_path / "export"
    train.main(flags(out, init=source, train=part, context=256))
    start = Transformer.from_pretrained(source)
    start.extend_vocab(20, train.seeded(0, 0))
    old, new = start.state_dict(), saved(out)["model"]
    assert old.keys() == new.keys() and len([name for name in new if "image_rows" in name]) == 2 - tied
    for name in old:
        assert torch.equal(old[name], new[name]) == (part == "rows" and "image_rows" not in name), name
    run = sample.load(out, device="cpu")
    assert (run.vocab.bos, run.vocab.eos, run.vocab.image_start, run.vocab.boi) == (256, 258, 270, 286)

    sample.main(["export", str(folder), "--run", str(out), "--device", "cpu"])
    again, picture = sample.load(folder, device="cpu"), Image.new("RGB", (64, 64))
    assert again.vocab == run.vocab and again.sampling == run.sampling == sample.LIQUID
    drawn, said = ([f(r) for r in (run, again)] for f in (
        lambda r: sample.text_to_image(r, ["a red circle"])[0].tobytes(),
        lambda r: sample.answer(r, [picture], ["what?"], n=5)))
    assert drawn[0] == drawn[1] and said[0] == said[1]
    config = [json.loads((place / "config.json").read_text()) for place in (source, folder)]
    assert config[1] == config[0] | {"vocab_size": 290}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.get_input_embeddings().weight[:270], new["model.embed_tokens.weight"])
    ids = torch.tensor([[1, 2, 280]])
    torch.testing.assert_close(theirs(ids).logits, again.model(ids), atol=1e-4, rtol=1e-4)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(place) for place in (source, folder)]
    turns = [{"role": "user", "content": "é?"}]
    assert len({tuple(t.apply_chat_template(turns, tokenize=True)["input_ids"]) for t in tokenizers}) == 1


def test_a_hub_name_is_downloaded_and_a_failure_is_one_sentence(tmp_path, monkeypatch):
    """A hub name is taken for a folder, or a traceback comes out of the network."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    assert data.fetch("google/gemma-3-270m") == tmp_path / "google/gemma-3-270m"
    monkeypatch.setattr(hub, "snapshot_download", None)         # whatever it raises
    with pytest.raises(ValueError, match="google/gemma-3-270m"):
        data.fetch("google/gemma-3-270m")
