"""Kernels for TPUs, in Pallas, where the compiler's own operations are slower."""
