// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <set>

#include "collegium/base/error.h"
#include "collegium/base/safetensors.h"
#include "collegium/data/prepare.h"
#include "collegium/data/tokenizer.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;

class Corpus : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              ("collegium_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(folder_);
    fs::create_directories(folder_ / "code");
    for (int i = 0; i < 12; ++i) {
      std::ofstream file(folder_ / "code" / fmt::format("f{}.py", i));
      for (int j = 0; j < 60; ++j)
        file << "def function_" << i * 60 + j << "(x):\n\tif x > " << j << ":\n        return 'a" << i
             << "'\n";
    }
    std::ofstream(folder_ / "prose.txt") << prose();
    options_ = {.out = folder_ / "out",
                .texts = {{"code", folder_ / "code"}, {"prose", folder_ / "prose.txt"}},
                .token_files = {},
                .tokenizer = {},
                .vocab_size = 380,
                .validation_fraction = 0.2,
                .force = false};
  }
  void TearDown() override { fs::remove_all(folder_); }

  static std::string prose() {
    std::string text;
    for (int i = 0; i < 300; ++i)
      text += fmt::format("The {} mice, être ou не быть, went up hill {}.\n\n", i * 7, i);
    return text;
  }
  data::PrepareSummary prepare() const {
    return data::prepare(options_, [](const std::string&) {});
  }
  std::string refusal() const {
    try {
      prepare();
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  }
  std::string loading_refusal() const {
    try {
      const data::Dataset dataset(folder_ / "out");
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  }

  fs::path folder_;
  data::PrepareOptions options_;
};

TEST_F(Corpus, text_survives_the_round_trip) {
  prepare();
  const data::Dataset dataset(folder_ / "out");
  const data::Tokenizer tokenizer = data::Tokenizer::load(folder_ / "out");
  const data::Document& first = dataset.index().documents[0];
  std::vector<std::int64_t> ids;
  for (std::int64_t i = first.begin; i < first.end; ++i) ids.push_back(dataset.token(i));
  EXPECT_EQ(tokenizer.decode(ids), read_file(first.name));
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(prose(), true)), prose());
  // A model with more rows than the tokenizer has pieces may sample any of them.
  EXPECT_THAT(tokenizer.decode({tokenizer.vocab_size(), tokenizer.vocab_size() + 7}),
              testing::HasSubstr("\u2047"));
}

TEST_F(Corpus, split_is_by_document_and_a_lone_document_gives_its_tail) {
  prepare();
  const data::Dataset dataset(folder_ / "out");
  std::map<std::pair<std::int64_t, data::Split>, int> count;
  for (const data::Document& document : dataset.index().documents) ++count[{document.domain, document.split}];
  EXPECT_GE((count[{0, data::Split::kValidation}]), 1);
  EXPECT_EQ((count[{0, data::Split::kTrain}]) + (count[{0, data::Split::kValidation}]), 12);
  EXPECT_EQ((count[{1, data::Split::kTrain}]), 1);
  EXPECT_EQ((count[{1, data::Split::kValidation}]), 1);
  // No window of one split holds a token of the other.
  const data::Sampler sampler(dataset, data::Split::kTrain, 32, 1);
  for (std::int64_t i = 0; i < sampler.num_windows(); ++i) {
    for (const std::int64_t id : sampler.window(i).document_ids)
      EXPECT_EQ(dataset.index().documents[static_cast<std::size_t>(id)].split, data::Split::kTrain);
  }
}

TEST_F(Corpus, prepared_twice_gives_the_same_bytes) {
  const auto first = prepare().index.tokens_checksum;
  options_.force = true;
  EXPECT_EQ(prepare().index.tokens_checksum, first);
}

TEST_F(Corpus, wrong_options_are_named) {
  prepare();
  EXPECT_THAT(refusal(), testing::HasSubstr("exists already; pass --force"));
  options_.out = folder_ / "code";
  EXPECT_THAT(refusal(), testing::HasSubstr("exists and was not made by prepare"));
  options_.out = folder_ / "new";
  options_.validation_fraction = 1.0;
  EXPECT_EQ(refusal(), "--validation-fraction 1: must be above 0 and below 1");
  options_.validation_fraction = 0.1;
  options_.vocab_size = 10;
  EXPECT_THAT(refusal(), testing::StartsWith("--vocab-size 10: needs at least 300"));
  options_.vocab_size = 1000000;
  EXPECT_THAT(refusal(),
              testing::MatchesRegex("cannot train a tokenizer of vocab_size = 1000000 on [0-9]+ files: "
                                    "Vocabulary size too high.*"));
  std::string many;  // different characters
  for (int i = 0; i < 400; ++i) {
    for (const int byte : {0xE4, 0xB8 + i / 64, 0x80 + i % 64}) many += static_cast<char>(byte);
  }
  write_file_atomically(folder_ / "many.txt", many);
  options_.texts = {{"many", folder_ / "many.txt"}};
  options_.vocab_size = 300;
  EXPECT_THAT(refusal(), testing::EndsWith("Increase vocab_size"));
  options_.vocab_size = 380;
  options_.texts = {{"none", folder_ / "missing"}};
  EXPECT_THAT(refusal(), testing::HasSubstr("no such file or folder"));
  fs::create_directories(folder_ / "empty");
  options_.texts = {{"none", folder_ / "empty"}};
  EXPECT_EQ(refusal(), "domain none: no UTF-8 text found below its paths");
  options_.texts = {};
  EXPECT_THAT(refusal(), testing::StartsWith("give either --domain"));
  options_.token_files = {{"ids", folder_ / "ids.safetensors"}};
  options_.tokenizer = "tokenizer.model";
  EXPECT_THAT(refusal(), testing::StartsWith("--tokenizer tokenizer.model: goes with --domain"));
  EXPECT_FALSE(fs::exists(folder_ / "new"));
  try {
    data::parse_domain_path("--tokens", "nopath");
    FAIL() << "not refused";
  } catch (const ConfigError& error) {
    EXPECT_EQ(std::string(error.what()), "--tokens nopath: must be NAME=PATH, such as code=src");
  }
}

