"""Layers with a mixture of LoRA experts or of vectors, alone: their equations in float64 against loops over experts."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from peftctl.tuners.routed import LoraExperts, RoutedLoraConfig, RoutedLoraLayer
from peftctl.tuners.routed_vectors import RoutedVectorsConfig, VectorExperts
from peftctl.tuners.routing import layers, recording, route

X = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Pair(nn.Module):
    """Two linear layers, the second of which ends a feed-forward part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return self.down(self.up(x))


def lora(experts=4, randomise=True, dtype=torch.float64, **keys):
    """Return a Pair with experts beside both layers, whose B is not 0."""
    config = RoutedLoraConfig(**{"experts": experts, "r": 3, "alpha": 5, "target_modules": ["up", "down"], **keys})
    torch.manual_seed(1)
    model = get_peft_model(Pair().to(dtype), config).to(dtype)
    if randomise:
        for layer in layers(model).values():
            for p in layer.experts.parameters():
                p.data.normal_()
    return model


def parts(layer):
    """Return the router, every A_e and every B_e of a layer, whichever way it keeps them."""
    experts = layer.experts["default"]
    downs = torch.cat([a for a, _ in experts.pairs()]).detach()
    ups = torch.cat([b for _, b in experts.pairs()], dim=1).detach()
    r = experts.config.r
    return experts.router.detach(), downs.split(r), ups.split(r, dim=1)


def naive(layer, token, k=None, renormalise=False):
    """Return what a layer answers to one token, (d_in,), expert by expert."""
    router, downs, ups = parts(layer)
    p = torch.exp(router @ token) / torch.exp(router @ token).sum()
    chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[:k]
    total = sum(p[e] for e in chosen) if renormalise else 1.0
    y = layer.base_layer.weight @ token + layer.base_layer.bias
    for e in chosen:
        y = y + 5 / 3 * p[e] / total * ups[e] @ (downs[e] @ token)
    return y.detach()


def by_token(layer, **keys):
    return torch.stack([naive(layer, token, **keys) for token in X.flatten(0, 1)]).unflatten(0, X.shape[:2])


def up(model):
    return layers(model)["up"]


# -- the equation --------------------------------------------------------------------------------------------------


