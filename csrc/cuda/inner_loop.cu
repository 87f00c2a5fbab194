// The kernels for the GPU, compiled by nvcc.
#include "device.h"
//
#include "entry.h"
