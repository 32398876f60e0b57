// Adds wkv7 over chunks to the Python module.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace rwkvpeft {

void bind_chunked_wkv7(pybind11::module_& module);

}  // namespace rwkvpeft
