"""Attention and its memory against the formula softmax(q kᵀ / √d) v, written out."""

import math

import pytest
import torch

from workers.engines.attention import attend, cache_dtype, register
from workers.engines.kv_cache import KeyValueBuffer, hidden


def formula(query, key, value, visible):
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 5, 9])
@pytest.mark.parametrize("value_size", [8, 6])
def test_without_a_mask_the_last_query_sees_every_key(key_heads, queries, value_size):
    query = draw(2, 4, queries, 8, seed=1)
    key, value = draw(2, key_heads, 9, 8, seed=2), draw(2, key_heads, 9, value_size, seed=3)
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads  # type: ignore[assignment]
    output, _ = attend(module, query, key, value, None, scaling=8**-0.5)
    visible = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    torch.testing.assert_close(output, formula(query, key, value, visible), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3, 70])
def test_a_mask_hides_the_same_keys_from_every_head(key_heads, queries):
    query = draw(2, 4, queries, 8, seed=1)
    key, value = draw(2, key_heads, 80, 8, seed=2), draw(2, key_heads, 80, 8, seed=3)
    visible = draw(2, 1, queries, 80, seed=4) > 0
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads  # type: ignore[assignment]
    output, _ = attend(module, query, key, value, hidden(visible, torch.float32), scaling=8**-0.5)
    torch.testing.assert_close(output, formula(query, key, value, visible), atol=1e-5, rtol=1e-5)


def test_a_cpu_keeps_float32_and_answers_in_the_models_dtype():
    assert cache_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32
    query, key = draw(1, 2, 1, 8, seed=1).bfloat16(), draw(1, 2, 4, 8, seed=2)
    assert attend(torch.nn.Module(), query, key, key, None)[0].dtype == torch.bfloat16


def test_a_step_writes_into_the_buffer_and_copies_nothing():
    cache = KeyValueBuffer(1, rows=2, columns=8, dtype=torch.float32)
    new = draw(2, 1, 3, 4, seed=1)
    cache.append(1, 2)
    keys, _ = cache.update(new[:1], new[:1], 0)
    assert keys.shape == (1, 1, 5, 4) and torch.equal(keys[:, :, 2:], new[:1])
    more, _ = cache.update(new[1:, :, :1], new[1:, :, :1], 0)
    assert more.data_ptr() == keys.data_ptr() and more.shape[2] == 6
    cache.copy(1, 0, 4)
    cache.clear(1, 3, 6)
    cache.append(0, 4)
    assert torch.equal(cache.update(new[:1], new[:1], 0)[0][0, :, 2:4], new[0, :, :2])
    cache.append(1, 6)
    assert cache.update(new[:1, :, :2], new[:1, :, :2], 0)[0][0, 0, :, 0].nonzero().flatten().tolist() == [2, 6, 7]


def test_each_row_of_a_step_writes_where_it_has_got_to():
    cache = KeyValueBuffer(1, rows=3, columns=8, dtype=torch.float32)
    new = draw(2, 1, 2, 4, seed=1)
    cells = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([2, 3, 6]))
    cache.scatter(2, 7, cells)
    keys, values = cache.update(new, 2 * new, 0)
    expected = torch.zeros(2, 1, 7, 4)
    expected[0, :, 2:4], expected[1, :, 6] = new[0], new[1, :, 1]
    assert torch.equal(keys, expected) and torch.equal(values, 2 * expected)


def test_cudnn_builds_no_plan_for_each_number_of_keys():
    torch.backends.cuda.enable_cudnn_sdp(True)
    register()
    kernels = torch.backends.cuda
    assert not kernels.cudnn_sdp_enabled()
    assert kernels.flash_sdp_enabled() and kernels.mem_efficient_sdp_enabled() and kernels.math_sdp_enabled()


class Kernels:
    """Stands in for the kernels of CUDA, by the formula; `seen` says which was called, and of how many heads."""

    def __init__(self):
        self.seen = []

    def efficient(self, query, key, value, bias, compute_log_sumexp, dropout, causal, *, scale):
        assert bias is None and compute_log_sumexp and query.shape[1] == key.shape[1], "no mask, and no groups"
        self.seen.append(("efficient", causal, query.dtype))
        rows = torch.arange(query.shape[2])[:, None]
        visible = rows >= torch.arange(key.shape[2])[None] if causal else torch.ones(rows.shape[0], key.shape[2]) > 0
        query, key, value = (part.host for part in (query, key, value))
        scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
        weights = scores.logsumexp(-1)
        padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % 32), value=torch.inf)
        return *((scores.softmax(-1) @ value).to("card"), padded.to("card")), None, None


@pytest.mark.parametrize("key_heads", [1, 2])
def test_float32_with_groups_has_no_mask_of_queries_and_keys_on_a_gpu(card, monkeypatch, key_heads):
    """No kernel of CUDA takes groups in float32: PyTorch made a mask and all scores, 12 GB at 131,072 keys."""
    card.lags, kernels = False, Kernels()
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", kernels.efficient)
    query = draw(2, 4, 5, 8, seed=1)
    key, value = draw(2, key_heads, 9, 8, seed=2), draw(2, key_heads, 9, 6, seed=3)
    there = [part.to("card") for part in (query, key, value)]
    output, _ = attend(torch.nn.Module(), *there, None, scaling=8**-0.5)
    assert kernels.seen == [("efficient", False, torch.float32), ("efficient", True, torch.float32)]
    visible = torch.ones(5, 9, dtype=torch.bool).tril(4)
    torch.testing.assert_close(output.cpu(), formula(query, key, value, visible), atol=1e-5, rtol=1e-5)


def test_half_precision_has_the_flash_kernel_on_a_gpu(card, monkeypatch):
    """Which aligns the triangle to the lower right, and takes groups: no mask is made."""
    card.lags, seen = False, []

    def flash(query, key, value, dropout, is_causal, return_debug_mask, scale):
        seen.append((is_causal, query.shape[1], key.shape[1]))
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        return (formula(query.host.float(), key.host.float(), value.host.float(), visible).transpose(1, 2).to("card"),)

    monkeypatch.setattr("torch.nn.attention.bias.can_use_flash_attention", lambda asked: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    query, key, value = draw(2, 4, 5, 8, seed=1), draw(2, 2, 9, 8, seed=2), draw(2, 2, 9, 8, seed=3)
    there = [part.bfloat16().to("card") for part in (query, key, value)]
    output, _ = attend(torch.nn.Module(), *there, None, scaling=8**-0.5)
    assert seen == [(True, 4, 2)]
    visible = torch.ones(5, 9, dtype=torch.bool).tril(4)
    torch.testing.assert_close(output.cpu().float(), formula(query, key, value, visible), atol=3e-2, rtol=3e-2)
