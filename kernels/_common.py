"""What the Triton kernels share: mixed-precision dot, activations, common refusals.

Letters: x input, M rows, K in, N out, R rank, T prompt, B batch, S sequence, H hidden.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

#: True when the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before the import).
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# ---- loads -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(ptr, stride, rows, inside, cols, C):
    """[rows, cols] tile of a matrix of C columns with unit column stride; 0 outside: `inside` says it of the rows."""
    mask = inside[:, None] & (cols < C)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)


# ---- dot products --------------------------------------------------------------------------------------------------


@triton.jit
def round_to(v, DTYPE: tl.constexpr):
    """`v` in DTYPE, rounded to nearest even. The interpreter truncates f32 to bf16, so there it is rounded first."""
    if _INTERPRETED and v.dtype == tl.float32 and DTYPE == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def _mma(a, b, acc):
    # The interpreter multiplies the raw bits of bf16, so there the rounded operands are widened first.
    if _INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _nearest_bf16(v):
    """`v` as f32 with the bits of bf16 alone, ties away from zero: a conversion to bf16 and back is slower."""
    bits = (v.to(tl.float32).to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def two_halves(v):
    """(first, second) bf16 whose sum is `v` to 2^-17."""
    if v.dtype == tl.bfloat16:
        return v, tl.zeros_like(v)
    first = _nearest_bf16(v)
    return first.to(tl.bfloat16), round_to(v.to(tl.float32) - first, tl.bfloat16)


@triton.jit
def _dot_split(a, b, acc):
    # f32 as the sum of two bf16, 8 + 8 bits, whose products are exact in f32; left out is 2^-16 of the product.
    a0, a1 = two_halves(a)
    b0, b1 = two_halves(b)
    if a.dtype != tl.bfloat16:
        acc = _mma(a1, b0, acc)
    if b.dtype != tl.bfloat16:
        acc = _mma(a0, b1, acc)
    return _mma(a0, b0, acc)


@triton.jit
def _dot_sides(a, b, acc):
    # The same with the halves of b side by side. A product with few columns waits for shared memory longer than it
    # multiplies: one with twice as many takes half the time of two.
    b0, b1 = two_halves(b)
    both = tl.reshape(tl.join(b1, b0), [b.shape[0], 2 * b.shape[1]])
    sums = _mma(a, both, tl.zeros((a.shape[0], 2 * b.shape[1]), tl.float32))
    small, large = tl.split(tl.reshape(sums, [a.shape[0], b.shape[1], 2]))
    return acc + (small + large)


@triton.jit
def _thirds(v):
    v = v.to(tl.float32)
    first = _nearest_bf16(v)
    second = _nearest_bf16(v - first)
    return first.to(tl.bfloat16), second.to(tl.bfloat16), round_to(v - first - second, tl.bfloat16)


@triton.jit
def _dot_split3(a, b, acc):
    # Three bf16 of 8 bits each: the six products that reach 2^-24, the smaller three first.
    a0, a1, a2 = _thirds(a)
    b0, b1, b2 = _thirds(b)
    acc = _mma(a2, b0, acc)
    acc = _mma(a1, b1, acc)
    acc = _mma(a0, b2, acc)
    acc = _mma(a1, b0, acc)
    acc = _mma(a0, b1, acc)
    return _mma(a0, b0, acc)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in f32; PRECISION is one that `precision` names, a and b of any of f32, bf16, f16.

    "split3" is "split" to the last bit of f32, for sums that cancel; "sides" is "split" for a b of few columns.
    """
    if PRECISION == "bf16":
        acc = _mma(round_to(a, tl.bfloat16), round_to(b, tl.bfloat16), acc)
    elif PRECISION == "fp16":
        acc = _mma(round_to(a, tl.float16), round_to(b, tl.float16), acc)
    elif PRECISION == "sides" and a.dtype == tl.bfloat16:
        acc = _dot_sides(a, b, acc)
    elif PRECISION == "split" or PRECISION == "sides":
        acc = _dot_split(a, b, acc)
    elif PRECISION == "split3":
        acc = _dot_split3(a, b, acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def long_dot(a, b, acc, PRECISION: tl.constexpr):
    """The same as one of many terms of an f32 result: each is summed by itself, then added.

    Tensor cores cut off what f32 units round, and one chain of thousands of roundings errs more than many short ones.
    """
    if PRECISION == "split" or PRECISION == "sides" or PRECISION == "ieee":
        acc += dot(a, b, tl.zeros_like(acc), PRECISION)
    else:
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def long_pair_dot(a, first, second, acc):
    """acc + a @ (first + second) of bf16, as one of many terms: "split" with the halves of b made beforehand."""
    return acc + _mma(a, first, _mma(a, second, tl.zeros_like(acc)))


def precision(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """How products of x and weights of these dtypes are taken.

    "bf16" / "fp16": operands in that type (x and weights share it, as torch would do).
    "ieee" / "tf32": x is f32; tf32 only when torch itself is allowed to use it.
    "split": 16-bit x with weights of another type, to 2^-16 of the product: 1/128 of what bf16 rounds x by.
    """
    if x_dtype == torch.float32:
        return "tf32" if torch.version.hip is None and tf32_allowed() else "ieee"
    return _TRITON_NAMES[x_dtype] if x_dtype == weight_dtype else "split"


def of_rank(precision: str, rank: int) -> str:
    """The same for products whose second factor has so many columns."""
    return "sides" if precision == "split" and 1 < rank <= 32 else precision  # of one, Triton's compiler fails


def tf32_allowed() -> bool:
    """Whether torch itself may round the factors of f32 products to tf32."""
    # The legacy allow_tf32 raises once the newer fp32_precision has been set; the newer one reads both.
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", "none")
    return bool(setting == "tf32")


# ---- activations ---------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(v):
    # 1 - 2 / (e^2|v| + 1) cancels near 0, where the Taylor series to v^15 is exact to f32.
    t = v * v
    s = -929569.0 / 638512875.0
    s = s * t + 21844.0 / 6081075.0
    s = s * t - 1382.0 / 155925.0
    s = s * t + 62.0 / 2835.0
    s = s * t - 17.0 / 315.0
    s = s * t + 2.0 / 15.0
    s = s * t - 1.0 / 3.0
    near = v + v * t * s
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(v)) + 1.0)
    return tl.where(tl.abs(v) < 0.5, near, tl.where(v < 0.0, -far, far))


