"""The image tokenizer: shapes, quantizer, adversary, checkpoints, and the same numbers as transformers."""

import pickle
import re
import sys
import types
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from vqgan import (Discriminator, Quantizer, VQGAN, VQGANConfig, adaptive_weight, discriminator_loss,
                   generator_loss, sample_far)

TINY = VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, n_embed=64, embed_dim=8)
BOTH = pytest.mark.parametrize("l2_norm", [False, True])


def make(**changes):
    torch.manual_seed(0)
    model = VQGAN(replace(TINY, **changes)).eval()
    nn.init.normal_(model.quantize.embedding.weight, std=0.3)       # rows far enough apart that codes differ
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm):                         # 1 and 0 would hide mistakes
            layer.weight.data += 0.2 * torch.randn_like(layer.weight)
            layer.bias.data += 0.2 * torch.randn_like(layer.bias)
    return model


def noise(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_quantizer(l2_norm, beta=0.25):
    torch.manual_seed(0)
    quantizer = Quantizer(replace(TINY, l2_norm=l2_norm, beta=beta))
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer, noise(2, TINY.embed_dim, 3, 5).requires_grad_()


# -----------------------------------------------------------------------------------------------------------
# Shapes

@pytest.mark.parametrize("patch, levels, f", [(1, (1, 2), 2), (4, (1,), 4), (4, (1, 1, 2), 16)])
def test_shapes(patch, levels, f):
    """Rows and columns change places, or the code grid has another size than the pixels."""
    model, pixels = make(patch=patch, ch_mult=levels), noise(2, 3, 4 * f, 3 * f)
    codes, out = model.encode(pixels), model(pixels)
    assert model.config.f == f and codes.shape == (2, 4, 3) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < TINY.n_embed and len(codes.unique()) > 1
    assert torch.equal(out.codes, codes) and out.pixels.shape == pixels.shape and out.loss.shape == ()
    decoded = model.decode(codes)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1 and not decoded.requires_grad


def test_codes_stand_where_their_pixels_are():
    """The grid is not in raster order: a change at the right below must leave codes at the left above."""
    model = make(patch=4, ch_mult=(1,))
    nn.init.zeros_(model.encoder.mid.attn_1.proj_out.weight)        # it sees the whole picture, as norms do
    for layer in model.encoder.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x
    a = noise(1, 3, 64, 96)
    b = a.clone()
    b[..., 60:, 92:] += 1.0
    changed = (model.latents(a) - model.latents(b)).abs().sum(1)[0] > 1e-6
    assert changed[15, 23] and not changed[0].any() and not changed[:, 0].any()


def test_an_indivisible_size_is_refused():
    """Pixels are cut off silently, or an error comes from deep inside a convolution."""
    for height, width in ((16, 20), (9, 16)):
        with pytest.raises(ValueError, match=f"{width}x{height} pixels.*8x8.*that 8 divides"):
            make(patch=4).encode(noise(1, 3, height, width))


@BOTH
def test_unquantized_vectors_pass(l2_norm):
    """The first phase of training already rounds to the untrained codebook."""
    model, pixels = make(l2_norm=l2_norm), noise(1, 3, 8, 12)
    out, z = model(pixels, quantize=False), model.quant_conv(model.encoder(pixels))
    z = F.normalize(z, dim=1) if l2_norm else z
    assert out.codes is None and out.loss == 0
    assert torch.equal(out.pixels, model.decoder(model.post_quant_conv(z)))
    assert not torch.allclose(out.pixels, model(pixels).pixels)


# -----------------------------------------------------------------------------------------------------------
# The quantizer

@pytest.mark.nearest_code
@BOTH
def test_the_nearest_row_is_chosen(l2_norm):
    """A wrong sign or a forgotten term in the expanded distance; training and decoding see other vectors."""
    quantizer, z = make_quantizer(l2_norm)
    z_q, codes, _ = quantizer(z)
    vectors, book = z.detach().permute(0, 2, 3, 1).reshape(-1, 8), quantizer.embedding.weight.detach()
    if l2_norm:
        vectors, book = F.normalize(vectors, dim=1), F.normalize(book, dim=1)
    nearest = torch.cdist(vectors.double(), book.double()).argmin(1)
    assert torch.equal(codes.flatten(), nearest) and torch.equal(codes, quantizer.assign(z))
    torch.testing.assert_close(z_q.permute(0, 2, 3, 1).reshape(-1, 8), book[nearest])
    torch.testing.assert_close(z_q, quantizer.lookup(codes))


@pytest.mark.straight_through
@BOTH
def test_the_gradient_passes_straight_through(l2_norm):
    """The reconstruction cannot teach the encoder, or it moves the codebook."""
    quantizer, z = make_quantizer(l2_norm)
    weights = noise(*z.shape, seed=2)
    (quantizer(z)[0] * weights).sum().backward()
    through, = torch.autograd.grad((quantizer.project(z) * weights).sum(), z)
    torch.testing.assert_close(z.grad, through)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()


@pytest.mark.straight_through
@BOTH
def test_beta_weighs_the_encoder_only(l2_norm):
    """Taming's old mistake, beta on the codebook's term; gradients drag unused codes along."""
    grads = []
    for beta in (0.25, 0.5):
        quantizer, z = make_quantizer(l2_norm, beta)
        _, codes, loss = quantizer(z)
        grads.append(torch.autograd.grad(loss, (z, quantizer.embedding.weight)))
    (z1, book1), (z2, book2) = grads
    torch.testing.assert_close(2 * z1, z2)
    torch.testing.assert_close(book1, book2)
    assert book1.abs().sum(1).nonzero().flatten().tolist() == codes.unique().tolist()
    distance = (quantizer.project(z) - quantizer.lookup(codes)).square()
    distance = distance.sum(1) if l2_norm else distance             # on the sphere it must not fade as 1 / e
    torch.testing.assert_close(loss, 1.5 * distance.mean())


def test_far_vectors_come_first():
    """A plain background, nine of ten vectors, takes nine of ten codes."""
    vectors, generator = torch.cat([torch.zeros(900, 2), torch.eye(2).repeat(50, 1)]), torch.Generator()
    assert (sample_far(vectors, torch.zeros(1, 2), 20, generator.manual_seed(0)).sum(1) == 1).all()
    far = sample_far(torch.tensor([[1.0], [3.0]]), torch.zeros(1, 1), 4000, generator)
    assert abs((far == 3).float().mean() - 0.9) < 0.03              # in proportion to the squared distance


# -----------------------------------------------------------------------------------------------------------
# The adversary

class Mean(nn.Module):
    """A discriminator whose logit is the pixels' mean."""
    def forward(self, pixels):
        return pixels.mean(dim=(1, 2, 3))


def test_the_discriminators_loss_spares_the_generator():
    """A discriminator's step teaches the generator to be found out, or does not reach all layers."""
    torch.manual_seed(0)
    discriminator, fake = Discriminator(ch=8, layers=2), noise(2, 3, 32, 32).requires_grad_()
    discriminator_loss(discriminator, noise(2, 3, 32, 32, seed=2), fake * 1.0).backward()
    assert fake.grad is None and all(p.grad.any() for p in discriminator.parameters() if p.ndim == 4)
    generator_loss(discriminator, fake * 1.0).backward()
    assert fake.grad.abs().sum() > 0


def test_signs_of_the_adversarial_losses():
    """Two players pull on the same side."""
    real, fake = torch.full((1, 3, 2, 2), 0.3), torch.full((1, 3, 2, 2), -0.2)
    loss = discriminator_loss(Mean(), real, fake)
    assert loss == pytest.approx(0.5 * (1 - 0.3) + 0.5 * (1 - 0.2))
    assert discriminator_loss(Mean(), real + 0.1, fake) < loss < discriminator_loss(Mean(), real, fake + 0.1)
    assert discriminator_loss(Mean(), real + 1, fake - 1) == 0      # nothing to learn beyond the margins
    assert generator_loss(Mean(), fake + 0.1) < generator_loss(Mean(), fake) == pytest.approx(0.2)


def test_patches_of_the_discriminator():
    """Other layers than taming's, whose weights it is named after."""
    discriminator = Discriminator()
    assert discriminator(noise(1, 3, 64, 96)).shape == (1, 1, 6, 10)
    shapes = {name: tuple(p.shape) for name, p in discriminator.named_parameters() if p.ndim == 4}
    assert shapes == {"main.0.weight": (64, 3, 4, 4), "main.2.weight": (128, 64, 4, 4),
                      "main.5.weight": (256, 128, 4, 4), "main.8.weight": (512, 256, 4, 4),
                      "main.11.weight": (1, 512, 4, 4)}


def test_adaptive_weight_is_the_ratio_of_gradients():
    """The adversary drowns the reconstruction, or gradients flow through its weight."""
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    rebuilt, adversarial = (layer @ torch.tensor(x) for x in ([3.0, 4.0], [0.0, 0.5]))
    weight = adaptive_weight(rebuilt, adversarial, layer)
    assert weight == pytest.approx(5.0 / 0.5001) and not weight.requires_grad and layer.grad is None
    assert adaptive_weight(rebuilt, 0 * adversarial, layer, ceiling=70) == 70
    (rebuilt + weight * adversarial).backward()                     # the graph is still there


# -----------------------------------------------------------------------------------------------------------
# Checkpoints

def foreign(model):
    """The layout of taming's files: Lightning's, with the training's discriminator among the weights."""
    return {"state_dict": {**model.state_dict(), "loss.discriminator.x": torch.zeros(2)}, "epoch": 3}


@pytest.mark.parametrize("changes, old", [
    ({"ch_mult": (1, 1, 2), "num_res_blocks": 2, "attn_levels": (0, 2)}, False),
    ({"patch": 4, "ch_mult": (1,), "attn_levels": (0,), "embed_dim": 16, "n_embed": 9}, True)],
    ids=["zip", "before torch 1.6"])
def test_a_foreign_checkpoint_tells_its_shape(tmp_path, changes, old):
    """A configuration has to be guessed by hand, or weights of the loss count as left over."""
    model = make(**changes)
    torch.save(foreign(model), tmp_path / "x.ckpt", _use_new_zipfile_serialization=not old)
    loaded = VQGAN.load(tmp_path / "x.ckpt")
    assert loaded.config == model.config and loaded.fingerprint() == model.fingerprint()
    assert not loaded.training


def test_lightnings_callbacks_do_not_stop_a_foreign_checkpoint(tmp_path, monkeypatch):
    """Taming's own files are refused, which hold a class of PyTorch Lightning as a dictionary key."""
    lightning = "pytorch_lightning.callbacks.model_checkpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": lightning})
    sys.modules[lightning].ModelCheckpoint = callback
    torch.save({**foreign(make()), "callbacks": {callback: {"best_model_path": "x"}}}, tmp_path / "x.ckpt")
    monkeypatch.undo()
    assert VQGAN.load(tmp_path / "x.ckpt").fingerprint() == make().fingerprint()


