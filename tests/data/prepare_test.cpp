// SPDX-License-Identifier: Apache-2.0
#include "collegium/data/prepare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/rng.h"
#include "collegium/base/safetensors.h"
#include "collegium/data/tokenizer.h"
#include "collegium/data/training_lines.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;

class Prepare : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() /
        ("collegium_prepare_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    options_ = {.out = folder_ / "out",
                .texts = {},
                .token_files = {},
                .tokenizer = {},
                .vocab_size = 300,
                .validation_fraction = 0.05,
                .force = false};
  }
  void TearDown() override { fs::remove_all(folder_); }

  data::DatasetIndex prepare() const {
    return data::prepare(options_, [](const std::string&) {}).index;
  }
  void write(const std::string& name, const std::string& content) const {
    fs::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name) << content;
  }
  std::string tokenizer_of(const std::string& text) {
    options_.out = folder_ / (text + ".out");
    options_.texts = {{"text", folder_ / text}};
    prepare();
    return read_file(options_.out / "tokenizer.model");
  }
  void add_tokens(const std::string& name, std::int64_t length) {
    write_safetensors(folder_ / name,
                      {{.name = "input_ids", .dtype = "I64", .shape = {length}, .bytes = [length] {
                          return std::vector<std::byte>(static_cast<std::size_t>(length) * 8);
                        }}});
    options_.token_files.push_back({"ids", folder_ / name});
  }
  std::vector<std::string> lines(const data::Corpus& corpus, std::int64_t max_lines,
                                 std::size_t max_bytes) const {
    std::vector<std::string> result;
    for (data::TrainingLines lines(corpus, max_lines, max_bytes); !lines.done(); lines.next())
      result.push_back(lines.value());
    return result;
  }

  fs::path folder_;
  data::PrepareOptions options_;
};

std::map<std::string, std::int64_t> validation_of(const data::DatasetIndex& index) {
  std::map<std::string, std::int64_t> tokens;
  for (const data::Document& document : index.documents) {
    if (document.split == data::Split::kValidation) tokens[document.name] += document.end - document.begin;
  }
  return tokens;
}

TEST_F(Prepare, tokenizer_of_jsonl_is_that_of_its_texts) {
  std::string json;
  std::string text;
  for (int i = 0; i < 200; ++i) {
    json += fmt::format(
        "{{\"prompt\": \"Gr\\u00fc\\u00dfe \\\"{0}\\\"?\\n\", \"completion\": \"the mouse {0}\\n"
        "went\\tup the hill again\"}}\n",
        i);
    text += fmt::format("Grüße \"{0}\"?\nthe mouse {0}\nwent\tup the hill again\n", i);
  }
  write("a.jsonl", json);
  write("plain, with a comma.txt", text);
  EXPECT_EQ(tokenizer_of("a.jsonl"), tokenizer_of("plain, with a comma.txt"));
}

TEST_F(Prepare, tokenizer_learns_from_long_lines) {
  std::string line;
  while (line.size() < 50000) line += " zyxwv";
  for (int i = 0; i < 30; ++i) line += "\nthe mouse went up the hill, and down again";
  write("a.txt", line);
  tokenizer_of("a.txt");
  EXPECT_EQ(data::Tokenizer::load(options_.out).encode(" zyxwv", false).size(), 1U);
}

TEST_F(Prepare, long_lines_are_cut_before_spaces_and_between_characters) {
  write("a.txt", "one two  three\n\néééé four\n        end\nexactly8\n");
  const data::Corpus corpus = data::find_texts({{"a", folder_ / "a.txt"}});
  EXPECT_THAT(lines(corpus, 100, 8),
              testing::ElementsAre("one two", "  three", "éééé", " four", "        ", "end", "exactly8"));
  EXPECT_THAT(lines(corpus, 100, 5), testing::ElementsAre("one", " two", "  thr", "ee", "éé", "éé", " four",
                                                          "     ", "   en", "d", "exact", "ly8"));
}

