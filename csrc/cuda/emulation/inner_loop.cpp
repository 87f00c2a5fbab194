// The kernels for tests on a machine without a GPU: a task by a block.
#include "device.h"
//
#include "../entry.h"
#include "../run.h"

// how many there were so far, for bench/gpu_counts.py
FASTMAML_ENTRY int64_t fastmaml_cuda_launches() { return fastmaml::emulation::launches; }
