"""Tolerances for results that two computations of one model should share, by the type they were computed in."""

import torch

# Products of matrices add up in fp32 whatever their type. In fp32 the order of hundreds of additions shows, and it differs
# between kernels and CPUs. In 16 bits the rounding of each layer's output outweighs it, and there are few layers.
ROUNDINGS = {torch.float32: 100, torch.bfloat16: 8, torch.float16: 8}


def tolerance(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> float:
    """Return the absolute tolerance of results computed in `dtype`: about 1e-5 in fp32, 0.06 in bf16.

    `dtype` is the compute type. 4-bit weights are exact once they are dequantised, so with `bnb_4bit_compute_dtype` float32 the
    tolerance is that of float32. Two 4-bit models agree to it only if both take the same path: a model that a test loads by
    Transformers alone needs `disable_cpu_4bit_repacking`, else bitsandbytes computes in bf16 on CPUs with AVX512-BF16.

    Args:
        dtype: Type that the compared numbers were computed in.
        scale: Magnitude of the numbers, or of the terms of a sum.
    """
    return ROUNDINGS[dtype] * torch.finfo(dtype).eps * scale


def assert_close(actual: object, expected: object, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    """Assert that numbers or tensors differ by no more than `tolerance(dtype, scale)`."""
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance(dtype, scale))
