// pybind11, and the torch that a module is built for.

#pragma once

#include <string>

namespace chainzrule {

inline constexpr unsigned long long kTargetTorch = TORCH_TARGET_VERSION;

inline std::string torch_abi() {
  return std::to_string(kTargetTorch >> 56) + "." + std::to_string((kTargetTorch >> 48) & 0xFF) + " and newer";
}

}  // namespace chainzrule

// Torch's build puts its own copy of pybind11 first, and that of torch 2.10 to 2.12 refuses to be included by code that keeps
// to the stable ABI. pybind11 is headers only and uses nothing of torch, so a file that includes nothing else of torch may.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
