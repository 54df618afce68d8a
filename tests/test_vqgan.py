"""The image tokenizer: each test says which failure it prevents."""

import pickle
import re
import sys
import types
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from vqgan import (Discriminator, Perceptual, Quantizer, VQGAN, VQGANConfig, adaptive_weight, discriminator_loss,
                   draw_far, generator_loss, kmeans, perturb, usage)

TINY = VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, n_embed=64, embed_dim=8)
BOTH = pytest.mark.parametrize("l2_norm", [False, True])


def make(config=TINY, seed=0):
    torch.manual_seed(seed)
    model = VQGAN(config).eval()
    nn.init.normal_(model.quantize.embedding.weight, std=0.3)       # rows far enough apart that codes differ
    return model


def noise(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_quantizer(l2_norm, beta=0.25):
    torch.manual_seed(0)
    quantizer = Quantizer(replace(TINY, l2_norm=l2_norm, beta=beta))
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer, noise(2, TINY.embed_dim, 3, 5).requires_grad_()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes

@pytest.mark.parametrize("patch, levels, f", [(1, (1, 2), 2), (4, (1, 2), 8), (4, (1,), 4), (1, (1, 1, 2), 4)])
def test_shapes_keep_height_and_width_apart(patch, levels, f):
    """Prevents rows and columns that change places, and a code grid of another size than the pixels."""
    model = make(replace(TINY, patch=patch, ch_mult=levels))
    assert model.config.f == f
    codes = model.encode(noise(2, 3, 4 * f, 3 * f))
    assert codes.shape == (2, 4, 3) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < TINY.n_embed and len(codes.unique()) > 1
    pixels = model.decode(codes)
    assert pixels.shape == (2, 3, 4 * f, 3 * f) and pixels.abs().max() <= 1
    assert not pixels.requires_grad
    out = model(noise(2, 3, 4 * f, 3 * f))
    assert torch.equal(out.codes, codes) and out.pixels.shape == pixels.shape and out.loss.shape == ()


def test_codes_stand_where_their_pixels_are():
    """Prevents a grid that is not in raster order: a change at the right below must leave the code at the left above."""
    model = make(replace(TINY, patch=4, ch_mult=(1,)))
    nn.init.zeros_(model.encoder.mid.attn_1.proj_out.weight)        # attention and group norm see the whole picture
    for layer in model.encoder.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x
    a = noise(1, 3, 64, 96)
    b = a.clone()
    b[..., 60:, 92:] += 1.0
    changed = (model.latents(a) - model.latents(b)).abs().sum(1)[0] > 1e-6
    assert changed[15, 23] and not changed[0].any() and not changed[:, 0].any()


@pytest.mark.parametrize("height, width", [(16, 20), (20, 16), (9, 16)])
def test_an_indivisible_size_is_refused(height, width):
    """Prevents pixels that are cut off silently, or an error deep inside a convolution."""
    with pytest.raises(ValueError, match=f"{width}x{height} pixels.*8x8.*that 8 divides"):
        make(replace(TINY, patch=4)).encode(noise(1, 3, height, width))


def test_unquantized_vectors_pass():
    """Prevents a first phase of training that already rounds to the untrained codebook."""
    for l2_norm in (False, True):
        model, pixels = make(replace(TINY, l2_norm=l2_norm)), noise(1, 3, 8, 12)
        out = model(pixels, quantize=False)
        z = model.quant_conv(model.encoder(pixels))
        z = F.normalize(z, dim=1) if l2_norm else z
        assert out.codes is None and out.loss == 0
        assert torch.equal(out.pixels, model.decoder(model.post_quant_conv(z)))
        assert not torch.allclose(out.pixels, model(pixels).pixels)


# ---------------------------------------------------------------------------------------------------------------------
# The quantizer

@BOTH
def test_the_nearest_row_is_chosen(l2_norm):
    """Prevents a wrong sign or a forgotten term in the expanded distance."""
    quantizer, z = make_quantizer(l2_norm)
    z_q, codes, _ = quantizer(z)
    vectors, book = z.detach().permute(0, 2, 3, 1).reshape(-1, 8), quantizer.embedding.weight.detach()
    if l2_norm:
        vectors, book = F.normalize(vectors, dim=1), F.normalize(book, dim=1)
    nearest = torch.cdist(vectors.double(), book.double()).argmin(1)
    assert torch.equal(codes.flatten(), nearest)
    torch.testing.assert_close(z_q.permute(0, 2, 3, 1).reshape(-1, 8), book[nearest])
    torch.testing.assert_close(z_q, quantizer.lookup(codes))        # training and decoding see the same vectors
    assert torch.equal(codes, quantizer.assign(z))


@BOTH
def test_the_gradient_passes_straight_through(l2_norm):
    """Prevents an encoder that the reconstruction cannot teach."""
    quantizer, z = make_quantizer(l2_norm)
    weights = noise(*z.shape, seed=2)
    (quantizer(z)[0] * weights).sum().backward()
    through, = torch.autograd.grad((quantizer.project(z) * weights).sum(), z)
    torch.testing.assert_close(z.grad, through if l2_norm else weights)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()


@BOTH
def test_beta_weighs_the_encoder_only(l2_norm):
    """Prevents taming's old mistake, which put beta on the codebook's term."""
    grads = []
    for beta in (0.25, 0.5):
        quantizer, z = make_quantizer(l2_norm, beta)
        grads.append(torch.autograd.grad(quantizer(z)[2], (z, quantizer.embedding.weight)))
    (z1, book1), (z2, book2) = grads
    torch.testing.assert_close(2 * z1, z2)
    torch.testing.assert_close(book1, book2)
    if not l2_norm:
        quantizer, z = make_quantizer(False)
        z_q = quantizer.lookup(quantizer(z)[1]).detach()
        torch.testing.assert_close(z1, 0.25 * 2 * (z - z_q).detach() / z.numel())


@BOTH
def test_only_chosen_rows_learn(l2_norm):
    """Prevents gradients that drag unused codes along."""
    quantizer, z = make_quantizer(l2_norm)
    _, codes, loss = quantizer(z)
    loss.backward()
    used = torch.zeros(TINY.n_embed, dtype=torch.bool)
    used[codes.unique()] = True
    assert 1 < used.sum() < TINY.n_embed
    assert torch.equal(quantizer.embedding.weight.grad.abs().sum(1) > 0, used)


def test_l2_loss_does_not_depend_on_the_number_of_dimensions():
    """Prevents a loss of unit vectors that fades as 1 / e: it is the squared distance on the sphere, for any e."""
    quantizer, z = make_quantizer(True)
    _, codes, loss = quantizer(z)
    distance = (F.normalize(z, dim=1) - quantizer.lookup(codes)).square().sum(1).mean()
    torch.testing.assert_close(loss, 1.25 * distance)


def test_usage_counts():
    """Prevents a perplexity in bits, or one that counts codes that never occur."""
    assert usage(torch.tensor([5, 5, 5, 5, 0, 0])) == (4, pytest.approx(4.0))
    assert usage(torch.tensor([7, 0, 0])) == (1, pytest.approx(1.0))
    assert usage(torch.tensor([3, 1]))[1] == pytest.approx(2 ** 0.8112781244591328)     # entropy of (3/4, 1/4) in bits
    assert usage(torch.zeros(4, dtype=torch.long)) == (0, pytest.approx(1.0))


def test_kmeans_finds_clusters():
    """Prevents centres that do not move to the means of their vectors, and centres without vectors that become NaN."""
    generator = torch.Generator().manual_seed(0)
    means = 10.0 * torch.eye(4)
    vectors = (means.repeat(50, 1) + 0.1 * torch.randn(200, 4, generator=generator))
    centres = kmeans(vectors, 16, generator=generator)              # enough starts for each cluster to get one
    assert centres.shape == (16, 4) and centres.isfinite().all()
    assert torch.cdist(means, centres).min(1).values.max() < 0.2
    assert torch.equal(kmeans(vectors, 3, generator=torch.Generator().manual_seed(5)),
                       kmeans(vectors, 3, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(kmeans(vectors, 1, generator=generator)[0], vectors.mean(0))
    assert kmeans(vectors[:3], 5, generator=generator).isfinite().all()     # fewer vectors than centres


def test_far_vectors_are_drawn_first():
    """Prevents a plain background, nine of ten vectors, from taking nine of ten codes."""
    vectors = torch.cat([torch.zeros(900, 2), torch.eye(2).repeat(50, 1)])
    assert (draw_far(vectors, torch.zeros(1, 2), 20, torch.Generator().manual_seed(0)).sum(1) == 1).all()
    far = draw_far(torch.tensor([[1.0], [3.0]]), torch.zeros(1, 1), 4000, torch.Generator().manual_seed(0))
    assert abs((far == 3).float().mean() - 0.9) < 0.03      # in proportion to the squared distance


def test_noise_leads_to_codes_that_look_alike():
    """Codes 0, 2, 4 ... stand at one place, 1, 3, 5 ... at another far away: no noise of this size leads across."""
    far = torch.tensor([0.0, 100.0]).repeat(8)[:, None] + torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(16).view(2, 8).repeat(20, 1)
    draw = lambda noise, seed=1: perturb(far, noise, codes, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), codes) and draw(0.05).shape == codes.shape
    assert torch.equal(draw(0.05) % 2, codes % 2) and 0.1 < (draw(0.05) != codes).float().mean() < 0.9
    assert torch.equal(draw(0.05), draw(0.05)) and not torch.equal(draw(0.05), draw(0.05, seed=2))
    assert 0.1 < ((draw(3.0) - codes) % 2).float().mean()


def test_replace_sets_rows_and_no_others():
    """Prevents dead codes that come back at the wrong rows."""
    quantizer, _ = make_quantizer(False)
    before, vectors = quantizer.embedding.weight.detach().clone(), noise(2, 8)
    quantizer.replace(torch.tensor([9, 2]), vectors.double())
    after = quantizer.embedding.weight
    assert torch.equal(after[9], vectors[0]) and torch.equal(after[2], vectors[1]) and after.requires_grad
    others = [i for i in range(TINY.n_embed) if i not in (2, 9)]
    assert torch.equal(after[others], before[others])


# ---------------------------------------------------------------------------------------------------------------------
# The adversary

class Mean(nn.Module):
    """A discriminator whose logit is the pixels' mean."""
    def forward(self, pixels):
        return pixels.mean(dim=(1, 2, 3))


def test_the_discriminators_loss_spares_the_generator():
    """Prevents a discriminator's step that also teaches the generator to be found out."""
    torch.manual_seed(0)
    discriminator, drawn = Discriminator(ch=8, layers=2), noise(2, 3, 32, 32).requires_grad_()
    loss = discriminator_loss(discriminator, noise(2, 3, 32, 32, seed=2), drawn * 1.0)
    loss.backward()
    assert drawn.grad is None and all(p.grad is not None for p in discriminator.parameters())
    generator_loss(discriminator, drawn * 1.0).backward()
    assert drawn.grad.abs().sum() > 0


def test_signs_of_the_adversarial_losses():
    """Prevents two players who pull on the same side."""
    real, fake = torch.full((1, 3, 2, 2), 0.3), torch.full((1, 3, 2, 2), -0.2)
    loss = discriminator_loss(Mean(), real, fake)
    assert loss == pytest.approx(0.5 * (1 - 0.3) + 0.5 * (1 - 0.2))
    assert discriminator_loss(Mean(), real + 0.1, fake) < loss < discriminator_loss(Mean(), real, fake + 0.1)
    assert discriminator_loss(Mean(), real + 1, fake - 1) == 0      # beyond the margins there is nothing to learn
    assert generator_loss(Mean(), fake + 0.1) < generator_loss(Mean(), fake) == pytest.approx(0.2)


def test_the_discriminator_learns():
    """Prevents layers that no gradient reaches: bright and dark pictures are told apart in a few steps."""
    torch.manual_seed(0)
    discriminator = Discriminator(ch=8, layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, betas=(0.5, 0.9))
    losses = []
    for step in range(12):
        real, fake = noise(4, 3, 16, 16, seed=step) * 0.3 + 0.5, noise(4, 3, 16, 16, seed=100 + step) * 0.3 - 0.5
        loss = discriminator_loss(discriminator, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 and losses[-1] < 0.5 * losses[0]


def test_patches_of_the_discriminator():
    """Prevents other layers than taming's, whose weights it is named after."""
    discriminator = Discriminator()
    assert discriminator(noise(1, 3, 64, 96)).shape == (1, 1, 6, 10)
    shapes = {name: tuple(p.shape) for name, p in discriminator.named_parameters() if p.ndim == 4}
    assert shapes == {"main.0.weight": (64, 3, 4, 4), "main.2.weight": (128, 64, 4, 4), "main.5.weight": (256, 128, 4, 4),
                      "main.8.weight": (512, 256, 4, 4), "main.11.weight": (1, 512, 4, 4)}


def test_adaptive_weight_is_the_ratio_of_gradients():
    """Prevents an adversary that drowns the reconstruction, or a weight that gradients flow through."""
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight == pytest.approx(5.0 / 0.5001) and not weight.requires_grad and layer.grad is None
    assert adaptive_weight(reconstruction, 0 * adversarial, layer, ceiling=70) == 70
    (reconstruction + weight * adversarial).backward()              # the graph is still there


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def foreign(model):
    """The layout of taming's files: Lightning's, with the training's discriminator among the weights."""
    return {"state_dict": {**model.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(2)}, "epoch": 3}


@pytest.mark.parametrize("change", [{}, {"ch_mult": (1, 1, 2), "num_res_blocks": 2, "attn_levels": (0, 2)},
                                    {"patch": 4, "ch_mult": (1,), "attn_levels": (0,)}, {"embed_dim": 16, "n_embed": 9}])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_a_foreign_checkpoint_tells_its_shape(tmp_path, change, old):
    """Prevents a configuration that has to be guessed by hand, and weights of the loss that count as left over."""
    model = make(replace(TINY, **change))
    torch.save(foreign(model), tmp_path / "x.ckpt", _use_new_zipfile_serialization=not old)
    loaded = VQGAN.load(tmp_path / "x.ckpt")
    assert loaded.config == model.config and loaded.fingerprint() == model.fingerprint() and not loaded.training
    pixels = noise(2, 3, 16, 32)
    assert torch.equal(loaded.encode(pixels), model.encode(pixels))
    assert torch.equal(loaded.decode(model.encode(pixels)), model.decode(model.encode(pixels)))


def test_lightnings_callbacks_do_not_stop_a_foreign_checkpoint(tmp_path, monkeypatch):
    """Prevents taming's own files from being refused: they hold a class of PyTorch Lightning as a dictionary key."""
    lightning = "pytorch_lightning.callbacks.model_checkpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": lightning})
    sys.modules[lightning].ModelCheckpoint = callback
    torch.save({**foreign(make()), "callbacks": {callback: {"best_model_path": "x"}}}, tmp_path / "x.ckpt")
    monkeypatch.undo()
    assert VQGAN.load(tmp_path / "x.ckpt").fingerprint() == make().fingerprint()


def test_our_own_checkpoint_comes_back(tmp_path):
    """Prevents settings that the tensors do not show, such as l2_norm, from being lost."""
    model, path = make(replace(TINY, l2_norm=True, beta=0.5, attn_levels=(1,))), tmp_path / "vqgan.pt"
    torch.save({"config": asdict(model.config), "model": model.state_dict(), "step": 7}, path)
    loaded = VQGAN.load(path)
    assert loaded.config == model.config and loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.encode(noise(1, 3, 8, 8)), model.encode(noise(1, 3, 8, 8)))
    path.write_bytes(b"")                                           # weights must not live on in the file
    assert loaded.fingerprint() == model.fingerprint()


