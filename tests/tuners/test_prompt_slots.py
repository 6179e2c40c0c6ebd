"""Vectors inside of a row: the equation in float64, which tensors get gradients, and what is saved and loaded."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peftctl.errors import UsageError
from peftctl.tuners.prompt_slots import PromptSlotsConfig, SlotTable, keep_vectors, slots_layer
from tests.tiny import tiny_llama, tiny_opt

FIRST = 400  # one past the vocabulary of the tiny models
IDS = torch.tensor([[400, 7, 8, 402, 401, 9], [11, 402, 12, 13, 400, 14]])


def slotted(base, slots=3, first=FIRST, stand_in=5):
    torch.manual_seed(0)
    name = next(n for n, m in base.named_modules() if m is base.get_input_embeddings())
    config = PromptSlotsConfig(slots=slots, first_token=first, stand_in=stand_in, target_modules=[name])
    model = get_peft_model(base, config).eval()
    slots_layer(model).prompt_slots["default"].weight.data.normal_()
    return model


def naive(base, table, first=FIRST, ids=IDS):
    """Logits of a base that reads vectors and tokens, position by position."""
    embedding = base.get_input_embeddings()
    rows = [
        [table[i - first] if first <= i < first + len(table) else embedding(torch.tensor(i)) for i in row]
        for row in ids.tolist()
    ]
    read = torch.stack([torch.stack(row) for row in rows])
    return base(inputs_embeds=read).logits.detach()


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_placeholders_read_their_vectors_and_other_tokens_the_embedding(base):
    model = slotted(base().double()).double()
    expected = naive(base().double(), slots_layer(model).vectors().detach())
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-10, atol=1e-10)


def test_placeholders_may_lie_within_the_vocabulary_too():
    model = slotted(tiny_llama().double(), first=7).double()
    table = slots_layer(model).vectors().detach()
    ids = torch.tensor([[7, 30, 9, 10, 6]])
    expected = naive(tiny_llama().double(), table, 7, ids)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-10)


def test_moving_a_vector_changes_the_answer_and_every_row_reads_the_same_ones():
    model = slotted(tiny_llama())
    moved = model(input_ids=torch.tensor([[7, 400, 8, 402, 401, 9]])).logits[0, -1]
    assert (moved - model(input_ids=IDS).logits[0, -1]).abs().max() > 1e-3
    layer = slots_layer(model)
    read = layer(IDS)
    assert torch.equal(read[0, 0], read[1, 4]) and torch.equal(read[0, 3], read[1, 1])


def test_only_the_vectors_get_gradients_and_each_from_every_place():
    model = slotted(tiny_llama())
    layer = slots_layer(model)
    layer.base_layer.weight.requires_grad_(True)
    read = layer(IDS)
    read.sum().backward()
    table = layer.prompt_slots["default"].weight
    assert table.grad[:, 0].tolist() == [2.0, 1.0, 2.0]  # as often as each stands in the batch
    touched = layer.base_layer.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == [7, 8, 9, 11, 12, 13, 14]


def test_rows_without_placeholders_are_the_bases_and_with_the_adapter_off_a_stand_in_is_read():
    model, base = slotted(tiny_llama()), tiny_llama()
    plain = torch.arange(5, 29).reshape(2, 12)
    assert torch.equal(model(input_ids=plain).logits, base(input_ids=plain).logits)
    with model.disable_adapter():
        off = model(input_ids=IDS).logits
    assert torch.equal(off, base(input_ids=IDS.masked_fill(IDS >= FIRST, 5)).logits)


def test_the_head_has_no_column_for_a_placeholder_and_stays_tied():
    model = slotted(tiny_llama())
    assert model(input_ids=IDS).logits.shape[-1] == FIRST
    assert model.get_output_embeddings().weight is slots_layer(model).base_layer.weight


def test_only_the_vectors_are_saved_and_a_loaded_adapter_answers_alike(tmp_path):
    model = slotted(tiny_llama())
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)
    from safetensors.torch import load_file

    (tensor,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert tensor.shape == (3, 32) and tensor.dtype is torch.float32


def test_what_made_the_vectors_is_dropped_for_a_table_of_them():
    class Maker(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 4)
            self.up = nn.Linear(4, 32)

        def forward(self, indices):
            return self.up(self.table(indices))

    model = slotted(tiny_llama())
    slots_layer(model).make_by(Maker())
    logits = model(input_ids=IDS).logits
    vectors = slots_layer(model).vectors().detach()
    keep_vectors(model)
    assert isinstance(slots_layer(model).prompt_slots["default"], SlotTable)
    assert torch.equal(slots_layer(model).vectors(), vectors)
    assert torch.equal(model(input_ids=IDS).logits, logits)


def test_in_a_bfloat16_base_the_vectors_are_float32():
    model = slotted(tiny_llama(dtype="bfloat16"))
    assert slots_layer(model).prompt_slots["default"].weight.dtype is torch.float32
    slots_layer(model).make_by(SlotTable(3, 32))
    assert slots_layer(model).vectors().dtype is torch.float32
    assert model(input_ids=IDS).logits.dtype is torch.bfloat16


def test_it_can_not_be_merged():
    from peftctl.artifacts.fold import fold

    with pytest.raises(UsageError, match="PEFTCTL_PROMPT_SLOTS: adapters of this type can't be merged"):
        fold(slotted(tiny_llama()), torch.float32)
