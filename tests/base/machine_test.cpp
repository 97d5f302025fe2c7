// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/machine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <sstream>

namespace collegium {
namespace {

namespace fs = std::filesystem;

class ControlGroups : public testing::Test {
 protected:
  void TearDown() override { fs::remove_all(root_); }

  void write(const fs::path& file, const std::string& text) const {
    fs::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text << "\n";
  }
  double limit(const std::string& own_groups) const {
    std::istringstream stream(own_groups);
    return control_group_limit(root_, stream);
  }

  fs::path root_ = fs::temp_directory_path() / "collegium_control_groups_test";
};

TEST_F(ControlGroups, the_least_limit_on_the_way_to_the_root_counts) {
  EXPECT_TRUE(std::isinf(limit("0::/job/step\n")));
  write("memory.max", "max");
  EXPECT_TRUE(std::isinf(limit("0::/job/step\n")));
  write("job/step/memory.max", "max");
  write("job/memory.max", "3000");
  EXPECT_EQ(limit("0::/job/step\n"), 3000.0);
  write("job/step/memory.max", "2000");
  EXPECT_EQ(limit("0::/job/step\n"), 2000.0);
  EXPECT_EQ(limit("0::/job/other\n"), 3000.0);
  // A container that sees its own group as the root.
  write("memory.max", "1000");
  EXPECT_EQ(limit("0::/\n"), 1000.0);
  EXPECT_EQ(limit("0::/not/mounted/here\n"), 1000.0);
}

TEST_F(ControlGroups, version_1_has_a_tree_for_memory) {
  write("memory/memory.limit_in_bytes", "9223372036854771712");
  write("memory/job/memory.limit_in_bytes", "500");
  write("cpu/job/memory.limit_in_bytes", "1");
  EXPECT_EQ(limit("12:cpu,cpuacct:/job\n9:memory:/job\n1:name=systemd:/x\n"), 500.0);
  EXPECT_EQ(limit("no line of this kind\n"), limit(""));
}

}  // namespace
}  // namespace collegium