def test_half_precision_weights_are_read_as_float32(tmp_path):
    """Prevents a network of mixed types."""
    torch.save({"state_dict": make().half().state_dict()}, tmp_path / "x.ckpt")
    assert {p.dtype for p in VQGAN.load(tmp_path / "x.ckpt").parameters()} == {torch.float32}


def test_the_fingerprint_sees_every_weight():
    """Prevents codes of one network from being decoded by another."""
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


def bad_checkpoints(tmp_path):
    model = make()
    state, own = model.state_dict(), {"config": asdict(TINY), "model": model.state_dict()}
    without = {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}
    return {
        "a tensor is missing": ({"state_dict": without}, "decoder.conv_out.bias"),
        "a tensor is missing in ours": ({**own, "model": without}, "decoder.conv_out.bias"),
        "a tensor of the decoder is left over": ({"state_dict": {**state, "decoder.up.7.x": torch.ones(1)}}, "decoder.up.7.x"),
        "another network": ({"state_dict": nn.Linear(2, 2).state_dict()}, "encoder.conv_in.weight"),
        "another shape": ({"state_dict": {**state, "quant_conv.weight": torch.ones(3, 3)}}, "quant_conv.weight"),
        "other widths": ({"state_dict": {**state, "encoder.conv_in.weight": torch.ones(20, 3, 3, 3)}}, "ch is 20"),
        "numbers for tensors": ({"state_dict": {k: 1 for k in state}}, "int"),
        "an unknown setting": ({**own, "config": {**own["config"], "depth": 3}}, "depth"),
        "a wrong setting": ({**own, "config": {**own["config"], "ch": 20}}, "ch is 20"),
        "a list": ([1, 2], "list"),
        "code": ({**foreign(model), "x": Evil(tmp_path / "evil")}, "plain tensors"),
    }


