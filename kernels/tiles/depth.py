"""How deep: one matrix instruction, one sum of fp8, and the pipeline in front of them."""

from fastres.kernels.cost import Target

MOST_STAGES = 8  # of a pipeline; the candidates of every kernel have fewer


def least_depth(itemsize: int) -> int:
    """The least depth of one matrix instruction: 32 elements of 8 bits, 16 of others."""
    return 32 if itemsize == 1 else 16


def summed_by_steps(depth: int, target: Target) -> bool:
    """Whether an fp8 sum so deep is made step by step: each step's sum is added up in fp32.

    The tensor cores of sm_89 and sm_90 keep 13 bits behind the point of an fp8 sum and cut off what
    is beyond: in a model of them (`tests/kernels/test_fp8_sums.py`) 4608 products of one sign come
    out 8 % too small. So they are given at most 256 products at a time, and the sum is 0.2 % off.
    On sm_100 Triton takes them to add in full; of sm_120 nothing is known here.

    Source: Zhang et al., SageAttention2, arXiv 2411.10958 (both GPUs); DeepSeek-V3 Technical
    Report, arXiv 2412.19437, section 3.3.2; Triton 3.6, backends/nvidia/compiler.py,
    `max_num_imprecise_acc_default`.

    Args:
        depth: products in one sum.
    """
    return target.sm in (89, 90) and depth > 256
