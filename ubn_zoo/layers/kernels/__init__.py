"""The layer as Triton kernels; :mod:`.operators` wraps them as torch operators and decides when to use them.

Only :mod:`.operators` can be imported without Triton. Each of the other modules holds kernels and the functions that
launch them.

A kernel works on tiles of BLOCK_C channels by a number of positions, within one sample. The same source serves both
memory formats: an element is addressed by c * channel_stride + position * column_stride, and one of the strides is 1.
Offsets within a sample are 32 bits wide, offsets of samples 64. Sums are taken in DTYPE, float32 or float64, in a fixed
order: partial results go through a workspace, without atomic operations, so results repeat bit by bit.

The normalized features are x_hat = a (x + shift) with a = 1 / sqrt(var + eps) per channel and
shift = center_weight * instance_mean - mean per instance. The shift is added to the input before the product, whose
rounding would otherwise swamp small deviations from a large mean. Norms prepared for inference have the form
x_hat = slope x + shift, which a fused multiply-add computes with a single rounding.

The kernels with depthwise taps iterate down the rows of a tile. A row is loaded once per horizontal tap, from the cache
after the first time, and added to as many unfinished rows as there are vertical taps, which stay in registers: k loads
for k * k products. Rows outside the image are skipped; columns outside are masked to zero. ROWS rows are loaded before
the first of them is used, to keep enough loads in flight.

Kernels are not specialized on sizes: a network has many, and each would need its own compilation. VECTOR is a divisor
of the sizes that lets the compiler widen loads.
"""
