// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/rng.h"

#include <gtest/gtest.h>

#include <cmath>

namespace collegium {
namespace {

// Known answers published with the reference implementation of Philox4x32-10 (kat_vectors of Random123).
TEST(Philox, matches_published_known_answers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStream, depends_on_every_part_of_its_key) {
  const RandomStream base(1, "noise", 2, 3);
  EXPECT_EQ(base.bits(7), RandomStream(1, "noise", 2, 3).bits(7));
  EXPECT_NE(base.bits(7), RandomStream(2, "noise", 2, 3).bits(7));
  EXPECT_NE(base.bits(7), RandomStream(1, "other", 2, 3).bits(7));
  EXPECT_NE(base.bits(7), RandomStream(1, "noise", 3, 2).bits(7));
  EXPECT_NE(base.bits(7, 1), base.bits(7, 2));
}

// Means and variances of n draws lie within five standard errors of their expectations.
TEST(RandomStream, moments_of_uniform_normal_and_gumbel) {
  const RandomStream stream(42, "moments");
  constexpr int n = 200000;
  double uniform = 0;
  double normal = 0;
  double normal_squared = 0;
  double gumbel = 0;
  for (int i = 0; i < n; ++i) {
    const auto index = static_cast<std::uint64_t>(i);
    uniform += stream.uniform(index);
    const double z = stream.normal(index, 1);
    normal += z;
    normal_squared += z * z;
    gumbel += stream.gumbel(index, 2);
  }
  const double root = std::sqrt(static_cast<double>(n));
  EXPECT_NEAR(uniform / n, 0.5, 5 * std::sqrt(1.0 / 12) / root);
  EXPECT_NEAR(normal / n, 0.0, 5 / root);
  EXPECT_NEAR(normal_squared / n, 1.0, 5 * std::sqrt(2.0) / root);
  constexpr double kEulerGamma = 0.57721566490153286;
  EXPECT_NEAR(gumbel / n, kEulerGamma, 5 * M_PI / std::sqrt(6.0) / root);
}

}  // namespace
}  // namespace collegium
