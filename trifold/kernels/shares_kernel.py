"""How Triton's programs add up what each of them summed, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_up(total, partial_ptr, count_ptr, pid, size, place, inside, SHARED: tl.constexpr):
    """(sums, whether they are whole): programs along the second axis share a piece of y.

    The one that is last to leave its sums in `partial` (programs, size) adds them up in their order, so that results
    do not depend on which it was.
    """
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    arrived = parts - 1
    if SHARED:
        tl.store(partial_ptr + part.to(tl.int64) * size + place, total, mask=inside)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + pid, 1, sem="acq_rel")
        if arrived == parts - 1:
            total = tl.zeros_like(total)
            for i in range(parts):
                other = partial_ptr + tl.cast(i, tl.int64) * size
                total += tl.load(other + place, mask=inside, other=0, cache_modifier=".cg")
    return total, arrived == parts - 1
