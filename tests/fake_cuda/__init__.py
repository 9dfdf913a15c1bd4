"""A fake CUDA device for tests on machines without one: host memory and CPU kernels with the rules of a GPU.

It has no timing, no races, no GPU rounding and no memory of kernels, so no figure from it describes a GPU.
"""
