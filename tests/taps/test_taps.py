"""Taps on models that are not of transformers, compiled, checkpointed; what they refuse."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as by_name

import optima_fast
from optima_fast import taps
from optima_fast.taps import calls, masks


class SelfAttention(nn.Module):
    """As vision libraries write it."""

    def __init__(self, width=16, heads=2, causal=False, named=False, by_hand=False):
        super().__init__()
        self.heads, self.causal, self.by_hand = heads, causal, by_hand
        self.function = by_name if named else F.scaled_dot_product_attention
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        self.seen = q, k
        if self.by_hand:
            optima_fast.record(self, q, k, causal=self.causal, mask=mask, scale=0.5)
            scores = q @ k.mT * 0.5
            if self.causal:
                later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            y = scores.softmax(-1) @ v
        else:
            y = self.function(q, k, v, attn_mask=mask, is_causal=self.causal, scale=0.25)
        return y.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = SelfAttention(**options)
        self.mlp = nn.Linear(16, 16)

    def forward(self, x, mask=None):
        return x + self.mlp(self.attn(x, mask))


class Tower(nn.Module):
    def __init__(self, layers=2, **options):
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.fixture
def x():
    return torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("named", [False, True], ids=["looked up", "imported by name"])
def test_calls_of_the_function(x, named, causal):
    model = Tower(named=named, causal=causal)
    expected = model(x)
    with optima_fast.tap(model) as tap:
        assert tap.modules == {"blocks": "blocks"}
        assert torch.equal(model(x), expected)
        layers = tap.layers()["blocks"]
        for block, layer in zip(model.blocks, layers, strict=True):
            (attention,) = layer.attentions
            assert attention.q is block.attn.seen[0]  # nothing is copied
            assert attention.k is block.attn.seen[1]
            assert attention.causal == causal
            assert attention.scale == 0.25
            assert layer.mask is None
        assert torch.equal(layers[1].hidden, expected)
        with pytest.raises(ValueError, match=r"blocks.0 has not run since"):
            tap.layers()
    assert not any(hasattr(m, "_optima_fast_calls") for m in model.modules())
    assert torch.equal(model(x), expected)


def test_gradients_reach_the_model_through_what_is_recorded(x):
    student, teacher = Tower(), Tower()
    with optima_fast.tap(student) as a, optima_fast.tap(teacher) as b:
        student(x)
        with torch.no_grad():
            teacher(x)
        s, t = (tap.layers()["blocks"][1].attentions[0] for tap in (a, b))
        optima_fast.attention_mse(s.q, s.k, t.q, t.k, student_scale=s.scale).sum().backward()
    assert student.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert teacher.blocks[0].attn.qkv.weight.grad is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_multihead_attention_inside_an_encoder(training, causal):
    """Its shortcut in eval mode and its inner call are seen too."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(3, 7, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    options = {"mask": mask, "is_causal": causal, "src_key_padding_mask": padding.float() * -1e9}
    with torch.set_grad_enabled(training):
        expected = model(x, **options)
        with optima_fast.tap(model) as tap:
            torch.testing.assert_close(model(x, **options), expected)
            layers = tap.layers()["layers"]
    weight, bias = model.layers[0].self_attn.in_proj_weight, model.layers[0].self_attn.in_proj_bias
    q, k, _ = F.linear(x, weight, bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    (attention,) = layers[0].attentions
    torch.testing.assert_close(attention.q, q)
    torch.testing.assert_close(attention.k, k)
    assert attention.causal == causal
    assert torch.equal(layers[0].mask, ~padding)
    assert torch.equal(attention.key_mask, ~padding)


def test_states_with_the_batch_second():
    """PyTorch's default for its own encoder; the records are [B, N, d] all the same."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.zeros(4, 4, dtype=torch.bool)  # as many sequences as tokens
    padding[0, 2:] = True
    with optima_fast.tap(model) as tap:
        output = model(torch.randn(4, 4, 16), src_key_padding_mask=padding)
        layers = tap.layers()["layers"]
    assert torch.equal(layers[1].hidden, output.transpose(0, 1))
    assert torch.equal(layers[0].mask, ~padding)


def test_multihead_attention_that_is_asked_for_weights_is_named():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    model = nn.Sequential(nn.Sequential(Weights(), Weights()))
    with optima_fast.tap(model) as tap:
        model(torch.randn(2, 5, 16))
        (layers,) = tap.layers().values()
    assert "need_weights=False" in layers[0].refusals[0]


@pytest.mark.parametrize("tapped", [False, True])
def test_record_is_the_hook_of_an_attention_written_by_hand(x, tapped):
    model = Tower(by_hand=True, causal=True)
    expected = model(x)
    if not tapped:
        assert not any("_optima_fast_calls" in m.__dict__ for m in model.modules())
        return
    padding = torch.ones(3, 7, dtype=torch.bool)
    padding[0, 4:] = False
    with optima_fast.tap(model) as tap:
        assert torch.equal(model(x, padding), expected)
        (attention,) = tap.layers()["blocks"][0].attentions
    assert attention.causal
    assert attention.scale == 0.5
    assert torch.equal(attention.key_mask, padding)


def test_a_checkpoints_second_run_is_not_kept(x):
    class Checkpointed(Tower):
        def forward(self, x):
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    plain = Tower()
    again = Checkpointed()
    again.load_state_dict(plain.state_dict())
    grads = []
    for model in (plain, again):
        with optima_fast.tap(model) as tap:
            y = model(x)
            layers = tap.layers()["blocks"]
            a, b = (layer.attentions[0] for layer in layers)
            loss = optima_fast.attention_mse([a.q, b.q], [a.k, b.k], [b.q, a.q], [b.k, a.k]).sum()
            (loss + layers[0].hidden.square().mean() + y.mean()).backward()
            assert all(m._optima_fast_calls == () for m in model.modules()
                       if hasattr(m, "_optima_fast_calls"))  # fmt: skip
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_records_are_let_go(x):
    model = Tower()
    with optima_fast.tap(model) as tap, torch.no_grad():
        model(x)
        kept = weakref.ref(tap.layers()["blocks"][0].hidden)
        gc.collect()
        assert kept() is None
        for _ in range(3):
            model(x)  # nothing piles up where they are not read
        assert len(tap.layers()["blocks"]) == 2
        model(x)
    copy.deepcopy(model)


def test_a_failed_forward_leaves_nothing_behind(x):
    model = Tower()
    with optima_fast.tap(model) as tap:
        with pytest.raises(RuntimeError):
            model(x[..., :3])
        model(x)
        assert len(tap.layers()["blocks"]) == 2


def test_errors(x):
    model = Tower()
    with pytest.raises(ValueError, match=r"no 'blocs'; its lists of layers are blocks"):
        optima_fast.tap(model, {"vision": "blocs"})
    with pytest.raises(ValueError, match="is a Linear, not a list of layers"):
        optima_fast.tap(model, {"vision": "blocks.0.mlp"})
    with pytest.raises(ValueError, match="Linear has no list of layers with attention"):
        optima_fast.tap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="compiled already: tap it first"):
        optima_fast.tap(torch.compile(model))
    with optima_fast.tap(model), pytest.raises(ValueError, match="has a tap already"):
        optima_fast.tap(model)
    with optima_fast.tap(model), pytest.raises(Exception, match="cannot be compiled as a whole"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    shared = Tower(1)
    shared.blocks.append(shared.blocks[0])
    with optima_fast.tap(shared) as tap:
        shared(x)
        with pytest.raises(ValueError, match=r"blocks.0 ran 2 times"):
            tap.layers()


def test_timm():
    timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with optima_fast.tap(model) as tap:
        assert torch.equal(model(images), expected)
        (layers,) = tap.layers().values()
    assert [x.attentions[0].q.shape for x in layers] == [(2, 3, 17, 64)] * 2
    assert not any(x.refusals for x in layers)


def test_open_clip():
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip", exc_type=ImportError)
    text = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    model = open_clip.CLIP(16, vision, text).eval()
    with optima_fast.tap(model) as tap:
        model(torch.randn(3, 3, 32, 32), torch.randint(1, 99, (3, 12)))
        layers = tap.layers()
    assert sorted(x[0].attentions[0].causal for x in layers.values()) == [False, True]


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attentions_arguments(causal):
    """Its mask is of tokens, its window an argument; without a card the function is a stand-in."""
    seen = calls._Seen("flash_attention_2", lambda module, q, k, v, mask, **kwargs: (q, mask))
    module = nn.Module()
    module.is_causal = causal
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    arguments = {"scaling": 0.3, "sliding_window": 3, "softcap": None}
    assert seen(module, q, k, k, mask, **arguments) == (q, mask)  # nobody watches
    calls.watch(module)
    seen(module, q, k, k, mask, **arguments)
    (call,) = module._optima_fast_calls
    pairs = taps._pairs(call, False, {})
    found = taps._attention(call, pairs, pairs.queries)
    assert found.q is q
    assert found.k is k
    assert (found.causal, found.window, found.scale) == (causal, 3, 0.3)
    assert torch.equal(found.key_mask, mask.bool())
    assert torch.equal(found.query_mask, mask.bool())
    for refused, reason in (
        ({"softcap": 30.0}, "caps its scores"),
        ({"s_aux": q[0, :, 0, 0]}, "attention sinks"),
        ({"position_bias": q}, "position bias"),
    ):
        calls.watch(module)
        seen(module, q, k, k, None, **refused)
        with pytest.raises(masks.Refused, match=reason):
            taps._pairs(module._optima_fast_calls[0], False, {})


def pairs(mask, queries=6, keys=6, batch=2, cross=False):
    return masks.of_pairs(mask, (batch, queries, keys), cross)


@pytest.mark.parametrize("additive", [False, True])
def test_masks_are_read_back(additive):
    token = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    full = token[:, None, :, None] & token[:, None, None]
    for causal in (False, True):
        for window in (None, 2, 3):
            mask = full.tril() if causal else full
            if window:
                mask = mask.tril(window - 1).triu(1 - window)
            if additive:
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            found = pairs(mask)
            assert torch.equal(found.queries, token)
            assert torch.equal(found.keys, token)
            assert (found.causal, found.window) == (causal, window)
    # all count: no mask is needed
    assert pairs(torch.ones(2, 1, 6, 6).bool()) == (None, None, False, None)
    assert pairs(torch.ones(6, 6).bool().tril()) == (None, None, True, None)


def test_a_query_of_padding_may_see_anything():
    token = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    mask = token[:, None, None].expand(2, 1, 6, 6)
    assert torch.equal(pairs(mask).queries, token)


def test_masks_of_another_kind_are_refused():
    ones = torch.ones(2, 1, 6, 6).bool()
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool().expand(2, 1, 6, 6)
    prefix = ones.tril() | (torch.arange(6) < 3)
    per_head = torch.stack([ones[0, 0], ones[0, 0].tril()])[None]
    per_item = torch.cat([ones[:1], ones[:1].tril()])
    for mask, reason in (
        (packed, "packed"),
        (packed.tril(), "packed"),
        (prefix, "prefix"),
        (per_item, "packed"),
        (per_head, "head to head"),
        (torch.randn(1, 2, 6, 6), "bias"),
        (ones.float(), "bias"),
        (torch.eye(6), "bias"),
        (torch.zeros(1, 2, 6, 6, requires_grad=True), "learned bias"),
    ):
        with pytest.raises(masks.Refused, match=reason):
            pairs(mask)
    with pytest.raises(masks.Refused, match="all see the same keys"):
        pairs(ones.tril(), cross=True)
    with pytest.raises(masks.Refused, match="causal with 3 queries and 6 keys"):
        masks.of_tokens(None, (2, 3, 6), True, None)


def test_a_mask_of_three_dimensions_is_of_heads():
    """As PyTorch broadcasts it, even where there are as many sequences."""
    per_head = torch.stack([torch.ones(6, 6), torch.ones(6, 6).tril()]).bool()
    with pytest.raises(masks.Refused, match="head to head"):
        pairs(per_head)


def test_flex_attentions_mask():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    block = flex.create_block_mask(lambda b, h, i, j: i >= j, 2, None, 6, 6, device="cpu")
    assert pairs(block) == (None, None, True, None)
