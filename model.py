"""The transformer: one decoder for words and image codes, which spans Gemma 1-3, Qwen 2-3 and Llama 3.

    ids --embed_tokens--> x --[norm, attention, +, norm, MLP, +] * L--> norm --table^T--> logits

An image code is a token like any other, a row of the extended table. Names are Hugging Face's.

B batch   T queries   S keys   D hidden_size   H heads   G key-value heads   d head_dim   L layers
V rows of the table   N positions with a target   K codes   e dimensions of a code
"""

import json
import math
import warnings
from collections import ChainMap
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import flex_attention


@dataclass(frozen=True)
class Family:
    """What sets a family of models apart."""
    architecture: str               # Hugging Face's class
    unit_offset: bool = False       # norms multiply by 1 + weight
    embed_scale: bool = False       # embeddings are multiplied by sqrt(D)
    qkv_bias: bool = False
    qk_norm: bool = False           # norms of queries and keys
    post_norms: bool = False        # norms behind attention and MLP, too


gemma = partial(Family, unit_offset=True, embed_scale=True)
FAMILIES = {"llama": Family("LlamaForCausalLM"),
            "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
            "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
            "gemma": gemma("GemmaForCausalLM"),
            "gemma2": gemma("Gemma2ForCausalLM", post_norms=True),
            "gemma3_text": gemma("Gemma3ForCausalLM", qk_norm=True, post_norms=True)}


@dataclass
class ModelConfig:
    """Hugging Face's names; a small Qwen 3 by default."""
    model_type: str = "qwen3"
    vocab_size: int = 1024                      # rows of words
    image_rows: int = 0                         # rows behind them: of codes, then of marks such as <boi>
    codebook: tuple[int, int] | None = None     # (K, e): the VQGAN's codebook makes the rows of codes
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 32
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    attention_bias: bool = False                # on q, k, v
    attention_out_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None            # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    rope_local_base_freq: float | None = None   # rope_theta of sliding layers (Gemma 3)
    sliding_window: int | None = None           # keys that a sliding layer sees
    layer_types: list[str] | None = None        # "full_attention" or "sliding_attention"
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    source: dict | None = None                  # the config.json that it was read from

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


class RMSNorm(nn.Module):
    """Scale to unit mean square, in float32; Gemma multiplies by 1 + weight before rounding."""
    def __init__(self, dim, config):
        super().__init__()
        self.eps, self.unit_offset = config.rms_norm_eps, config.family.unit_offset
        self.weight = nn.Parameter(torch.zeros(dim) if self.unit_offset else torch.ones(dim))

    def forward(self, x):
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        y = y * (1 + self.weight.float()) if self.unit_offset else self.weight * y.type_as(x)
        return y.type_as(x)


def rope_angles(config, positions, sliding):
    """positions (B, T) -> cos, sin (B, 1, T, d) float32; RoPE, Su et al. 2021, arXiv 2104.09864."""
    local = config.rope_local_base_freq if sliding else None        # Gemma 3's sliding layers are not scaled
    scaling, d = None if local else config.rope_scaling, config.head_dim
    steps = torch.arange(0, d, 2, device=positions.device).float() / d
    freqs = 1.0 / (local or config.rope_theta) ** steps             # radians a position (d/2,)
    if scaling and scaling["rope_type"] == "linear":
        freqs = freqs / scaling["factor"]
    elif scaling:               # Llama 3.1: slow waves are stretched, fast ones kept, those between blended
        turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = freqs * (keep + (1 - keep) / scaling["factor"])
    angles = positions[:, None, :, None].float() * freqs
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, heads, T, d), whose pairs are (i, i + d/2)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class Cache:
    """Keys and values of earlier tokens in a fixed number of slots, padding (B,) empty ones before them."""
    def __init__(self, config, batch, slots, padding=None, device=None, dtype=None):
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)             # (B, G, S, d)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.padding = torch.zeros(batch, dtype=torch.long, device=device) if padding is None else padding
        self.next = torch.zeros((), dtype=torch.long, device=device)    # a tensor, for CUDA graphs


