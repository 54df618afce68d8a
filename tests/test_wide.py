"""Many processes make what one makes: gradients, runs, checkpoints, drawings; and the memory they need."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

import data
import memory
import sample
import train
from model import ModelConfig, Transformer
from test_train import TINY, equal, few_scenes, losses_of, published, run, saved
from vqgan import VQGAN, Discriminator, VQGANConfig

ROOT = Path(__file__).parent.parent


def start(rank, function, args, world):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{args[0]}/meeting", rank=rank, world_size=world)
    data.built_in = few_scenes
    function(train.start_process("cpu", train.Stop()), *args)
    dist.barrier()
    gc.collect()        # models in cycles keep the group: gloo's threads would abort a process that ends
    dist.destroy_process_group()
    (args[0] / "meeting").unlink(missing_ok=True)


def two_processes(function, *args, seconds=120, world=2):
    """function(process, *args) in two processes, whose first argument is a folder; they must end in time."""
    context = torch.multiprocessing.spawn(start, (function, args, world), world, join=False)
    until = time.time() + seconds
    try:
        while not context.join(1):
            assert time.time() < until, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()


# -----------------------------------------------------------------------------------------------------------
# Gradients

def small():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=80, image_rows=21, codebook=(17, 4), hidden_size=32,
                                    intermediate_size=48, num_hidden_layers=3, head_dim=8))
    model.model.embed_tokens.image_rows.start(torch.randn(17, 4))
    return model


def rows(*numbers):
    """Some of four rows of 16 positions; they have different numbers of targets, one has none."""
    ids, targets = torch.randint(0, 101, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    targets[0, 3:], targets[2] = data.IGNORE, data.IGNORE
    positions, tasks = torch.arange(16).expand(4, 16), torch.arange(4)[:, None].expand(4, 16)
    return data.Batch(*(x[list(numbers)] for x in (ids, targets, positions, torch.zeros_like(ids), tasks)))


def test_checkpointing_computes_blocks_twice_and_changes_no_gradient():
    """A flag that does nothing, or a recomputation that differs."""
    gradients, calls, process = [], [], train.Process(0, 1, torch.device("cpu"))
    for checkpointing in (False, True):
        model = small()
        model.model.layers[1].mlp.act = lambda x: calls.append(checkpointing) or torch.nn.functional.silu(x)
        wide = train.parallel(model, process, checkpointing=checkpointing)
        sums = train.forward_backward(wide, rows(0, 1, 2, 3), 1, 0.0, process)
        gradients.append([sums, *(p.grad for p in model.parameters())])
    assert calls == [False, True, True] and all(map(torch.equal, *gradients))


def gradients_of_two(process, folder):
    one, batch = small(), rows(process.rank, process.rank + 2)
    alone = train.Process(0, 1, process.device)
    wanted = train.forward_backward(one, rows(0, 1, 2, 3), 1, 0.1, alone).tolist()
    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    for flags in (dict(), dict(shard=True), dict(shard=True, checkpointing=True)):
        model = small()
        wide = train.parallel(model, process, **flags)
        sums, counts = train.forward_backward(wide, batch, 2, 0.1, process).tolist()
        assert counts == wanted[1] and sums == pytest.approx(wanted[0], rel=1e-5)
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, train.DTensor) == bool(flags)
        assert torch.allclose(train.unshard(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)), norm)
        for p, q in zip(model.parameters(), one.parameters()):
            assert torch.allclose(train.unshard(p.grad), q.grad, atol=1e-7)
        with train.unsharded(model):        # rank 0 alone may use the model, as it does when it draws
            assert process.rank or torch.allclose(model(batch.ids), one(batch.ids), atol=1e-5)
        if flags:
            moments_after_a_restart(model, process, folder / "model.pt")


def moments_after_a_restart(model, process, path):
    networks = {"model": (model, train.make_optimizers([], model.named_parameters(), 0.0, 0.0))}
    train.step_all(networks["model"][1], 1.0)
    train.save_checkpoint(path, process, networks, step=1)
    process.wait()
    assert train.restore(train.read_checkpoint(path, mmap=True), path, networks) == 1
    for state in networks["model"][1][0].state.values():
        part = state["exp_avg"].to_local()
        row = part[:1].nbytes           # the last shard may be padded to the rows of the others
        assert part.untyped_storage().nbytes() <= part.nbytes + row, "a view of the whole, which stays in memory"


def test_gradients_of_two_processes_are_those_of_one_with_and_without_shards(tmp_path):
    """Gradients are averaged wrongly or, of the table, not reduced; a norm is of a shard; moments stay whole."""
    two_processes(gradients_of_two, tmp_path)


# -----------------------------------------------------------------------------------------------------------
# Runs

def unreadable():
    raise ValueError("not a readable picture")


def first_act_of_two(process, folder):
    """Act 1 with all that it has; rank 1 has unreadable pictures now and then."""
    train.Discriminator = partial(Discriminator, ch=8, layers=2)
    train.CONTINUOUS, train.RESTART_EVERY = 0.2, 2
    broken = [data.Picture(str(i), unreadable) for i in range(8)]
    splits = {"train": data.Split(data.scenes(32, 0, "own", 32) + broken, [])}
    cfg = train.Config(**{**TINY, "out": str(folder), "image_size": 32, "vq_batch": 8, "codes": 64,
                          "vq_steps": 12, "adversarial": 0.5, "eval_every": 1000})
    cfg, vq_config = train.resolve(cfg, splits)
    model = train.train_tokenizer(cfg, vq_config, splits, process, train.Log(folder / "log.jsonl", process))
    torch.save(model.state_dict(), folder / f"{process.rank}.pt")


def test_the_tokenizers_of_all_processes_stay_the_same(tmp_path):
    """Codebooks drift apart: codes restart at each process's own vectors, or sums are rounded in two ways."""
    two_processes(first_act_of_two, tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    states.append(saved(tmp_path, "vqgan.pt")["model"])
    assert all(torch.equal(states[0][k], state[k]) for state in states for k in states[0])


def run_and_keep_half(out, **options):
    """Train, and keep a copy of the run as it stood after half of the transformer's steps: OUT-half."""
    save = data.save_atomically

    def save_and_copy(value, path):
        save(value, path)
        if path.name == "model.pt" and value["step"] == 3:
            shutil.copytree(out, f"{out}-half", dirs_exist_ok=True)
    data.save_atomically = save_and_copy
    run(out, **options)
    data.save_atomically = save


def runs_of_two(process, folder, options):
    run_and_keep_half(folder / "two", accumulate=2, **options)
    run_and_keep_half(folder / "shard", shard=True, **options)
    run(folder / "one-half", shard=True, resume=True, **options)


@pytest.mark.parametrize("init", [False, True], ids=["new", "published, --train rows"])
def test_two_processes_make_the_curves_and_checkpoints_of_one(tmp_path, monkeypatch, init):
    """They wait for each other once one has drawn, repeat examples, or save what others cannot open."""
    monkeypatch.setattr(data, "built_in", few_scenes)
    options = dict(layers=2, eval_every=2)
    if init:
        folder = published(tmp_path / "qwen", tied=False)
        options |= dict(init=str(folder), train="rows", optimizer="adamw", image_rows="free", context=256)
    run(tmp_path / "first", steps=1)
    options["vqgan"] = str(tmp_path / "first" / "vqgan.pt")     # act 1 of two rounds in other places
    run_and_keep_half(tmp_path / "one", **options)
    two_processes(runs_of_two, tmp_path, options)
    run(tmp_path / "shard-half", resume=True, **options)        # one goes on with what two had cut up
    one, curve = saved(tmp_path / "one"), losses_of(tmp_path / "one")
    for name in ("two", "shard", "shard-half", "one-half"):
        other = saved(tmp_path / name)
        assert losses_of(tmp_path / name) == pytest.approx(curve, rel=2e-3), name
        assert other["data"] == one["data"] and other["step"] == one["step"] == 6
        assert equal(other["model_optimizer"]["param_groups"], one["model_optimizer"]["param_groups"])
        for x, y in ((other["model"], one["model"]), (other["model_optimizer"]["state"],
                                                      one["model_optimizer"]["state"])):
            torch.testing.assert_close(x, y, atol=5e-3, rtol=1e-3)


# -----------------------------------------------------------------------------------------------------------
# Memory

def peak_of_opening(process, folder, shard):
    """-> folder/peaks: the bytes by which each process grows, at most, while it opens a published model."""
    def status(name):
        return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    cfg = train.Config(init=str(folder / "qwen"), shard=shard)
    transformers.AutoModelForCausalLM       # imports take memory, too
    train.parallel(small(), process, shard=shard)
    Path("/proc/self/clear_refs").write_text("5")       # forget the peak so far
    before = status("VmRSS")
    model = train.build_model(cfg, data.WordTokenizer([]).vocab(8), None, "cpu" if process.is_main else "meta")
    model = train.parallel(model, process, shard=shard)
    grown = process.gather(status("VmHWM") - before)
    if process.is_main:
        (folder / "peaks").write_text(json.dumps(grown))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_one_of_four_processes_reads_a_published_model_and_the_others_hold_their_shards(tmp_path):
    """Each process reads all of it: a 7B needs 255 GB on the host of 8 GPUs."""
    config = transformers.Qwen2Config(vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
                                      num_attention_heads=8, num_key_value_heads=8)
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "qwen")
    size = sum(p.nbytes for p in model.parameters())
    assert size > 100e6
    two_processes(peak_of_opening, tmp_path, True, world=4)
    first, *others = (peak / size for peak in json.loads((tmp_path / "peaks").read_text()))
    assert first < 2.5 and max(others) < 0.55       # the file's pages, weights and a shard; a shard and the table


