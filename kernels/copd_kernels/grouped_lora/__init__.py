"""The adapters of many experts on one stream of tokens: each expert's low-rank factors act on its own rows.

Shapes: T rows of the stream, K in, M out, G experts, R the largest LoRA rank. ``Segments`` (``segments.py``) says
which rows belong to which expert; no row has two, some may have none.

``grouped_down(x_TK, factors, segments)`` gives h_TR: row t of expert g is x_t A_g^T in its first r_g columns; the
rest, and rows without an expert, are 0.
``grouped_up(y_TM, h_TR, factors, scales, segments, columns)`` gives y plus s_g h_t[:r_g] B_g^T in the rows of g.
``columns`` = (first, width, step) says where B's rows go in y: row n to column first + (n // width) step + n % width,
so that q, k and v of a fused projection, or gate and up, are written where they belong without being arranged.
Between the two, tensor parallelism moves h: copied, summed, gathered or scattered, [T, R] numbers whatever G is.

Gradients: of x, y, h and of every factor (in the factor's own dtype, accumulated in float32).
FLOPs: 2 n r (K + M) forward for n routed rows, twice that backward. Bytes: n (K + 2 M + 2 r) x itemsize forward and
the factors once per tile of rows; looping over experts adds a launch and a pass over y for each of them.
Limits: any ranks, also different ones; factors of any float dtype, cast to x's; Triton: not float64.
"""
