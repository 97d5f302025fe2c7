// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>

#include "collegium/base/error.h"

namespace collegium::comm {

/// Ranks disagree, do not answer, or the transport failed. The message names operation, group, place in the
/// program (step, layer, phase) and the ranks at fault.
class CommError : public Error {
 public:
  using Error::Error;
};

/// A wait has lasted as long as it may. Where several ranks throw it, the one that misses fewest knows best.
class NoAnswer : public CommError {
 public:
  NoAnswer(const std::string& message, std::size_t num_missing)
      : CommError(message), num_missing_(num_missing) {}
  std::size_t num_missing() const { return num_missing_; }

 private:
  std::size_t num_missing_;
};

/// This rank was stopped because another rank failed. Whoever reports errors reports the other rank's only.
class PeerFailure : public CommError {
 public:
  using CommError::CommError;
};

}  // namespace collegium::comm
