"""Triton's CPU interpreter, mended where it does not do what a GPU does; for tests only.

Checked against triton 3.7.1 (triton/runtime/interpreter.py). Each repair says what the stock interpreter does:

* casts from float32 to bfloat16 cut the low bits off, casts to FP8 lose the carry into the exponent;
* ``tl.dot`` multiplies the bit patterns of bfloat16 operands as integers;
* the xor reduction inside ``tl.sort`` and ``tl.topk`` calls Python once per element;
* every tensor is copied back to where it came from, on a CPU onto itself, whole memory pages that nobody touched too.

Interpretation is decided when ``triton.jit`` decorates a function, so the environment variable must be set before
a kernel module is imported: ``tests/conftest.py`` calls ``install`` first of all where there is no GPU.
"""
from __future__ import annotations

import os

import numpy as np
import torch

_FLOATS = {"fp32": (torch.float32, torch.int32, np.uint32), "fp16": (torch.float16, torch.int16, np.uint16),
           "bf16": (torch.bfloat16, torch.int16, np.uint16), "fp8e4nv": (torch.float8_e4m3fn, torch.uint8, np.uint8),
           "fp8e5": (torch.float8_e5m2, torch.uint8, np.uint8)}
"""Triton's name -> torch's dtype, an integer dtype of the same width, NumPy's unsigned one."""
_NARROW = ("bf16", "fp8e4nv", "fp8e5")
_FP8_MAX = 448.0


def install() -> None:
    """Interpret kernels on the CPU from here on, with the repairs."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    stock_cast, stock_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    stock_reduce, stock_restore = interpreter.ReduceOps.apply_impl, interpreter.GridExecutor._restore_args_dev

    def cast(data, source, target, rounding):
        if source.name in _FLOATS and target.name in _FLOATS:
            return _bits(_tensor(data, source.name).float(), target.name, np.shape(data))
        return stock_cast(data, source, target, rounding)

    def dot(self, a, b, d, precision, imprecise):
        return stock_dot(self, _widened(interpreter, tl, a), _widened(interpreter, tl, b), d, precision, imprecise)

    def reduce(self, operands):
        if self.combine_fn is not tl.standard._xor_combine:
            return stock_reduce(self, operands)
        x = operands[0] if isinstance(operands, tuple) else operands
        data = x.handle.data
        if self.axis is None:
            return self.to_tensor(np.bitwise_xor.reduce(data.ravel()), x.dtype)
        return self.to_tensor(np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims), x.dtype)

    def restore(self, args_dev, args_hst, kwargs, kwargs_hst):
        if not all(_on_cpu(arg) for arg in (*args_dev, *kwargs.values())):
            stock_restore(self, args_dev, args_hst, kwargs, kwargs_hst)

    interpreter.GridExecutor._restore_args_dev = restore
    interpreter._convert_float = cast
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.ReduceOps.apply_impl = reduce


def _on_cpu(arg) -> bool:
    """Whether an argument is a number, or a tensor that the interpreter works on where it is."""
    return isinstance(arg, (bool, int, float)) or arg is None or isinstance(arg, torch.Tensor) and not arg.is_cuda


def _tensor(data: np.ndarray, name: str) -> torch.Tensor:
    """The interpreter's array of a float type as a tensor of that dtype."""
    dtype, integer, unsigned = _FLOATS[name]
    bits = np.ascontiguousarray(data).view(unsigned).copy().reshape(-1)
    signed = bits.view({torch.int32: np.int32, torch.int16: np.int16, torch.uint8: np.uint8}[integer])
    return torch.from_numpy(signed).view(dtype).reshape(np.shape(data))


def _bits(x: torch.Tensor, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values rounded to a float type, as the interpreter's unsigned bit patterns."""
    dtype, integer, unsigned = _FLOATS[name]
    if name == "fp8e4nv":
        x = x.clamp(-_FP8_MAX, _FP8_MAX)  # the hardware's cast saturates
    return x.to(dtype).contiguous().view(integer).numpy().view(unsigned).reshape(shape)


def _widened(interpreter, tl, operand):
    """An operand of ``tl.dot`` as float32, exactly."""
    name = operand.dtype.scalar.name
    if name not in _NARROW:
        return operand
    return interpreter.TensorHandle(_tensor(operand.data, name).float().numpy(), tl.float32)
