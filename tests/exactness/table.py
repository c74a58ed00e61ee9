"""Architectures and settings under which a run must not depend on how a step is cut."""

from dataclasses import dataclass, field
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' </s>' }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)

LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "learning_rate": 0.02,  # an adapter begins as nothing
}

FASTER = {"learning_rate": 0.005}
"""Where three steps at the usual rate leave the order of the margins as it was."""

EXPERTS = {
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Entry:
    """A tiny model (prefix of its classes in transformers, keys of its config), keys of the YAML,
    and whether its prompts are shared. With ``refused`` no run starts, and the text says why."""

    name: str
    kind: str
    sizes: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    shared: bool = True
    mode: str = "paired"
    refused: str | None = None
    short: bool = False


MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}

TABLE = [
    # Architectures.
    Entry("llama", "Llama"),
    Entry("mistral-window", "Mistral", {"sliding_window": 8}, shared=False, short=True),
    Entry("mistral-wide-window", "Mistral", {"sliding_window": 512}),
    Entry("ministral", "Ministral", {"sliding_window": 512, "head_dim": 16}),
    Entry("qwen2", "Qwen2"),
    Entry("qwen3", "Qwen3", {"head_dim": 16}),
    Entry("gemma2", "Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    Entry("gemma2-window", "Gemma2", {"head_dim": 16, "sliding_window": 8}, FASTER, shared=False),
    Entry("cohere", "Cohere", {"logit_scale": 0.5}),
    Entry(
        "gpt-oss",
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, **EXPERTS},
    ),
    Entry("mixtral", "Mixtral", {"num_local_experts": 4, **EXPERTS}, short=True),
    Entry("phi3", "Phi3"),
    Entry("smollm3", "SmolLM3"),
    Entry("olmo2", "Olmo2", keys=FASTER),
    Entry("granite", "Granite", {"logits_scaling": 2.0}, FASTER),
    Entry("gpt-neox", "GPTNeoX"),
    Entry(  # its dropout is a function, and on by default
        "opt",
        "OPT",
        {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    Entry("falcon", "Falcon"),
    Entry("falcon-alibi", "Falcon", {"alibi": True}, shared=False, short=True),
    Entry("bloom", "Bloom", {"n_head": 4, "n_layer": 2}, {"learning_rate": 0.01}, shared=False),
    Entry("falcon-h1", "FalconH1", {"head_dim": 16, "mamba_d_ssm": 128, **MAMBA}, shared=False),
    Entry("bamba", "Bamba", {"attn_layer_indices": [1], **MAMBA}, FASTER, shared=False),
    Entry(
        "granite-hybrid",
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "router_aux_loss_coef": 0.0,
            "shared_intermediate_size": 128,
            **MAMBA,
        },
        FASTER,
        shared=False,
    ),
    Entry("lfm2", "Lfm2", {"layer_types": ["conv", "full_attention"]}, shared=False, short=True),
    Entry(
        "phi3-longrope",
        "Phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 512,
        },
        refused="`rope_type: longrope`",
        short=True,
    ),
    Entry(
        "padded-longrope",
        "Phi3",
        {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 60},
            "original_max_position_embeddings": 60,
            "max_position_embeddings": 512,
        },
        {"sequence_len": 60, "pad_to_multiple_of": 8},
        refused="longer than 60 tokens, padding included",
    ),
    Entry(
        "opt-layerdrop",
        "OPT",
        {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0, "layerdrop": 0.05},
        refused="`layerdrop: 0.05`",
        short=True,
    ),
    Entry(
        "qwen3-moe",
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, **EXPERTS, "moe_intermediate_size": 32},
    ),
    Entry(  # the host raises `max_position_embeddings` to `sequence_len`, so no row is above it
        "dynamic-rope",
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    # Settings, on a Llama.
    Entry("unpaired", "Llama", mode="unpaired", short=True),
    Entry("eager", "Llama", keys={"attn_implementation": "eager"}),
    Entry("lora", "Llama", keys=LORA),
    Entry("dora", "Llama", keys=LORA | {"peft_use_dora": True}),
    Entry("rslora", "Llama", keys=LORA | {"peft_use_rslora": True}),
    Entry("lora-head", "Llama", keys=LORA | {"lora_target_modules": ["q_proj", "lm_head"]}),
    Entry(
        "checkpointing",
        "Llama",
        keys=LORA
        | {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ),
    Entry(
        "reentrant",
        "Llama",
        keys={
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
    Entry("cached-reference", "Llama", keys={"precompute_ref_log_probs": True}),
    Entry("soft-sort", "Llama", keys={"aot_sort": "soft", "aot_sort_epsilon": 2.0}),
]
