// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/version.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>

#include "collegium/base/fields.h"
#include "collegium/base/machine.h"
#include "collegium/base/units.h"
#include "collegium/cli/mpirun.h"
#include "collegium/cli/verb.h"
#include "collegium/comm/mpi/mpi.h"
#include "collegium/ops/gemm_peak.h"
#include "collegium/ops/product.h"
#include "collegium/ops/threads.h"

namespace collegium::cli {

namespace {

std::vector<std::string> instruction_sets() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::set<std::string> flags;
  std::string word;
  while (cpuinfo >> word) flags.insert(word);
  std::vector<std::string> found;
  for (const char* name : {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}) {
    if (flags.contains(name)) found.emplace_back(name);
  }
  return found;
}

// Every libgomp that is mapped: two would own two sets of threads.
std::vector<std::string> openmp_libraries() {
  std::ifstream maps("/proc/self/maps");
  std::set<std::string> paths;
  std::string line;
  while (std::getline(maps, line)) {
    const std::size_t slash = line.find('/');
    if (slash != std::string::npos && line.find("libgomp") != std::string::npos)
      paths.insert(line.substr(slash));
  }
  return {paths.begin(), paths.end()};
}

double memcpy_bytes_per_s() {
  constexpr std::size_t kBytes = std::size_t{256} << 20U;
  constexpr int kRuns = 5;
  std::vector<char> source(kBytes, 1);
  std::vector<char> target(kBytes, 0);
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    std::memcpy(target.data(), source.data(), kBytes);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(kBytes) / seconds);
  }
  return best;
}

Json examine() {
  const std::size_t cores = ops::allowed_cores().size();
  ops::bind_threads();
  bool bound = true;
  for (const ops::ThreadBinding& binding : ops::thread_bindings()) bound = bound && binding.cores.size() == 1;
  const double machine =
      static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGE_SIZE));
  return {{"cores", cores},
          {"instruction_sets", instruction_sets()},
          {"memory_bytes", machine},
          {"allowed_memory_bytes", machine_memory_bytes()},
          {"threads", at::get_num_threads()},
          {"threads_bound", bound},
          {"openmp_libraries", openmp_libraries()},
          {"gemm_peak_flops",
           {{"bfloat16", ops::measure_gemm_peak(at::kBFloat16)},
            {"float32", ops::measure_gemm_peak(at::kFloat)},
            {"float64", ops::measure_gemm_peak(at::kDouble)}}},
          {"memcpy_bytes_per_s", memcpy_bytes_per_s()},
          {"libtorch", TORCH_VERSION},
          {"mpi", comm::has_mpi()},
          {"mpirun", find_mpirun()}};
}

void print(const Json& j) {
  const auto isa = j["instruction_sets"].get<std::vector<std::string>>();
  const auto libraries = j["openmp_libraries"].get<std::vector<std::string>>();
  const bool bf16 = !ops::product_ways().widen_bf16;
  fmt::print("cores        {} with {}\n", j["cores"].get<int>(), fmt::join(isa, ", "));
  fmt::print("             {}\n",
             bf16 ? "bfloat16 runs in hardware: train with dtype = \"bfloat16\""
                  : "no bfloat16 in hardware: its products run in fp32, so dtype = \"float32\" is as fast, "
                    "and \"bfloat16\" saves memory");
  const auto memory = j["memory_bytes"].get<double>();
  const auto allowed = j["allowed_memory_bytes"].get<double>();
  fmt::print("memory       {}{}\n", format_bytes(memory),
             allowed < memory
                 ? fmt::format(", of which a control group allows this process {}", format_bytes(allowed))
                 : "");
  fmt::print("threads      {}, {}\n", j["threads"].get<int>(),
             j["threads_bound"].get<bool>() ? "each bound to a core"
                                            : "not bound: parallel regions may wait for the scheduler (unset "
                                              "OMP_PROC_BIND, or use no more threads than cores)");
  fmt::print("OpenMP       {}{}\n", fmt::join(libraries, ", "),
             libraries.size() > 1 ? "  WARNING: more than one runtime is loaded" : "");
  for (const auto& [dtype, flops] : j["gemm_peak_flops"].items())
    fmt::print("GEMM peak    {} FLOP/s in {}\n", format_count(flops.get<double>()), dtype);
  fmt::print("memcpy       {}/s on one core\n", format_bytes(j["memcpy_bytes_per_s"].get<double>()));
  fmt::print("libtorch     {} (all verbs run on the CPU)\n", j["libtorch"].get<std::string>());
  const auto mpirun = j["mpirun"].get<std::string>();
  const bool mpi = j["mpi"].get<bool>();
  const bool processes = mpi && !mpirun.empty();
  fmt::print("MPI          {}\n", processes ? mpirun
                                  : mpi     ? "in this build, but no mpirun beside the program or on PATH"
                                            : "not in this build");
  fmt::print("             --ranks N starts N {}; docs/launch.md has the other ways\n",
             processes ? "processes with it (with --backend local: threads)" : "threads of one process");
}

}  // namespace

void add_doctor(CLI::App& app) {
  auto json = std::make_shared<bool>(false);
  CLI::App* verb = app.add_subcommand("doctor", "What was found on this machine, and what it means");
  verb->add_flag("--json", *json, "print one JSON object");
  verb->footer("Example:\n  collegium doctor");
  verb->callback([json] {
    const Json found = examine();
    if (*json) {
      fmt::print("{}\n", found.dump());
    } else {
      print(found);
    }
  });
}

}  // namespace collegium::cli
