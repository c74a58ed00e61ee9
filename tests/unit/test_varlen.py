"""Packed rows under attention kernels that take variable lengths: the numbers are those of
separate rows under eager attention."""

import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from flash_stand_in import NAME, FlashAttn, attention, flash_attn
from harness import random_model
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from aot_plugin.scoring import varlen
from aot_plugin.scoring.layout import Packed
from aot_plugin.scoring.logps import sequence_logps
from aot_plugin.scoring.masks import Places
from aot_plugin.scoring.model_input import Batch, ModelInput, padded_rows
from aot_plugin.scoring.probe import batch_of
from aot_plugin.scoring.settle import settle_layout

__all__ = ["flash_attn"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PACKED = Packed(varlen.segments_for(NAME, CPU))
WINDOW = 8

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
        | {"attn_logit_softcapping": 2.0, "num_hidden_layers": 3},
    ),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Three completions of one prompt, two of another, one of a third, and one without a prompt."""
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> list[int]:
        return torch.randint(2, 20, (n,), generator=generator).tolist()

    first, second = some(12), some(5)
    return batch_of(
        [
            (first, some(9)),
            (second, some(4)),
            (first, some(1)),
            (some(7), some(11)),
            (first, some(14)),
            (second, some(10)),
            ([], some(6)),
        ]
    )


def model_of(name: str, tokenizer: Any, backend: str, checkpointing: bool = False) -> Any:
    kind, sizes = MODELS[name]
    model = random_model(tokenizer, kind, max_position_embeddings=2048, **sizes)
    model.config._attn_implementation = backend
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(checkpointing)


def scored(model: Any, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradients of a weighted sum of them."""
    model.zero_grad()
    logps = sequence_logps(model, model.get_output_embeddings(), inputs)
    (torch.linspace(-1.0, 1.5, len(logps)) * logps).sum().backward()
    return logps.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def furthest(found: Any, expected: Any) -> float:
    """The largest difference of log-probabilities or gradients, relative to the latter's size."""
    assert found[1].keys() == expected[1].keys()
    sizes = [
        ((found[1][name] - gradient).norm() / (gradient.norm() + 1e-3)).item()
        for name, gradient in expected[1].items()
    ]
    return max(*sizes, (found[0] - expected[0]).abs().max().item() / 10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_separate_rows(
    name: str,
    checkpointing: bool,
    batch: Batch,
    word_tokenizer: Any,
    flash_attn: FlashAttn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = scored(model_of(name, word_tokenizer, "eager"), padded_rows(batch))
    model = model_of(name, word_tokenizer, NAME, checkpointing)
    inputs = PACKED.arrange(batch)
    assert furthest(scored(model, inputs), expected) < 2e-5
    # No padding: what precedes a prompt's last token, and that token and the completion each time.
    assert inputs.input_ids.shape == (1, 11 + 10 + 2 + 15 + 4 + 5 + 11 + 18 + 6)
    # Of the second pass: the model is asked for its vocabulary in the first.
    flash_attn.calls.clear()
    scored(model, inputs)
    assert len(flash_attn.calls) == model.config.num_hidden_layers * (1 + checkpointing)
    assert {len(call["q"]) for call in flash_attn.calls} == {82}
    assert {len(call["k"]) for call in flash_attn.calls} == {82 + 3 * 11 + 2 * 4}
    windows = {call["window_size"] for call in flash_attn.calls}
    assert ((WINDOW - 1, WINDOW - 1) in windows) is ("sliding_window" in MODELS[name][1])
    caps = {call["softcap"] for call in flash_attn.calls}
    assert caps == {MODELS[name][1].get("attn_logit_softcapping", 0.0)}
    assert all((call["s_aux"] is not None) is (name == "gpt-oss") for call in flash_attn.calls)

    # Keys of another prompt, and keys that end elsewhere, must be seen.
    for broken in (_other_prompt, _one_early):
        monkeypatch.setattr(varlen, "segments", broken(segments))
        assert furthest(scored(model, PACKED.arrange(batch)), expected) > 0.01


segments = varlen.segments


def _other_prompt(form: Callable[[Places], varlen.Segments]) -> Any:
    def broken(places: Places) -> varlen.Segments:
        found = form(places)
        return found._replace(source=found.source.clamp(min=2))

    return broken


def _one_early(form: Callable[[Places], varlen.Segments]) -> Any:
    def broken(places: Places) -> varlen.Segments:
        found = form(places)
        keys = found.keys.clone()
        keys[2] -= 1  # the first completion lacks a key, and the second sees it
        return found._replace(keys=keys, longest_keys=int(keys.diff().max()))

    return broken


def test_a_pair_takes_three_segments() -> None:
    places = Places(torch.tensor([[0] * 6 + [1] * 2]), torch.tensor([[0, 0, 1, 1, 2, 2, 1, 1]]))
    found = segments(places)
    assert found.queries.tolist() == [0, 2, 4, 6, 8]
    assert found.keys.tolist() == [0, 2, 6, 10, 12]
    assert (found.longest_queries, found.longest_keys) == (2, 4)
    assert found.source is not None
    assert found.source.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]


def test_rows_of_their_own_prompts_gather_nothing(batch: Batch) -> None:
    apart = {name: values[[1, 3, 6]] for name, values in batch.items()}
    inputs = PACKED.arrange(apart)
    found = inputs.arguments()[varlen.ARGUMENT]
    assert found.source is None
    assert found.keys.tolist() == found.queries.tolist() == [0, 9, 27, 33]
    varlen.remove(NAME)


def settle(model: Any, **keys: Any) -> Any:
    return settle_layout(model, model, 64, CPU, checkpointing=False, regrouped=True, **keys)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_flash_attention_settles_on_packed_rows(
    name: str, word_tokenizer: Any, flash_attn: FlashAttn
) -> None:
    settled = settle(model_of(name, word_tokenizer, NAME))
    assert isinstance(settled.layout, Packed)
    assert settled.why_not_shared is settled.why_not_packed is None


def test_a_kernel_of_another_kind_is_seen(
    word_tokenizer: Any, flash_attn: FlashAttn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is aligned at the beginning, as that of old releases."""
    model = model_of("llama", word_tokenizer, NAME)
    call = varlen.SegmentedAttention.__call__

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = kwargs.pop(varlen.ARGUMENT, None)
        if found is not None:
            found = found._replace(source=torch.roll(found.source, 1))
            kwargs[varlen.ARGUMENT] = found
        return call(self, *args, **kwargs)

    monkeypatch.setattr(varlen.SegmentedAttention, "__call__", other)
    settled = settle(model)
    assert settled.layout.name == "padded"
    assert "other log-probabilities" in settled.why_not_packed
    assert AttentionInterface()[NAME] is flash_attention_forward


def test_a_kernel_that_raises_is_not_used(
    word_tokenizer: Any, flash_attn: FlashAttn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(varlen.SegmentedAttention, "__call__", raises)
    settled = settle(model_of("llama", word_tokenizer, NAME))
    assert settled.layout.name == "padded"
    assert settled.why_not_packed == "the probe raised RuntimeError: no such kernel"
    assert AttentionInterface()[NAME] is flash_attention_forward


def test_a_function_of_somebody_else_is_left_alone(
    batch: Batch, word_tokenizer: Any, flash_attn: FlashAttn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ring_attention(*args: Any, **kwargs: Any) -> Any:
        return flash_attention_forward(*args, **kwargs)

    model = model_of("llama", word_tokenizer, NAME)
    assert settle(model).layout.name == "packed"
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, ring_attention)
    with pytest.raises(RuntimeError, match=r"no longer transformers' own.*ring_attention"):
        PACKED.arrange(batch)
    settled = settle(model)
    assert settled.layout.name == "padded"
    assert settled.why_not_packed == f"`attn_implementation: {NAME}` accepts no custom mask"
    assert AttentionInterface()[NAME] is ring_attention


@pytest.fixture(params=["grouped keys", "a key per query"])
def torch_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch's kernel for variable lengths, which needs CUDA, by the stand-in's arithmetic; as it
    is, and as in PyTorch 2.11, which knows no grouped keys."""
    kernel = signature(torch_varlen.varlen_attn)
    if request.param == "a key per query":
        parameters = [p for name, p in kernel.parameters.items() if name != "enable_gqa"]
        kernel = kernel.replace(parameters=parameters)
    calls: list[dict[str, Any]] = []

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        given = kernel.bind(*args, **kwargs).arguments
        calls.append(given)
        grouped = given["query"].shape[1] != given["key"].shape[1]
        assert given.get("enable_gqa", False) is grouped
        return attention(
            *(given[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k")),
            *(given[name] for name in ("max_q", "max_k")),
            dropout_p=0.0,
            softmax_scale=given["scale"],
            causal=False,  # it is, by the window
            window_size=given["window_size"],
            softcap=0.0,
            deterministic=False,
            s_aux=None,
        )

    varlen_attn.__signature__ = kernel  # type: ignore[attr-defined]
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    yield calls
    varlen.remove("sdpa")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sdpa_by_the_kernel_of_pytorch(
    name: str, checkpointing: bool, batch: Batch, word_tokenizer: Any, torch_kernel: Any
) -> None:
    expected = scored(model_of(name, word_tokenizer, "eager"), padded_rows(batch))
    model = model_of(name, word_tokenizer, "sdpa", checkpointing)
    inputs = Packed(varlen.segments_for("sdpa", CUDA)).arrange(batch)
    assert furthest(scored(model, inputs), expected) < 2e-5
    assert {call["window_size"] for call in torch_kernel} == {
        (WINDOW - 1 if name == "mistral" else -1, 0)
    }


def test_what_sdpa_settles_on(
    word_tokenizer: Any, torch_kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU as before; on CUDA packed rows, and a mask where the kernel can't be used."""
    model = model_of("llama", word_tokenizer, "sdpa")
    assert settle(model).layout.name == "shared"
    kind = varlen._kind
    monkeypatch.setattr(varlen, "_kind", lambda name, device: kind(name, CUDA))
    assert settle(model).layout.name == "packed"
    dropping = model_of("llama", word_tokenizer, "sdpa")
    monkeypatch.setattr(varlen.SegmentedSDPA, "of_segments", lambda *args, **kwargs: 1 / 0)
    settled = settle(dropping)
    assert settled.layout.name == "shared"
    assert settled.why_not_shared is None
    assert settled.why_not_packed == "the probe raised ZeroDivisionError: division by zero"
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


def test_the_kernel_of_pytorch_refuses_what_it_has_not(torch_kernel: Any) -> None:
    places = Places(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    qkv = [torch.ones(1, 2, 3, 8)] * 3
    call = varlen.SegmentedSDPA(sdpa_attention_forward)
    for key, value in {"dropout": 0.1, "is_causal": False, "position_bias": qkv[0]}.items():
        with pytest.raises(ValueError, match="neither dropout nor biases"):
            call(torch.nn.Module(), *qkv, None, **{key: value, varlen.ARGUMENT: segments(places)})
    call(torch.nn.Module(), *qkv, None, **{varlen.ARGUMENT: segments(places)})
    assert len(torch_kernel) == 1


STATEFUL = {
    "bamba": (
        "Bamba",
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
        | {"mamba_expand": 2, "mamba_n_groups": 1},
        "convolution|mamba",
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_models_with_a_state_get_padded_rows(
    name: str, word_tokenizer: Any, flash_attn: FlashAttn
) -> None:
    kind, sizes, _ = STATEFUL[name]
    model = random_model(word_tokenizer, kind, max_position_embeddings=512, **sizes).eval()
    model.config._attn_implementation = NAME
    settled = settle(model)
    assert settled.layout.name == "padded"
    assert "layers of another kind" in settled.why_not_packed


def test_other_calls_are_what_they_were(
    batch: Batch, word_tokenizer: Any, flash_attn: FlashAttn
) -> None:
    model = model_of("mistral", word_tokenizer, NAME)
    before = scored(model, padded_rows(batch))
    flash_attn.calls.clear()
    PACKED.arrange(batch)
    assert isinstance(AttentionInterface()[NAME], varlen.SegmentedAttention)
    after = scored(model, padded_rows(batch))
    assert len(flash_attn.calls) == model.config.num_hidden_layers
    assert torch.equal(before[0], after[0])


def test_nothing_is_registered_at_import() -> None:
    code = (
        "import aot_plugin.trainer, aot_plugin.scoring.settle\n"
        "from transformers import AttentionInterface\n"
        "from transformers.integrations.flash_attention import flash_attention_forward as own\n"
        "assert all(AttentionInterface()[f'flash_attention_{n}'] is own for n in (2, 3))"
    )
    code = code.replace("aot_plugin.trainer, ", "")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