TEST_F(Prepare, every_domain_and_file_has_its_share_of_the_training_lines) {
  for (int file = 0; file < 10; ++file) {
    std::string text;
    for (int i = 0; i < 50; ++i) text += fmt::format("a{} {}\n", file, i);
    write(fmt::format("a/{}.txt", file), text);
  }
  write("b.txt", "b1\nb2\nb3\n");
  write("c.jsonl", "{\"text\": \"c1\\nc2\"}\n{\"text\": \"c3\\n\\nc4\"}\n");
  const data::Corpus corpus =
      data::find_texts({{"a", folder_ / "a"}, {"b", folder_ / "b.txt"}, {"c", folder_ / "c.jsonl"}});
  EXPECT_EQ(lines(corpus, 1000, 64).size(), 507U);
  const std::vector<std::string> some = lines(corpus, 27, 64);
  ASSERT_EQ(some.size(), 27U);
  for (int file = 0; file < 10; ++file) {
    const auto of_file = [&](const std::string& line) { return line.starts_with(fmt::format("a{} ", file)); };
    EXPECT_EQ(std::count_if(some.begin(), some.end(), of_file), 2) << file;
  }
  EXPECT_THAT(std::vector<std::string>(some.begin() + 20, some.end()),
              testing::ElementsAre("b1", "b2", "b3", "c1", "c2", "c3", "c4"));
  EXPECT_EQ(lines(corpus, 6, 64).size(), 6U);
}

TEST_F(Prepare, texts_without_a_character_are_refused) {
  write("a.jsonl", "{\"text\": \"\"}\n{\"text\": \"\\n\"}\n");
  EXPECT_THROW(tokenizer_of("a.jsonl"), ConfigError);
}

TEST_F(Prepare, small_documents_go_to_validation_in_the_order_of_their_hashes) {
  std::vector<std::pair<std::uint64_t, std::string>> order;
  for (int i = 0; i < 100; ++i) {
    const std::string name = fmt::format("{}.safetensors", i);
    add_tokens(name, 10);
    order.emplace_back(hash_name(name), name);
  }
  std::sort(order.begin(), order.end());
  std::map<std::string, std::int64_t> expected;
  for (std::size_t i = 0; i < 5; ++i) expected[order[i].second] = 10;
  EXPECT_EQ(validation_of(prepare()), expected);
}

TEST_F(Prepare, a_long_document_stays_in_training_while_others_suffice) {
  add_tokens("book", 1000);
  for (int i = 0; i < 100; ++i) add_tokens(fmt::format("{}.safetensors", i), 1);
  // The share is 55 of 1100: whatever the order of the hashes, 55 of the short ones.
  const auto validation = validation_of(prepare());
  EXPECT_EQ(validation.size(), 55U);
  EXPECT_EQ(validation.count("book"), 0U);
}

TEST_F(Prepare, a_long_document_gives_its_tail_where_no_other_fits) {
  add_tokens("book", 990);
  for (int i = 0; i < 10; ++i) add_tokens(fmt::format("{}.safetensors", i), 1);
  auto validation = validation_of(prepare());
  EXPECT_EQ(validation["book (tail)"], 40);  // with the ten others 50 of 1000
  EXPECT_EQ(validation.size(), 11U);
  options_.token_files.clear();
  options_.force = true;
  add_tokens("one", 500);
  add_tokens("two", 500);
  validation = validation_of(prepare());
  ASSERT_EQ(validation.size(), 1U);
  EXPECT_THAT(validation.begin()->first, testing::HasSubstr(" (tail)"));
  EXPECT_EQ(validation.begin()->second, 50);
}

TEST_F(Prepare, force_leaves_the_new_folder_whole_when_the_old_one_cannot_be_removed) {
  add_tokens("one", 500);
  prepare();
  options_.force = true;
  add_tokens("two", 500);
  prepare();
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder_)) names.push_back(entry.path().filename().string());
  EXPECT_THAT(names, testing::UnorderedElementsAre("one", "two", "out"));
  // A folder in it that only its owner, or root, may empty.
  fs::create_directories(options_.out / "closed/inner");
  constexpr uid_t kNobody = 65534;
  const bool root = ::geteuid() == 0;  // who may remove everything
  if (root) {
    fs::permissions(folder_, fs::perms::all);
    ASSERT_EQ(::chown(options_.out.c_str(), kNobody, kNobody), 0);
    ASSERT_EQ(::seteuid(kNobody), 0);
  } else {
    fs::permissions(options_.out / "closed", fs::perms::none);
  }
  std::string message = "accepted";
  options_.token_files.pop_back();
  try {
    prepare();
  } catch (const Error& error) {
    message = error.what();
  }
  if (root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
  EXPECT_THAT(message, testing::HasSubstr("out is written, but what it replaced cannot be removed: "));
  EXPECT_EQ(data::Dataset(options_.out).index().num_tokens, 500);
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (fs::exists(entry.path() / "closed")) fs::permissions(entry.path() / "closed", fs::perms::owner_all);
  }
}

}  // namespace
}  // namespace collegium
