"""The `config.json` of the models under configs/, as on the Hub; tests have no network."""

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

_QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
_LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8}
_QWEN2 = {"vocab_size": 152_064, "num_key_value_heads": 8}


def _make(kind, hidden, intermediate, layers, heads, tied, options):
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **options,
    )


MODELS = {
    "Qwen/Qwen3-0.6B-Base": _make(Qwen3Config, 1024, 3072, 28, 16, True, _QWEN3),
    "Qwen/Qwen3-1.7B-Base": _make(Qwen3Config, 2048, 6144, 28, 16, True, _QWEN3),
    "Qwen/Qwen3-4B-Base": _make(Qwen3Config, 2560, 9728, 36, 32, True, _QWEN3),
    "Qwen/Qwen3-8B-Base": _make(Qwen3Config, 4096, 12_288, 36, 32, False, _QWEN3),
    "Qwen/Qwen3-14B-Base": _make(Qwen3Config, 5120, 17_408, 40, 40, False, _QWEN3),
    "Qwen/Qwen2.5-32B": _make(Qwen2Config, 5120, 27_648, 64, 40, False, _QWEN2),
    "meta-llama/Llama-3.2-1B": _make(LlamaConfig, 2048, 8192, 16, 32, True, _LLAMA),
    "meta-llama/Llama-3.1-8B": _make(LlamaConfig, 4096, 14_336, 32, 32, False, _LLAMA),
}


def load_config(name, *options):
    """Stand in for the memory package's `load_config`."""
    from rlhf_recipes.memory import model_shape

    return MODELS[name] if name in MODELS else model_shape.load_config(name, *options)
