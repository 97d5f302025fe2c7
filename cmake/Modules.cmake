# SPDX-License-Identifier: Apache-2.0
# One folder = one module = one target. A module lists its sources in its own CMakeLists.txt.
add_library(collegium_flags INTERFACE)
target_include_directories(collegium_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(collegium_flags INTERFACE -Wall -Wextra -Wshadow -Wconversion)
# Loops over conditions and square roots become vector code; no value changes.
target_compile_options(collegium_flags INTERFACE -fno-math-errno -fno-trapping-math)
if(COLLEGIUM_WERROR)
  target_compile_options(collegium_flags INTERFACE -Werror)
endif()
if(CMAKE_UNITY_BUILD)
  # Warns of types of unnamed namespaces outside the main file, for it every source of a batch.
  target_compile_options(collegium_flags INTERFACE -Wno-subobject-linkage)
endif()
if(COLLEGIUM_SANITIZE)
  # Compiled in half the time of -O2 -g; errors still name lines.
  target_compile_options(collegium_flags INTERFACE -O1 -g1)
  target_compile_options(collegium_flags INTERFACE -fsanitize=${COLLEGIUM_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
  target_link_options(collegium_flags INTERFACE -fsanitize=${COLLEGIUM_SANITIZE})
endif()

# Of programs whose time goes to the modules: three quarters of the compile time of -O3, half where CLI11 is included. Not
# where nothing is optimised, for which the shared headers are compiled.
set(COLLEGIUM_LESS_OPTIMISED $<$<NOT:$<CONFIG:Debug>>:-O1>)

# Sources share headers that are compiled once: FORM is plain, tensor or autograd, with _test for test programs. Narrow
# ones: what a header leaves to be instantiated, every source that includes it pays for (ATen/ATen.h alone: 2 to 3 s).
set(COLLEGIUM_HEADERS_plain
    <algorithm> <cstdint> <functional> <map> <optional> <string> <vector> <fmt/format.h> <fmt/ranges.h> <nlohmann/json.hpp>)
set(COLLEGIUM_HEADERS_tensor
    ${COLLEGIUM_HEADERS_plain} <ATen/core/Tensor.h> <ATen/Dispatch.h> <ATen/Parallel.h> <ATen/TensorOperators.h>)
set(COLLEGIUM_HEADERS_autograd
    ${COLLEGIUM_HEADERS_tensor} <torch/csrc/autograd/custom_function.h>)
set(COLLEGIUM_HEADERS_plain_test ${COLLEGIUM_HEADERS_plain} <gmock/gmock.h> <gtest/gtest.h>)
set(COLLEGIUM_HEADERS_tensor_test ${COLLEGIUM_HEADERS_tensor} <gmock/gmock.h> <gtest/gtest.h>)
function(collegium_share_headers target form)
  set(holder collegium_headers_${form})
  if(NOT TARGET ${holder})
    # Unlike file(WRITE), leaves an old file its time: what includes the headers need not be compiled again.
    file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/${holder}.cpp CONTENT "")
    add_library(${holder} OBJECT ${CMAKE_BINARY_DIR}/${holder}.cpp)
    target_link_libraries(${holder} PRIVATE collegium_flags fmt::fmt nlohmann_json::nlohmann_json)
    if(NOT form MATCHES plain)
      target_link_libraries(${holder} PRIVATE collegium_torch)
    endif()
    if(form MATCHES test)
      target_link_libraries(${holder} PRIVATE GTest::gmock GTest::gtest)
    endif()
    target_precompile_headers(${holder} PRIVATE ${COLLEGIUM_HEADERS_${form}})
  endif()
  target_precompile_headers(${target} REUSE_FROM ${holder})
endfunction()

# collegium_module(<name> [TORCH | AUTOGRAD] SOURCES <files> [DEPENDS <libraries>])
function(collegium_module name)
  cmake_parse_arguments(ARG "TORCH;AUTOGRAD" "" "SOURCES;DEPENDS" ${ARGN})
  add_library(collegium_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(collegium_${name} PUBLIC collegium_flags ${ARG_DEPENDS})
  set(form plain)
  if(ARG_TORCH OR ARG_AUTOGRAD)
    target_link_libraries(collegium_${name} PUBLIC collegium_torch)
    set(form tensor)
  endif()
  if(ARG_AUTOGRAD)
    set(form autograd)
  endif()
  collegium_share_headers(collegium_${name} ${form})
endfunction()

# collegium_test(<name> [TORCH] SOURCES <files> [DEPENDS <libraries>] [LABELS <labels>] [TIMEOUT <seconds>])
# One test program = one ctest; labels choose what ./dev test and the sanitizer builds run.
function(collegium_test name)
  cmake_parse_arguments(ARG "TORCH" "TIMEOUT" "SOURCES;DEPENDS;LABELS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  set_target_properties(${name} PROPERTIES UNITY_BUILD OFF)  # each names its cases as it likes
  target_compile_options(${name} PRIVATE ${COLLEGIUM_LESS_OPTIMISED})
  target_link_libraries(${name} PRIVATE collegium_flags ${ARG_DEPENDS} collegium_test_support GTest::gmock GTest::gtest_main)
  set(form plain_test)
  if(ARG_TORCH)
    target_link_libraries(${name} PRIVATE collegium_torch)
    set(form tensor_test)
  endif()
  collegium_share_headers(${name} ${form})
  add_test(NAME ${name} COMMAND ${name})
  # What ./dev asan builds and runs: the modules below the models.
  if(ARG_LABELS MATCHES "^(base|ops|moe)$")
    add_dependencies(sanitized_tests ${name})
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
endfunction()
