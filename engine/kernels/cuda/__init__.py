"""CUDA kernels of the decode step, compiled for the card at first use by NVRTC: no compiler and no CUDA header needed.

`linear.cu` multiplies by int8 or fp16 weights with the norm, the gated activation or the residual addition around it;
`attention.cu` rotates, appends to the KV cache and attends. `variants` names their compile-time parameters, `compiler`
and `driver` make and launch them, `emulation.h` runs them on the CPU, `reference` is what they are checked against.
"""
