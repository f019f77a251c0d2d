// Functions that the CPU's and the GPU's code share.
#pragma once

#ifdef __CUDACC__
#define PYABLATE_HOST_DEVICE __host__ __device__
#else
#define PYABLATE_HOST_DEVICE
#endif
