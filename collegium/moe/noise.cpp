// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/noise.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "collegium/base/rng.h"

namespace collegium::moe {

namespace {

double draw(const RandomStream& stream, Distribution distribution, std::uint64_t token,
            std::uint64_t column) {
  switch (distribution) {
    case Distribution::kUniform:
      return stream.uniform(token, column);
    case Distribution::kNormal:
      return stream.normal(token, column);
    case Distribution::kGumbel:
      return stream.gumbel(token, column);
  }
  return 0.0;
}

}  // namespace

at::Tensor random_values(const TokenContext& context, std::string_view purpose, Distribution distribution,
                         std::int64_t columns, at::ScalarType dtype) {
  constexpr std::int64_t kTokensPerTask = 16;
  const RandomStream stream(context.seed, purpose, static_cast<std::uint64_t>(context.step),
                            static_cast<std::uint64_t>(context.layer));
  at::Tensor values = at::empty({context.num_tokens(), columns}, dtype);
  AT_DISPATCH_FLOATING_TYPES(dtype, "random_values", [&] {
    auto* out = values.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, context.num_tokens(), kTokensPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t token = begin; token < end; ++token) {
        const auto global_token = static_cast<std::uint64_t>(context.first_token() + token);
        for (std::int64_t column = 0; column < columns; ++column) {
          out[token * columns + column] = static_cast<scalar_t>(
              draw(stream, distribution, global_token, static_cast<std::uint64_t>(column)));
        }
      }
    });
  });
  return values;
}

}  // namespace collegium::moe
