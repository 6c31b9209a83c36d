// What the choice of kernels has in common on every processor.
#pragma once

#include <cstdlib>
#include <cstring>

namespace starling {

// STARLING_CPU_ISA takes the kernels that a processor with no more than that instruction set would, for tests and
// comparisons.
inline bool is_held_to(const char* instruction_set) {
  const char* most = std::getenv("STARLING_CPU_ISA");
  return most != nullptr && std::strcmp(most, instruction_set) == 0;
}

}  // namespace starling
