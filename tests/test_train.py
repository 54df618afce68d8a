"""The three acts on settings so small that they take seconds, and the whole story once in the slow suite."""

import json
import math
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

TINY = dict(vq_steps=6, vq_batch=4, vq_restart_every=2, ch=32, ch_mult=(1,), patch=16, res_blocks=1, z_channels=8, codes=16,
            steps=6, rows=4, hidden_size=32, layers=1, heads=2, words=64, save_every=3, eval_every=6, log_every=1,
            eval_n=2, device="cpu")


@pytest.fixture
def few(monkeypatch):
    """Built-in scenes, but few of them."""
    full = data.built_in
    monkeypatch.setattr(data, "built_in", lambda *source: shortened(full(*source, train=40, val=4, unseen=2)))


def shortened(splits):
    return {name: split._replace(texts=split.texts[::40]) for name, split in splits.items()}


def weights(run, name="model.pt"):
    return torch.load(Path(run) / name, weights_only=True)["model"]


def test_all_acts_fill_the_run_folder_with_what_the_readme_promises(few, tmp_path, capsys):
    """A file or a score that the README names and nobody writes, or that sampling cannot read back."""
    scores = train.train(train.Config(out=str(tmp_path), **TINY))
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set("model optimizer step config model_config vocab tokenizer data random_state".split()) <= set(checkpoint)
    assert torch.load(tmp_path / "vqgan.pt", weights_only=True)["step"] == 6
    assert (tmp_path / "samples" / "reconstructions.png").exists() and (tmp_path / "samples" / "drawn-000006.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["act"] for line in lines} == {1, 3, 4} and lines[-1]["scores"] == scores
    wanted = """t2i_exact t2i_objects t2i_unseen_combinations caption_exact vqa text_bits_per_byte reconstruction_exact
                reconstruction_psnr codes_used n"""
    assert set(wanted.split()) <= set(scores)
    capsys.readouterr()
    sample.main(["eval", "--run", str(tmp_path), "--n", "2", "--device", "cpu"])        # the folder alone is enough
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {k: round(v, 4) if type(v) is float else v for k, v in scores.items()}
    assert [line.split()[0] for line in table] == list(scores)


def test_flags_reach_training_and_noise_nothing_that_is_scored(few, tmp_path, monkeypatch):
    """A flag that --help explains and training ignores; pictures padded in training and cropped afterwards."""
    made, rates, fitted = [], [], []
    loader, schedule, fit = data.Loader, train.schedule, data.fit
    monkeypatch.setattr(data, "Loader", lambda *args, **options: made.append(loader(*args, **options)) or made[-1])
    monkeypatch.setattr(train, "schedule", lambda step, steps, warmup, decay: rates.append(warmup) or schedule(step, steps, warmup, decay))
    monkeypatch.setattr(data, "fit", lambda image, size, pad=False: fitted.append(pad) or fit(image, size, pad))
    train.train(train.Config(out=str(tmp_path), **TINY | dict(uncond=0.7, warmup=0.5, pad=True)))
    training, *others = made
    assert training.uncond == 0.7 and rates[-1] == 0.5 and fitted and all(fitted)
    assert training.perturb and others and not any(other.perturb or other.uncond for other in others)
    assert json.loads((tmp_path / "config.json").read_text())["code_noise"] == 0.3          # the default with scenes


def test_same_seed_same_weights_and_another_seed_others(few, tmp_path):
    """A run that nobody can repeat, or --seed that changes nothing."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(train.Config(out=str(tmp_path / name), **{**TINY, "seed": seed, "eval_n": 0}))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(a[k].shape != c[k].shape or not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("act", [1, 3])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(few, tmp_path, monkeypatch, act):
    """Lost optimizer state, a replayed or skipped batch, or a log with lines twice."""
    cfg = dict(TINY, eval_n=0)
    train.train(train.Config(out=str(tmp_path / "whole"), **cfg))
    save, calls = data.save_atomically, []

    def dies(value, path):
        save(value, path)
        calls.append(path)
        if Path(path).name == {1: "vqgan.pt", 3: "model.pt"}[act] and value["step"] == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(data, "save_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(train.Config(out=str(tmp_path / "cut"), **cfg))
    monkeypatch.setattr(data, "save_atomically", save)
    train.train(train.Config(out=str(tmp_path / "cut"), **cfg, resume=True))
    for name in ("vqgan.pt", "model.pt"):
        a, b = weights(tmp_path / "whole", name), weights(tmp_path / "cut", name)
        assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "cut")]
    steps = [[(x["act"], x["step"], x.get("loss")) for x in lines] for lines in logs]
    assert steps[0] == steps[1]


# ---------------------------------------------------------------------------------------------------------------------
# One act alone

def first_act(out, **options):
    """-> the tokenizer after act 1 on 40 pictures of 32x32 pixels."""
    pictures = data.scenes(40, 0, "own", 32)
    cfg = train.Config(out=str(out), **{**TINY, "image_size": 32, "workers": 0, "eval_every": 1000, **options})
    splits, process = {"train": data.Split(pictures, [])}, train.set_up(cfg)
    out.mkdir(exist_ok=True)
    return train.train_tokenizer(cfg, splits, process, train.Log(out / "log.jsonl", process))


def test_the_codebook_starts_from_k_means_and_unused_codes_come_back(tmp_path, monkeypatch):
    """A codebook far from every vector, or codes that nothing was assigned to and that stay so."""
    events, start, restart, forward = [], train.start_codebook, train.restart_codes, VQGAN.forward

    def starts(cfg, model, pictures, process):
        start(cfg, model, pictures, process)
        seen = model.encode(torch.cat([data.to_pixels(p.open()) for p in pictures]))
        events.append("start")
        assert len(seen.unique()) > 0.9 * cfg.codes

    def restarts(cfg, model, pixels, counts, step, process):
        before, dead = model.quantize.embedding.weight.detach().clone(), counts == 0
        restart(cfg, model, pixels, counts, step, process)
        moved = model.quantize.embedding.weight.detach()
        events.append(f"restart {step}")
        assert dead.any() and torch.equal((moved != before).any(1), dead)
        near = torch.cdist(moved[dead], model.quantize.vectors(model.latents(pixels))).min(1).values
        assert near.max() < 1e-3        # of the batch

    def step(self, pixels, quantize=True):
        events.append("codes" if quantize else "vectors")
        return forward(self, pixels, quantize)
    monkeypatch.setattr(train, "start_codebook", starts)
    monkeypatch.setattr(train, "restart_codes", restarts)
    monkeypatch.setattr(VQGAN, "forward", step)
    first_act(tmp_path, codes=64, vq_steps=8, vq_continuous=0.25)
    assert events == ["vectors"] * 2 + ["start"] + ["codes"] * 2 + ["restart 3"] + ["codes"] * 2 + ["restart 5"] + \
        ["codes"] * 2           # no code comes back in the last quarter, which would leave it untrained


class Likes(torch.nn.Module):
    """A discriminator that takes bright pictures for real, or dark ones, whatever it is told."""
    def __init__(self, sign):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(sign)))

    def forward(self, pixels):
        return pixels.mean((1, 2, 3)) * self.weight


def test_the_generator_is_pulled_to_what_the_discriminator_likes(tmp_path, monkeypatch):
    """A sign: a generator that learns to be found out."""
    options, biases = dict(vq_steps=1, adversarial=10.0, adversarial_start=0.0), []
    for sign in (1, -1):
        monkeypatch.setattr(train, "Discriminator", partial(Likes, sign))
        biases.append(first_act(tmp_path / str(sign), **options).decoder.conv_out.bias)
    assert (biases[0] > biases[1]).all()        # after a step, pictures are brighter or darker


def test_an_adversarial_act_resumes_bit_for_bit(tmp_path, monkeypatch):
    """A discriminator, or its optimizer, that begins anew with every job of a queue."""
    save = data.save_atomically
    monkeypatch.setattr(train, "Discriminator", partial(Discriminator, ch=8, layers=2))

    def dies(value, path):
        save(value, path)
        if value["step"] == 4:
            raise KeyboardInterrupt
    options = dict(adversarial=0.5, adversarial_start=0.25, save_every=4)       # from the second of 6 steps on
    first_act(tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "save_atomically", dies)
        first_act(tmp_path / "cut", **options)
    first_act(tmp_path / "cut", **options, resume=True)
    whole, cut = (torch.load(tmp_path / name / "vqgan.pt", weights_only=True) for name in ("whole", "cut"))
    for key in ("model", "discriminator", "optimizer", "counts"):
        torch.testing.assert_close(cut[key], whole[key], rtol=0, atol=0)
    assert len(whole["optimizer"]) == 3 and whole["discriminator"]["main.3.num_batches_tracked"] > 0


def test_the_perceptual_loss_reaches_the_step(tmp_path, monkeypatch):
    """--perceptual that is loaded and not added."""
    class Brightness(torch.nn.Module):
        def __init__(self, path):
            super().__init__()

        def forward(self, drawn, real):
            return drawn.mean()
    monkeypatch.setattr(train, "Perceptual", Brightness)
    a, b = (first_act(tmp_path / str(p), perceptual=p, vq_steps=1, vq_continuous=1.0) for p in (None, "some.pt"))
    assert not torch.equal(a.decoder.conv_out.weight, b.decoder.conv_out.weight)


def third_act(out, **options):
    """-> weights and log after one step of act 3 on random codes."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4, patch=16))
    pictures = [data.Picture(str(i), None, [f"{i}"], [], torch.randint(0, 16, (2, 2))) for i in range(20)]
    splits = {"train": data.Split(pictures, ["hello"]), "val": data.Split(pictures[:0], ["hello"])}
    cfg = train.Config(out=str(out), **{**TINY, "steps": 1, "context": 64, **options})
    process = train.set_up(cfg)
    out.mkdir()
    train.train_transformer(cfg, splits, vqgan, process, train.Log(out / "log.jsonl", process))
    return weights(out), json.loads((out / "log.jsonl").read_text().splitlines()[0])


def test_flags_of_the_loss_and_the_optimizers_reach_the_step(tmp_path):
    """A flag that --help explains and training ignores."""
    plain, log = third_act(tmp_path / "plain")
    stable, other = third_act(tmp_path / "z", z_loss=0.1)
    rows = len(plain["model.embed_tokens.weight"]) + 16
    assert other["loss"] - log["loss"] == pytest.approx(0.1 * math.log(rows) ** 2, rel=0.02)    # logsumexp^2
    assert not torch.equal(stable["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    never, far = (third_act(tmp_path / str(clip), clip=clip)[0] for clip in (0.0, 1e9))
    torch.testing.assert_close(never, far)      # no clipping, in place of no gradient
    tight = third_act(tmp_path / "tight", clip=1e-12)[0]        # so small that AdamW's epsilon shows it
    assert not torch.allclose(tight["model.embed_tokens.weight"], never["model.embed_tokens.weight"], atol=1e-4)
    for optimizer in ("muon", "adamw"):
        free, half, whole = (third_act(tmp_path / f"{optimizer}-{decay}", optimizer=optimizer, weight_decay=decay)[0]
                             for decay in (0.0, 50.0, 100.0))
        for name, w in free.items():
            torch.testing.assert_close(half[name], (w + whole[name]) / 2)       # less lr * decay * what it was
            assert half[name].norm() < w.norm() or w.ndim < 2 or "codebook" in name, name


def test_rows_from_a_codebook_are_refused_for_a_model_that_has_rows():
    """`--init` that takes `--image_rows codebook` and passes over it."""
    splits = shortened(data.built_in(0, train=40, val=4, unseen=2))
    cfg = train.resolve(train.configure(["--init", "folder", "--image_rows", "codebook"]), splits)
    with pytest.raises(ValueError, match="--image_rows codebook: the model of --init"):
        train.check(cfg, splits, 1)


class Built(Exception):
    """Carries the configuration of what was to be built."""


@pytest.mark.parametrize("argv", [[], *(["--data", "own", "--preset", name] for name in train.PRESETS)], ids=" ".join)
def test_every_preset_fits_together(tmp_path, monkeypatch, argv):
    """A preset that stops, hours after it was started on a rented machine, at sizes that do not fit."""
    cfg = train.configure(["--out", str(tmp_path / "run"), *argv])
    picture = data.Picture("x", lambda: Image.new("RGB", (600, 500)), ["a"], [[("q", "a")]])
    splits = {"train": data.Split([picture] * 50, ["text"]), "val": data.Split([picture], ["text"])}
    cfg = train.resolve(cfg, splits)
    for world in (1, 8):
        train.check(cfg, splits, world)

    def built(config):
        raise Built(config)
    monkeypatch.setattr(train, "VQGAN", built)
    with pytest.raises(Built) as caught:
        train.train_tokenizer(cfg, splits, train.set_up(cfg), None)
    tokenizer = data.WordTokenizer([])
    with torch.device("meta"):
        vqgan = VQGAN(*caught.value.args)
        out = vqgan(torch.zeros(1, 3, cfg.image_size, cfg.image_size))
        model = train.build_model(cfg, tokenizer.vocab(cfg.codes), vqgan)
        logits = model(torch.zeros(1, out.codes.numel(), dtype=torch.long))
    assert out.pixels.shape[-1] == cfg.image_size and out.codes.numel() < cfg.context
    assert logits.shape[2] == tokenizer.size + cfg.codes


# ---------------------------------------------------------------------------------------------------------------------
# Steps

def batch_of(vocab, tokenizer, world=1, rank=0, rows=4):
    texts = ["a " * n for n in range(1, 30)]
    return data.Loader({"text": texts}, {"text": 1}, vocab, tokenizer, rows, 64, rank=rank, world=world).batch()


def test_accumulated_parts_add_up_to_the_whole_batch():
    """A mean of means weighs the targets of a short caption more than those of a drawing."""
    tokenizer = data.WordTokenizer(["a", " a"])
    vocab, process = tokenizer.vocab(8), train.Process(0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=vocab.size, hidden_size=32, num_hidden_layers=1))
    ids, targets, positions, documents, _ = batch = batch_of(vocab, tokenizer)
    targets[0, 5:] = data.IGNORE            # rows with unlike numbers of targets
    (model(ids, targets, positions, documents).sum() / (targets != data.IGNORE).sum()).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    for accumulate in (1, 2, 4):
        model.zero_grad()
        train.learn(train.Config(accumulate=accumulate), model, batch, process)
        for p, grad in zip(model.parameters(), wanted):
            torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


def test_one_batch_can_be_learned_by_heart():
    """A loss that does not fall: targets, masks or steps that do not belong together."""
    tokenizer = data.WordTokenizer([])
    vocab = tokenizer.vocab(32)
    torch.manual_seed(0)
    codes = torch.randint(0, 32, (4, 2, 2))
    pictures = [data.Picture(str(i), None, [f"{i}"], [[("what?", f"{i * i}")]], c) for i, c in enumerate(codes)]
    tasks = {"t2i": pictures, "i2t": pictures, "vqa": pictures, "text": ["hello", "world"]}
    batch = data.Loader(tasks, dict.fromkeys(tasks, 1), vocab, tokenizer, 4, 160, uncond=0.0).batch()
    model = Transformer(ModelConfig(vocab_size=vocab.size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                    head_dim=16))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    optimizers = train.make_optimizers(matrices, model.parameters(), 0.02, 1e-2)
    count = (batch.targets != data.IGNORE).sum()
    for _ in range(60):
        loss = model(batch.ids, batch.targets, batch.positions, batch.documents).sum() / count
        loss.backward()
        train.step_all(optimizers)
    assert loss < 0.35      # what is left is the choice among pictures, texts and digits that no prefix tells


def test_every_parameter_has_one_optimizer():
    """A weight that is stepped twice, or that never moves."""
    model = Transformer(ModelConfig(codebook_dim=4, codebook_size=16))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    optimizers = train.make_optimizers(matrices, model.parameters(), 0.02, 1e-3)
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("rows, columns", [(20, 50), (50, 20), (20, 20)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_their_vectors(rows, columns, rank):
    """Any other orthogonal matrix, a transposed one, or noise where a gradient has no rank."""
    torch.manual_seed(0)
    (u, _), (v, _) = (torch.linalg.qr(torch.randn(2, n, rank)) for n in (rows, columns))
    g = u @ torch.diag(torch.linspace(3, 0.3, rank)) @ v.mT
    x = train.orthogonalize(g)
    values = (u.mT @ x @ v).diagonal(dim1=1, dim2=2)                # (2, rank)
    assert 0.6 < values.min() and values.max() < 1.25
    torch.testing.assert_close(u @ torch.diag_embed(values) @ v.mT, x, atol=1e-4, rtol=0)       # and nothing besides
    torch.testing.assert_close(train.orthogonalize(g[:1]), x[:1], atol=1e-5, rtol=0)    # no matrix minds another


def test_schedule_rises_stays_and_falls_to_zero():
    """A first step at full speed, a rate that falls too early, or a run that never settles at its end."""
    rates = [train.schedule(step, 100, 0.1, 0.5) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == 1 and rates[100] == 0 and rates[50:] == sorted(rates[50:], reverse=True)


def test_muon_moves_along_its_momentum(monkeypatch):
    """A gradient of the last step alone, a tall matrix that moves too little, or a rate that is not the group's."""
    monkeypatch.setattr(train, "orthogonalize", lambda g: g)
    for shape, size in (((4, 2), 2 ** 0.5), ((2, 4), 1.0)):
        p, momentum, wanted = torch.nn.Parameter(torch.zeros(shape)), torch.zeros(shape), torch.zeros(shape)
        muon = train.Muon([p], lr=0.1, momentum=0.9)
        for step in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            momentum = 0.9 * momentum + 0.1 * p.grad
            wanted -= 0.1 * size * (0.1 * p.grad + 0.9 * momentum)
            muon.step()
        torch.testing.assert_close(p.detach(), wanted)


def tiny_flags():
    return [x for k, v in TINY.items() for x in (f"--{k}", ",".join(map(str, v)) if isinstance(v, tuple) else str(v))]


def test_a_run_is_not_overwritten_and_resume_refuses_other_flags(tmp_path, few):
    """A good run lost to a repeated command, or resumed at a width that it does not have."""
    out = ["--out", str(tmp_path / "run")]
    train.main(out + tiny_flags())
    with pytest.raises(SystemExit, match="--overwrite"):
        train.main(out + tiny_flags())
    with pytest.raises(SystemExit, match="--hidden_size"):
        train.main(out + ["--resume", "--hidden_size", "64"])
    before = weights(tmp_path / "run")
    train.main(out + ["--resume", "--eval_n", "0", "--accumulate", "2"])    # all acts are done: nothing changes
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "run").items())


def test_own_pictures_train_and_bad_ones_are_named(tmp_path, capsys):
    """One broken file among somebody's own pictures that ends the run, or is left out without a word."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, p in enumerate(data.scenes(8, 0, "own")):
        p.open().resize((50 + i, 40)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(p.captions[0])
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    scores = train.train(train.Config(out=str(tmp_path / "run"), data=str(folder), mix="t2i=1,i2t=1", **{**TINY, "workers": 0}))
    assert scores["t2i_exact"] is None and scores["reconstruction_psnr"] > 0
    assert "broken.png" in capsys.readouterr().out and "broken.png" in (tmp_path / "run" / "log.jsonl").read_text()


def pretrained_folder(folder):
    """A tiny random Qwen 2 with a byte-level tokenizer, as a Hugging Face folder."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    torch.manual_seed(0)
    Transformer(ModelConfig(model_type="qwen2", vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=16)).save_pretrained(folder)
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("part", ["all", "embeddings"])
def test_a_pretrained_model_is_extended_trained_exported_and_sampled(few, tmp_path, part):
    """Image rows that start inside the embedding's padding rows, frozen new rows, or an export that nobody can open."""
    folder, out = pretrained_folder(tmp_path / "qwen"), tmp_path / "run"
    flags = [f for f in tiny_flags() if f not in ("--words", "64")]
    train.main(["--init", str(folder), "--train", part, "--lr_adam", "1e-3", "--context", "256", "--out", str(out), *flags])
    old, new = Transformer.from_pretrained(folder).state_dict(), weights(out)
    table = new["model.embed_tokens.weight"]
    run = sample.load(out, device="cpu")
    assert run.vocab.image_start == 270 and run.vocab.boi == 258 and len(table) == 270 + 16
    assert len(set(table[270:, 0].tolist())) == 16
    spare = [run.vocab.boi, run.vocab.eoi, run.vocab.uncond]            # ids of the family that nothing had a use for
    if part == "embeddings":
        moved = (table[:270] != old["model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist()
        assert set(moved) <= set(spare) and run.vocab.boi in moved
        assert all(torch.equal(old[name], new[name]) for name in old if "layers" in name or "model.norm" in name)
    else:
        assert not any(torch.equal(old[name], new[name][:len(old[name])]) for name in list(old)[:2])
    sample.main(["export", str(tmp_path / "export"), "--run", str(out), "--device", "cpu"])
    again = sample.load(tmp_path / "export", device="cpu")
    assert again.vocab == run.vocab and again.sampling == sample.LIQUID and (tmp_path / "export" / "tokenizer.json").exists()
    drawn = [sample.text_to_image(r, ["a red circle"])[0].tobytes() for r in (run, again)]
    assert drawn[0] == drawn[1]
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[1, 2, 280]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (run.vocab.bos, run.vocab.eos)
    assert torch.allclose(theirs(ids).logits, again.model(ids), atol=1e-4)


def test_a_hub_name_is_downloaded_and_a_failure_is_one_sentence(tmp_path, monkeypatch):
    """A hub name taken for a folder, or a traceback out of the network."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    assert data.fetch("google/gemma-3-270m") == tmp_path / "google/gemma-3-270m"
    def fails(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(ValueError, match="google/gemma-3-270m"):
        data.fetch("google/gemma-3-270m")


@pytest.mark.slow
def test_the_whole_story(tmp_path, monkeypatch):
    """The README's first command with smaller networks and less of everything, under two minutes: an act that does not learn.

    Without noise on the codes, which takes longer to learn from than this.
    """
    monkeypatch.setattr(data, "built_in", partial(data.built_in, train=3000))
    train.main(["--out", str(tmp_path), "--ch", "32", "--vq_steps", "400", "--hidden_size", "96", "--steps", "260", "--eval_n", "50",
                "--mix", "t2i=8,i2t=1,vqa=2,text=1", "--code_noise", "0"])
    scores = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["scores"]
    assert scores["reconstruction_psnr"] > 20 and scores["codes_used"] > 200
    assert scores["t2i_code_accuracy"] > 0.5 and scores["t2i_objects"] > 0.1        # guessed: 1/512, and less than 1/100
    assert scores["vqa"] > 0.2 and scores["text_bits_per_byte"] < scores["text_bits_per_byte_unigram"]


def test_a_shard_holds_pictures_and_what_is_said_about_them(tmp_path):
    """A caption that its owner mended, and that training never hears of; a shard that is made again at every resume."""
    path, p = tmp_path / "x.pt", data.Picture("a", None, ["one"], [[("q", "a")]], torch.zeros(2, 2, dtype=torch.long))
    data.write_shard(path, [p], "f")
    assert train.holds(path, [p], "f") and not train.holds(path, [p], "g") and not train.holds(path, [p, p], "f")
    for changed in (dict(captions=["two"]), dict(talks=[]), dict(name="b")):
        assert not train.holds(path, [replace(p, **changed)], "f"), changed
    data.write_shard(path, [], "f", {"a": "torn"})
    assert train.holds(path, [p], "f") and not train.holds(path, [replace(p, name="b")], "f")


def test_only_training_steps_are_compiled(few, tmp_path, monkeypatch):
    """Drawing and k-means that ask for programs of their own, past a limit after which training itself is not compiled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    train.train(train.Config(out=str(tmp_path), **TINY | dict(compile=True, layers=3, vq_continuous=0.0, eval_every=2)))
    assert counter.frame_count == 2                 # one for all residual blocks, which are alike here, one for all layers