def test_dense_is_the_sum_over_all_experts():
    layer = up(lora())
    torch.testing.assert_close(layer(X), by_token(layer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_is_the_sum_over_the_chosen_experts(k, renormalise):
    layer = up(lora(k=k, renormalise=renormalise))
    torch.testing.assert_close(layer(X), by_token(layer, k=k, renormalise=renormalise), rtol=1e-12, atol=1e-12)


def test_the_mask_is_the_loop_that_gives_each_expert_its_tokens():
    layer = up(lora(experts=5, k=2, renormalise=True))
    router, downs, ups = parts(layer)
    tokens = X.flatten(0, 1)
    p, chosen = (tokens @ router.T).softmax(-1).topk(2, dim=-1)
    p = p / p.sum(-1, keepdim=True)
    y = layer.base_layer(tokens).detach()
    for e in range(5):
        place, which = (chosen == e).nonzero(as_tuple=True)
        change = tokens.index_select(0, place) @ downs[e].T @ ups[e].T * p[place, which, None] * 5 / 3
        y = y.index_add(0, place, change)
    torch.testing.assert_close(layer(X).flatten(0, 1), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("k", "renormalise"), [(2, True), (3, True), (2, False)])
def test_top_k_has_exactly_k_gates_which_sum_to_1_where_they_shall(k, renormalise):
    router = torch.randn(6, 6).double()
    routing = route(X, router, k, renormalise)
    assert ((routing.gates > 0).sum(-1) == k).all()
    kept = routing.probabilities.topk(k).values.sum(-1)
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones_like(kept) if renormalise else kept)
    smallest_kept = routing.gates.masked_fill(routing.gates == 0, 2).amin(-1)
    assert (routing.probabilities.masked_fill(routing.gates > 0, 0).amax(-1) <= smallest_kept).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_sum_to_1_and_are_float32_or_wider(dtype):
    p = route(X.to(dtype), torch.randn(9, 6)).probabilities
    assert p.dtype == torch.promote_types(dtype, torch.float32)
    assert (p.sum(-1) - 1).abs().max() < 1e-6
    assert (p >= 0).all()


@pytest.mark.parametrize("renormalise", [False, True])
def test_top_k_of_all_experts_is_dense(renormalise):
    dense, sparse = lora(experts=3), lora(experts=3, k=3, renormalise=renormalise)
    for layer, other in zip(layers(dense).values(), layers(sparse).values(), strict=True):
        router, downs, ups = parts(layer)
        copy_into(other, router, downs, ups)
    torch.testing.assert_close(sparse(X), dense(X), rtol=1e-12, atol=1e-12)


def copy_into(layer, router, downs, ups):
    experts = layer.experts["default"]
    experts.router.data = router.clone()
    if experts.pieces == 1:
        downs, ups = [torch.cat(downs)], [torch.cat(ups, dim=1)]
    for (a, b), down, up_ in zip(experts.pairs(), downs, ups, strict=True):
        a.data, b.data = down.clone(), up_.clone()


def one_lora(a, b):
    """Return a Pair with peft's own LoRA beside the first layer."""
    model = get_peft_model(Pair().double(), LoraConfig(r=3, lora_alpha=5, target_modules=["up"])).double()
    layer = model.base_model.model.up
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    return layer


def test_one_expert_is_lora():
    layer = up(lora(experts=1))
    _, (a,), (b,) = parts(layer)
    torch.testing.assert_close(layer(X), one_lora(a, b)(X), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("keys", [{}, {"k": 2, "renormalise": True}], ids=["dense", "top_k"])
def test_identical_experts_are_one_lora_whatever_the_router_says(keys):
    layer = up(lora(experts=4, **keys))
    router, downs, ups = parts(layer)
    copy_into(layer, 10 * router, [downs[0]] * 4, [ups[0]] * 4)
    torch.testing.assert_close(layer(X), one_lora(downs[0], ups[0])(X), rtol=1e-12, atol=1e-12)


def test_mixing_parameters_is_mixing_outputs():
    layer = up(lora())
    router, downs, ups = parts(layer)
    p = (X @ router.T).softmax(-1)
    products = torch.stack([b @ a for a, b in zip(downs, ups, strict=True)])
    mixed = torch.einsum("bse,eoi->bsoi", p, products) * 5 / 3
    expected = layer.base_layer(X) + torch.einsum("bsoi,bsi->bso", mixed, X)
    torch.testing.assert_close(layer(X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [{}, {"k": 2}], ids=["dense", "top_k"])
def test_the_order_of_experts_does_not_matter(keys):
    layer = up(lora(**keys))
    before = layer(X)
    router, downs, ups = parts(layer)
    order = [2, 0, 3, 1]
    copy_into(layer, router[order], [downs[e] for e in order], [ups[e] for e in order])
    torch.testing.assert_close(layer(X), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [{}, {"k": 2}], ids=["dense", "top_k"])
def test_every_token_is_routed_on_its_own(keys):
    layer, order = up(lora(**keys)), torch.randperm(7)
    torch.testing.assert_close(layer(X[:, order]), layer(X)[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(X[1, 2]), layer(X)[1, 2], rtol=1e-12, atol=1e-12)


def test_layers_may_have_experts_of_their_own_number():
    model = lora(experts=2, experts_of={"down": 5})
    assert [len(parts(layer)[1]) for layer in layers(model).values()] == [2, 5]
    for layer, x in zip(layers(model).values(), (X, X[..., :5]), strict=True):
        expected = torch.stack([naive(layer, token) for token in x.flatten(0, 1)]).unflatten(0, (2, 7))
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


# -- starting, gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"k": 2}, {"k": 2, "renormalise": True}], ids=str)
def test_it_starts_as_the_base_where_only_b_has_a_gradient(keys):
    model = lora(randomise=False, **keys)
    assert torch.equal(model(X), Pair().double()(X))
    model(X).square().sum().backward()
    for layer in layers(model).values():
        experts = layer.experts["default"]
        assert not experts.router.grad.any()
        for a, b in experts.pairs():
            assert not a.grad.any()
            assert b.grad is not None
        assert any(b.grad.any() for _, b in experts.pairs())


def test_starts_are_drawn_as_named():
    config = RoutedLoraConfig(experts=8, r=16, init="kaiming", target_modules=["up"])
    torch.manual_seed(0)
    experts = LoraExperts(100, 50, 8, config)
    for drawn in (experts.router, experts.pairs()[0][0]):
        assert 0.095 < drawn.abs().max() <= 0.1  # 1 / sqrt(100)
        assert drawn.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    experts = LoraExperts(100, 50, 8, RoutedLoraConfig(experts=8, r=16, init="normal", target_modules=["up"]))
    for drawn in (experts.router, experts.pairs()[0][0]):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.06)
        assert drawn.abs().max() > 0.05
    assert not experts.pairs()[0][1].any()


def test_an_expert_that_no_token_chose_has_no_gradient():
    model = lora(experts=4, k=2, renormalise=True)
    layer = up(model)
    experts = layer.experts["default"]
    x = X.abs()
    experts.router.data = torch.tensor([5.0, 4.0, -4.0, -5.0]).double()[:, None] * torch.ones(4, 6).double()
    layer(x).square().sum().backward()
    reached = [a.grad.any().item() and b.grad.any().item() for a, b in experts.pairs()]
    assert reached == [True, True, False, False]
    assert not any(p.grad.any() for pair in experts.pairs()[2:] for p in pair)


def test_the_gradients_are_those_of_the_equation():
    layer = up(lora())
    experts = layer.experts["default"]

    def again(router, a, b):
        p = (X @ router.T).softmax(-1)
        low = torch.stack([X @ piece.T for piece in a.split(3)], dim=-2)
        return 5 / 3 * torch.einsum("bse,bser,oer->bso", p, low, b.unflatten(1, (4, 3)))

    tensors = [experts.router, *experts.pairs()[0]]
    weight = torch.randn(2, 7, 5).double()
    found = torch.autograd.grad((layer(X) * weight).sum(), tensors)
    expected = torch.autograd.grad((again(*tensors) * weight).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# -- types, switches -----------------------------------------------------------------------------------------------


def test_in_a_half_type_the_tensors_are_float32_and_the_stream_is_not():
    config = RoutedLoraConfig(experts=4, target_modules=["up", "down"])
    model = get_peft_model(Pair().bfloat16(), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with recording(model) as found:
        assert model(X.bfloat16()).dtype == torch.bfloat16
    assert {routing.probabilities.dtype for routing in found.values()} == {torch.float32}


def test_dropout_is_on_what_experts_read_and_not_on_the_router():
    model = lora(dropout=0.5).train()
    with recording(model) as found:
        first, second = up(model)(X), up(model)(X)
    assert not torch.equal(first, second)
    expected = (X @ parts(up(model))[0].T).softmax(-1)
    torch.testing.assert_close(found["up"].probabilities, expected)
    model.eval()
    torch.testing.assert_close(up(model)(X), by_token(up(model)), rtol=1e-12, atol=1e-12)


def test_switched_off_it_is_the_base_and_merging_is_refused():
    model, reference = lora(), Pair().double()(X)
    assert not torch.equal(model(X), reference)
    with model.disable_adapter():
        assert torch.equal(model(X), reference)
    with pytest.raises(NotImplementedError, match="no weight of the base can take them up"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="no weight of the base can take them up"):
        model.merge_adapter()
    assert torch.equal(model.unload()(X), reference)


def test_two_adapters_lie_beside_each_other():
    model = lora()
    first = model(X)
    model.add_adapter("other", RoutedLoraConfig(experts=2, r=1, k=1, target_modules=["up"]))
    assert torch.equal(model(X), first)
    model.set_adapter("other")
    torch.testing.assert_close(model(X), Pair().double()(X))  # its B is 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("other" in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(model(X), first)


def test_routing_is_told_inside_of_recording_only():
    model = lora()
    with recording(model) as found:
        assert not found
        model(X)
        assert set(found) == {"up", "down"}
    found.clear()
    model(X)
    assert not found and all(layer.listener is None for layer in layers(model).values())
    with pytest.raises(RuntimeError), recording(model):
        raise RuntimeError
    assert all(layer.listener is None for layer in layers(model).values())


# -- vectors -------------------------------------------------------------------------------------------------------


def vectors(randomise=True, dtype=torch.float64):
    """Return a Pair whose first layer's output and second layer's input are scaled."""
    config = RoutedVectorsConfig(experts=4, feedforward=["down"], target_modules=["up", "down"])
    torch.manual_seed(1)
    model = get_peft_model(Pair().to(dtype), config)
    if randomise:
        model = model.to(dtype)
        for layer in layers(model).values():
            for p in layer.experts.parameters():
                p.data.normal_()
    return model


def scaled(layer, z):
    """Return z * Σ_e p_e l_e, token by token and expert by expert."""
    experts = layer.experts["default"]
    router, own = experts.router.detach(), experts.vectors.detach()
    rows = []
    for token in z.flatten(0, 1):
        p = torch.exp(router @ token) / torch.exp(router @ token).sum()
        rows.append(token * sum(p[e] * own[e] for e in range(len(p))))
    return torch.stack(rows).view_as(z)


def test_vectors_scale_an_output_or_an_input_as_the_paper_has_it():
    model, base = vectors(), Pair().double()
    first, second = layers(model)["up"], layers(model)["down"]
    torch.testing.assert_close(first(X), scaled(first, base.up(X).detach()), rtol=1e-12, atol=1e-12)
    z = X[..., :5]
    torch.testing.assert_close(second(z), base.down(scaled(second, z)), rtol=1e-12, atol=1e-12)
    assert isinstance(first.experts["default"], VectorExperts) and not isinstance(first, RoutedLoraLayer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_vectors_of_1_leave_everything_as_it_is(dtype):
    model, x = vectors(randomise=False, dtype=dtype), X.to(dtype)
    assert torch.equal(model(x), Pair().to(dtype)(x))
    assert model(x).dtype == dtype


def test_identical_vectors_are_ia3_whatever_the_router_says():
    model = vectors()
    config = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    single = get_peft_model(Pair().double(), config).double()
    for name, layer in layers(model).items():
        own = layer.experts["default"].vectors
        own.data = own.data[:1].expand_as(own).clone()
        same = single.base_model.model.get_submodule(name).ia3_l["default"]
        same.data = own.data[0].view_as(same)
    torch.testing.assert_close(model(X), single(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [1.0, 0.7])
def test_routers_have_no_gradient_while_vectors_are_equal(value):
    model = vectors()
    for layer in layers(model).values():
        layer.experts["default"].vectors.data.fill_(value)
    model(X).square().sum().backward()
    for layer in layers(model).values():
        experts = layer.experts["default"]
        assert experts.router.grad.abs().max() < 1e-12 and (value != 1 or not experts.router.grad.any())
        assert (experts.vectors.grad != 0).all()


def test_order_of_vectors_and_of_tokens():
    model = vectors()
    before, tokens, order = model(X), torch.randperm(7), [3, 1, 0, 2]
    torch.testing.assert_close(model(X[:, tokens]), before[:, tokens], rtol=1e-12, atol=1e-12)
    for layer in layers(model).values():
        for p in layer.experts.parameters():
            p.data = p.data[order]
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
