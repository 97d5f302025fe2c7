// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/fields.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace collegium {
enum class Colour { kRed, kGreen };
template <>
struct EnumNames<Colour> {
  static constexpr std::pair<std::string_view, Colour> names[] = {{"red", Colour::kRed},
                                                                  {"green", Colour::kGreen}};
};

namespace {

struct Inner {
  std::int64_t steps = 3;
};
template <class Fields>
void describe(Fields& fields, Inner& inner) {
  fields("steps", inner.steps, "number of steps");
}

struct Outer {
  double rate = 0.5;
  Colour colour = Colour::kRed;
  std::optional<Colour> shade;
  std::vector<std::int64_t> sizes;
  Inner inner;
};
template <class Fields>
void describe(Fields& fields, Outer& outer) {
  fields("rate", outer.rate, "learning rate");
  fields("colour", outer.colour, "a colour");
  fields("shade", outer.shade, "an optional colour");
  fields("sizes", outer.sizes, "some sizes");
  fields("inner", outer.inner, "nested");
}

template <typename Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

std::string message_of(const char* text) {
  Outer outer;
  return refusal([&] { read_fields(Json::parse(text), "", outer); });
}

TEST(Fields, reads_what_is_given_and_keeps_defaults) {
  Outer outer;
  read_fields(Json::parse(R"({"rate": 2, "colour": "green", "sizes": [1, 2], "inner": {"steps": 9}})"), "",
              outer);
  EXPECT_EQ(outer.rate, 2.0);
  EXPECT_EQ(outer.colour, Colour::kGreen);
  EXPECT_THAT(outer.sizes, testing::ElementsAre(1, 2));
  EXPECT_EQ(outer.inner.steps, 9);
  EXPECT_FALSE(outer.shade.has_value());
  read_fields(Json::parse(R"({"shade": "red"})"), "", outer);
  EXPECT_EQ(outer.shade, Colour::kRed);
  read_fields(Json::parse(R"({"shade": "auto"})"), "", outer);
  EXPECT_FALSE(outer.shade.has_value());
}

TEST(Fields, written_struct_reads_back_equal) {
  Outer outer{
      .rate = 0.25, .colour = Colour::kGreen, .shade = Colour::kRed, .sizes = {4}, .inner = {.steps = 1}};
  const Json json = write_fields(outer);
  Outer copy;
  read_fields(json, "", copy);
  EXPECT_EQ(write_fields(copy), json);
}

TEST(Fields, unknown_key_names_path_and_nearest) {
  EXPECT_EQ(message_of(R"({"inner": {"step": 1}})"), "unknown key 'inner.step'; did you mean 'steps'?");
}

TEST(Fields, wrong_types_name_field_value_and_rule) {
  EXPECT_EQ(message_of(R"({"rate": "fast"})"), "rate = \"fast\": expected a number");
  EXPECT_EQ(message_of(R"({"inner": {"steps": 1.5}})"), "inner.steps = 1.5: expected a whole number");
  EXPECT_EQ(message_of(R"({"sizes": [1, "x"]})"), "sizes[1] = \"x\": expected a whole number");
  EXPECT_EQ(message_of(R"({"colour": "gren"})"),
            "colour = \"gren\": must be one of red, green (did you mean 'green'?)");
  EXPECT_EQ(message_of(R"({"shade": "autos"})"),
            "shade = \"autos\": must be one of auto, red, green (did you mean 'auto'?)");
}

TEST(Json, a_key_given_twice_is_refused_in_its_object_alone) {
  EXPECT_EQ(parse_json(R"({"a": {"b": 1}, "c": [{"b": 2}, {"b": 3}]})", "f").at("c").at(1).at("b"), 3);
  for (const std::string text : {R"({"a": 1, "b": 2, "a": 1})", R"([{"c": {"a": 1, "a": 2}}])"})
    EXPECT_THAT(refusal([&] { parse_json(text, "config.json"); }),
                testing::HasSubstr("config.json: 'a' occurs twice"));
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_EQ(refusal([&] { parse_json(nested(100), "config.json"); }), "no error");
  EXPECT_EQ(refusal([&] { parse_json(nested(1000000), "config.json"); }),
            "config.json: values are nested more than 100 deep");
  EXPECT_THAT(refusal([] { parse_json("{", "config.json"); }),
              testing::HasSubstr("config.json: not valid JSON"));
}

TEST(Fields, numbers_are_finite) {
  Outer outer;
  try {
    read_fields(Json{{"rate", std::numeric_limits<double>::infinity()}}, "optimizer", outer);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "optimizer.rate = inf: must be finite");
  }
}

struct Exact {
  DecimalText factor = "1.25";
};
template <class Fields>
void describe(Fields& fields, Exact& exact) {
  fields("factor", exact.factor, "an exact number");
}

TEST(Fields, decimal_text_is_read_from_a_number_or_a_text) {
  Exact exact;
  EXPECT_EQ(write_fields(exact).dump(), R"({"factor":"1.25"})");
  read_fields(Json::parse(R"({"factor": 1.1})"), "", exact);
  EXPECT_EQ(exact.factor.text, "1.1");
  read_fields(Json::parse(R"({"factor": "0.70"})"), "", exact);
  EXPECT_EQ(exact.factor.text, "0.70");
  EXPECT_THROW(read_fields(Json::parse(R"({"factor": [1]})"), "", exact), ConfigError);
  EXPECT_THROW(read_fields(Json{{"factor", std::nan("")}}, "", exact), ConfigError);
}

TEST(Fields, documents_every_key_with_its_default) {
  const auto docs = document_fields<Outer>();
  ASSERT_EQ(docs.size(), 6U);
  EXPECT_EQ(docs[5].path, "inner.steps");
  EXPECT_EQ(docs[5].default_value, "3");
}

}  // namespace
}  // namespace collegium
