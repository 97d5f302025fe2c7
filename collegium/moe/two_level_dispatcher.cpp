// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/error.h"
#include "collegium/moe/dispatcher.h"

namespace collegium::moe {

std::shared_ptr<Dispatcher> make_two_level_dispatcher(const ExpertPlacement&, const std::shared_ptr<comm::Communicator>&, bool) {
  throw InternalError("two_level: placeholder");
}

}  // namespace collegium::moe
