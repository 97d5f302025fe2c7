// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/error.h"
#include "collegium/moe/dispatcher.h"

namespace collegium::moe {

std::shared_ptr<Dispatcher> make_padded_dispatcher(const ExpertPlacement&, std::shared_ptr<comm::Communicator>) {
  throw InternalError("padded: placeholder");
}

}  // namespace collegium::moe
