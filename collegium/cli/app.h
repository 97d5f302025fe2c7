// SPDX-License-Identifier: Apache-2.0
#pragma once

// CLI11's application by name only: its header takes longer to compile than most sources that pass one on.

namespace CLI {  // NOLINT(readability-identifier-naming)
class App;
}
