"""Will it fit? Memory of training on each GPU, on paper: PyTorch counts on tensors without data.

    python tests/memory.py      # the README's table
"""

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from model import NLL, Block, ModelConfig, Transformer, rope_angles  # noqa: E402
from vqgan import VQGAN, Discriminator, VQGANConfig  # noqa: E402


# -----------------------------------------------------------------------------------------------------------
# Act 1

class Peak(TorchDispatchMode):
    """The most bytes that the tensors made within it hold at a time."""
    now = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is not None and not hasattr(storage, "counted"):
                storage.counted = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.now += size
        self.most = max(self.most, self.now)


def memory_of_act_1(config, batch, side, checkpointing=False, mixed=True) -> float:
    """Bytes at the peak of a step with the adversary, for `batch` pictures on each device, not compiled."""
    process = SimpleNamespace(world=1, autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=mixed))
    with FakeTensorMode(), Peak() as peak:
        model, adversary = VQGAN(config), Discriminator()
        train.prepare([x for x in model.modules() if isinstance(x, train.ResnetBlock)], False, checkpointing)
        moments = [torch.empty_like(p) for network in (model, adversary) for p in network.parameters()]
        moments += [torch.empty_like(p) for p in adversary.parameters()]        # Muon needs one, AdamW two
        train.tokenizer_step(model, torch.zeros(batch, 3, side, side), True, None, adversary, 0.5, process)
    return peak.most


def print_memory_of_act_1():
    """GiB for each GPU, without / with --checkpointing."""
    print("| preset, 32 pictures a step | 1 GPU | 4 | 8 |\n|---|---|---|---|")
    for name in ("gpu", "paper"):
        cfg = train.Config(**train.PRESETS[name])
        config = VQGANConfig(ch=cfg.ch, ch_mult=cfg.ch_mult, num_res_blocks=cfg.res_blocks,
                             z_channels=cfg.z_channels, n_embed=cfg.codes, embed_dim=cfg.code_dim,
                             l2_norm=cfg.l2_norm, patch=cfg.patch)
        cells = (" / ".join(f"{memory_of_act_1(config, cfg.vq_batch // world, cfg.image_size, again) / 2 ** 30:.0f}"
                            for again in (False, True)) for world in (1, 4, 8))
        print(f"| `{name}`, {cfg.image_size} pixels | {' | '.join(cells)} |")


# -----------------------------------------------------------------------------------------------------------
# Act 3


def kept_by_block(config, rows, context, low, residual) -> int:
    """Bytes of activations that one block keeps for backward, counted by PyTorch on tensors without data.

    low: the dtype of products; residual: that of what flows from block to block, and of the weights.
    """
    kept, held = {}, []         # held: storages must live, or their addresses would come back
    def keep(tensor):
        held.append(storage := tensor.untyped_storage())
        kept[storage._cdata] = storage.nbytes()
        return tensor
    usual = torch.get_default_dtype()
    torch.set_default_dtype(residual)
    try:
        with FakeTensorMode(), torch.autocast("cpu", low, enabled=low != residual):
            block, x = Block(config, 0), torch.empty(rows, context, config.hidden_size, requires_grad=True)
            angles = rope_angles(config, torch.arange(context)[None], False)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                block(x, angles, None)
            weights = [p.untyped_storage() for p in block.parameters()]
    finally:
        torch.set_default_dtype(usual)
    copies = sum(p.numel() for p in block.parameters() if p.ndim == 2) * low.itemsize * (low != residual)
    return sum(kept.values()) - sum(kept.get(w._cdata, 0) for w in weights) - copies


def memory(config, rows, context, world=1, shard=False, checkpointing=False, mixed=True) -> float:
    """Bytes at the peak of a step with AdamW, for `rows` packed rows on each device.

    mixed: bf16 products, as on CUDA.
    """
    with torch.device("meta"):
        model = Transformer(config)
    L, table = config.num_hidden_layers, config.vocab_size * config.hidden_size
    every, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0]))
    root, low = every - L * block, torch.bfloat16 if mixed else torch.float32
    residual = low if shard else torch.float32
    kept = kept_by_block(config, rows, context, low, residual)
    x = rows * context * config.hidden_size * residual.itemsize
    activations = L * x + kept if checkpointing else L * kept
    weights_and_moments, gradients = (n * every / (world if shard else 1) for n in (12, 4))
    copies = low.itemsize * (root + 2 * block) if shard else 2 * every * mixed  # gathered, or by autocast
    arriving = (low.itemsize + 4) * root if shard else 8 * table    # the table's, from head and embedding
    logits = 4 * config.vocab_size * min(rows * context, max(NLL.LEAST, NLL.CHUNK // (4 * config.vocab_size)))
    loss = 2 * logits + (4 + 2 * mixed) * table     # and the gradients of both, the table's in float32
    buckets = gradients if world > 1 or shard else 0                # DDP keeps room for all gradients
    return weights_and_moments + copies + max(activations + loss + buckets, gradients + arriving)


def print_memory(rows=4, context=2048):
    """GiB for each GPU, without / with --checkpointing; every vocabulary is extended by 8192 image rows."""
    sizes = {"Gemma-2B": ("gemma", 256000, 2048, 16384, 18, 8, 1, 256),
             "Gemma-7B": ("gemma", 256000, 3072, 24576, 28, 16, 16, 256),
             "Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 64),
             "Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64),
             "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128),
             "Qwen2.5-32B": ("qwen2", 152064, 5120, 27648, 64, 40, 8, 128)}
    print("| model | 1 GPU | data parallel, 8 or 64 | `--shard`, 8 | `--shard`, 64 |\n|---|---|---|---|---|")
    for name, (family, words, width, inner, layers, heads, groups, d) in sizes.items():
        config = ModelConfig(
            model_type=family, vocab_size=words + 8192, hidden_size=width, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups, head_dim=d,
            tie_word_embeddings=name not in ("Qwen2.5-7B", "Qwen2.5-32B"))
        cells = (" / ".join(f"{memory(config, rows, context, world, shard, checkpointing) / 2 ** 30:.0f}"
                            for checkpointing in (False, True))
                 for world, shard in ((1, False), (8, False), (8, True), (64, True)))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print_memory_of_act_1()
    print_memory()