def mask_mod(documents=None, padding=None, window=None):
    """Which keys a query sees: itself and earlier ones of its document (a mask_mod of FlexAttention).

    documents (B, T) numbers packed examples, -1 in padding, which sees itself: no keys would give NaN.
    """
    def visible(b, head, query, key):
        mask = query >= key
        if window is not None:
            mask = mask & (query - key < window)
        if documents is not None:
            mask = mask & (documents[b, query] == documents[b, key]) & (documents[b, query] >= 0)
        if padding is not None:
            mask = mask & (key >= padding[b])
        return mask | (query == key)
    return visible


def flex_runs(device, head_dim):
    """FlexAttention's kernels need Triton, Ampere and room for a tile in shared memory."""
    if device.type != "cuda" or not find_spec("triton"):
        return False
    gpu = torch.cuda.get_device_properties(device)
    # torch/_inductor/kernel/flex: no heads below 16; heads of 256 need 112 KB in backward
    least = 120 * 1024 if head_dim > 128 else 0
    return gpu.major >= 8 and head_dim >= 16 and gpu.shared_memory_per_block_optin >= least


compiled_once = lru_cache(torch.compile)


def flex(name):
    """FlexAttention (arXiv 2412.05496); uncompiled it would hold all scores."""
    function = getattr(flex_attention, name)
    return function if torch.compiler.is_compiling() else compiled_once(function)


def attend(q, k, v, mask, scale, softcap=None):
    """q (B, H, T, d), k, v (B, G, S, d), mask (B, 1, T, S), of blocks or None: causal -> (B, H, T, d)."""
    (B, H, T, d), G = q.shape, k.shape[1]
    if mask is not None and not torch.is_tensor(mask):
        cap = (lambda score, b, h, query, key: softcap * torch.tanh(score / softcap)) if softcap else None
        return flex("flex_attention")(q, k, v, cap, mask, scale, enable_gqa=H > G)
    if T == 1 and H > G and not softcap:        # decoding: a group's heads are queries of one
        y = F.scaled_dot_product_attention(q.view(B, G, H // G, d), k, v, mask, scale=scale)
        return y.reshape(B, H, 1, d)
    if H > G:                                   # on GPUs, SDPA's kernels for masks know no groups
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    scores = softcap * torch.tanh((q @ k.mT * scale).float() / softcap)                 # (B, H, T, S)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).type_as(q) @ v


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        c = self.config = config
        self.layer = layer
        bias = c.attention_bias or c.family.qkv_bias
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_out_bias)
        self.q_norm = RMSNorm(c.head_dim, c) if c.family.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c) if c.family.qk_norm else nn.Identity()
        self.scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5

    def forward(self, x, angles, mask, slots=None, cache=None):     # (B, T, D)
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.config.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(self.q_norm(q).transpose(1, 2), *angles)         # (B, H, T, d)
        k = rotate(self.k_norm(k).transpose(1, 2), *angles)         # (B, G, T, d)
        v = v.transpose(1, 2)                                       # (B, G, T, d)
        if cache is not None:
            k = cache.k[self.layer].index_copy_(2, slots, k)        # (B, G, S, d)
            v = cache.v[self.layer].index_copy_(2, slots, v)        # (B, G, S, d)
        y = attend(q, k, v, mask, self.scale, self.config.attn_logit_softcapping)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))     # (B, T, D)


ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):                                           # (B, T, D)
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.post_norms = config.family.post_norms
        self.sliding = bool(config.layer_types) and config.layer_types[layer] == "sliding_attention"
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)

    def forward(self, x, angles, mask, slots=None, cache=None):     # (B, T, D)
        y = self.self_attn(self.input_layernorm(x), angles, mask, slots, cache)
        if self.post_norms:                                         # Gemma 2 and 3
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- The extended table, the paper's one move: rows for image codes behind those of words -----------------

