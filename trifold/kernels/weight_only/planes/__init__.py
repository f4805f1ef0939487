"""Weight-only products on GPUs: codes in bit planes, unpacked in registers in front of tensor cores."""