TEST_F(Corpus, binary_and_invalid_files_are_skipped_and_counted) {
  std::ofstream(folder_ / "code/binary.bin") << std::string("a\0b", 3);
  std::ofstream(folder_ / "code/latin1.txt") << "caf\xe9";
  write_file_atomically(folder_ / "code/empty.txt", "");
  EXPECT_EQ(prepare().num_skipped, 3);
}

TEST_F(Corpus, nothing_to_train_or_validate_on_is_refused) {
  std::ofstream(folder_ / "blank.jsonl") << "\n\n\n";
  options_.texts.push_back({"blank", folder_ / "blank.jsonl"});
  EXPECT_EQ(refusal(), "domain blank: its files hold no document");
  options_.texts.clear();
  for (const std::int64_t length : {0, 1}) {
    write_safetensors(
        folder_ / "ids.safetensors",
        {{.name = "input_ids", .dtype = "I64", .shape = {length}, .bytes = [length] {
            return std::vector<std::byte>(static_cast<std::size_t>(length) * sizeof(std::int64_t));
          }}});
    options_.token_files = {{"ids", folder_ / "ids.safetensors"}};
    EXPECT_EQ(
        refusal(),
        fmt::format("the corpus has 0 training and {} validation tokens; both splits need some", length));
  }
  EXPECT_FALSE(fs::exists(options_.out));
}