class ImageRows(nn.Module):
    """One row for each code, then one for each mark -> (image_rows, D).

    The paper learns each on its own. With config.codebook, an MLP adds what it makes of the VQGAN's codebook:
    codes that look alike start alike, and rare codes share what their neighbours learn.
    """
    def __init__(self, config):
        super().__init__()
        K, e = config.codebook or (0, 0)
        self.weight = nn.Parameter(torch.empty(config.image_rows, config.hidden_size))
        self.made = None                                            # see Transformer.constant_rows
        self.register_buffer("codebook", torch.zeros(K, e) if K else None)
        if K:
            self.up = nn.Linear(e, 2 * config.hidden_size)
            self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def start(self, codebook):
        """Begin with a codebook (K, e) and rows as small as those of words."""
        self.codebook.copy_((codebook - codebook.mean(0)) / codebook.std(0).clamp(min=1e-6))
        nn.init.normal_(self.up.weight, 0.0, codebook.shape[1] ** -0.5)
        nn.init.normal_(self.down.weight, 0.0, 0.04 / self.up.out_features ** 0.5)
        nn.init.zeros_(self.weight[:len(codebook)])

    def forward(self):
        if self.codebook is None or self.made is not None:
            return self.weight if self.made is None else self.made
        codes = self.down(F.silu(self.up(self.codebook)))           # (K, D)
        return self.weight + F.pad(codes, (0, 0, 0, len(self.weight) - len(codes)))


class Table(nn.Module):
    """Rows of words, bit for bit as published, and behind them the image rows."""
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.image_rows = ImageRows(config) if config.image_rows else None

    def parts(self):
        """[rows of words, image rows], or the former alone."""
        return [self.weight] + ([] if self.image_rows is None else [self.image_rows()])

    def forward(self, ids):
        """ids (B, T) -> (B, T, D)"""
        if self.image_rows is None:
            return F.embedding(ids, self.weight)
        words, rows = self.parts()
        new = ids >= len(words)                                     # (B, T)
        x = F.embedding(ids.masked_fill(new, 0), words)
        return torch.where(new[..., None], F.embedding((ids - len(words)).clamp(min=0), rows).type_as(x), x)

    def logits(self, x, rows=None):
        """x (..., D) -> (..., V), or those of rows (first, past_last) alone."""
        first, past_last = rows or (0, math.inf)
        products, start = [], 0
        for part in self.parts():
            chosen = part[max(0, first - start):max(0, min(len(part), past_last - start))]
            if len(chosen):     # MKL takes half the time with the table on the left
                products.append((chosen.type_as(x) @ x.mT).mT)
            start += len(part)
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


# ---- The loss ---------------------------------------------------------------------------------------------

class NLL(torch.autograd.Function):
    """-log softmax(x table^T)[target]: x (N, D), targets (N,), parts of the table (V_i, D) -> (N,) float32.

    Only one chunk's logits exist at a time. Their gradient, softmax minus one-hot, is taken in forward, and
    backward scales it. z_loss * logsumexp^2 is added (PaLM, arXiv 2204.02311, 5).
    """
    CHUNK, LEAST = 2 ** 27, 512     # bytes of float32 logits; fewer positions would make slow products

    @staticmethod
    def forward(ctx, x, targets, z_loss, softcap, *parts):
        sizes, V, wanted = [len(p) for p in parts], sum(map(len, parts)), ctx.needs_input_grad[4:]
        nll, dx = torch.empty(len(x), device=x.device), torch.zeros_like(x)
        dparts = [torch.zeros_like(p, dtype=torch.float32) if w else None for p, w in zip(parts, wanted)]
        size = max(NLL.LEAST, NLL.CHUNK // (4 * V))
        # Fresh pages cost a fifth of the product; GPUs want aligned rows.
        buffer = x.new_empty(min(size, len(x)), math.ceil(V / 64) * 64)
        for i in range(0, len(x), size):
            xs, y = x[i:i + size], targets[i:i + size, None]
            for part, columns in zip(parts, buffer[:len(xs), :V].split(sizes, dim=1)):
                torch.mm(xs, part.T, out=columns)
            z = buffer[:len(xs)].float()                            # (chunk, V)
            z = z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)
            slope = None if softcap is None else 1 - (z / softcap).square()             # of the cap
            z[:, V:] = -math.inf
            correct, most = z.gather(1, y), z.amax(-1, keepdim=True)
            total = z.sub_(most).exp_().sum(-1, keepdim=True)       # from here on, z / total is the softmax
            lse = most + total.log()                                # (chunk, 1)
            nll[i:i + size] = (lse - correct + z_loss * lse.square())[:, 0]
            if ctx.needs_input_grad[0]:
                g = z.mul_((1 + 2 * z_loss * lse) / total).scatter_add_(1, y, torch.full_like(lse, -1))
                g = (g if slope is None else g.mul_(slope)).type_as(x)
                for part, dpart, columns in zip(parts, dparts, g[:, :V].split(sizes, dim=1)):
                    dx[i:i + size].addmm_(columns, part)
                    if dpart is not None:                           # chunks add up in float32
                        dpart.addmm_(columns.T, xs) if x.dtype == dpart.dtype else dpart.add_(columns.T @ xs)
        ctx.gradients = dx, dparts
        return nll

    @staticmethod
    def backward(ctx, weights):                                     # (N,)
        scale = weights[:1].sum()                                   # 0 if there is no target
        torch._assert_async((weights == scale).all(), "all targets of a loss must weigh the same")
        (dx, dparts), ctx.gradients = ctx.gradients, None           # in place, so only once
        return dx.mul_(scale), None, None, None, *(d if d is None else d.mul_(scale) for d in dparts)


