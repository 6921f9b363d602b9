#include "engine.cuh"

template const fusedrnn::CudaEngine& fusedrnn::cuda_engine<fusedrnn::ResetBeforeGruCell>();