MEASURE = """
import memory, re, sys, torch, train
from dataclasses import replace
from model import ModelConfig, Transformer
from vqgan import VQGAN, Discriminator, VQGANConfig
config = ModelConfig(vocab_size=4000, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                     head_dim=64)
act, checkpointing, process = sys.argv[1], sys.argv[2] == "True", train.Process(0, 1, torch.device("cpu"))
def peak():     # ru_maxrss would be the parent's, too
    return 1024 * int(re.search("VmHWM:(.*)kB", open("/proc/self/status").read())[1])
def steps(config, context):
    model = Transformer(config)
    wide = train.parallel(model, process, checkpointing=checkpointing)
    optimizers = train.make_optimizers([], model.named_parameters(), 0, 1e-3)
    for _ in range(2):
        ids = torch.randint(0, config.vocab_size, (4, context))
        wide(ids, ids).sum().backward()
        train.step_all(optimizers, 1.0)
def act_1(config, batch):
    model, adversary = VQGAN(config), Discriminator()
    train.prepare([x for x in model.modules() if isinstance(x, train.ResnetBlock)], False, checkpointing)
    train.tokenizer_step(model, torch.zeros(batch, 3, 64, 64), True, None, adversary, 0.5, process)
if act == "1":
    sizes = VQGANConfig(ch=32, ch_mult=(1, 2), z_channels=32, n_embed=64, embed_dim=32)
    act_1(sizes, 1)
    before = peak()
    act_1(sizes, 32)
    on_paper = memory.memory_of_act_1(sizes, 32, 64, checkpointing, mixed=False)
else:
    steps(replace(config, vocab_size=64, num_hidden_layers=1), 8)
    before = peak()
    steps(config, 256)
    on_paper = memory.memory(config, 4, 256, checkpointing=checkpointing, mixed=False)
print((peak() - before) / on_paper)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("act", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_on_paper_is_the_measured_peak(act, checkpointing):
    """A table says that a model fits which does not; malloc gives large pieces back, as a GPU's allocator."""
    env = dict(os.environ, PYTHONPATH=str(ROOT / "tests"), OMP_NUM_THREADS="1",
               MALLOC_MMAP_THRESHOLD_="1000000")
    command = [sys.executable, "-c", MEASURE, str(act), str(checkpointing)]
    assert 0.75 < float(subprocess.check_output(command, cwd=ROOT, env=env, text=True)) < 1.25


