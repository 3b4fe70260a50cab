"""The `config.json` of the models under configs/, as on the Hub; tests have no network."""

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

_QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
_LLAMA = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16"}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


MODELS = {
    "Qwen/Qwen3-0.6B-Base": Qwen3Config(**_sizes(1024, 3072, 28, 16), tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-1.7B-Base": Qwen3Config(**_sizes(2048, 6144, 28, 16), tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-4B-Base": Qwen3Config(**_sizes(2560, 9728, 36, 32), tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-8B-Base": Qwen3Config(**_sizes(4096, 12_288, 36, 32), tie_word_embeddings=False, **_QWEN3),
    "Qwen/Qwen3-14B-Base": Qwen3Config(**_sizes(5120, 17_408, 40, 40), tie_word_embeddings=False, **_QWEN3),
    "Qwen/Qwen2.5-32B": Qwen2Config(
        **_sizes(5120, 27_648, 64, 40),
        vocab_size=152_064,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ),
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **_LLAMA
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, tie_word_embeddings=False, **_LLAMA
    ),
}


def load_config(name, *options):
    """Stand in for the memory package's `load_config`."""
    from rlhf_recipes.memory import model_shape

    return MODELS[name] if name in MODELS else model_shape.load_config(name, *options)
