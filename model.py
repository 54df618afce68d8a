"""The transformer: one decoder for words and image codes, whose configuration spans Gemma 1-3, Qwen 2-3 and Llama 3.

It is trained with one next-token loss; an image code is a token like any other, a row of the same table:

    ids --table--> x --[norm, attention, +, norm, MLP, +] * L--> norm --table^T--> logits

Parameter names are Hugging Face's, so that published weights load as they are.

B batch   T queries   S keys   D hidden_size   H heads   G key-value heads   d head_dim   F intermediate_size
L layers   V rows of the table   N positions that carry loss   K codes   e dimensions of a code
"""

import copy
import importlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import flex_attention


def require(true, message):
    if not true:
        raise ValueError(message)


def require_choice(name, value, choices):
    # A list, for what a file holds may not be hashable
    require(value in list(choices), f"{name} {value!r} is not supported: choose from {', '.join(choices)}")


@dataclass
class Family:
    """What sets one family of models apart beyond its sizes."""
    architecture: str               # Hugging Face's class
    unit_offset: bool = False       # norms multiply by 1 + weight
    embed_scale: bool = False       # embeddings are multiplied by sqrt(D)
    qkv_bias: bool = False
    qk_norm: bool = False           # queries and keys are normalised in each head
    post_norms: bool = False        # a norm behind attention and MLP, too


as_gemma = partial(Family, unit_offset=True, embed_scale=True)
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "gemma": as_gemma("GemmaForCausalLM"),
    "gemma2": as_gemma("Gemma2ForCausalLM", post_norms=True),
    "gemma3_text": as_gemma("Gemma3ForCausalLM", qk_norm=True, post_norms=True),
}

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "max_position_embeddings")
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def is_positive(x):
    return type(x) in (int, float) and x > 0


def rope_type(scaling):
    return scaling.get("rope_type", scaling.get("type", "default"))


def check_rope(scaling):
    require_choice("rope type", kind := rope_type(scaling), ROPE_KEYS)
    for name in ROPE_KEYS[kind]:
        value = scaling.get(name)
        require(is_positive(value), f"{name} of rope type {kind} is {value!r}, not a positive number")


@dataclass
class ModelConfig:
    """Hugging Face's names. The defaults are a small model of the Qwen 3 family, made to be trained from scratch."""
    model_type: str = "qwen3"
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 32
    hidden_act: str = "silu"                    # or gelu_pytorch_tanh
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    attention_bias: bool = False                # on q, k, v; with attention_out_bias on o as well
    attention_out_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None            # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    rope_local_base_freq: float | None = None   # rope_theta of sliding layers, if another (Gemma 3)
    sliding_window: int | None = None           # keys that a sliding layer sees, itself included
    layer_types: list[str] | None = None        # "full_attention" or "sliding_attention" for each layer
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    codebook_dim: int = 0                       # > 0: the last rows of the table are a function of the VQGAN's codebook
    codebook_size: int = 0                      # K, with codebook_dim

    def __post_init__(self):
        for name in (*SIZES, "num_key_value_heads", "head_dim"):
            require(type(n := getattr(self, name)) is int and n > 0, f"{name} is {n!r}, not a positive whole number")
        optional = "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"
        for name in ("rms_norm_eps", "rope_theta", *optional):
            x = getattr(self, name)
            require(is_positive(x) or x is None and name in optional, f"{name} is {x!r}, not a positive number")
        require_choice("model_type", self.model_type, FAMILIES)
        require_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        require(self.num_attention_heads % self.num_key_value_heads == 0,
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key-value heads")
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, and rotary positions need pairs")
        check_rope(self.rope_scaling or {})
        if self.layer_types is not None:
            require(len(self.layer_types) == self.num_hidden_layers,
                    f"layer_types names {len(self.layer_types)} of {self.num_hidden_layers} layers")
            for kind in self.layer_types:
                require_choice("layer type", kind, ("full_attention", "sliding_attention"))
            require("sliding_attention" not in self.layer_types or is_positive(self.sliding_window),
                    f"sliding_window is {self.sliding_window!r}, not a positive number")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def slides(self, layer) -> bool:
        return bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"


# ---------------------------------------------------------------------------------------------------------------------
# Parts

class RMSNorm(nn.Module):
    """Scale to unit mean square, computed in float32; Gemma multiplies by 1 + weight, before rounding."""
    def __init__(self, dim, config):
        super().__init__()
        self.eps, self.unit_offset = config.rms_norm_eps, config.family.unit_offset
        self.weight = nn.Parameter(torch.zeros(dim) if self.unit_offset else torch.ones(dim))

    def forward(self, x):
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        y = y * (1 + self.weight.float()) if self.unit_offset else self.weight * y.type_as(x)
        return y.type_as(x)


def rope_frequencies(config, sliding, device):
    """Radians a position for each pair of dimensions -> (d/2,) float32; Su et al. 2021, arXiv 2104.09864."""
    own = config.rope_local_base_freq if sliding else None          # of Gemma 3's sliding layers, which nothing scales
    steps = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freqs, scaling = 1.0 / (own or config.rope_theta) ** steps, config.rope_scaling or {}
    if own or rope_type(scaling) == "default":
        return freqs
    if rope_type(scaling) == "linear":
        return freqs / scaling["factor"]
    # Llama 3.1: slow waves are stretched by factor, fast ones kept, those between are blended.
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / scaling["factor"])


