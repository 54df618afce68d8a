"""Many processes make what one makes: gradients, loss curves, checkpoints, files; and what memory and speed are said to be."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import data
import memory
import sample
import train
from model import ModelConfig, Transformer
from vqgan import VQGAN, VQGANConfig

ROOT = Path(__file__).parent.parent
SMALL = ModelConfig(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8, codebook_dim=4,
                    codebook_size=21)


def small():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    model.model.image_rows.start(torch.randn(21, 4))
    return model


def rows():
    """ids and targets (4, 16); the rows have different numbers of targets, one has none."""
    ids, targets = torch.randint(0, 101, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    targets[0, 3:], targets[2] = data.IGNORE, data.IGNORE
    return ids, targets


def alone():
    return train.Process(0, 1, torch.device("cpu"))


def start(rank, function, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    function(folder)
    dist.destroy_process_group()


def two_processes(function, folder):
    torch.multiprocessing.spawn(start, (function, folder), 2)


def test_checkpointing_computes_blocks_twice_and_changes_no_gradient():
    """A flag that does nothing, or a recomputation that differs."""
    ids, targets = rows()
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = small()
        model.model.layers[1].mlp.act = lambda x: calls.append(checkpointing) or torch.nn.functional.silu(x)
        nll = train.parallel(train.Config(checkpointing=checkpointing), model, alone())(ids, targets)
        nll.sum().backward()
        gradients.append([nll, *(p.grad for p in model.parameters())])
    assert calls == [False, True, True] and all(map(torch.equal, *gradients))


def gradients_of_two(folder):
    """The clipped gradients of two processes must be those of one, however they are laid out, in two parts each."""
    process, (ids, targets) = train.Process(dist.get_rank(), 2, torch.device("cpu")), rows()
    total, one = (targets != data.IGNORE).sum(), small()
    (one(ids, targets).sum() / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    for flags in (dict(), dict(shard=True), dict(shard=True, checkpointing=True)):
        model = small()
        wide = train.parallel(train.Config(**flags), model, process)
        for i in (process.rank, process.rank + 2):
            (wide(ids[i:i + 1], targets[i:i + 1]).sum() * 2 / total).backward()
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, train.DTensor) == bool(flags)
        assert torch.allclose(train.full(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)), norm)
        for p, q in zip(model.parameters(), one.parameters()):
            assert torch.allclose(train.full(p.grad), q.grad, atol=1e-7)
        with train.gathered_weights(model):         # the first alone may use the model, as it does when it draws
            assert process.rank or torch.allclose(model(ids), one(ids), atol=1e-5)


def test_gradients_of_two_processes_are_those_of_one_with_and_without_shards(tmp_path):
    """Gradients averaged or not reduced at all (the table is used outside of every block), or a norm of one shard only."""
    two_processes(gradients_of_two, tmp_path)


TINY = dict(vq_steps=6, vq_batch=4, vq_restart_every=2, ch=32, ch_mult=(1,), patch=16, res_blocks=1, z_channels=8, codes=16,
            steps=6, rows=4, hidden_size=32, layers=2, heads=2, words=64, save_every=3, eval_every=6, log_every=1,
            eval_n=0, device="cpu")


def few_scenes(*source, full=data.built_in):
    splits = full(*source, train=40, val=5, unseen=2)
    return {name: split._replace(texts=split.texts[::40]) for name, split in splits.items()}


def train_run(out, **flags):
    """Train, and keep a copy of the run as it stood after half of the transformer's steps: OUT-half."""
    save, data.built_in = data.save_atomically, few_scenes
    def save_and_copy(value, path):
        save(value, path)
        if Path(path).name == "model.pt" and value["step"] == 3:
            shutil.copytree(out, f"{out}-half", dirs_exist_ok=True)
    data.save_atomically = save_and_copy
    train.train(train.Config(**{**TINY, "out": str(out), **flags}))
    data.save_atomically = save


