"""Run the compiled kernels on a CPU: an emulator of the PTX that Triton emits. See README.md."""
