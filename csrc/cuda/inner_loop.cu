// The kernels for the GPU, compiled by nvcc: a task by a block.
#include "device.h"
//
#include "entry.h"
#include "run.h"
