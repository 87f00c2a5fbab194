// The kernels for tests on a machine without a GPU.
#include "device.h"
//
#include "../entry.h"
