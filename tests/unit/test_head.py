"""Chunked log-probabilities against the full log-softmax: for what models do to their logits, and
for heads that are more than a matrix."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from aot_plugin.scoring import lm_head as head_module
from aot_plugin.scoring.lm_head import linear_head, token_logps, watched_token_logps
from aot_plugin.scoring.logps import (
    sequence_logps,
    watched_sequence_logps,
    weighted_logps_sum,
)
from aot_plugin.scoring.model_head import why_head_is_not_chunked
from aot_plugin.scoring.model_input import padded_rows
from aot_plugin.scoring.tail import IDENTITY, Tail, fitted_tail, known_logits

VOCABULARY, WIDTH, TOKENS = 50, 8, 33
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TAILS = {
    "as they are": (IDENTITY, lambda x: x),
    "scaled": (Tail(0.0625), lambda x: x * 0.0625),
    "divided": (Tail(1 / 7), lambda x: x / 7),
    "capped": (Tail(1.0, 1.5), lambda x: torch.tanh(x / 1.5) * 1.5),
    "scaled and capped": (Tail(0.3, 2.0), lambda x: torch.tanh(x * 0.3 / 2.0) * 2.0),
}


@pytest.fixture(params=[1, 7, 1000], ids=lambda tokens: f"chunks of {tokens}")
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", request.param * VOCABULARY)


def head_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize("with_graph", [True, False])
def test_what_is_watched_is_of_the_whole_distribution(
    with_graph: bool, kind: str, chunked: None
) -> None:
    """Peaked and flat predictions, and targets of which some are the most probable tokens."""
    hidden, weight, _ = (tensor.detach() for tensor in head_inputs(torch.float32))
    hidden *= torch.linspace(0.1, 20, TOKENS)[:, None]
    tail, function = TAILS[kind]
    distribution = torch.distributions.Categorical(logits=function(hidden @ weight.T).double())
    best = distribution.probs.argmax(dim=-1)
    targets = torch.where(torch.arange(TOKENS) % 3 == 0, best, torch.arange(TOKENS))
    hidden.requires_grad_(with_graph)
    logps, watched = watched_token_logps(linear_head(weight, None, tail), hidden, targets)
    assert logps.requires_grad == with_graph and not watched.requires_grad
    torch.testing.assert_close(logps.double(), distribution.log_prob(targets), rtol=1e-5, atol=1e-4)
    assert torch.equal(watched[:, 0].bool(), targets == best)
    torch.testing.assert_close(watched[:, 1].double(), distribution.entropy(), rtol=1e-4, atol=1e-5)
    plain = token_logps(linear_head(weight, None, tail), hidden, targets)
    assert torch.equal(logps, plain)  # at the start policy and reference agree to the bit


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients_are_those_of_log_softmax(
    weighted: bool, with_bias: bool, kind: str, chunked: None
) -> None:
    hidden, weight, bias = head_inputs(torch.float32)
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    token_weights = torch.linspace(-1, 2, TOKENS) * 1e-7
    tail, function = TAILS[kind]
    logits = function(nn.functional.linear(hidden, weight, bias if with_bias else None))
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected_grads = torch.autograd.grad((token_weights * expected).sum() * 3, inputs)

    head = linear_head(weight, bias if with_bias else None, tail)
    if weighted:
        total = token_logps(head, hidden, targets, token_weights)
    else:
        logps = token_logps(head, hidden, targets)
        torch.testing.assert_close(logps, expected)
        total = (token_weights * logps).sum()
    torch.testing.assert_close(total, (token_weights * expected).sum(), rtol=1e-4, atol=1e-12)
    for found, grad in zip(torch.autograd.grad(total * 3, inputs), expected_grads, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_fp16_gradients_survive_small_weights() -> None:
    """Unscaled they would lie below 6e-8, the smallest fp16 number, and vanish."""
    hidden, weight, _ = head_inputs(torch.float16)
    targets = torch.arange(TOKENS) % VOCABULARY
    total = token_logps(linear_head(weight, None), hidden, targets, torch.full((TOKENS,), 1e-9))
    (grad,) = torch.autograd.grad(total * 2.0**16, hidden)
    assert (grad != 0).float().mean() > 0.9


def test_no_tokens() -> None:
    hidden, weight, bias = head_inputs()
    none = torch.zeros(0, dtype=torch.int64)
    head = linear_head(weight, bias)
    assert token_logps(head, hidden[:0], none).shape == (0,)
    total = token_logps(head, hidden[:0], none, torch.zeros(0))
    assert total.item() == 0
    for grad in torch.autograd.grad(total, [weight, bias]):
        assert not grad.any()  # and there is one: DDP waits for it


def test_hooks_on_saved_tensors_see_the_models_graph_only(chunked: None) -> None:
    """Activation offloading takes what is saved to another device, and counts it."""
    hidden, weight, bias = head_inputs(torch.float32)
    targets, token_weights = torch.arange(TOKENS), torch.ones(TOKENS)
    inputs = [hidden, weight, bias]
    head = linear_head(weight, bias)
    expected = torch.autograd.grad(token_logps(head, hidden, targets, token_weights), inputs)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor.clone()

    for weights in (token_weights, None):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
            total = token_logps(head, hidden, targets, weights).sum()
            for found, grad in zip(torch.autograd.grad(total, inputs), expected, strict=True):
                torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5)
        assert len(saved) <= 4


@pytest.mark.parametrize("kind", TAILS)
def test_the_tail_is_measured(kind: str) -> None:
    tail, function = TAILS[kind]
    logits = known_logits(torch.empty(1, 8, VOCABULARY))
    found = fitted_tail(logits, function(logits))
    assert found is not None
    assert found.scale == pytest.approx(tail.scale, rel=3e-7)
    assert found.cap == tail.cap
    if tail.scale == 1:
        assert found.scale == 1


def test_a_model_that_returns_bf16_is_the_identity() -> None:
    logits = known_logits(torch.empty(1, 8, VOCABULARY))
    assert fitted_tail(logits, logits.bfloat16()) == IDENTITY


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[..., :-3],
        lambda x: x.relu(),
        lambda x: x.flip(-1),
        lambda x: x.log_softmax(-1),
        lambda x: x + 1e-4 * (torch.arange(x.shape[-1]) == 3),
        lambda x: x * (1 + 1e-5 * (torch.arange(x.shape[-1]) == 3)),
        lambda x: x.clamp(-30, 30),
        lambda x: 30 * (x / 30).atan(),
        lambda x: x * float("nan"),
        lambda x: (torch.tanh(x / 30) * 30).bfloat16(),
    ],
    ids="cut relu permuted normalized bias temperature clamped arctan nan rounded".split(),
)
def test_what_is_no_tail_is_none(function: Callable[[Tensor], Tensor]) -> None:
    logits = known_logits(torch.empty(1, 8, VOCABULARY))
    assert fitted_tail(logits, function(logits)) is None


MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    # So strong that it changes every log-probability.
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.05},
    "Cohere": {"logit_scale": 0.0625, "tie_word_embeddings": True},
    "Granite": {"logits_scaling": 7.0},
}


def tiny(kind: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | MODELS[kind] | sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
HEADS: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "DoRA": LORA | {"use_dora": True},
    "modules_to_save": LORA | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(model: Any, head: str) -> Any:
    """Its matrices moved away from where they begin: B is 0, a copy is a copy."""
    model = peft.get_peft_model(model, peft.LoraConfig(**HEADS[head]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def rows() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    completion = (torch.arange(9) >= torch.tensor([[4], [6], [9]])).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
    }


WEIGHTS = torch.tensor([0.3, -0.2, 0.5])


def assert_as_from_full_logits(
    model: Any, head: nn.Module, rtol: float = 1e-4, autocast: bool = False
) -> None:
    """Values and all parameters' gradients, when what is known of the head is found out, and
    after."""
    batch = rows()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    with context():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["completion_mask"][:, 1:]
    expected = (chosen * mask).sum(1)
    correct = ((logits.argmax(-1) == batch["input_ids"][:, 1:]) * mask).sum(1)
    entropy = (torch.distributions.Categorical(logits=logits).entropy() * mask).sum(1)
    grads = torch.autograd.grad((WEIGHTS * expected).sum(), parameters)
    for _ in range(2):
        with context():
            logps, watched = watched_sequence_logps(model, head, padded_rows(batch))
        with context():
            total = weighted_logps_sum(model, head, padded_rows(batch), WEIGHTS)
        torch.testing.assert_close(logps, expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(watched[:, 1], entropy, rtol=rtol, atol=rtol)
        assert autocast or torch.equal(watched[:, 0], correct.float())
        torch.testing.assert_close(total, (WEIGHTS * expected).sum(), rtol=rtol, atol=rtol)
        for value in ((WEIGHTS * logps).sum(), total):
            for found, grad in zip(torch.autograd.grad(value, parameters), grads, strict=True):
                assert grad.any()
                assert (found - grad).norm() <= rtol * grad.norm()
    assert "forward" not in vars(head)


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_model_does_to_its_logits_counts(kind: str, chunked: None) -> None:
    model = tiny(kind)
    head = model.get_output_embeddings()
    assert_as_from_full_logits(model, head)
    assert why_head_is_not_chunked(head) is None


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite"])
def test_the_tail_is_what_makes_it_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Tail, "__call__", lambda self, logits: logits)
    monkeypatch.setattr(Tail, "backward_", lambda self, grad, values: grad)
    monkeypatch.setattr("aot_plugin.scoring.model_head.fitted_tail", lambda *_: IDENTITY)
    model = tiny(kind)
    with pytest.raises(AssertionError):
        assert_as_from_full_logits(model, model.get_output_embeddings(), rtol=0.05)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize("adapter", HEADS)
def test_heads_with_an_adapter(adapter: str, kind: str, tied: bool, chunked: None) -> None:
    model = adapted(tiny(kind, tie_word_embeddings=tied), adapter)
    head = model.get_output_embeddings()
    assert type(head) is not nn.Linear
    assert_as_from_full_logits(model, head)
    assert why_head_is_not_chunked(head) is None


@pytest.mark.parametrize(
    ("kind", "adapter"), [("Llama", None), ("Gemma2", None), ("Llama", "LoRA"), ("Llama", "DoRA")]
)
def test_under_autocast(kind: str, adapter: str | None, chunked: None) -> None:
    model = tiny(kind)
    if adapter is not None:
        model = adapted(model, adapter)
    head = model.get_output_embeddings()
    assert_as_from_full_logits(model, head, rtol=0.03, autocast=True)
    assert why_head_is_not_chunked(head) is None


class Tailed(nn.Module):
    """A Llama that does something to its logits."""

    def __init__(self, tail: Callable[[Tensor], Tensor], **parameters: nn.Parameter) -> None:
        super().__init__()
        self.llama, self.tail = tiny("Llama"), tail
        self.extra = nn.ParameterDict(parameters)

    def forward(self, **inputs: Any) -> Any:
        output = self.llama(**inputs)
        output.logits = self.tail(output.logits)
        return output


def scaled_in_place(logits: Tensor) -> Tensor:
    logits /= 4
    return logits


def test_a_tail_in_place() -> None:
    model = Tailed(scaled_in_place)
    assert_as_from_full_logits(model, model.llama.lm_head)
    assert why_head_is_not_chunked(model.llama.lm_head) is None


def test_a_tail_that_is_not_known() -> None:
    model = Tailed(lambda logits: 3 * torch.atan(logits / 3))
    head = model.llama.lm_head
    assert_as_from_full_logits(model, head)
    assert why_head_is_not_chunked(head) == (
        "what the model does to its logits is neither scaling nor soft-capping"
    )


def test_a_tail_that_is_trained() -> None:
    """It looks like a constant until there is a graph."""
    scale = nn.Parameter(torch.tensor(0.5))
    model = Tailed(lambda logits: logits * scale, scale=scale)
    head = model.llama.lm_head
    assert_as_from_full_logits(model, head)
    assert why_head_is_not_chunked(head) == (
        "the model has a trained parameter that changes its logits"
    )


class _Borrowing(nn.Linear):
    """As Axolotl's tied adapters: computes from weights of another module."""

    def __init__(self, head: nn.Linear, other: nn.Parameter) -> None:
        super().__init__(head.in_features, head.out_features, bias=False)
        self.weight, self.other = head.weight, [other]

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden @ self.other[0].T


