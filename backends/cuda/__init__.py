"""GPU kernels: device rows, NVRTC, the PTX emulator that checks them, kernel families, models."""