def test_shards_and_checkpointing_save_what_they_are_for():
    """--shard or --checkpointing does not change the memory on paper, or two counts differ."""
    config = ModelConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=8, head_dim=64)
    plain, shards, checkpointed = (memory.memory(config, 4, 256, world=8, **options)
                                   for options in ({}, {"shard": True}, {"checkpointing": True}))
    states = 16 * sum(p.numel() for p in Transformer(config).parameters())
    assert plain > states and shards < plain - states / 2 and checkpointed < plain
    kept = [memory.kept_by_block(config, 1, 128, torch.float32, torch.float32) for _ in range(2)]
    assert kept[0] == kept[1] and kept[0] % 128 == 0


# -----------------------------------------------------------------------------------------------------------
# Drawings

def test_drawings_are_shared_out_and_continued_to_the_same_files(tmp_path, monkeypatch):
    """Drawings are made twice or never, cut short by an interruption, or changed by who makes them."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=4))
    tokenizer = data.WordTokenizer([])
    vocab = tokenizer.vocab(16)
    model = Transformer(ModelConfig(vocab_size=vocab.image_start, image_rows=20, num_hidden_layers=1))
    loaded = sample.Run(model, vqgan.eval(), vocab, tokenizer, (2, 2), {})
    monkeypatch.setattr(sample, "load", lambda *_: loaded)
    (tmp_path / "prompts.txt").write_text("a\nred\n\ncircle\na circle\na red circle\n")

    def draw(folder, rank=0, world=1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        sample.main(["t2i", "--prompts", str(tmp_path / "prompts.txt"), "--save-dir", str(tmp_path / folder),
                     "--batch", "1"])           # in batches of other sizes a pixel may move by one level
        return {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.png")}
    whole = draw("whole")
    assert len(whole) == 5 and len(draw("parts", 0, 2)) == 3 and draw("parts", 1, 2) == whole
    first, second, *_ = sorted((tmp_path / "parts").glob("*.png"))
    first.write_bytes(b"kept")
    second.unlink()
    second.with_name(second.name + ".partial").write_bytes(b"half")
    assert draw("parts") == whole | {first.name: b"kept"}
