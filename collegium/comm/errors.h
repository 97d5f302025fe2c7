// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "collegium/base/error.h"

namespace collegium::comm {

/// Ranks disagree, do not answer, or the transport failed. The message names operation, group, place in the
/// program (step, layer, phase) and the ranks at fault.
class CommError : public Error {
 public:
  using Error::Error;
};

/// This rank was stopped because another rank failed. Whoever reports errors reports the other rank's only.
class PeerFailure : public CommError {
 public:
  using CommError::CommError;
};

}  // namespace collegium::comm