@triton.jit
def activation(v, ACT: tl.constexpr):
    """act(v) in f32; ACT is "" (identity), relu, gelu (exact), silu or tanh. NaN goes through."""
    if ACT == "relu":
        v = tl.where(v <= 0.0, 0.0, v)
    elif ACT == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "silu":
        v = v * tl.sigmoid(v)
    elif ACT == "tanh":
        v = _tanh(v)
    return v


@triton.jit
def activation_grad(v, ACT: tl.constexpr):
    """d act / d v in f32."""
    if ACT == "relu":
        d = tl.where(v <= 0.0, 0.0, 1.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        d = cdf + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    elif ACT == "silu":
        s = tl.sigmoid(v)
        d = s * (1.0 + v * (1.0 - s))
    elif ACT == "tanh":
        t = _tanh(v)
        d = 1.0 - t * t
    else:
        d = v * 0.0 + 1.0
    return d


@triton.jit
def _count_kernel(out_ptr, n):
    count = 0
    for _ in range(n):
        count += 1
    tl.store(out_ptr, count)


@functools.cache
def _interpreter_failure() -> str | None:
    """Why this Triton's interpreter cannot run loops: the one of 3.6 cannot with numpy 2.4 and later."""
    out = torch.zeros(1, dtype=torch.int32)
    try:
        _count_kernel[(1,)](out, 2)
    except Exception as error:
        return f"the interpreter of Triton {triton.__version__} fails with this numpy (want Triton >= 3.7): {error}"
    return None


def refuse_common(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why the Triton kernels cannot run there, or None."""
    if dtype not in _DTYPES:
        return f"dtype {dtype}: want float32, bfloat16 or float16"
    if device.type == "cpu":
        if not INTERPRETED:
            return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the process starts"
        if (failure := _interpreter_failure()) is not None:
            return failure
    elif device.type != "cuda":
        return f"tensor is on {device.type}: want a CUDA or ROCm device"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(device)}: want (8, 0) or newer"
    for name, size in dims.items():
        if size >= 2**31:
            return f"{name} = {size}: sizes are 32-bit in the kernels"
    return None
