"""Kernels for TPUs, in Pallas, where the compiler's own operations are slower.

Those of our own say in their metadata how many `steps` their grid has, each of one schedule: `plan.bundles` counts by that.
"""