def test_bad_checkpoints_are_one_sentence_that_names_the_file(tmp_path):
    """Prevents tracebacks of the unpickler, half-loaded networks, and code from strangers that runs."""
    path = tmp_path / "x.ckpt"
    with pytest.raises(ValueError, match="x.ckpt: no such file"):
        VQGAN.load(path)
    for name, (content, reason) in bad_checkpoints(tmp_path).items():
        torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            VQGAN.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and reason in message and "\n" not in message, name
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint at all\n", whole[:len(whole) // 2], pickle.dumps(Evil(tmp_path / "evil"), 2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.ckpt: damaged, or not a checkpoint of plain tensors"):
            VQGAN.load(path)
    assert not (tmp_path / "evil").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "evil"))).close()
    assert (tmp_path / "evil").exists()                             # it would have appeared


@pytest.mark.parametrize("mult, blocks, levels", [((1, 2), 1, ()), ((1, 1, 2), 2, (0, 2))])
def test_codes_equal_those_of_transformers(tmp_path, mult, blocks, levels):
    """Prevents an encoder that differs from Chameleon's in padding, order of the layers, attention or epsilon."""
    pytest.importorskip("transformers")
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    ours = make(replace(TINY, ch_mult=mult, num_res_blocks=blocks, attn_levels=levels))
    for layer in ours.modules():
        if isinstance(layer, nn.GroupNorm):                         # norms start at 1 and 0, which would hide mistakes
            layer.weight.data += 0.2 * torch.randn_like(layer.weight)
            layer.bias.data += 0.2 * torch.randn_like(layer.bias)
    decoder = {k: v for k, v in ours.state_dict().items() if k.startswith("decoder.")}
    reference = ChameleonVQVAE(ChameleonVQVAEConfig(
        base_channels=32, channel_multiplier=list(mult), num_res_blocks=blocks, resolution=32, latent_channels=16, embed_dim=8,
        num_embeddings=64, attn_resolutions=[32 >> level for level in levels])).eval()
    reference.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in decoder})
    torch.save({"state_dict": {**decoder, **reference.state_dict(), "loss.discriminator.main.0.weight": torch.ones(1)}},
               tmp_path / "x.ckpt")
    model = VQGAN.load(tmp_path / "x.ckpt")
    assert model.config.attn_levels == levels
    for height, width in ((32, 32), (16, 40)):
        pixels = noise(2, 3, height, width)
        with torch.no_grad():
            expected = reference.encode(pixels).image_tokens
        codes = model.encode(pixels)
        assert torch.equal(codes.flatten(), expected.flatten()) and len(codes.unique()) > 5


