"""S2-Attn against a naive one with masks in float64: groups, shifts, causality, lengths, and what evaluation gets."""

from unittest.mock import patch

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftctl.tuners import shifted_attention as shifted
from tests.tiny import tiny_llama, tiny_opt


class Layer(torch.nn.Module):
    """What an attention function reads of its layer."""

    is_causal = True

    def __init__(self, repeats=1):
        super().__init__()
        self.num_key_value_groups = repeats


def drawn(length, heads=4, of_keys=4, batch=2, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, count, length, d, dtype=torch.float64, generator=generator)
        for count in (heads, of_keys, of_keys)
    ]


def attend(parts, group, mask=None, training=True, **options):
    layer = Layer(parts[0].shape[1] // parts[1].shape[1]).train(training)
    return shifted.shifted_attention(layer, *parts, mask, group=group, **options)[0]


def segment(position, group, moved):
    """Return the number of the segment that holds a position."""
    return (position + group // 2) // group if moved else position // group


def naive(parts, group, lengths=None):
    """Return S2-Attn one query at a time: softmax over what it may look at."""
    query, key, value = parts
    batch, heads, length, d = query.shape
    out = torch.zeros(batch, length, heads, d, dtype=torch.float64)
    for row in range(batch):
        whole = (length if lengths is None else lengths[row]) <= group
        for head in range(heads):
            of_key = head // (heads // key.shape[1])
            moved = head >= heads // 2
            for i in range(length):
                seen = [j for j in range(i + 1) if whole or segment(j, group, moved) == segment(i, group, moved)]
                scores = torch.stack([query[row, head, i] @ key[row, of_key, j] for j in seen]) / d**0.5
                out[row, i, head] = torch.softmax(scores, 0) @ value[row, of_key, seen]
    return out


@pytest.mark.parametrize(("heads", "of_keys"), [(4, 4), (4, 2), (4, 1), (3, 3), (9, 3), (1, 1)])
@pytest.mark.parametrize(("length", "group"), [(16, 4), (13, 4), (17, 4), (9, 8), (12, 2)])
def test_it_is_the_papers_in_float64(heads, of_keys, length, group):
    parts = drawn(length, heads, of_keys)
    torch.testing.assert_close(attend(parts, group), naive(parts, group), rtol=1e-12, atol=1e-12)


def test_the_segments_of_16_tokens_in_groups_of_4():
    """A query of one token weighs what it sees evenly where keys are 0: values of 1 at one place show who sees it."""
    length, group = 16, 4
    sees = torch.zeros(length, length, 2, dtype=torch.bool)
    for j in range(length):
        value = torch.zeros(1, 2, length, 1)
        value[:, :, j] = 1.0
        zero = torch.zeros(1, 2, length, 1)
        sees[:, j] = attend([zero, zero, value], group)[0, :, :, 0] > 0
    lengths = []
    for head in range(2):
        starts = [i for i in range(length) if sees[i, :, head].sum() == 1]
        lengths.append([b - a for a, b in zip(starts, [*starts[1:], length], strict=True)])
        for start, size in zip(starts, lengths[-1], strict=True):
            block = sees[start : start + size, :, head]
            assert torch.equal(block[:, start : start + size], torch.ones(size, size).tril().bool())
            assert block.sum() == size * (size + 1) / 2
    assert lengths == [[4, 4, 4, 4], [2, 4, 4, 4, 2]]


@pytest.mark.parametrize("length", [16, 14, 19])
def test_no_token_sees_a_later_one_in_any_head(length):
    parts = drawn(length)
    before = attend(parts, 4)
    for j in range(1, length):
        changed = [part.clone() for part in parts]
        for part, other in zip(changed, drawn(length, seed=1), strict=True):
            part[:, :, j:] = other[:, :, j:]
        after = attend(changed, 4)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.isclose(after[:, j], before[:, j]).all(dim=-1).any()  # every head sees the token itself


def test_the_first_groups_are_full_attention_and_later_ones_forget():
    parts, group = drawn(16), 4
    full, ours = attend(parts, 16), attend(parts, group)
    torch.testing.assert_close(full, attend(parts, group, training=False), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[:, :group, :2], full[:, :group, :2], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[:, : group // 2, 2:], full[:, : group // 2, 2:], rtol=0, atol=1e-12)
    assert (ours[:, group:] - full[:, group:]).abs().amax(dim=(0, 1, 3)).min() > 0.1
    parts[1][:, :, :12] += 1.0
    parts[2][:, :, :12] += 1.0
    again = attend(parts, group)
    assert torch.equal(again[:, 12:, :2], ours[:, 12:, :2])
    assert not torch.isclose(again[:, 12, 2:], ours[:, 12, 2:]).any()  # shifted heads hand on what lies before


def test_shifted_heads_of_one_group_without_the_special_case_would_not_be_full():
    parts = drawn(8)
    cut = shifted._in_shifted_groups(
        [part[:, 2:] for part in parts], 8, torch.nn.functional.scaled_dot_product_attention
    )
    assert (cut.transpose(1, 2) - attend(parts, 8)[:, :, 2:]).abs().max() > 0.1


@pytest.mark.parametrize("group", [8, 10, 64])
def test_one_group_over_the_row_is_full_attention(group):
    parts = drawn(8, 4, 2)
    torch.testing.assert_close(attend(parts, group), naive(parts, 8), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[13, 4], [3, 13], [13, 5], [8, 13]])
def test_padding_changes_nothing_for_the_tokens_of_a_row(lengths):
    parts, group = drawn(13, 4, 2), 4
    mask = torch.tensor([[i < length for i in range(13)] for length in lengths])
    together = attend(parts, group, mask[:, None, None, :])
    for row, length in enumerate(lengths):
        alone = attend([part[row : row + 1, :, :length] for part in parts], group)
        torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        together[mask], naive(parts, group, lengths)[mask], rtol=1e-12, atol=1e-12
    )  # the same from masks
    full = torch.ones(13, 13).tril().bool() & mask[:, None, None, :]
    torch.testing.assert_close(attend(parts, group, full)[mask], together[mask], rtol=0, atol=1e-12)


def test_scale_and_dropout_reach_every_group():
    parts = drawn(16)
    scaled = [parts[0] * 3 * parts[0].shape[-1] ** 0.5, *parts[1:]]
    torch.testing.assert_close(attend(parts, 4, scaling=3.0), attend(scaled, 4), rtol=1e-10, atol=1e-10)
    ones = [parts[0], parts[1], torch.ones_like(parts[2])]
    torch.manual_seed(0)
    kept = attend(ones, 4, dropout=0.5)
    assert (kept - 1).abs().amax(dim=(0, 3)).min() > 0.01  # at every position and head weights fell out


def test_other_lengths_of_keys_are_attended_as_ever():
    query, key, value = drawn(12)
    parts = [query[:, :, -3:], key, value]
    mask = torch.ones(3, 12).tril(9).bool()[None, None]
    expected = sdpa_attention_forward(Layer(), *parts, mask)[0]
    assert torch.equal(attend(parts, 4, mask), expected)


# -- in models -----------------------------------------------------------------------------------------------------

IDS = torch.arange(1, 25).reshape(2, 12)
PADDED = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
LEFT = PADDED.flip(1)


def patched(make, group=4):
    model = make()
    model.set_attn_implementation(shifted.register(group))
    assert model.config._attn_implementation == f"peftctl_shifted_{group}"
    return model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [None, torch.ones_like(PADDED), PADDED, LEFT], ids=["none", "ones", "right", "left"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_evaluation_is_sdpa_bit_for_bit(make, mask, grad):
    with torch.set_grad_enabled(grad):
        expected = make()(input_ids=IDS, attention_mask=mask).logits
        assert torch.equal(patched(make)(input_ids=IDS, attention_mask=mask).logits, expected)


def test_generation_is_sdpa_bit_for_bit():
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (
        model.generate(input_ids=IDS, attention_mask=LEFT, **options) for model in (patched(tiny_llama), tiny_llama())
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_training_is_not_and_sees_no_future_through_all_layers(make):
    model, rows = patched(make).train(), torch.arange(1, 20)[None]
    before = model(input_ids=rows).logits
    full = make().train()(input_ids=rows).logits
    torch.testing.assert_close(before[:, :2], full[:, :2], rtol=0, atol=1e-5)
    assert not torch.isclose(before[:, 4:], full[:, 4:], atol=1e-3).all(dim=-1).any()
    for j in (2, 9, 18):
        changed = rows.clone()
        changed[:, j:] += 100
        after = model(input_ids=changed).logits
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-5)
        assert not torch.isclose(after[:, j], before[:, j], atol=1e-3).all()


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_rows_of_a_padded_batch_train_as_they_do_alone(make):
    lengths = (12, 7, 4, 3)
    rows = torch.arange(1, 49).reshape(4, 12)
    mask = torch.tensor([[int(i < length) for i in range(12)] for length in lengths])
    together = patched(make).train()(input_ids=rows, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = patched(make).train()(input_ids=rows[row : row + 1, :length]).logits
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


def test_no_tensor_of_seq_by_seq_is_made_in_training():
    model = patched(tiny_llama, 8).train()
    length = 70
    rows = torch.arange(1, 2 * length + 1).reshape(2, length)
    mask = torch.ones_like(rows)
    mask[1, 50:] = 0
    sizes = []
    call = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, **options):
        sizes.append((query.shape[2], key.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return call(query, key, value, attn_mask=attn_mask, **options)

    with (
        patch.object(shifted, "scaled_dot_product_attention", watch),
        patch.object(shifted, "sdpa_mask", side_effect=AssertionError("a mask of seq by seq")),
    ):
        model(input_ids=rows, attention_mask=mask).logits.sum().backward()
    assert {size for size, _, _ in sizes} == {4, 8}
    assert all(query == key and seen is None for query, key, seen in sizes)


def test_the_name_is_not_saved(tmp_path):
    model = patched(tiny_llama)
    model.save_pretrained(tmp_path)
    assert "peftctl" not in (tmp_path / "config.json").read_text()
