// SPDX-License-Identifier: Apache-2.0
#pragma once

// Included before every source of a module that uses torch, and compiled once.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
