// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

namespace collegium::ops {

/// One OpenMP thread and the cores it may run on after binding.
struct ThreadBinding {
  int thread = 0;
  std::vector<int> cores;
};

/// What     The cores that the process may use: all, those a launcher left it, or OpenMP's places.
std::vector<int> allowed_cores();

/// What     The cores for rank `index` of `count` ranks that share `cores`: consecutive, sizes that differ by
///          at most one, disjoint. Fewer cores than ranks: all cores for everyone.
std::vector<int> slice_of_cores(const std::vector<int>& cores, int index, int count);

/// What     Binds each OpenMP thread of the calling thread to one of `cores`, or, where there are more
///          threads, to all of them. Unbound threads on a small virtual machine wait a scheduler quantum (8
///          ms) at parallel regions. Does nothing with OMP_PROC_BIND=false.
/// Order    Call once at start-up, from the thread that will compute; every thread that computes has OpenMP
///          threads of its own.
void bind_threads(const std::vector<int>& cores);
/// What     The same with all allowed cores, unless OpenMP's variables bind: then the user has chosen.
void bind_threads();
/// What     Lets every OpenMP thread of the calling thread run on all of `cores`.
void share_cores(const std::vector<int>& cores);

/// What     Lets the calling thread run on all allowed cores, and programs that it starts.
void unbind_thread();

/// What     Where the OpenMP threads of the calling thread may run now.
std::vector<ThreadBinding> thread_bindings();

}  // namespace collegium::ops
