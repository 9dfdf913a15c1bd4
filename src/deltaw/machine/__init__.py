"""Detect processors, memory limits and devices, and choose device, precision, threads and kernels for them."""