def rope_angles(config, positions, sliding):
    """positions (B, T) -> cos, sin (B, 1, T, d) float32."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, sliding, positions.device)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, heads, T, d), whose pairs are (i, i + d/2)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class Cache:
    """Keys and values of what was read so far; row b begins with padding[b] slots that hold no token.

    reach: how many slots attention looks at. None is all that are filled, which is least work; a constant keeps every
    shape constant, as compiled steps and CUDA graphs need.
    """
    def __init__(self, config, batch, size, device=None, dtype=None, padding=None, reach=None):
        shape = (batch, config.num_key_value_heads, size, config.head_dim)              # (B, G, slots, d)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.padding = torch.zeros(batch, dtype=torch.long, device=device) if padding is None else padding  # (B,)
        self.next = torch.zeros((), dtype=torch.long, device=device)    # the slot of the next token, for CUDA graphs
        self.filled, self.reach = 0, reach                              # the same on the host, unless reach is constant

    def advance(self, count):
        """Claim slots for `count` tokens -> their numbers (T,)."""
        slots = self.next + torch.arange(count, device=self.next.device)
        self.next += count
        if self.reach is None:                                      # else nothing on the host changes from step to step
            total = self.k[0].shape[2]
            require(self.filled + count <= total,
                    f"the cache has {total} slots, {self.filled} are filled and {count} more are asked for")
            self.filled += count
        return slots

    def update(self, layer, slots, k, v):
        """Store k, v (B, G, T, d) -> all keys and values in reach (B, G, S, d)."""
        self.k[layer].index_copy_(2, slots, k)
        self.v[layer].index_copy_(2, slots, v)
        reach = self.reach or self.filled
        return self.k[layer][:, :, :reach], self.v[layer][:, :, :reach]

    def select(self, rows, size, reach=None):
        """A cache of `size` slots whose row i continues row rows[i] of this one: read once, answered often."""
        new = copy.copy(self)
        room = (0, 0, 0, size - self.filled)                        # empty slots behind the filled ones
        new.k = [F.pad(k[rows, :, :self.filled], room) for k in self.k]
        new.v = [F.pad(v[rows, :, :self.filled], room) for v in self.v]
        new.padding, new.next, new.reach = self.padding[rows], self.next.clone(), reach
        if reach:                                                   # CUDA graphs write here, in place
            for tensor in (*new.k, *new.v, new.next):
                torch._dynamo.mark_static_address(tensor, guard=False)
        return new


def seen(documents=None, padding=None, window=None):
    """Which key a query may look at: itself and earlier ones of its own document; a mask_mod of FlexAttention.

    documents (B, T) numbers the examples of packed rows, -1 where a row holds none; padding (B,) is how many slots at
    the start of a row hold nothing. What holds nothing sees itself alone: softmax needs one key.
    """
    def sees(b, head, query, key):
        mask = query >= key
        if window is not None:
            mask = mask & (query - key < window)
        if documents is not None:
            mask = mask & (documents[b, query] == documents[b, key]) & (documents[b, query] >= 0)
        if padding is not None:
            mask = mask & (key >= padding[b])
        return mask | (query == key)
    return sees


def visible(queries, keys, documents=None, padding=None, window=None):
    """`seen` as a tensor, for the slots queries (T,) and keys (S,) -> (B or 1, 1, T, S) bool."""
    rows = documents if padding is None else padding
    b = torch.arange(1 if rows is None else len(rows), device=keys.device)[:, None, None, None]
    return seen(documents, padding, window)(b, 0, queries[:, None], keys).expand(len(b), 1, -1, -1)


once_compiled = lru_cache(torch.compile)


def flex(name):
    """A function of torch's FlexAttention (arXiv 2412.05496), compiled: as it is, it would hold all scores."""
    function = getattr(flex_attention, name)
    return function if torch.compiler.is_compiling() else once_compiled(function)   # in a compiled block: a part of it


