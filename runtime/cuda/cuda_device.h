// A model on a GPU.
#pragma once

#include "device.h"

namespace qigen::cuda {

// What ModelDescription::open_device of a GPU artifact is; device_program is a cuda::Program.
// Before anything runs, driver, device and memory are checked: throws QIGEN_MACHINE or
// QIGEN_NO_MEMORY.
runtime::Device* open_device(const ModelDescription& description, const uint8_t* weights);

}  // namespace qigen::cuda