def runs_of_two(folder):
    train_run(folder / "two", accumulate=2)
    train_run(folder / "shard", shard=True, accumulate=2)
    train_run(folder / "one-half", shard=True, resume=True)


def losses(out, act):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [value for line in lines if line["act"] == act
            for key, value in line.items() if key in ("loss", "norm", "codes_used") or key.startswith("val")]


@pytest.mark.slow
def test_two_processes_make_the_curves_and_checkpoints_of_one(tmp_path, monkeypatch):
    """In all acts and layouts: repeated examples, a mean of means, restarts that differ, states of a half of a matrix only."""
    monkeypatch.setattr(data, "built_in", few_scenes)
    train_run(tmp_path / "one")
    two_processes(runs_of_two, tmp_path)
    train_run(tmp_path / "shard-half", resume=True)         # what two saved cut up, one continues
    for name in ("two", "shard", "shard-half", "one-half"):
        for act in (1, 3):
            assert losses(tmp_path / name, act) == pytest.approx(losses(tmp_path / "one", act), rel=2e-3), (name, act)
        for file in ("vqgan.pt", "model.pt"):
            a, b = (torch.load(tmp_path / n / file, weights_only=True)["model"] for n in ("one", name))
            assert a.keys() == b.keys()
            assert max((a[k] - b[k]).abs().max() for k in a) < 5e-3, (name, file)


