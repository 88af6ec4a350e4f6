"""Native kernels behind a plain C interface: ``include/negengine_cpu.h``, ``src``, and ``library`` that loads them."""