def block_mask(documents, window=None):
    """`seen` of packed rows (B, T), for FlexAttention, which skips blocks of which nothing is visible."""
    B, T = documents.shape
    return flex("create_block_mask")(seen(documents, window=window), B, None, T, T, documents.device)


def attend(q, k, v, mask, scale, softcap=None):
    """q (B, H, T, d), k and v (B, G, S, d), mask (B or 1, 1, T, S), None for causal or a block mask -> (B, H, T, d)."""
    B, H, T, d = q.shape
    G = k.shape[1]
    if mask is not None and not torch.is_tensor(mask):
        cap = (lambda score, b, h, query, key: softcap * torch.tanh(score / softcap)) if softcap else None
        return flex("flex_attention")(q, k, v, cap, mask, scale, enable_gqa=H > G)
    if T == 1 and H > G and not softcap:                            # decoding: a group's heads are queries of one head
        y = F.scaled_dot_product_attention(q.view(B, G, H // G, d), k, v, mask, scale=scale)
        return y.reshape(B, H, 1, d)
    if H > G:                                                       # on GPUs, SDPA's kernels for masks know no groups
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    if mask is None:                                                # Gemma 2's cap, which no fused kernel has
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = softcap * torch.tanh((q @ k.mT * scale).float() / softcap)         # (B, H, T, S)
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
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(self.q_norm(q).transpose(1, 2), *angles)         # (B, H, T, d)
        k = rotate(self.k_norm(k).transpose(1, 2), *angles)         # (B, G, T, d)
        v = v.transpose(1, 2)                                       # (B, G, T, d)
        if cache is not None:
            k, v = cache.update(self.layer, slots, k, v)            # (B, G, S, d)
        y = attend(q, k, v, mask, self.scale, self.config.attn_logit_softcapping)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))     # (B, T, D)


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
        self.sliding = config.slides(layer)
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


class CodebookRows(nn.Module):
    """Rows of the table as a function of the VQGAN's code vectors: codes that look alike start alike, and a code that
    training never drew shares what its neighbours learned. The paper learns every row on its own."""
    def __init__(self, config):
        super().__init__()
        width = 2 * config.hidden_size
        self.register_buffer("codebook", torch.zeros(config.codebook_size, config.codebook_dim))    # (K, e)
        self.up = nn.Linear(config.codebook_dim, width)
        self.down = nn.Linear(width, config.hidden_size, bias=False)

    def start(self, codebook):
        """Begin with a codebook (K, e), standardised, and rows as small as those of words."""
        self.codebook.copy_((codebook - codebook.mean(0)) / codebook.std(0).clamp(min=1e-6))
        nn.init.normal_(self.up.weight, 0.0, codebook.shape[1] ** -0.5)
        nn.init.normal_(self.down.weight, 0.0, 0.04 / self.up.out_features ** 0.5)

    def forward(self):                                              # -> (K, D)
        return self.down(F.silu(self.up(self.codebook)))


def learned_only(weight, learned):
    """The same rows, but gradients reach only the `learned` (V, 1) ones; in the graph, where DDP and FSDP keep it."""
    return weight if learned is None or not torch.is_grad_enabled() else torch.where(learned, weight, weight.detach())


