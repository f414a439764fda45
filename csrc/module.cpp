// peftkern._C: how this binary was built and which instruction set it uses. Loading it registers
// torch.ops.peftkern_cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

#ifndef PEFTKERN_BUILD_FLAGS
#define PEFTKERN_BUILD_FLAGS "unknown"
#endif
#ifndef PEFTKERN_GIT_REVISION
#define PEFTKERN_GIT_REVISION "unknown"
#endif
#ifndef PEFTKERN_TORCH_VERSION
#define PEFTKERN_TORCH_VERSION "unknown"
#endif

namespace {

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  const std::string compiler = std::string("gcc ") + __VERSION__;
#else
  const std::string compiler = "unknown";
#endif
  return {{"compiler", compiler},
          {"flags", PEFTKERN_BUILD_FLAGS},
          {"git_revision", PEFTKERN_GIT_REVISION},
          {"torch", PEFTKERN_TORCH_VERSION},
          {"isas", peftkern::built_isas()}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled CPU kernels of peftkern: what was built, and which instruction set runs.";
  m.def("build_info", &build_info, "Compiler, flags, git revision, torch version at build and instruction sets.");
  m.def(
      "cpu_capability", [] { return std::string(peftkern::isa_name(peftkern::best_isa())); },
      "The best instruction set of this CPU that the build holds.");
  m.def(
      "active_isa", [] { return std::string(peftkern::isa_name(peftkern::active_isa())); },
      "The instruction set that the kernels use now.");
  m.def(
      "force_isa",
      [](const std::optional<std::string>& name) {
        if (name && name->empty()) throw std::invalid_argument("force_isa: empty name; None lifts the force");
        peftkern::force_isa(name.value_or(""));
      },
      pybind11::arg("name"), "Use this instruction set, None for the best. Raises ValueError if the CPU lacks it.");
}
