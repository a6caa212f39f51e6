"""Architectures to start from random weights (`model.fresh`): fields of a config.json.

A configuration copies one and changes what it needs: `config.model.fresh = dict(LACT_760M)`.
"""

LACT_760M = {
    "model_type": "lact_swiglu",
    "vocab_size": 32000,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attn_heads": 24,
    "num_lact_heads": 4,
    "lact_chunk_size": 2048,
    "window_size": 2048,
    "w0_w2_low_rank": 32,
    "rope_theta": 1000000.0,
}
"""LaCT's published lact_llm/configs/760M_lact_swiglu_nh4_fwlow_rank_momentum.json, without Muon."""

DELTANET_1_3B = {
    "model_type": "delta_net",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 16,
    "intermediate_size": 5632,
}
"""DeltaNet-1.3B as fla-hub publishes it."""

TINY_DELTANET = DELTANET_1_3B | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 128,
}
"""Takes the place of a checkpoint where a configuration is only tried out: seconds on a CPU."""

QWEN3_5_0_8B = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 248044,
}
"""The text model of Qwen3.5-0.8B."""

QWEN3_5_2B = QWEN3_5_0_8B | {"hidden_size": 2048, "intermediate_size": 6144}
"""The text model of Qwen3.5-2B."""

QWEN3_5_4B = QWEN3_5_0_8B | {
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 32,
}
"""The text model of Qwen3.5-4B."""

QWEN3_5_9B = QWEN3_5_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
"""The text model of Qwen3.5-9B."""

QWEN3_5_27B = QWEN3_5_9B | {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "linear_num_value_heads": 48,
}
"""The text model of Qwen3.5-27B."""

QWEN3_5 = {
    "0.8b": QWEN3_5_0_8B,
    "2b": QWEN3_5_2B,
    "4b": QWEN3_5_4B,
    "9b": QWEN3_5_9B,
    "27b": QWEN3_5_27B,
}
"""The sizes of Qwen 3.5 by the names that the forms of configs/ have."""
