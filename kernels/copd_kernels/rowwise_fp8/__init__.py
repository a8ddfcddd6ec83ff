"""FP8 (e4m3) rows with one scale each, and the product with a frozen weight that is kept in them.

Shapes: M rows (tokens), K in, N out. Row r of a matrix x is stored as q_r = x_r / s_r, s_r = max |x_r| / 448.

``quantise_rows(x_MK, multiplier_K)`` gives q_MK float8_e4m3fn and s_M1 float32 of x, or of x times the multiplier.
``frozen_linear(x_MK, q_NK, s_N1)`` is y_MN = dequantised(quantise_rows(x)) W^T with W = s q, differentiable in x. The
frozen bytes serve forward and backward: N is the sum's dim in dx = dy W, so W's scales are folded into dy before dy is
quantised, dx_r = t_r (q'_r q) with q', t = quantise_rows(dy, s). So it is 1 byte per parameter, where a library that
scales whole tensors keeps a transposed copy as well; and the backward is the exact adjoint of the stored weight, up to
the rounding of dy.

Both are per token: a row's result does not depend on the rows beside it, so that a prefix may be evaluated once and
used again. FLOPs 2 M N K each way. Bytes: M K (itemsize + 1) to quantise, N K for the weight.
Limits: N and K multiples of 16; no gradient of the weight; values are clamped to +-448 before the cast, as torch's cast
makes NaN of larger ones in some versions. A row of zeros has scale eps / 448 and stays zero.
"""
