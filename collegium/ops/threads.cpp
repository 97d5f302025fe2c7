// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/threads.h"

#include <ATen/Parallel.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <cstdlib>

namespace collegium::ops {

std::vector<int> allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

std::vector<int> slice_of_cores(const std::vector<int>& cores, int index, int count) {
  const auto size = static_cast<int>(cores.size());
  if (size < count) return cores;
  const auto begin = [&](int rank) { return cores.begin() + size * rank / count; };
  return {begin(index), begin(index + 1)};
}

void bind_threads(const std::vector<int>& cores) {
  if (std::getenv("OMP_PROC_BIND") != nullptr) return;  // NOLINT(concurrency-mt-unsafe): start-up, one thread
  const int num_threads = at::get_num_threads();
  if (num_threads < 1 || static_cast<std::size_t>(num_threads) > cores.size()) return;
#pragma omp parallel num_threads(num_threads)
  {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(static_cast<std::size_t>(cores[static_cast<std::size_t>(omp_get_thread_num())]), &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  }
}

void bind_threads() { bind_threads(allowed_cores()); }

std::vector<ThreadBinding> thread_bindings() {
  std::vector<ThreadBinding> bindings(static_cast<std::size_t>(at::get_num_threads()));
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const int thread = omp_get_thread_num();
    bindings[static_cast<std::size_t>(thread)] = {.thread = thread, .cores = allowed_cores()};
  }
  return bindings;
}

}  // namespace collegium::ops
