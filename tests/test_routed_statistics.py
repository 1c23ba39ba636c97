"""Statistics of experts against a plain loop over tokens and experts."""

import pytest
import torch
from mixtures import MIXTURES

from eckart.model.discovery import discover
from eckart.model.experts import dense_weight
from eckart.statistics import Need
from eckart.statistics.sweep import sweep

FAMILIES = ("qwen3-moe", "gpt-oss", "deepseek-v3")
INPUTS, GRADIENTS = (Need.INPUT_GRAM, Need.INPUT_ABSMEAN), (Need.INPUT_GRAM, Need.TRUE_GRADIENT_GRAM)


def by_hand(model, ids, block):
    """`{(kind, expert): [(x, gate, gradient at the output)]}`, one entry for each token that reached the expert.

    Written anew from what transformers says that experts compute, token by token; gradients of the summed next-token
    loss by autograd through that loop.
    """
    experts = model.model.layers[block].mlp.experts
    seen, transposed = {}, experts.is_transposed

    def product(kind, e, x, gate):
        weight = getattr(experts, kind)[e]
        y = x @ weight if transposed else weight @ x
        y = y.detach().requires_grad_() if not y.requires_grad else y
        y.retain_grad()
        seen.setdefault((f"mlp.experts.{kind}", int(e)), []).append((x.detach(), float(gate.detach()), y))
        return y + getattr(experts, f"{kind}_bias")[e] if experts.has_bias else y

    def forward(states, index, gates):
        rows = []
        for token in range(len(states)):
            total = torch.zeros_like(states[token])
            for e, gate in zip(index[token], gates[token], strict=True):
                inner = experts._apply_gate(product("gate_up_proj", e, states[token], gate)[None])[0]
                total = total + gate * product("down_proj", e, inner, gate)
            rows.append(total)
        return torch.stack(rows)

    experts.forward = forward
    try:
        logits = model(input_ids=ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    finally:
        del experts.forward
    return {key: [(x, gate, y.grad) for x, gate, y in uses] for key, uses in seen.items()}


def gram(rows):
    return sum(torch.outer(row.double(), row.double()) for row in rows)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_routed_tokens_weighed_by_squared_gates(family, ids):
    model = MIXTURES[family]()
    layout = discover(model)
    tokens = by_hand(model, ids, 1)
    for collected in sweep(model, layout, ids, INPUTS, prior=0.0):
        for target in [t for t in layout.in_block(1) if t.name in collected and t.expert is not None]:
            uses, statistics = tokens[target.kind, target.expert], collected[target.name]
            assert statistics.routed == statistics.tokens == len(uses)
            close(statistics.input_gram.matrix, gram([gate * x for x, gate, _ in uses]))
            absolute = torch.stack([abs(gate) * x.abs() for x, gate, _ in uses]).mean(0)
            close(statistics.input_absmean, absolute)


def test_the_smaller_gram_of_a_wide_expert_is_of_its_outputs(ids):
    model = MIXTURES["mixtral"]()  # whose down_proj is 32 x 48
    layout = discover(model, include=["*.experts.down_proj"])
    weights, tokens = {t.name: dense_weight(model, t) for t in layout.targets}, by_hand(model, ids, 1)
    for collected in sweep(model, layout, ids, (Need.SMALLER_GRAM,), prior=0.0):
        for target in [t for t in layout.in_block(1) if t.name in collected]:
            outputs = [gate * (weights[target.name] @ x) for x, gate, _ in tokens[target.kind, target.expert]]
            close(collected[target.name].output_gram.matrix, gram(outputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_hold_the_gate_and_inputs_beside_them_do_not(family, ids):
    model = MIXTURES[family]()
    layout = discover(model)
    weights, tokens = {t.name: dense_weight(model, t).double() for t in layout.targets}, by_hand(model, ids, 1)
    for collected in sweep(model, layout, ids, GRADIENTS, prior=0.0):
        for target in [t for t in layout.in_block(1) if t.name in collected and t.expert is not None]:
            uses, statistics = tokens[target.kind, target.expert], collected[target.name]
            assert (statistics.tokens, statistics.predictions) == (len(uses), ids.numel() - len(ids))
            close(statistics.input_gram.matrix, gram([x for x, _, _ in uses]))
            inside = gram([g for _, _, g in uses])
            weight = weights[target.name]
            if target.out_features > target.in_features:
                close(statistics.pulled_gradient_gram.matrix, weight.T @ inside @ weight)
            else:
                close(statistics.gradient_gram.matrix, inside)
            assert statistics.gradient_energy == pytest.approx(float(inside.trace()) / target.out_features, rel=1e-4)


def test_the_fisher_information_of_an_expert_is_of_its_gradients_window_by_window(ids):
    model = MIXTURES["qwen3-moe"]()
    layout = discover(model)
    experts = [t for t in layout.targets if t.expert is not None]
    expected = {t.name: torch.zeros(t.out_features, t.in_features, dtype=torch.float64) for t in experts}
    for window in ids:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None]).loss.backward()
        for t in experts:
            gradient = model.get_parameter(t.name.removesuffix(f".{t.expert}")).grad
            expected[t.name] += gradient[t.expert].double() ** 2
    for collected in sweep(model, layout, ids, (Need.WEIGHT_FISHER,), prior=0.0):
        for target in [t for t in experts if t.name in collected]:
            close(collected[target.name].fisher_rows, expected[target.name].sum(1))
            close(collected[target.name].fisher_columns, expected[target.name].sum(0))


def send_past(model, expert):
    """Routers of every layer never choose this expert."""
    for layer in model.model.layers:
        router = layer.mlp.gate
        forward = router.forward

        def without(states, forward=forward, router=router):
            logits, _, _ = forward(states)
            logits = logits.index_fill(-1, torch.tensor([expert]), -torch.inf)
            gates, index = torch.topk(logits.softmax(-1), router.top_k, dim=-1)
            return logits, gates, index

        router.forward = without


@pytest.mark.parametrize("needs", [INPUTS, (Need.SMALLER_GRAM, Need.GRADIENT_GRAM), (Need.WEIGHT_FISHER,)])
def test_an_expert_that_no_token_reached_has_the_means_of_its_layer(needs, ids):
    model = MIXTURES["qwen3-moe"]()
    layout = discover(model)
    send_past(model, 2)
    for collected in sweep(model, layout, ids, needs):
        for kind in ("gate_up_proj", "down_proj"):
            own = {t.expert: collected[t.name] for t in layout.targets if t.name in collected and kind in t.kind}
            own = {e: s for e, s in own.items() if e is not None}
            assert own[2].routed == 0
            assert own[2].unknown is None
            assert sum(own[e].routed for e in (0, 1, 3)) == 2 * ids.numel()
            for name in ("input_gram", "gradient_gram", "pulled_gradient_gram", "fisher_rows"):
                assert (getattr(own[2], name) is None) == (getattr(own[0], name) is None), name
            if own[2].input_gram is not None and kind == "gate_up_proj":
                raw = sum(s.input_gram.matrix for e, s in own.items() if e != 2) / (2 * ids.numel())
                assert torch.cosine_similarity(own[2].input_gram.matrix.flatten(), raw.flatten(), dim=0) > 0.99
            if own[2].input_gram is not None and kind == "down_proj":
                mean = own[2].input_gram.matrix
                close(mean, mean[0, 0] * torch.eye(len(mean)))


def test_a_rare_expert_is_drawn_to_its_layer_by_the_tokens_that_it_lacks(ids):
    model = MIXTURES["qwen3-moe"]()
    layout = discover(model)
    plain = {n: s for part in sweep(model, layout, ids, INPUTS, prior=0.0) for n, s in part.items()}
    drawn = {n: s for part in sweep(model, layout, ids, INPUTS, prior=0.5) for n, s in part.items()}
    experts = [t for t in layout.targets if t.kind == "mlp.experts.gate_up_proj" and t.block == 1]
    total = sum(plain[t.name].tokens for t in experts)
    mean = sum(plain[t.name].input_gram.matrix for t in experts) / total
    for target in experts:
        n, k = plain[target.name].tokens, 0.5 * 32
        close(drawn[target.name].input_gram.matrix, n / (n + k) * (plain[target.name].input_gram.matrix + k * mean))
        assert drawn[target.name].tokens == n
    ordinary = next(t for t in layout.targets if t.kind == "self_attn.q_proj")
    assert torch.equal(plain[ordinary.name].input_gram.matrix, drawn[ordinary.name].input_gram.matrix)


def test_what_came_before_the_mark_and_after_it_adds_up(ids):
    model = MIXTURES["qwen3-moe"]()
    layout = discover(model)
    windows = ids.repeat(2, 1)
    windows[2:] = windows[2:].flip(1)
    for collected in sweep(model, layout, windows, (Need.SMALLER_GRAM, Need.GRADIENT_GRAM), batch_tokens=16):
        for target in layout.targets:
            statistics = collected.get(target.name)
            if statistics is None or target.expert is None or statistics.early is None:
                continue
            assert 0 < statistics.early.tokens < statistics.tokens
            late = statistics.late
            assert late.tokens + statistics.early.tokens == statistics.tokens
            assert late.predictions == 15
            for name in ("input_gram", "gradient_gram", "pulled_gradient_gram"):
                if (gram_ := getattr(statistics, name)) is not None:
                    assert torch.linalg.eigvalsh(getattr(late, name).matrix)[0] > -1e-6 * gram_.matrix.trace()