def test_our_own_checkpoint_comes_back(tmp_path):
    """Settings that tensors do not show, such as l2_norm, are lost; weights live on in the file."""
    model, path = make(l2_norm=True, beta=0.5, attn_levels=(1,)), tmp_path / "vqgan.pt"
    torch.save({"config": asdict(model.config), "model": model.state_dict(), "step": 7}, path)
    loaded = VQGAN.load(path)
    path.write_bytes(b"")
    assert loaded.config == model.config and loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("prefix", ["first_stage_model.", "module.", "_orig_mod.", "model.", "module.model."])
def test_a_wrapped_network_is_found(tmp_path, prefix):
    """A whole latent-diffusion model, or what DataParallel or torch.compile wrapped, is no checkpoint."""
    other = {"cond_stage_model.encoder.x": torch.ones(1), "model.diffusion_model.x": torch.ones(1)}
    for key in ("state_dict", "model"):
        torch.save({key: {prefix + k: v for k, v in make().state_dict().items()} | other}, tmp_path / "x.ckpt")
        assert VQGAN.load(tmp_path / "x.ckpt").fingerprint() == make().fingerprint()


def test_a_codebook_of_directions_is_recognised(tmp_path, capsys):
    """Codes of an L2-normalised network under taming's names are chosen and decoded wrongly, in silence."""
    model = make(l2_norm=True)
    for scale, l2_norm in ((1, True), (1.1, False)):
        weight = nn.functional.normalize(torch.randn(model.quantize.embedding.weight.shape)) * scale
        torch.save({"state_dict": model.state_dict() | {"quantize.embedding.weight": weight}}, tmp_path / "x.ckpt")
        assert VQGAN.load(tmp_path / "x.ckpt").config.l2_norm is l2_norm
        assert ("as directions" in capsys.readouterr().err) is l2_norm