class Trunk(nn.Module):
    """Everything but the head; the name `model` and those within are Hugging Face's."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        own = config.vocab_size - (config.codebook_size if config.codebook_dim else 0)
        self.embed_tokens = nn.Embedding(own, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.register_buffer("learned", None, persistent=False)     # rows of the table that gradients reach; None: all
        if config.codebook_dim:
            self.image_rows = CodebookRows(config)

    def table(self):
        """The embedding table (V, D)."""
        weight = learned_only(self.embed_tokens.weight, self.learned)
        return torch.cat([weight, self.image_rows().type_as(weight)]) if self.config.codebook_dim else weight

    @staticmethod
    def mask(slots, documents, cache, window):
        """In the form that the quickest kernel takes: none for plain causal rows, blocks for packed rows on GPUs."""
        if cache is not None:
            keys = torch.arange(cache.reach or cache.filled, device=slots.device)
            return visible(slots, keys, padding=cache.padding, window=window)
        if documents is not None and documents.is_cuda:
            return block_mask(documents, window)
        return None if documents is None and window is None else visible(slots, slots, documents, window=window)

    def forward(self, ids, table, positions=None, documents=None, cache=None):
        """ids (B, T) -> x (B, T, D); table is self.table(), which a caller of many steps makes once."""
        c, T = self.config, ids.shape[1]
        slots = torch.arange(T, device=ids.device) if cache is None else cache.advance(T)   # (T,)
        if positions is None:
            positions = slots[None] if cache is None else (slots - cache.padding[:, None]).clamp(min=0)
        masks, angles = {}, {}
        for sliding in {block.sliding for block in self.layers}:    # each kind of layer has its window and its waves
            masks[sliding] = self.mask(slots, documents, cache, c.sliding_window if sliding else None)
            angles[sliding] = rope_angles(c, positions, sliding)

        x = F.embedding(ids, table)                                 # (B, T, D)
        if c.family.embed_scale:
            x = x * torch.tensor(c.hidden_size ** 0.5, dtype=x.dtype)   # rounded as Gemma was trained
        for block in self.layers:
            x = block(x, angles[block.sliding], masks[block.sliding], slots, cache)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# The loss: a head of 264,192 rows would fill gigabytes with logits, so they come and go in chunks

def capped_logits(x, table, softcap, out=None):
    """x (..., D), table (V, D) -> float32 logits (..., V), with a soft cap between -softcap and softcap (Gemma 2)."""
    # Drawing has one position a row; for so thin an x, MKL takes half the time with the table as the left factor.
    z = ((table @ x.mT).mT if out is None else torch.matmul(x, table.T, out=out)).float()
    return z if softcap is None else z.div_(softcap).tanh_() * softcap


class ChunkedNLL(torch.autograd.Function):
    """-log softmax(cap(x table^T))[target], chunk by chunk.

    x (N, D), table (V, D), targets (N,) -> nll (N,) float32, plus z_loss * logsumexp^2 (PaLM, arXiv 2204.02311, 5).
    Gradients of the sum are taken while a chunk's logits are there; backward scales them, or, for a loss that weighs
    positions differently, goes through the chunks again.
    """
    CHUNK = 2 ** 27     # bytes of float32 logits at a time
    LEAST = 512         # but no fewer positions, which would make slow products

    @staticmethod
    def chunks(x, table, targets, z_loss, softcap, weights=None):
        """-> nll (N,), and with weights (N,) the gradients of (weights * nll).sum() for x and table."""
        nll = torch.empty(len(x), device=x.device)
        dx, dtable = (None, None) if weights is None else (torch.empty_like(x), torch.zeros_like(table))
        size = max(1, min(len(x), max(ChunkedNLL.LEAST, ChunkedNLL.CHUNK // (4 * len(table)))))
        buffer = x.new_empty(size, len(table))                      # fresh pages would cost a fifth of the product
        for i in range(0, len(x), size):
            s = slice(i, i + size)
            z = capped_logits(x[s], table, softcap, buffer[:len(x[s])])  # (chunk, V)
            # The slope of the cap: d/dz of c tanh(z / c) is 1 - tanh^2(z / c)
            slope = 1 - (z / softcap).square() if softcap and weights is not None else None
            wanted, most = z.gather(1, targets[s, None]), z.amax(-1, keepdim=True)
            total = z.sub_(most).exp_().sum(-1, keepdim=True)       # from here on, z / total is the softmax
            lse = most + total.log()                                # (chunk, 1)
            nll[s] = (lse - wanted + z_loss * lse.square())[:, 0]
            if weights is not None:
                w = weights[s, None]
                # d/dz of w (lse - wanted + z_loss lse^2) is w (1 + 2 z_loss lse) softmax(z), less w at the target
                g = z.mul_(w * (1 + 2 * z_loss * lse) / total).scatter_add_(1, targets[s, None], -w)
                g = (g if slope is None else g.mul_(slope)).type_as(x)
                dx[s] = g @ table
                dtable.addmm_(g.T, x[s])
        return nll, dx, dtable

    @staticmethod
    def forward(ctx, x, table, targets, z_loss, softcap):
        ctx.save_for_backward(x, table, targets)
        ctx.options, training = (z_loss, softcap), ctx.needs_input_grad[0]
        ones = torch.ones(len(x), device=x.device) if training else None
        nll, *gradients = ChunkedNLL.chunks(x, table, targets, z_loss, softcap, ones)
        ctx.gradients = gradients if training else None
        return nll

    @staticmethod
    def backward(ctx, grad):                                        # (N,)
        scale = grad[:1].sum()                                      # the first weight; 0 if there is none
        gradients, ctx.gradients = ctx.gradients, None              # scaled in place, so good for one backward only
        if gradients is None or (grad != scale).any():
            _, *gradients = ChunkedNLL.chunks(*ctx.saved_tensors, *ctx.options, grad)
        else:
            for g in gradients:
                g.mul_(scale)
        return *gradients, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# config.json, which older and newer releases of transformers spell differently

# Keys beyond SIZES, and their values when left out, as in the configuration classes of transformers 5:
PLAIN = dict(num_key_value_heads=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False,
             rope_theta=10000.0, rope_scaling=None, rope_parameters=None)
LLAMA = PLAIN | dict(attention_bias=False, mlp_bias=False)
QWEN2 = PLAIN | dict(num_key_value_heads=32, use_sliding_window=False, sliding_window=4096, max_window_layers=28,
                     layer_types=None)
QWEN3 = QWEN2 | dict(head_dim=128, attention_bias=False)
GEMMA = PLAIN | dict(num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation=None,
                     tie_word_embeddings=True, attention_bias=False)
SLIDING_GEMMA = GEMMA | dict(num_key_value_heads=4, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
                             sliding_window=4096, layer_types=None, final_logit_softcapping=None)
GEMMA2 = SLIDING_GEMMA | dict(sliding_window_pattern=2, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
GEMMA3 = SLIDING_GEMMA | dict(sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=10000.0)
DEFAULTS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3}


def layer_types_from_hf(known):
    """The kind of each layer, or None where no layer slides; older files state a rule in place of the list."""
    if known.get("sliding_window") is None or not known.get("use_sliding_window", True):
        return None
    every, first = known.get("sliding_window_pattern"), known.get("max_window_layers")

    def slides(i):      # Gemma: all but each `every`th; Qwen: from `first` on
        return (i + 1) % every > 0 if every else i >= first
    types = known["layer_types"] or ["sliding_attention" if slides(i) else "full_attention"
                                     for i in range(known["num_hidden_layers"])]
    return None if set(types) == {"full_attention"} else types


def rope_from_hf(known):
    """Newer files keep everything in rope_parameters, where Gemma 3 has a dict for each kind of layer."""
    rope, local = known["rope_parameters"] or {}, known.get("rope_local_base_freq")
    if "rope_local_base_freq" in known:
        sliding, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or {}
        local = sliding.get("rope_theta", local)
        require_choice("rope type of sliding layers", rope_type(sliding), ["default"])
    theta = rope.get("rope_theta", known["rope_theta"])
    rope = known["rope_scaling"] or rope
    require(rope.get("partial_rotary_factor") in (None, 1), "partial_rotary_factor is not supported")
    require_choice("rope type", kind := rope_type(rope), ROPE_KEYS)
    rope = {"rope_theta": theta, "rope_type": kind,
            "original_max_position_embeddings": known["max_position_embeddings"], **rope}
    return {"rope_theta": rope["rope_theta"], "rope_local_base_freq": local,
            "rope_scaling": None if kind == "default" else {k: rope.get(k) for k in ("rope_type", *ROPE_KEYS[kind])}}


def config_from_hf(hf) -> ModelConfig:
    """Translate the dict of a config.json, of any age; ValueError for what this model does not have."""
    kind = hf.get("model_type") if isinstance(hf, dict) else None
    require_choice("model_type", kind, FAMILIES)
    for name in SIZES:
        require(name in hf, f"{name} is missing")
    require(not hf.get("use_bidirectional_attention"), "use_bidirectional_attention is not supported")
    defaults, heads = DEFAULTS[kind], hf["num_attention_heads"]
    known = defaults | {k: v for k, v in hf.items() if k in (*SIZES, *defaults, "model_type")}
    if kind == "gemma" and known["hidden_act"] == "gelu":   # the first files say so, and mean this (transformers#29402)
        known["hidden_act"] = "gelu_pytorch_tanh"
    known["hidden_act"] = known.get("hidden_activation") or known["hidden_act"]
    known["num_key_value_heads"] = known["num_key_value_heads"] or heads
    known["head_dim"] = known["head_dim"] or hf["hidden_size"] // heads
    known.setdefault("query_pre_attn_scalar", known["head_dim"])
    known["attention_bias"] = known["attention_out_bias"] = bool(known.get("attention_bias"))
    known["layer_types"] = layer_types_from_hf(known)
    known["sliding_window"] = known["sliding_window"] if known["layer_types"] else None
    known |= rope_from_hf(known)
    return ModelConfig(**{f.name: known[f.name] for f in fields(ModelConfig) if f.name in known})


def config_to_hf(config) -> dict:
    """The reverse, in the older spelling, which all releases read; ValueError if the family has no words for it."""
    defaults, values = DEFAULTS[config.model_type], asdict(config)
    hf = {"architectures": [config.family.architecture], "model_type": config.model_type}
    hf |= {k: v for k, v in values.items() if k in SIZES or k in defaults}
    scalar = config.query_pre_attn_scalar or config.head_dim
    spelled = {"hidden_activation": config.hidden_act, "query_pre_attn_scalar": scalar,
               "use_sliding_window": bool(config.layer_types),
               "sliding_window": config.sliding_window or defaults.get("sliding_window"),
               "layer_types": config.layer_types or ["full_attention"] * config.num_hidden_layers}
    hf |= {k: v for k, v in spelled.items() if k in defaults}
    read = asdict(config_from_hf(hf))
    for name, value in (values | {"codebook_dim": 0, "codebook_size": 0, "query_pre_attn_scalar": scalar}).items():
        require(read[name] == value, f"a {config.model_type} of transformers cannot have {name} {value!r}")
    return hf


# ---------------------------------------------------------------------------------------------------------------------
# Files of weights

def import_extra(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f'published weights need {name}: pip install -e ".[pretrained]"') from None


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None


def read_config(folder) -> ModelConfig:
    """The config.json of a folder; ValueError, naming it, for what this model does not have."""
    path = Path(folder) / "config.json"
    hf = read_json(path)
    try:
        return config_from_hf(hf)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from None


def weight_files(folder):
    """The one file, or those that an index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = set(read_json(index)["weight_map"].values())
        beside = all(name == Path(name).name for name in names)    # not elsewhere on the machine
    except (KeyError, TypeError, AttributeError):
        beside = False
    require(beside and names, f"{index}: has no weight_map from tensors to the names of files beside it")
    return [folder / name for name in sorted(names)]


