// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "collegium/base/error.h"

namespace collegium {
namespace {

class Safetensors : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }
  // A file with this header and `data_bytes` bytes of data.
  std::string refusal(const std::string& header, std::size_t data_bytes) {
    const std::uint64_t length = header.size();
    std::string content(sizeof(length), '\0');
    std::memcpy(content.data(), &length, sizeof(length));
    return refusal_of(content + header + std::string(data_bytes, '\0'));
  }
  std::string refusal_of(const std::string& content) {
    write_file_atomically(path_, content);
    try {
      const SafetensorsFile file(path_);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  }
  std::filesystem::path path_ = std::filesystem::temp_directory_path() / "collegium_safetensors_test";
};

TEST_F(Safetensors, written_tensors_read_back) {
  write_safetensors(
      path_,
      {{.name = "a",
        .dtype = "F32",
        .shape = {2},
        .bytes = [] { return std::vector<std::byte>(8, std::byte{7}); }},
       {.name = "empty", .dtype = "I64", .shape = {0, 3}, .bytes = [] { return std::vector<std::byte>(); }}});
  const SafetensorsFile file(path_);
  ASSERT_EQ(file.tensors().size(), 2U);
  EXPECT_EQ(file.bytes(file.tensors().at("a")).size(), 8U);
  EXPECT_EQ(file.bytes(file.tensors().at("a"))[3], std::byte{7});
  EXPECT_EQ(file.tensors().at("empty").shape, (std::vector<std::int64_t>{0, 3}));
}

TEST_F(Safetensors, every_truncation_is_refused) {
  write_safetensors(
      path_,
      {{.name = "a", .dtype = "F32", .shape = {2, 2}, .bytes = [] { return std::vector<std::byte>(16); }}});
  const std::string content = read_file(path_);
  for (std::size_t length = 0; length < content.size(); ++length)
    EXPECT_NE(refusal_of(content.substr(0, length)), "accepted") << length;
  EXPECT_EQ(refusal_of(content), "accepted");
  EXPECT_NE(refusal_of(content + "x"), "accepted");
}

TEST_F(Safetensors, malformed_headers_are_named) {
  const std::pair<const char*, const char*> mistakes[] = {
      {"{", "the header: not valid JSON"},
      {"[]", "the header is not a JSON object"},
      {R"({"a":{"dtype":"F32"}})", "tensor 'a': shape is missing"},
      {R"({"a":7})", "tensor 'a': dtype is missing"},
      {R"({"a":{"dtype":"F32","shape":[1.9],"data_offsets":[0,4]}})",
       "shape[0] = 1.9: expected a whole number"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e300]}})", "expected a whole number"},
      {R"({"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}})", "more than 2^64 bytes"},
      {R"({"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}})", "unknown dtype 'F99'"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})",
       "[2] x F32 needs 8 bytes, data_offsets give 4"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "negative size -1"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}})",
       "more than 2^62 elements"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})",
       "data_offsets = [4, 0]: must be [begin, end]"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "ends at byte 8 of the data, which has 4"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
       "begins at byte 2 of the data, expected 0 (hole)"},
      {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
       "(overlap)"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
       "the tensors end at byte 2 of the data, which has 4"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       "'a' occurs twice"}};
  for (const auto& [header, message] : mistakes)
    EXPECT_THAT(refusal(header, 4), testing::HasSubstr(message)) << header;
}

}  // namespace
}  // namespace collegium
