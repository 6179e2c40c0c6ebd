"""P-tuning inside of a row: where placeholders stand, that nothing trains on them, and a run from data to answers."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError

import peftctl
from peftctl.artifacts.load import load
from peftctl.data.conversations import Message
from peftctl.data.dataset import encode_all
from peftctl.data.formats import Example
from peftctl.data.prompts import generation_prompts
from peftctl.errors import Interrupted, UsageError
from peftctl.evaluation.generation import generate
from peftctl.methods._places import add_placeholders, placeholder
from peftctl.methods.p_tuning import Config, Method
from peftctl.models.load import load_model
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import DataSection, ModelSection, QuantizationSection
from peftctl.training.checkpoints import read_state
from peftctl.tuners.prompt_slots import slots_layer
from tests.commands.helpers import write_recipe
from tests.methods.helpers import recipe
from tests.methods.prompts import attached, context, method, randomise
from tests.tiny import save_tiny, tiny_bart, tiny_llama, tiny_t5, tiny_tokenizer
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

PLACES = {"front": 1, "before_request": 2, "after_request": 1, "before_answer": 2}
P = [placeholder(i) for i in range(7)]
BOS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)


def chats(count=4, turns=1):
    return [
        Example(
            f"rows:{i}",
            messages=[
                message
                for turn in range(turns)
                for message in (Message("user", f"answer {i}{turn}" * (i + 1)), Message("assistant", f"{i}"))
            ],
        )
        for i in range(count)
    ]


def placed(positions=PLACES, data=None, examples=None, template=None):
    """Return (tokenizer, id of the first placeholder)."""
    tokenizer = copy.deepcopy(tiny_tokenizer() if template is None else tiny_tokenizer(template))
    settings = recipe()
    settings = settings.model_copy(update={"data": data or settings.data})
    n = sum(positions.values()) if positions else 6
    return tokenizer, add_placeholders(tokenizer, n, positions, examples or chats(), settings)


# -- chat templates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, BOS_TEMPLATE])
def test_a_chat_template_writes_placeholders_where_the_recipe_says(template):
    tokenizer, _ = placed(template=template)
    asked = tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    start = "" if template is None else "<|endoftext|>"
    assert asked == (
        f"{P[1]}{start}<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{P[2]}{P[3]}q{P[4]}<|im_end|>\n"
        f"<|im_start|>assistant\n{P[5]}{P[6]}"
    )


@pytest.mark.parametrize("template", [None, BOS_TEMPLATE])
@pytest.mark.parametrize("turns", [1, 3])
def test_rows_of_any_length_have_them_before_every_answer_and_none_is_trained_on(template, turns):
    examples = chats(turns=turns)
    tokenizer, first = placed(examples=examples, template=template)
    data = DataSection(train="rows.jsonl")
    rows, report = encode_all(examples, tokenizer, data)
    plain, _ = encode_all(examples, tiny_tokenizer() if template is None else tiny_tokenizer(template), data)
    assert report.kept == len(examples)
    for row, without, (prompt, _) in zip(rows, plain, generation_prompts(examples, tokenizer, data), strict=True):
        slots = [token - first + 1 for token in row.input_ids if token >= first]
        assert slots == [1, *[2, 3, 4, 5, 6] * turns]
        assert [token for token in row.input_ids if token < first] == without.input_ids
        assert [label for label in row.labels if label != -100] == [label for label in without.labels if label != -100]
        assert max(row.labels) < first
        assert row.input_ids[: len(prompt)] == prompt and prompt[-2:] == [first + 4, first + 5]


@pytest.mark.parametrize(
    ("shown", "asks"),
    [
        ("m.content", ""),  # no generation prompt: what stands before an answer in training would be trained on
        ("m.content[:1]", "<|im_start|>assistant\n"),
        ("m.content[12:]", "<|im_start|>assistant\n"),
    ],
)
def test_a_template_that_loses_a_place_is_refused(shown, asks):
    template = (
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ {shown} }}}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    )
    with pytest.raises(UsageError, match=r"^method\.positions: this model's chat template does not keep before_answer"):
        placed({"before_answer": 2}, template=template)


# -- templates of the recipe's own ---------------------------------------------------------------------------------

CLOZE = f"{P[1]}{P[2]}{P[3]}{{text}}{P[4]}{P[5]} is about{P[6]}"


def test_a_cloze_template_has_them_at_the_indices_where_it_names_them():
    data = DataSection(train="rows.jsonl", format="prompt_completion", template=CLOZE, columns={"completion": "label"})
    texts = ["a table", "please pay the waiter at seven on Friday", "7"]
    examples = [
        Example(f"rows:{i}", prompt=CLOZE.format(text=text), completion=" book") for i, text in enumerate(texts)
    ]
    tokenizer, first = placed(None, data=data, examples=examples)
    rows, _ = encode_all(examples, tokenizer, data)
    for row, text in zip(rows, texts, strict=True):
        a = len(tokenizer(text).input_ids)
        about = len(tokenizer(" is about").input_ids)
        places = [i for i, token in enumerate(row.input_ids) if token >= first]
        assert places == [0, 1, 2, 3 + a, 4 + a, 5 + a + about]
        assert max(row.labels) < first
    assert len({len(row.input_ids) for row in rows}) == 3


@pytest.mark.parametrize(
    ("positions", "data", "message"),
    [
        (None, {"template": f"{P[1]}{{text}}"}, r"^data\.template: lacks <\|P2\|> \(5 of 6 placeholders\)"),
        (None, {"template": CLOZE + placeholder(7)}, r"^data\.template: has <\|P7\|>, and .* is 6"),
        (None, {"template": "chat"}, r"^data\.template: lacks <\|P1\|>"),
        (PLACES, {"template": "{text}"}, r"^method\.positions: places are those of a chat template"),
        (PLACES, {"loss_on": "all"}, r"^method\.positions: data\.loss_on: all would train on the placeholders"),
    ],
)
def test_settings_that_do_not_fit_are_refused(positions, data, message):
    with pytest.raises(UsageError, match=message):
        placed(positions, DataSection(train="rows.jsonl", **data))


def test_rows_that_look_like_placeholders_are_refused():
    examples = [*chats(), Example("rows:9", messages=[Message("user", "see <|P3|>"), Message("assistant", "no")])]
    with pytest.raises(UsageError, match=r"^rows:9: has the text of a placeholder"):
        placed(examples=examples)
    own = Example("rows:8", prompt=CLOZE.format(text="<|P1|>"), completion="x")
    data = DataSection(train="rows.jsonl", format="prompt_completion", template=CLOZE)
    with pytest.raises(UsageError, match=r"^rows:8: has the text of a placeholder"):
        placed(None, data=data, examples=[own])


def test_the_counts_of_places_are_those_of_the_vectors():
    with pytest.raises(ValidationError, match=r"has 3 vectors, and num_virtual_tokens is 20; make them equal"):
        Config(positions={"front": 3})
    with pytest.raises(ValidationError, match=r"has no place before_anser; did you mean 'before_answer'"):
        Config(num_virtual_tokens=3, positions={"before_anser": 3})
    assert Config(num_virtual_tokens=3, positions={"front": 3}).positions == {"front": 3}


# -- the model -----------------------------------------------------------------------------------------------------

KINDS = ["p_tuning", "p_tuning-mlp"]
INSIDE = torch.tensor([[400, 7, 8, 402, 401, 9, 403, 404], [11, 402, 12, 13, 400, 14, 404, 15]])


def inside(kind="p_tuning", base=None, task="causal_lm", **keys):
    chosen = method(kind, positions={"front": 2, "before_answer": 3}, **keys)
    return chosen, attached(chosen, base, task)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_are_the_encoders_and_its_count_is_that_of_the_formula(kind):
    chosen, model = inside(kind)
    before = attached(method(kind))
    trained = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert sum(shape.numel() for shape in trained.values()) == chosen.count(tiny_llama())
    assert all(".prompt_slots.default." in name for name in trained)
    # peft's own encoder, and from one seed the same prompt as that before the row.
    torch.testing.assert_close(slots_layer(model).vectors(), before.get_prompt(1)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_encoder_it_answers_alike(kind):
    chosen, model = inside(kind)
    randomise(model).eval()
    logits = model(input_ids=INSIDE).logits
    exported = chosen.export(model)
    names = [n for n, _ in exported.named_parameters() if "prompt_slots" in n]
    assert names == ["base_model.model.model.embed_tokens.prompt_slots.default.weight"]
    assert torch.equal(exported(input_ids=INSIDE).logits, logits)


@pytest.mark.parametrize("base", [tiny_t5, tiny_bart])
def test_an_encoder_reads_them_and_a_decoder_never(base):
    _, model = inside(base=base(), task="seq2seq_lm")
    assert type(model.get_encoder().get_input_embeddings()).__name__ == "PromptSlotsLayer"
    batch = {"input_ids": INSIDE, "attention_mask": torch.ones_like(INSIDE), "labels": torch.tensor([[5, 6], [7, 8]])}
    loss = supervised_forward(model, batch).cross_entropy()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    assert model.generate(input_ids=INSIDE, max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_back_the_encoder_and_its_input_table(tmp_path, kind):
    """Loading the vectors as the encoder's input, as peft does where it resumes, would pass unseen."""

    def work(folder, **keys):
        chosen = method(kind, positions={"front": 2, "before_answer": 3})
        made = workload(folder, chosen, max_steps=8, **keys)
        draw = torch.Generator().manual_seed(0)
        for row in made.train_rows:
            row.input_ids[0] = 400 + int(torch.randint(5, (1,), generator=draw))
        return made

    with pytest.raises(Interrupted):
        train(work(tmp_path, reporter=StopAt(4)))
    stopped = work(tmp_path)
    torch.manual_seed(7)
    model = stopped.method.apply(tiny_llama(), context(stopped.method))
    fresh = trained_tensors(model)
    read_state(stopped.run.latest_checkpoint(), model, stopped.method)
    assert not any(torch.equal(fresh[name], tensor) for name, tensor in trained_tensors(model).items())
    straight, _ = train(work(tmp_path / "straight", save_steps=4))
    resumed, _ = train(stopped, stopped.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(resumed)[name], tensor), name


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"batch_size": 2, "gradient_accumulation": 2}])
def test_checkpointing_and_accumulation_train_alike(tmp_path, settings):
    def go(folder, **keys):
        made = workload(folder, method("p_tuning", positions={"front": 5}), max_steps=3, **keys)
        for i, row in enumerate(made.train_rows):
            row.input_ids[0], row.input_ids[1] = 400 + i % 5, 400 + (i + 2) % 5
        return trained_tensors(train(made)[0])

    straight, other = go(tmp_path / "a"), go(tmp_path / "b", **settings)
    for name, tensor in straight.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_over_nf4_the_encoder_trains_and_the_embedding_is_as_it_was(tmp_path):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path / "base")), dtype="float32")
    _, model = inside(base=load_model(section, device="cpu", quantization=QuantizationSection(bits=4)))
    batch = {"input_ids": INSIDE, "attention_mask": torch.ones_like(INSIDE), "labels": INSIDE.where(INSIDE < 400, -100)}
    supervised_forward(model, batch).cross_entropy().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert type(slots_layer(model).base_layer) is torch.nn.Embedding


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["places", "cloze"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    keys = {"name": "p_tuning", "num_virtual_tokens": 6, "positions": PLACES}
    data = {}
    if request.param == "cloze":
        for name in ("train", "eval"):
            rows = [{"text": f"answer with {i}", "label": f" {i % 3}"} for i in range(24 if name == "train" else 6)]
            rows = [row | {"text": f"{name} {row['text']}"} for row in rows]
            (folder / f"{name}_cloze.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys["positions"] = "template"
        data = {
            "train": "train_cloze.jsonl", "eval": "eval_cloze.jsonl", "format": "prompt_completion",
            "template": CLOZE, "columns": {"completion": "label"},
        }  # fmt: skip
    metrics = {"metrics": ["loss", "exact_match"], "max_new_tokens": 4}
    path = write_recipe(folder, save_tiny(folder / "base"), keys, data=data, eval=metrics)
    return folder, peftctl.train(peftctl.load_recipe(path, ["train.max_steps=12", "train.learning_rate=0.05"]))


def test_a_run_trains_saves_and_is_measured_again_alike(finished):
    _, result = finished
    assert result.summary["eval"]["after"]["loss"] < result.summary["eval"]["before"]["loss"]
    again = peftctl.evaluate(str(result.run))
    assert again.metrics["loss"] == pytest.approx(result.summary["eval"]["after"]["loss"], rel=1e-5)
    assert again.metrics["exact_match"] == result.summary["eval"]["after"]["exact_match"]


def test_the_saved_tokenizer_alone_puts_them_in_place_and_answers_do_not_depend_on_the_batch(finished):
    """With transformers and peft: render, tokenise, generate."""
    folder, result = finished
    model, tokenizer = load(result.run)
    assert model.peft_config["default"].peft_type == "PEFTCTL_PROMPT_SLOTS"
    first = slots_layer(model).configs["default"].first_token
    if folder.name.startswith("places"):
        asked = [[{"role": "user", "content": f"answer with {'x' * i}"}] for i in range(1, 4)]
        texts = [tokenizer.apply_chat_template(a, tokenize=False, add_generation_prompt=True) for a in asked]
    else:
        texts = [CLOZE.format(text=f"answer with {'x' * i}") for i in range(1, 4)]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert all([t - first for t in prompt if t >= first] == [0, 1, 2, 3, 4, 5] for prompt in prompts)
    together = generate(model, tokenizer, prompts, max_new_tokens=5, batch_size=3)
    alone = [generate(model, tokenizer, [p], max_new_tokens=5, batch_size=1)[0] for p in prompts]
    plain = [
        model.generate(input_ids=torch.tensor([p]), max_new_tokens=5, do_sample=False)[0, len(p) :] for p in prompts
    ]
    assert together == alone
    for answer, tokens in zip(together, plain, strict=True):
        assert tokens.tolist()[: len(answer)] == answer and all(token < first for token in answer)


def test_merging_is_refused_in_one_line(finished, tmp_path):
    _, result = finished
    with pytest.raises(UsageError, match="can't be merged"):
        peftctl.merge(str(result.run), str(tmp_path / "merged"))


def test_a_later_run_can_not_add_its_placeholders_to_a_tokenizer_that_has_them():
    tokenizer, _ = placed()
    settings = recipe(Config(num_virtual_tokens=6, positions=PLACES))
    with pytest.raises(UsageError, match=r"^method\.positions: this model's tokenizer has <\|P1\|> already"):
        Method(settings.method).prepare_tokenizer(tokenizer, chats(), settings)
