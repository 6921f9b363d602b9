// Inference on packed weights for AVX-512 F, BW, VL, DQ, VNNI, BF16.
#define FUSEDRNN_ISA avx512dots
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_VECTOR_REGISTERS 32
#include "frozen.inl"