@pytest.mark.parametrize("family, changed", [
    ("diffusers", {"encoder.down_blocks.0.x": 1}), ("LlamaGen", {"encoder.conv_blocks.0.x": 1}),
    ("Gumbel", {"quantize.embed.weight": 1}), ("KL", {"quantize.": 0}), ("Chameleon", {"decoder.": 0})])
def test_other_families_are_named(tmp_path, family, changed):
    """A user wonders what `encoder.conv_in.weight` has to do with the wrong file that was downloaded."""
    (name, kept), = changed.items()
    state = {k: v for k, v in make().state_dict().items() if kept or not k.startswith(name)}
    torch.save({"state_dict": state | ({name: torch.ones(1)} if kept else {})}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"x.ckpt: .*{family}"):
        VQGAN.load(tmp_path / "x.ckpt")


def test_half_precision_weights_are_read_as_float32(tmp_path):
    """A network of mixed types."""
    torch.save({"state_dict": make().half().state_dict()}, tmp_path / "x.ckpt")
    assert {p.dtype for p in VQGAN.load(tmp_path / "x.ckpt").parameters()} == {torch.float32}


def test_the_fingerprint_sees_every_weight():
    """Codes of one network are decoded by another."""
    model = make()
    prints = {model.fingerprint()}
    assert prints == {make().fingerprint()} and len(min(prints)) == 16
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        prints.add(model.fingerprint())
    assert len(prints) == 1 + len(list(model.parameters()))


