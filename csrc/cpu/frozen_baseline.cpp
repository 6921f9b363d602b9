// Inference on packed weights for what every processor of the architecture has.
#define FUSEDRNN_ISA baseline
#define FUSEDRNN_VECTOR_BYTES 16
#define FUSEDRNN_VECTOR_REGISTERS 16
#include "frozen.inl"