def test_pixels_equal_those_of_transformers():
    """Prevents a decoder that differs from taming's in the order of its levels, its upsampling or its attention."""
    pytest.importorskip("transformers")
    from transformers.models.janus.modeling_janus import JanusVQVAEConfig, JanusVQVAEDecoder    # taming's, too
    ours = make(replace(TINY, ch_mult=(1, 1, 2), num_res_blocks=2, attn_levels=(2,)))
    for layer in ours.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.weight.data += 0.2 * torch.randn_like(layer.weight)
            layer.bias.data += 0.2 * torch.randn_like(layer.bias)
    reference = JanusVQVAEDecoder(JanusVQVAEConfig(base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=2,
                                                   latent_channels=16)).eval()
    reference.load_state_dict({re.sub(r"^up\.(\d)", lambda m: f"up.{2 - int(m[1])}", name): tensor     # from the smallest up
                               for name, tensor in ours.decoder.state_dict().items()})
    codes = torch.randint(TINY.n_embed, (2, 4, 3))
    with torch.no_grad():
        wanted = reference(ours.post_quant_conv(ours.quantize.embedding(codes).permute(0, 3, 1, 2)))
    torch.testing.assert_close(ours.decode(codes), wanted.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    assert (wanted.abs() < 1).float().mean() > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# The perceptual loss

def vgg_file(path, blur=False, **changes):
    """A file as the lpips packages write it, with stored zeros but for a little in each layer."""
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    generator, c_in, number = torch.Generator().manual_seed(0), 3, 0
    for i, stage in enumerate(Perceptual.WIDTHS):
        if i and blur:
            state[f"net.slice{i + 1}.{number}.filt"] = torch.tensor([1., 2., 1.]).outer(torch.tensor([1., 2., 1.])).div(16) \
                .expand(c_in, 1, 3, 3).clone()
        for c in stage:
            weight = torch.zeros(c, c_in, 3, 3, dtype=torch.half)
            weight[:, :3, 1, 1] = torch.rand(c, 3, generator=generator).half()
            state[f"net.slice{i + 1}.{number + 1}.weight"], state[f"net.slice{i + 1}.{number + 1}.bias"] = weight, torch.zeros(c)
            c_in, number = c, number + 2
    for i, stage in enumerate(Perceptual.WIDTHS):
        state[f"lin{i}.model.1.weight"] = torch.full((1, stage[-1], 1, 1), 0.1 * (i + 1))
    torch.save({k: v for k, v in {**state, **changes}.items() if v is not None}, path)
    return path


@pytest.mark.parametrize("blur", [False, True])
def test_perceptual_distance(tmp_path, blur):
    """Prevents a loss that is not zero at the target, or that no gradient leaves, or heads at the wrong stage."""
    distance = Perceptual(vgg_file(tmp_path / "vgg.pth", blur))
    assert not any(p.requires_grad for p in distance.parameters())
    assert [h.shape[1] for h in distance.heads] == [64, 128, 256, 512, 512] and distance.heads[4][0, 0] == 0.5
    a, b = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=2).requires_grad_()
    assert distance(a, a) == 0
    loss = distance(b, a)
    loss.backward()
    assert loss > 0 and b.grad.isfinite().all() and b.grad.abs().sum() > 0
    torch.testing.assert_close(distance(a, b), loss)
    with torch.no_grad():
        torch.testing.assert_close(loss, 0.5 * (distance(b[:1], a[:1]) + distance(b[1:], a[1:])))  # a mean over the batch