# ---- The whole --------------------------------------------------------------------------------------------

class Backbone(nn.Module):
    """Everything but the head."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Table(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)

    def mask(self, ids, slots, documents, cache, window):
        """For the fastest kernel: None for causal rows, blocks for packed rows on GPUs, else (B, 1, T, S)."""
        (B, T), device = ids.shape, ids.device
        causal = cache is None and documents is None and window is None
        if causal and self.config.attn_logit_softcapping is None:
            return None
        visible = mask_mod(documents, None if cache is None else cache.padding, window)
        if documents is not None and flex_runs(device, self.config.head_dim):   # skips blocks of hidden keys
            return flex("create_block_mask")(visible, B, None, T, T, device)
        keys = slots if cache is None else torch.arange(cache.k[0].shape[2], device=device)     # (S,)
        rows = torch.arange(B, device=device)[:, None, None, None]
        return visible(rows, 0, slots[:, None], keys).expand(B, 1, -1, -1)

    def forward(self, ids, positions=None, documents=None, cache=None):
        """ids (B, T) -> x (B, T, D)"""
        c, slots = self.config, torch.arange(ids.shape[1], device=ids.device)               # (T,)
        if cache is not None:
            slots = cache.next + slots
            cache.next += len(slots)
            positions = (slots - cache.padding[:, None]).clamp(min=0)
        positions = slots[None] if positions is None else positions
        masks, angles = {}, {}
        for sliding in {block.sliding for block in self.layers}:    # each kind has its window and waves
            masks[sliding] = self.mask(ids, slots, documents, cache, c.sliding_window if sliding else None)
            angles[sliding] = rope_angles(c, positions, sliding)

        x = self.embed_tokens(ids)                                  # (B, T, D)
        if c.family.embed_scale:
            x = x * torch.tensor(c.hidden_size ** 0.5, dtype=x.dtype)   # rounded as Gemma was trained
        for block in self.layers:
            x = block(x, angles[block.sliding], masks[block.sliding], slots, cache)
        return self.norm(x)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Table(config)
        self.apply(self._init)

    def _init(self, layer):
        if isinstance(layer, (nn.Linear, Table, ImageRows)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if isinstance(layer, (Attention, MLP)):     # after their Linears: a block starts as the identity
            nn.init.zeros_((layer.o_proj if isinstance(layer, Attention) else layer.down_proj).weight)

    @property
    def tables(self) -> list[Table]:
        """The embedding, and an untied head; the last one makes the logits."""
        return [self.model.embed_tokens] + ([] if self.config.tie_word_embeddings else [self.lm_head])

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        kind, own = self.device.type, self.model.norm.weight.dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own

    def logits(self, x, rows=None):
        """x (..., D) -> float32 logits (..., V), or those of rows (first, past_last) alone."""
        z, cap = self.tables[-1].logits(x, rows).float(), self.config.final_logit_softcapping
        return z if cap is None else cap * torch.tanh(z / cap)      # Gemma 2

    def forward(self, ids, targets=None, positions=None, documents=None, cache=None, z_loss=0.0, where=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> nll (B, T) float32, 0 where one is -100."""
        x = self.model(ids, positions, documents, cache)            # (B, T, D)
        if targets is None:
            return self.logits(x)
        if where is None:           # places of targets (N,); the GPU waits
            where = (targets != -100).flatten().nonzero()[:, 0]
        x, parts = x.flatten(0, 1)[where], self.tables[-1].parts()
        if torch.is_autocast_enabled(ids.device.type):              # in backward, types must agree
            x, *parts = (y.to(torch.get_autocast_dtype(ids.device.type)) for y in (x, *parts))
        nll = NLL.apply(x, targets.flatten()[where], z_loss, self.config.final_logit_softcapping, *parts)
        return nll.new_zeros(ids.numel()).index_copy(0, where, nll).view(ids.shape)

    @contextmanager
    def constant_rows(self):
        """Make rows from a codebook once and not in every step; weights may not change."""
        rows = [table.image_rows for table in self.tables if self.config.codebook]
        for each in rows:
            each.made = each()
        try:
            yield
        finally:
            for each in rows:
                each.made = None

    @torch.no_grad()
    def extend_vocab(self, rows, generator=None):
        """Append rows for codes and marks to each table: the words' mean, and noise that tells them apart."""
        if self.config.image_rows:
            raise ValueError(f"the vocabulary has {self.config.image_rows} image rows already")
        self.config = self.model.config = replace(self.config, image_rows=rows)
        for table in self.tables:
            table.image_rows, words = ImageRows(self.config).to(table.weight), table.weight.float()
            noise = torch.randn(rows, words.shape[1], generator=generator).to(words.device)
            table.image_rows.weight.copy_(words.mean(0) + 0.02 * words.std(0) * noise)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu", image_rows=0):
        """Open a Hugging Face folder, its last image_rows rows as those of images; ValueError if bad."""
        config = read_config(folder)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        read_weights(model.to_empty(device=device), folder)
        if image_rows:
            words = config.vocab_size - image_rows
            model.config = model.model.config = replace(config, vocab_size=words, image_rows=image_rows)
            for table in model.tables:
                whole, table.image_rows = table.weight.detach(), ImageRows(model.config)
                table.weight = nn.Parameter(whole[:words].clone())
                table.image_rows.weight = nn.Parameter(whole[words:].clone())
        return model

    @torch.no_grad()
    def save_pretrained(self, folder, shard=5 * 10 ** 9, **keys):
        """Write a folder that transformers opens, with these keys in config.json."""
        hub, folder = pretrained_extra("huggingface_hub"), Path(folder)
        state = {k: v for k, v in self.state_dict().items() if "image_rows" not in k}
        for name, table in zip(("model.embed_tokens.weight", "lm_head.weight"), self.tables):
            state[name] = torch.cat([part.to(self.dtype) for part in table.parts()])
        config = write_config(self.config) | {"dtype": str(self.dtype).removeprefix("torch."), **keys}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            hub.save_torch_state_dict(state, folder, max_shard_size=shard)      # removes an earlier save
        except Exception as error:      # safetensors has exceptions of its own
            raise OSError(f"{folder}: weights not written ({error})") from None
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- Files of published models, read by the libraries that wrote them -------------------------------------