def test_a_head_that_uses_the_weights_of_another_module() -> None:
    model = tiny("Llama")
    embeddings = model.get_input_embeddings().weight
    model.lm_head = _Borrowing(model.lm_head, embeddings)
    assert_as_from_full_logits(model, model.lm_head)
    assert why_head_is_not_chunked(model.lm_head) == (
        "the LM head uses trained weights of another module"
    )


def test_an_exchanged_forward_is_run_and_stays() -> None:
    """As accelerate's hooks exchange it."""
    model = tiny("Llama")
    head = model.get_output_embeddings()
    own, calls = head.forward, []

    def forward(hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return own(hidden) * torch.linspace(0.5, 2, VOCABULARY)

    head.forward = forward
    expected = torch.nn.functional.cross_entropy(
        model(rows()["input_ids"]).logits[0, 3:-1], rows()["input_ids"][0, 4:], reduction="sum"
    )
    found = sequence_logps(model, head, padded_rows(rows()))
    torch.testing.assert_close(found[0], -expected)
    assert why_head_is_not_chunked(head) is None
    assert calls[-1] == rows()["completion_mask"][:, 1:].sum()
    assert head.forward is forward


@pytest.mark.parametrize("adapter", HEADS)
def test_the_parts_of_a_sharded_head_are_called_once(adapter: str) -> None:
    """ZeRO-3 marks its parameters so; a matrix alone is no matter."""
    model = adapted(tiny("Llama"), adapter)
    for parameter in model.parameters():
        parameter.ds_id = 0
    head = model.get_output_embeddings()
    calls: list[int] = []
    for part in head.modules():
        if type(part) is nn.Linear:
            part.register_forward_hook(lambda *_: calls.append(1))
    sequence_logps(model, head, padded_rows(rows()))
    once = len(calls)
    sequence_logps(model, head, padded_rows(rows() | {"completion_mask": rows()["attention_mask"]}))
    name = type(head).__name__
    assert why_head_is_not_chunked(head) == f"the LM head is a peft {name} whose parts are sharded"
    assert len(calls) == 1.5 * once  # the first time it is looked at, in a pass of its own


def test_a_matrix_may_be_sharded() -> None:
    model = tiny("Llama")
    model.lm_head.weight.ds_id = 0
    sequence_logps(model, model.lm_head, padded_rows(rows()))
    assert why_head_is_not_chunked(model.lm_head) is None


def test_dropout_on_the_head_is_drawn_once() -> None:
    model = peft.get_peft_model(tiny("Llama"), peft.LoraConfig(**LORA, lora_dropout=0.5))
    head = model.get_output_embeddings()
    sequence_logps(model, head, padded_rows(rows()))
    assert why_head_is_not_chunked(head) == "the LM head is a peft Linear with dropout"


@pytest.mark.parametrize("adapter", [None, *HEADS])
def test_hooks_on_parameters_are_for_the_whole_gradient(adapter: str | None) -> None:
    """Axolotl's tensor parallelism sums over ranks there; once, however many chunks there are."""
    model = tiny("Llama")
    if adapter is not None:
        model = adapted(model, adapter)
    seen: list[str] = []
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    for name, parameter in trained:
        parameter.register_hook(lambda grad, name=name: seen.append(name))
    weighted_logps_sum(
        model, model.get_output_embeddings(), padded_rows(rows()), WEIGHTS
    ).backward()
    assert sorted(seen) == sorted(name for name, _ in trained)


def test_the_backward_pass_comes_through_what_the_model_returns() -> None:
    """There DeepSpeed and FSDP gather the weights that the head's gradient needs, and DDP looks for
    the parameters."""
    events: list[str] = []

    def hooked(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            logits.register_hook(lambda grad: events.append("returned"))
        return logits

    model = Tailed(hooked)
    head = model.llama.lm_head
    total = weighted_logps_sum(model, head, padded_rows(rows()), WEIGHTS)
    head.weight.register_hook(lambda grad: events.append("weight"))
    total.backward()
    sequence_logps(model, head, padded_rows(rows())).sum().backward()
    assert events == ["returned", "weight"] * 2


def test_one_row_that_is_not_finite_leaves_the_others_alone() -> None:
    model = tiny("Gemma2")
    expected = sequence_logps(model, model.lm_head, padded_rows(rows()))
    handle = model.lm_head.register_forward_pre_hook(
        lambda _, args: (args[0].index_fill(0, torch.tensor(1), float("nan")),)
    )
    with handle:
        found = sequence_logps(model, model.lm_head, padded_rows(rows()))
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert found[1].isnan()
