// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/threads.h"

#include <ATen/Parallel.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>

namespace collegium::ops {

namespace {

std::vector<int> cores_of_this_thread() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

}  // namespace

std::vector<int> allowed_cores() {
  // OMP_PROC_BIND and OMP_PLACES have bound the first thread to one place before main().
  std::vector<int> cores;
  for (int place = 0; place < omp_get_num_places(); ++place) {
    std::vector<int> of_place(static_cast<std::size_t>(omp_get_place_num_procs(place)));
    omp_get_place_proc_ids(place, of_place.data());
    cores.insert(cores.end(), of_place.begin(), of_place.end());
  }
  if (cores.empty()) return cores_of_this_thread();
  std::sort(cores.begin(), cores.end());
  cores.erase(std::unique(cores.begin(), cores.end()), cores.end());
  return cores;
}

std::vector<int> slice_of_cores(const std::vector<int>& cores, int index, int count) {
  const auto size = static_cast<int>(cores.size());
  if (size < count) return cores;
  const auto begin = [&](int rank) { return cores.begin() + size * rank / count; };
  return {begin(index), begin(index + 1)};
}

namespace {

cpu_set_t set_of(const std::vector<int>& cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) CPU_SET(static_cast<std::size_t>(core), &set);
  return set;
}

bool user_binds() {
  return omp_get_num_places() > 0 ||
         std::getenv("OMP_PROC_BIND") != nullptr;  // NOLINT(concurrency-mt-unsafe)
}

}  // namespace

void bind_threads(const std::vector<int>& cores) {
  if (user_binds() && omp_get_proc_bind() == omp_proc_bind_false) return;
  const int num_threads = at::get_num_threads();
  const bool one_each = static_cast<std::size_t>(num_threads) <= cores.size();
  if (!one_each) return share_cores(cores);
#pragma omp parallel num_threads(num_threads)
  {
    const cpu_set_t set = set_of({cores[static_cast<std::size_t>(omp_get_thread_num())]});
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  }
}

void share_cores(const std::vector<int>& cores) {
  if (cores.empty()) return;
  const cpu_set_t set = set_of(cores);
#pragma omp parallel num_threads(at::get_num_threads())
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

void bind_threads() {
  if (!user_binds()) bind_threads(allowed_cores());
}

void unbind_thread() {
  const cpu_set_t set = set_of(allowed_cores());
  sched_setaffinity(0, sizeof(set), &set);
}

std::vector<ThreadBinding> thread_bindings() {
  std::vector<ThreadBinding> bindings(static_cast<std::size_t>(at::get_num_threads()));
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const int thread = omp_get_thread_num();
    bindings[static_cast<std::size_t>(thread)] = {.thread = thread, .cores = cores_of_this_thread()};
  }
  return bindings;
}

}  // namespace collegium::ops