def test_meter_counts_the_products_that_pytorch_counts():
    """Against FlopCounterMode on full rows: a third of the whole is forward; the mask hides a half of attention."""
    model, T = Transformer(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=80)), 16
    ids = torch.zeros(2, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    products = counter.get_total_flops()
    seen = 2 * 2 * 4 * 8 * 4 * T * (T + 1) // 2                     # rows, layers, heads, d; 4 flops for each pair of positions
    all_pairs = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    meter = train.Meter(model, alone())
    meter.count(data.Batch(ids, ids, torch.arange(T).expand(2, T), ids, ids), 0.0)
    assert meter.flops == 3 * (products - all_pairs + seen)
    empty = torch.full((2, T), -1)
    meter.count(data.Batch(ids, empty - 99, ids, empty, empty), 0.5)
    assert meter.flops == 3 * (products - all_pairs + seen)        # padding earns nothing
    meter.since -= 1
    speed = meter.read()
    assert speed["padding"] == 0.5 and 0 < speed["mfu"] < 1 and 0.3 < speed["waiting"] <= 0.5


MEASURE = """
import memory, re, sys, torch, train
from dataclasses import replace
from model import ModelConfig, Transformer
config = ModelConfig(vocab_size=4000, hidden_size=256, intermediate_size=768, num_hidden_layers=6, head_dim=64)
checkpointing = sys.argv[1] == "True"
def peak():
    return 1024 * int(re.search("VmHWM:(.*)kB", open("/proc/self/status").read())[1])    # ru_maxrss is the parent's, too
def steps(config, context):
    model = Transformer(config)
    wide = train.parallel(train.Config(checkpointing=checkpointing), model, train.Process(0, 1, torch.device("cpu")))
    optimizers = train.make_optimizers([], model.parameters(), 0, 1e-3)
    for _ in range(2):
        ids = torch.randint(0, config.vocab_size, (4, context))
        wide(ids, ids).sum().backward()
        train.step_all(optimizers)
steps(replace(config, vocab_size=64, num_hidden_layers=1), 8)
before = peak()
steps(config, 256)
measured = peak() - before
print(measured / memory.memory(config, 4, 256, checkpointing=checkpointing, mixed=False))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_on_paper_is_the_measured_peak(checkpointing):
    """Within a quarter, on a CPU whose malloc gives large freed pieces back."""
    env = dict(os.environ, PYTHONPATH=str(ROOT / "tests"), OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="1000000")
    ratio = subprocess.check_output([sys.executable, "-c", MEASURE, str(checkpointing)], cwd=ROOT, env=env, text=True)
    assert 0.75 < float(ratio) < 1.25


def test_shards_and_checkpointing_save_what_they_are_for():
    """Memory on paper that --shard or --checkpointing does not change, or that differs from count to count."""
    config = ModelConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=8, head_dim=64)
    plain, shards, checkpointed = (memory.memory(config, 4, 256, **kw) for kw in
                                   (dict(world=8), dict(world=8, shard=True), dict(world=8, checkpointing=True)))
    states = 16 * sum(p.numel() for p in Transformer(config).parameters())
    assert plain > states and shards < plain - states / 2 and checkpointed < plain
    kept = [memory.kept_by_block(config, 1, 128, torch.float32, torch.float32) for _ in range(2)]
    assert kept[0] == kept[1] and kept[0] % 128 == 0


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A tiny random model of words and 2x2 codes, which sample.py finds instead of a run folder."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4, patch=8)).eval()
    tokenizer = data.WordTokenizer.learn(["a red circle " * 3, data.DRAW * 3, data.CAPTION * 3])
    vocab = tokenizer.vocab(16)
    model = Transformer(ModelConfig(vocab_size=vocab.size, hidden_size=32, intermediate_size=64, num_hidden_layers=1)).eval()
    monkeypatch.setattr(sample, "load", lambda *_: sample.Run(model, vqgan, vocab, tokenizer, (2, 2), False, {}))
    for i in range(5):
        data.scenes(5, 0, "own")[i].open().save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "prompts.txt").write_text("a\nred\n\ncircle\na circle\na red circle\n")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def alike(a, b):
    """The same files; sums in batches of another size may move a pixel by one level."""
    def pixels(raw):
        return np.asarray(data.load_image(io.BytesIO(raw)), int)
    return a.keys() == b.keys() and all(a[name] == b[name] or a[name][:4] == b[name][:4] == b"\x89PNG" and
                                        abs(pixels(a[name]) - pixels(b[name])).max() <= 1 for name in a)


@pytest.mark.parametrize("argv", [["t2i", "--prompts", "prompts.txt"], ["i2t", ".", "--n", "4", "--temperature", "1"]])
def test_bulk_work_is_shared_out_and_continued_to_the_same_files(run, monkeypatch, argv):
    """Work done twice or never, files cut short by an interruption, or draws that depend on which process made them."""
    monkeypatch.chdir(run)
    sample.main([*argv, "--save-dir", "whole"])
    assert len(contents(run / "whole")) == 5
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        sample.main([*argv, "--save-dir", "parts"])
        assert len(contents(run / "parts")) in (2, 3, 5)
    assert alike(contents(run / "parts"), contents(run / "whole"))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "0")
    first, second, *_ = sorted((run / "parts").iterdir())
    first.write_bytes(b"kept")
    second.unlink()
    second.with_name(second.name + ".partial").write_bytes(b"half")
    sample.main([*argv, "--save-dir", "parts"])
    assert alike(contents(run / "parts"), contents(run / "whole") | {first.name: b"kept"})


def test_encoding_with_workers_names_each_broken_file_and_keeps_the_order(tmp_path):
    """Codes that slip to the next picture when one cannot be read."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4, patch=8)).eval()
    for i, p in enumerate(data.scenes(6, 0, "own")):
        p.open().save(tmp_path / f"{i}.png")
    for name in ("0", "3"):
        (tmp_path / f"{name}.png").write_text("no picture")
    pictures, cfg = data.read_folder(tmp_path), train.Config(image_size=16, workers=2)
    train.encode_shard(cfg, vqgan, pictures, tmp_path / "codes.pt", "x", torch.device("cpu"))
    shard, skipped = data.read_shard(tmp_path / "codes.pt", "x")
    assert [Path(name).stem for name in skipped] == ["0", "3"]
    assert [Path(p.name).stem for p in shard] == ["1", "2", "4", "5"]
    for p in shard:
        alone = vqgan.encode(data.to_pixels(data.fit(data.load_image(p.name), 16)))[0]
        assert torch.equal(p.codes.long(), alone)