def test_bad_perceptual_weights_are_refused(tmp_path):
    """Prevents a loss out of half a network."""
    path = tmp_path / "vgg.pth"
    with pytest.raises(ValueError, match="vgg.pth: no such file"):
        Perceptual(path)
    for changes in ({"lin4.model.1.weight": None}, {"net.slice1.1.bias": None}, {"net.slice1.1.weight": torch.ones(64, 4, 3, 3)}):
        with pytest.raises(ValueError, match="vgg.pth: not the trunk of VGG16 with 5 linear heads"):
            Perceptual(vgg_file(path, **changes))
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="vgg.pth: damaged"):
        Perceptual(path)


@torch.no_grad()
def test_perceptual_distance_by_hand(tmp_path):
    """Prevents other constants, a stage without its pooling, or features that are not normalised."""
    path = vgg_file(tmp_path / "vgg.pth")
    state = {k: v.float() for k, v in torch.load(path, weights_only=True).items()}
    a, b = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, y, wanted, names = (a - mean) / std, (b - mean) / std, 0, [k for k in state if k.startswith("net") and "weight" in k]
    for stage, width in enumerate(Perceptual.WIDTHS):
        if stage:
            x, y = (F.max_pool2d(z, 2) for z in (x, y))
        for _ in width:
            kernel = state[names.pop(0)]
            x, y = (F.conv2d(z, kernel, padding=1).relu() for z in (x, y))
        apart = (x / (x.norm(dim=1, keepdim=True) + 1e-10) - y / (y.norm(dim=1, keepdim=True) + 1e-10)).square()
        wanted += (apart * state[f"lin{stage}.model.1.weight"]).sum(1).mean()
    torch.testing.assert_close(Perceptual(path)(a, b), wanted)
