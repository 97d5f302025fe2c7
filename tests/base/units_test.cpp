// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/units.h"

#include <gtest/gtest.h>

namespace collegium {
namespace {

TEST(Units, the_unit_is_chosen_after_rounding) {
  EXPECT_EQ(format_duration(0.35), "350 ms");
  EXPECT_EQ(format_duration(0.9994), "999 ms");
  EXPECT_EQ(format_duration(0.9997), "1.0 s");
  EXPECT_EQ(format_duration(59.94), "59.9 s");
  EXPECT_EQ(format_duration(59.97), "1m 00s");
  EXPECT_EQ(format_duration(3599.4), "59m 59s");
  EXPECT_EQ(format_duration(3599.7), "1h 00m");
  EXPECT_EQ(format_duration(7199.0), "2h 00m");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1536), "1.50 KiB");
  EXPECT_EQ(format_bytes(1048575), "1.00 MiB");
  EXPECT_EQ(format_bytes(-1048575), "-1.00 MiB");
  EXPECT_EQ(format_count(8192), "8192");
  EXPECT_EQ(format_count(123456), "123.46 k");
  EXPECT_EQ(format_count(999999), "1.00 M");
}

}  // namespace
}  // namespace collegium
