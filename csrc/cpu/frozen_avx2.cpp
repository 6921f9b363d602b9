// Inference on packed weights for AVX2, FMA and F16C.
#define FUSEDRNN_ISA avx2
#define FUSEDRNN_VECTOR_BYTES 32
#define FUSEDRNN_VECTOR_REGISTERS 16
#include "frozen.inl"
