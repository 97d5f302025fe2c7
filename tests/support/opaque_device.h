// SPDX-License-Identifier: Apache-2.0
#pragma once

// A device whose memory the CPU cannot read: what libtorch calls PrivateUse1, kept in pages without access
// rights. Its operations are the CPU's on copies, so they are exact; a kernel of ours that reads such a
// tensor by pointer dies at once, and an operation on tensors of different devices is refused. So code for
// other devices is tested on machines that have none. Unlike a GPU it lets a scalar tensor of the CPU join in
// any operation.

#include <c10/core/Device.h>

namespace collegium::test {

/// The device; its memory and hooks are registered at the first call.
c10::Device opaque_device();

}  // namespace collegium::test
