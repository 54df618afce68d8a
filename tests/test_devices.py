"""The same on each device of this machine: CPU, and CUDA and MPS where they are. CI has CPUs alone."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from model import flex_runs
from test_sample import NEGATIVES, PROMPTS, SHAPES, slowly, tiny
from test_train import few, flags, losses_of, own_pictures, run  # noqa: F401
from vqgan import VQGAN, Discriminator, VQGANConfig

ROOT = Path(__file__).parent.parent
everywhere = pytest.mark.parametrize("name", SHAPES)


def near(x, y, tolerance=1e-3):
    torch.testing.assert_close(x.double().cpu(), y.double().cpu(), atol=tolerance, rtol=tolerance)


@everywhere
def test_loss_and_gradients_are_those_of_double_precision(device, name):
    """A kernel of a device that computes something else, or a tensor that stays on the CPU."""
    exact = tiny(**SHAPES[name]).double()
    model = copy.deepcopy(exact).float().to(device)
    ids, targets = torch.randint(50, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    targets[0, ::3] = data.IGNORE
    for each, place in ((exact, "cpu"), (model, device)):
        each(ids.to(place), targets.to(place)).sum().backward()
    near(model(ids.to(device)), exact(ids))
    for p, q in zip(model.parameters(), exact.parameters()):
        near(p.grad / q.grad.norm(), q.grad / q.grad.norm())


@pytest.mark.parametrize("d", [8, 64])
@everywhere
def test_packed_rows_equal_examples_alone_with_gradients(device, name, d):
    """FlexAttention's kernels see a neighbour, or their backward does; heads of 8 are not for them."""
    model = tiny(**SHAPES[name], head_dim=d).to(device)
    assert flex_runs(device, d) <= (device.type == "cuda" and d == 64)
    ids = torch.randint(50, (1, 200), generator=torch.Generator().manual_seed(0)).to(device)
    documents = (torch.arange(200, device=device) >= 130).long()[None]
    positions = torch.arange(200, device=device)[None] - 130 * documents
    model(ids, ids, positions, documents).sum().backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in ids.split([130, 70], dim=1):
        model(part, part).sum().backward()
    for p, grad in zip(model.parameters(), packed):
        near(grad / p.grad.norm(), p.grad / p.grad.norm(), 1e-2)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@everywhere
@torch.no_grad()
def test_guided_drawings_are_those_of_the_cpu_without_a_cache(device, name, compiled):
    """The cache, its mask or a CUDA graph shows other keys, or guidance mixes rows."""
    model = tiny(**SHAPES[name])
    wanted = [slowly(model, p, 7, (10, 50), q, 3.0) for p, q in zip(PROMPTS, NEGATIVES)]
    args = model.to(device), PROMPTS, 7, (10, 50), NEGATIVES, 3.0, 0
    assert sample.generate(*args, compile=compiled).tolist() == wanted


def test_a_step_of_act_1_is_that_of_a_cpu_with_channels_first(device):
    """A loss, a code or a gradient of the tokenizer that a device, bf16 or channels last change."""
    torch.manual_seed(0)
    exact = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, n_embed=32, embed_dim=8))
    exact.quantize.embedding.weight.data *= 32
    pixels, process = torch.rand(2, 3, 16, 16) * 2 - 1, train.Process(0, 1, device)
    model = copy.deepcopy(exact).to(device, memory_format=torch.channels_last)
    codes = model.encode(pixels.to(device)).cpu()
    assert (codes == exact.encode(pixels)).float().mean() > 0.9
    near(model.decode(codes.to(device)), exact.decode(codes), 2e-2)
    alone = train.Process(0, 1, torch.device("cpu"))
    mine = train.tokenizer_step(model, pixels.to(device), False, None, Discriminator(8, 1).to(device), 0.0, process)
    wanted = train.tokenizer_step(exact, pixels, False, None, None, 0.0, alone)
    near(mine[1], wanted[1], 2e-2)
    whole = [torch.cat([p.grad.flatten().double().cpu() for p in each.parameters()]) for each in (model, exact)]
    assert torch.cosine_similarity(*whole, dim=0) > 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu_before_its_losses_are_read():
    """A size or a flag that the host asks for: the GPU stands still in each part of a batch."""
    process, model = train.Process(0, 1, torch.device("cuda")), tiny(vocab_size=60, head_dim=16).cuda()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    optimizers = train.make_optimizers(matrices, model.named_parameters(), 1e-3, 1e-3)
    ids = torch.randint(60, (4, 64), generator=torch.Generator().manual_seed(0))
    batch = data.Batch(ids, ids, torch.arange(64).expand(4, 64), torch.zeros_like(ids), torch.zeros_like(ids))
    for mode in ("default", "default", "error"):        # once compiled, and with its optimizers' states
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train.forward_backward(model, batch, 2, 0.0, process)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            train.step_all(optimizers, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_run_learns_what_it_learns_on_a_cpu(device, few, tmp_path):  # noqa: F811
    """An act stops on a GPU, or its bf16 drifts; --resume and the scores run there, too."""
    curves = {}
    for place in {"cpu", device.type}:
        scores = run(tmp_path / place, device=place, eval_n=2, checkpointing=True, accumulate=2, adversarial=0.5)
        assert scores["text_bits_per_byte"] > 0
        run(tmp_path / place, device=place, resume=True)
        curves[place] = losses_of(tmp_path / place)
    assert curves[device.type] == pytest.approx(curves["cpu"], rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("shard", ["--no-shard", "--shard"])
def test_two_gpus_learn_what_one_does(tmp_path, shard):
    """NCCL waits for a process that went another way, or shards are not those of gloo."""
    source = own_pictures(tmp_path / "own")
    for name, number in (("one", 1), ("two", 2)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number),
                   "train.py", *flags(tmp_path / name, data=source, device="cuda", eval_every=2, eval_n=2), shard]
        subprocess.run(command, cwd=ROOT, check=True, timeout=600, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=0.1)
