// Which instruction sets this build has and this CPU can run, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace convoxel {

std::vector<const Kernels*> available_isas();  // weakest first
const Kernels& active_isa();                   // the strongest, or what CONVOXEL_ISA or set_isa says
void set_isa(const std::string& name);         // throws std::invalid_argument for one that is not available

}  // namespace convoxel