class Evil:
    """Creates a file when an unpickler that runs code meets it."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def bad_checkpoints(evil):
    state, own = make().state_dict(), {"config": asdict(TINY), "model": make().state_dict()}
    without = {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}
    return {
        "a tensor is missing": ({"state_dict": without}, "decoder.conv_out.bias"),
        "a tensor is missing in ours": ({**own, "model": without}, "decoder.conv_out.bias"),
        "a tensor is left over": ({"state_dict": state | {"decoder.up.7.x": torch.ones(1)}}, "up.7.x"),
        "another network": ({"state_dict": nn.Linear(2, 2).state_dict()}, "encoder.conv_in.weight"),
        "another shape": ({"state_dict": state | {"quant_conv.bias": torch.ones(3)}}, "quant_conv.bias"),
        "numbers for tensors": ({"state_dict": {k: 1 for k in state}}, "int"),
        "an unknown setting": ({**own, "config": {**own["config"], "depth": 3}}, "depth"),
        "a wrong setting": ({**own, "config": {**own["config"], "ch": 20}}, "ch is 20"),
        "a list": ([1, 2], "list"),
        "code": ({**foreign(make()), "x": Evil(evil)}, "plain tensors"),
    }


def test_bad_checkpoints_are_one_sentence_that_names_the_file(tmp_path):
    """Tracebacks of the unpickler, half-loaded networks, and code of strangers that runs."""
    path, evil = tmp_path / "x.ckpt", tmp_path / "evil"
    with pytest.raises(ValueError, match="x.ckpt: no such file"):
        VQGAN.load(path)
    for name, (content, reason) in bad_checkpoints(evil).items():
        torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            VQGAN.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and reason in message and "\n" not in message, name
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint\n", whole[:len(whole) // 2], pickle.dumps(Evil(evil), 2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.ckpt: damaged, or not a checkpoint of plain tensors"):
            VQGAN.load(path)
    assert not evil.exists()
    pickle.loads(pickle.dumps(Evil(evil))).close()
    assert evil.exists()                                            # it would have appeared


# -----------------------------------------------------------------------------------------------------------
# The same numbers as transformers

@pytest.mark.parametrize("mult, blocks, levels", [((1, 2), 1, ()), ((1, 1, 2), 2, (0, 2))])
def test_codes_equal_those_of_transformers(tmp_path, mult, blocks, levels):
    """The encoder differs from Chameleon's in padding, order of layers, attention or epsilon."""
    transformers = pytest.importorskip("transformers")
    ours = make(ch_mult=mult, num_res_blocks=blocks, attn_levels=levels)
    theirs = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(
        base_channels=32, channel_multiplier=list(mult), num_res_blocks=blocks, resolution=32,
        latent_channels=16, embed_dim=8, num_embeddings=64,
        attn_resolutions=[32 >> level for level in levels])).eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("decoder.")})
    torch.save({"state_dict": ours.state_dict() | theirs.state_dict()}, tmp_path / "x.ckpt")
    model = VQGAN.load(tmp_path / "x.ckpt")
    for height, width in ((32, 32), (16, 40)):
        pixels = noise(2, 3, height, width)
        with torch.no_grad():
            wanted = theirs.encode(pixels).image_tokens
        codes = model.encode(pixels)
        assert torch.equal(codes.flatten(), wanted.flatten()) and len(codes.unique()) > 5


def test_pixels_equal_those_of_transformers():
    """The decoder differs from taming's in the order of its levels, its upsampling or its attention."""
    janus = pytest.importorskip("transformers.models.janus.modeling_janus")         # taming's decoder, too
    ours = make(ch_mult=(1, 1, 2), num_res_blocks=2, attn_levels=(2,))
    theirs = janus.JanusVQVAEDecoder(janus.JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=2, latent_channels=16)).eval()
    theirs.load_state_dict({re.sub(r"^up\.(\d)", lambda m: f"up.{2 - int(m[1])}", name): tensor
                            for name, tensor in ours.decoder.state_dict().items()})     # from the smallest up
    codes = torch.randint(TINY.n_embed, (2, 4, 3))
    with torch.no_grad():
        wanted = theirs(ours.post_quant_conv(ours.quantize.embedding(codes).permute(0, 3, 1, 2)))
    torch.testing.assert_close(ours.decode(codes), wanted.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    assert (wanted.abs() < 1).float().mean() > 0.5