TEST_F(Corpus, paths_that_are_no_text_are_named) {
  options_.texts = {{"zero", "/dev/zero"}};
  EXPECT_EQ(refusal(), "--domain: /dev/zero is neither a file nor a folder");
  std::ofstream(folder_ / "junk.model") << "junk";
  options_.texts = {{"prose", folder_ / "prose.txt"}};
  options_.tokenizer = folder_ / "junk.model";
  EXPECT_THAT(refusal(),
              testing::StartsWith((folder_ / "junk.model").string() + ": not a SentencePiece model"));
  options_.tokenizer.clear();
  fs::create_directories(folder_ / "closed/inner");
  std::ofstream(folder_ / "closed/a.txt") << prose();
  fs::permissions(folder_ / "closed/inner", fs::perms::none);
  options_.texts = {{"closed", folder_ / "closed"}};
  constexpr uid_t kNobody = 65534;
  const bool root = ::geteuid() == 0;  // who may read everything
  if (root) {
    ASSERT_EQ(::seteuid(kNobody), 0);
  }
  const std::string message = refusal();
  if (root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
  fs::permissions(folder_ / "closed/inner", fs::perms::owner_all);
  EXPECT_EQ(message, fmt::format("--domain: cannot read folder {}: Permission denied",
                                 (folder_ / "closed/inner").string()));
}

TEST_F(Corpus, tokenizer_of_a_model_is_compared) {
  prepare();
  const data::Dataset dataset(folder_ / "out");
  const auto refused = [&] {
    try {
      data::require_same_tokenizer(dataset, folder_ / "model", "--any-tokenizer");
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  fs::create_directories(folder_ / "model");
  EXPECT_EQ(refused(), "accepted");
  write_file_atomically(folder_ / "model/tokenizer.json", "{}");
  EXPECT_THAT(refused(), testing::HasSubstr("tokenizer.json is not the SentencePiece model that made"));
  fs::copy_file(folder_ / "out/tokenizer.model", folder_ / "model/tokenizer.model");
  EXPECT_EQ(refused(), "accepted");
  write_file_atomically(folder_ / "model/tokenizer.model", "another");
  EXPECT_THAT(refused(), testing::AllOf(testing::HasSubstr("did not make the tokens of"),
                                        testing::HasSubstr("or pass --any-tokenizer")));
}

TEST_F(Corpus, damaged_folders_are_named) {
  EXPECT_THAT(loading_refusal(), testing::HasSubstr("no prepared data here"));
  prepare();
  const std::string tokens = read_file(folder_ / "out/tokens.bin");
  write_file_atomically(folder_ / "out/tokens.bin", tokens.substr(4));
  EXPECT_THAT(loading_refusal(), testing::HasSubstr("dataset.json says"));
  std::string changed = tokens;
  changed[100] = static_cast<char>(changed[100] ^ 1);
  write_file_atomically(folder_ / "out/tokens.bin", changed);
  EXPECT_THAT(loading_refusal(), testing::HasSubstr("does not match dataset.json's"));
  write_file_atomically(folder_ / "out/tokens.bin", tokens);
  const std::string tokenizer = read_file(folder_ / "out/tokenizer.model");
  write_file_atomically(folder_ / "out/tokenizer.model", tokenizer + "x");
  EXPECT_THAT(loading_refusal(), testing::HasSubstr("not the tokenizer that made these tokens"));
  write_file_atomically(folder_ / "out/tokenizer.model", tokenizer);
  EXPECT_EQ(loading_refusal(), "accepted");
  data::DatasetIndex index = data::Dataset(folder_ / "out").index();
  index.vocab_size = 10;
  write_file_atomically(folder_ / "out/dataset.json", write_fields(index).dump());
  EXPECT_THAT(loading_refusal(), testing::HasSubstr("but dataset.json says vocab_size = 10"));
  write_file_atomically(folder_ / "out/dataset.json", "{");
  EXPECT_THAT(loading_refusal(), testing::HasSubstr("not valid JSON"));
}

TEST_F(Corpus, prompts_are_no_targets) {
  std::ofstream(folder_ / "chat.jsonl")
      << R"({"prompt": "Question mice? ", "completion": "answer hill"})" << "\n"
      << "\r\n"
      << R"({"text": "mice went up the hill"})" << "\r\n";
  options_.texts.push_back({"chat", folder_ / "chat.jsonl"});
  prepare();
  const data::Dataset dataset(folder_ / "out");
  ASSERT_TRUE(dataset.index().has_loss_mask);
  const data::Document& chat = dataset.index().documents[dataset.index().documents.size() - 2];
  // Documents without a prompt are targets from the first token to the last, as in data without any prompt.
  for (const data::Document& document : dataset.index().documents) {
    if (document.begin == chat.begin) continue;
    for (std::int64_t i = document.begin; i < document.end; ++i) EXPECT_TRUE(dataset.is_target(i)) << i;
  }
  EXPECT_FALSE(dataset.is_target(chat.begin));
  EXPECT_TRUE(dataset.is_target(chat.end - 1));
  std::ofstream(folder_ / "chat.jsonl") << "{\"question\": 1}\n";
  options_.force = true;
  EXPECT_THAT(refusal(), testing::HasSubstr("chat.jsonl:1: needs a JSON object"));
}

TEST_F(Corpus, too_short_for_a_window) {
  prepare();
  const data::Dataset dataset(folder_ / "out");
  EXPECT_THROW(data::Sampler(dataset, data::Split::kTrain, 100000000, 1), ConfigError);
}

TEST(Tokenizer, other_kinds_are_refused_with_the_way_in) {
  const fs::path folder = fs::temp_directory_path() / "collegium_tokenizer_test";
  fs::create_directories(folder);
  write_file_atomically(folder / "tokenizer.json", "{}");
  try {
    data::Tokenizer::load(folder);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("not a SentencePiece model"),
                                             testing::HasSubstr("--input ids.safetensors")));
  }
  write_file_atomically(folder / "tokenizer.model", "nonsense");
  EXPECT_THROW(data::Tokenizer::load(folder), ConfigError);
  fs::remove_all(folder);
}

TEST(Sampler, permutation_is_a_bijection_for_every_size) {
  for (const std::int64_t size : {1, 2, 3, 4, 5, 17, 64, 1000}) {
    std::set<std::int64_t> seen;
    for (std::int64_t i = 0; i < size; ++i) seen.insert(data::permute_index(i, size, 5));
    EXPECT_EQ(static_cast<std::int64_t>(seen.size()), size);
    EXPECT_EQ(*seen.rbegin(), size - 1);
  }
  EXPECT_NE(data::permute_index(3, 1000, 5), data::permute_index(3, 1000, 6));
}

TEST(Utf8, accepts_only_shortest_forms) {
  EXPECT_TRUE(data::is_valid_utf8("aé€😀"));
  EXPECT_FALSE(data::is_valid_utf8("\xc0\xaf"));
  EXPECT_FALSE(data::is_valid_utf8("\xed\xa0\x80"));
  EXPECT_FALSE(data::is_valid_utf8("\xe2\x82"));
  EXPECT_FALSE(data::is_valid_utf8("\xf4\x90\x80\x80"));
}

}  // namespace
}  // namespace collegium
