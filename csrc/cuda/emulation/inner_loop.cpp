// The kernels for tests on a machine without a GPU: a task by a block.
#include "device.h"
//
#include "../entry.h"
#include "../run.h"
