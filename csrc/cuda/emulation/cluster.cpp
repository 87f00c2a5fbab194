// The same: a task by a cluster of blocks.
#define FASTMAML_CLUSTER 1
#include "device.h"
//
#include "../run.h"
