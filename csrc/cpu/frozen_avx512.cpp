// Inference on packed weights for AVX-512 F, BW, VL, DQ.
#define FUSEDRNN_ISA avx512
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_VECTOR_REGISTERS 32
#include "frozen.inl"
