// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/specialization.h"

#include <gtest/gtest.h>

#include <cmath>

namespace collegium {
namespace {

TEST(MutualInformation, hand_worked_values) {
  EXPECT_DOUBLE_EQ(train::normalized_mutual_information({{5, 0}, {0, 5}}), 1.0);
  EXPECT_DOUBLE_EQ(train::normalized_mutual_information({{3, 3}, {3, 3}}), 0.0);
  EXPECT_DOUBLE_EQ(train::normalized_mutual_information({{0, 0}, {0, 0}}), 0.0);
  EXPECT_DOUBLE_EQ(train::normalized_mutual_information({{4, 4}, {0, 0}}),
                   0.0);  // one domain: nothing to tell
  // p(d,e) = {{3/8, 1/8}, {1/8, 3/8}}: I = ln 2 - H(1/4) with H(1/4) in nats, H(domain) = ln 2.
  const double entropy = -0.25 * std::log(0.25) - 0.75 * std::log(0.75);
  EXPECT_NEAR(train::normalized_mutual_information({{3, 1}, {1, 3}}), 1.0 - entropy / std::log(2.0), 1e-15);
}

TEST(Specialization, separated_domains_stand_out_from_shuffled_labels) {
  train::SequenceLoads loads;
  for (int i = 0; i < 40; ++i) {
    loads.domain.push_back(i % 2);
    loads.choices.push_back(i % 2 == 0 ? std::vector<std::int64_t>{9, 1} : std::vector<std::int64_t>{1, 9});
  }
  const auto result = train::specialization(loads, 0, 2, 20, 0);
  EXPECT_DOUBLE_EQ(result.share[0][0], 0.9);
  EXPECT_GT(result.nmi, 5 * result.nmi_shuffled_max);
  EXPECT_EQ(result.nmi_shuffled, train::specialization(loads, 0, 2, 20, 0).nmi_shuffled);
}

}  // namespace
}  // namespace collegium