def pretrained_extra(name):
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f'published models need {name}: pip install -e ".[pretrained]"') from None


def read_config(folder) -> ModelConfig:
    """The config.json of a folder, in any spelling; ValueError, naming it, for other models."""
    transformers, path = pretrained_extra("transformers"), Path(folder) / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        source, copy = json.loads(text), json.loads(text)       # the library writes into its dict
        if source["model_type"] not in FAMILIES:
            raise ValueError(f"model_type {source['model_type']!r}: choose from {', '.join(FAMILIES)}")
        return translate(transformers.AutoConfig.for_model(**copy), source)
    except Exception as error:          # whatever the library stumbles over
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: not a configuration that this model can have ({reason})") from None


def translate(hf, source) -> ModelConfig:
    """A configuration of transformers -> ours."""
    declared, rope = vars(type(hf)()), hf.rope_parameters       # the library overlooks all other keys
    known = {k: v for k, v in vars(hf).items() if k in declared and v is not None}
    sliding = rope.get("sliding_attention", {})         # Gemma 3 has waves for each kind of layer
    rope = rope.get("full_attention", rope)
    d = known.get("head_dim") or hf.hidden_size // hf.num_attention_heads
    act = known.get("hidden_activation") or hf.hidden_act
    if hf.model_type == "gemma" and act == "gelu":      # transformers#29402
        act = "gelu_pytorch_tanh"
    kinds = known.get("layer_types", ())
    slides = "sliding_attention" in kinds
    unsupported = {
        f"rope_type {rope['rope_type']!r}": rope["rope_type"] not in ("default", "linear", "llama3"),
        "scaling of sliding layers": sliding.get("rope_type", "default") != "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
        f"layer_types {kinds}": not set(kinds) <= {"sliding_attention", "full_attention"},
        f"hidden_act {act!r}": act not in ACTIVATIONS,
        f"head_dim {d}": d % 2,
        "num_key_value_heads": hf.num_attention_heads % hf.num_key_value_heads,
        "use_bidirectional_attention": getattr(hf, "use_bidirectional_attention", False),
        "quantization_config": "quantization_config" in source}
    for name in unsupported:
        if unsupported[name]:
            raise ValueError(f"{name} is not supported")
    ours = {f.name: known[f.name] for f in fields(ModelConfig) if f.name in known}
    return ModelConfig(**ours | dict(
        model_type=hf.model_type, head_dim=d, hidden_act=act, source=source,
        attention_out_bias=known.get("attention_bias", False),
        rope_theta=rope["rope_theta"], rope_scaling=None if rope["rope_type"] == "default" else rope,
        rope_local_base_freq=sliding.get("rope_theta"), layer_types=kinds if slides else None,
        sliding_window=hf.sliding_window if slides else None))


