// weights.bin: a header of 4 KiB, then the packed tensors as the kernels read them.
#pragma once

#include "mapped_file.h"
#include "qigen/generated.h"

namespace qigen::runtime {

// Maps weights.bin and checks its header against the generated code; the tensors aren't touched
// (`qigen verify` checks every byte). Asks the system to read the file ahead. Throws
// QIGEN_BAD_INPUT for damage and for weights of another model, QIGEN_MACHINE for another ABI.
MappedFile open_weights(const std::string& path, const ModelDescription& description);

}  // namespace qigen::runtime
