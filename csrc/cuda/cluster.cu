// The kernels for GPUs of compute capability 9.0 or newer, compiled by nvcc: a task by a cluster of blocks.
#define FASTMAML_CLUSTER 1
#include "device.h"
//
#include "run.h"