def write_config(config) -> dict:
    """The source's config.json, or that of a model from scratch, with the size of the whole table."""
    hf, rows = config.source, config.vocab_size + config.image_rows
    if hf is None:
        own = asdict(config) | dict(        # no default of a family takes the place of None
            layer_types=config.layer_types or ["full_attention"] * config.num_hidden_layers,
            sliding_window=config.sliding_window or config.max_position_embeddings,
            query_pre_attn_scalar=config.query_pre_attn_scalar or config.head_dim)
        ours = "image_rows", "codebook", "attention_out_bias", "source"
        hf = {name: value for name, value in own.items() if name not in ours}
        read = asdict(translate(pretrained_extra("transformers").AutoConfig.for_model(**hf), {}))
        for name in hf:
            if read[name] not in (own[name], getattr(config, name)):
                raise ValueError(f"a {config.model_type} of transformers cannot have {name} {own[name]!r}")
    return hf | {"architectures": [config.family.architecture], "vocab_size": rows}


def read_weights(model, folder):
    """Fill the model from safetensors, one file or shards; on the meta device, only look at them."""
    hub, tied = pretrained_extra("huggingface_hub"), model.config.tie_word_embeddings
    try:
        one = Path(folder) / "model.safetensors"        # others may lie beside it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # that the meta device keeps nothing
            missing, unexpected = hub.load_torch_model(model, one if one.exists() else folder, strict=False)
        if tied and "lm_head.weight" in unexpected:     # mostly a copy
            files = [one] if one.exists() else Path(folder).glob("model-*.safetensors")
            every = ChainMap(*(hub.load_state_dict_from_file(file) for file in files))
            if not torch.equal(every["lm_head.weight"], every["model.embed_tokens.weight"]):
                raise ValueError("config.json ties the head to the embedding, but lm_head.weight is another")
    except Exception as error:          # the library has many
        raise ValueError(f"{folder}: weights cannot be read ({' '.join(str(error).split())[:300]})") from None
    harmless = ("lm_head.weight", "rotary_emb.inv_freq")    # a tied head's copy, constants of old releases
    wrong = [f"{name} is missing" for name in missing]
    wrong += [f"{name} has no place in the model" for name in unexpected if not name.endswith(harmless)]
    if wrong:
        raise ValueError(f"{folder}: tensor {wrong[0]}, and {len(wrong) - 1} more")