def read_tensors(path, wanted):
    """Yield (name, tensor) of one file, checked against wanted, {name: tensor of that shape}."""
    library = import_extra("safetensors")
    try:
        with library.safe_open(path, framework="pt") as file:
            for name in file.keys():
                if (name == "lm_head.weight" and name not in wanted) or name.endswith("rotary_emb.inv_freq"):
                    continue                                        # the copy of a tied head; constants of old releases
                require(name in wanted, f"{path}: tensor {name} has no place in the model of config.json")
                shape, asked = tuple(file.get_slice(name).get_shape()), tuple(wanted[name].shape)
                require(shape == asked, f"{path}: tensor {name} is {shape}, and config.json asks for {asked}")
                yield name, file.get_tensor(name)
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None


def grown(weight, rows, generator):
    """A parameter with `rows` more rows: the mean of the old ones, plus noise of a fiftieth of their spread."""
    where = generator.device if generator else weight.device
    noise = torch.randn(rows, weight.shape[1], generator=generator, device=where).to(weight.device)
    new = weight.mean(0, dtype=torch.float32) + 0.02 * weight.std(0).float() * noise        # (rows, D)
    return nn.Parameter(torch.cat([weight, new.to(weight.dtype)]), requires_grad=weight.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# The whole

class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            require(not config.codebook_dim, "rows made from a codebook need tied embeddings")
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init)

    def _init(self, layer):
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if isinstance(layer, (Attention, MLP)):     # after their Linears: residual branches add up over 2L layers
            out = layer.o_proj if isinstance(layer, Attention) else layer.down_proj
            nn.init.normal_(out.weight, 0.0, 0.02 / (2 * self.config.num_hidden_layers) ** 0.5)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    def head(self, table):
        """The rows that logits are products with (V, D): those of model.table(), or an untied head's."""
        tied = self.config.tie_word_embeddings
        return table if tied else learned_only(self.lm_head.weight, self.model.learned)

    def logits(self, x, table, rows=None):
        """x (..., D) -> float32 logits (..., V), or of the rows (first, past_last) only."""
        head = self.head(table)
        return capped_logits(x, head if rows is None else head[slice(*rows)], self.config.final_logit_softcapping)

    def forward(self, ids, targets=None, positions=None, documents=None, cache=None, z_loss=0.0):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> nll (B, T) float32, 0 where a target is -100.

        positions (B, T) and documents (B, T) describe packed rows (see data.Batch); cache continues what it holds.
        """
        table = self.model.table()
        x = self.model(ids, table, positions, documents, cache)     # (B, T, D)
        if targets is None:
            return self.logits(x, table)
        head, where = self.head(table), (targets != -100).flatten().nonzero()[:, 0]     # (N,); waits for the GPU once
        if torch.is_autocast_enabled(ids.device.type):              # backward runs outside autocast: types must agree
            x, head = (y.to(torch.get_autocast_dtype(ids.device.type)) for y in (x, head))
        nll = ChunkedNLL.apply(x.flatten(0, 1)[where], head, targets.flatten()[where], z_loss,
                               self.config.final_logit_softcapping)
        return nll.new_zeros(ids.numel()).index_copy(0, where, nll).view(ids.shape)

    # Published weights and new rows

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Open a folder of config.json and safetensors; ValueError, naming file or tensor, for what does not fit."""
        folder = Path(folder)
        with torch.device("meta"):                                  # shapes alone: the file's weights are the only copy
            model = cls(read_config(folder))
        state, wanted = {}, model.state_dict()
        for path in weight_files(folder):
            for name, tensor in read_tensors(path, wanted):
                require(name not in state, f"{path}: tensor {name} is in another file, too")
                state[name] = tensor.to(device, dtype, copy=True)
        missing = sorted(wanted.keys() - state.keys())
        if missing:
            raise ValueError(f"{folder}: tensor {missing[0]} is missing, and {len(missing) - 1} more")
        model.load_state_dict(state, assign=True)
        return model

    @torch.no_grad()
    def save_pretrained(self, folder, shard=5 * 10 ** 9, **keys):
        """Write config.json, with these keys besides, and safetensors in files of about `shard` bytes."""
        folder, hub, library = Path(folder), import_extra("huggingface_hub"), import_extra("safetensors")
        config = config_to_hf(self.config) | {"dtype": str(self.dtype).removeprefix("torch.")} | keys
        state = {k: v for k, v in self.state_dict().items() if "image_rows" not in k}
        state["model.embed_tokens.weight"] = self.model.table().detach()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            hub.save_torch_state_dict(state, folder, max_shard_size=shard)      # an earlier save's files go
        except library.SafetensorError as error:
            raise OSError(f"{folder}: weights not written ({error})") from None
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def extend_vocab(self, rows, generator=None):
        """Append rows to the table, and to an untied head: the mean of the old ones and noise that tells them apart."""
        require(not self.config.codebook_dim, "the vocabulary cannot grow behind rows made from a codebook")
        require(self.model.learned is None, "the vocabulary has to grow before train_only_rows")
        self.config = self.model.config = replace(self.config, vocab_size=self.config.vocab_size + rows)
        self.model.embed_tokens.weight = grown(self.model.embed_tokens.weight, rows, generator)
        self.model.embed_tokens.num_embeddings += rows
        if not self.config.tie_word_embeddings:
            self.lm_head.weight = grown(self.lm_head.weight, rows, generator)
            self.lm_head.out_features += rows

    def train_only_rows(self, ids):
        """Freeze everything but the rows of these ids, of the table and of an untied head.

        The other rows share a parameter with them and get gradients of zero: give them no weight decay.
        """
        self.requires_grad_(False)
        learned = torch.zeros(self.config.vocab_size, 1, dtype=torch.bool, device=self.device)
        learned[list(ids)] = True
        self.model.learned = learned[:self.model.embed_tokens.num_embeddings]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(("model.embed_tokens", "model.image_rows", "lm_head")))
