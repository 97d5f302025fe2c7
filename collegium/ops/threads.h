// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

namespace collegium::ops {

/// One OpenMP thread and the cores it may run on after binding.
struct ThreadBinding {
  int thread = 0;
  std::vector<int> cores;
};

/// What     Binds each OpenMP thread to one core of the process's allowed set. Unbound threads on a small
/// virtual machine
///          wait a scheduler quantum (8 ms) at parallel regions. Does nothing when there are more threads
///          than cores, or when OMP_PROC_BIND is set: then the user has chosen.
/// Order    Call once at start-up, from the thread that will compute.
void bind_threads();

/// What     Where the OpenMP threads may run now.
std::vector<ThreadBinding> thread_bindings();

}  // namespace collegium::ops
