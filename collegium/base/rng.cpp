// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/rng.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace collegium {

namespace {

// Constants of Philox4x32 [Salmon2011, Table 2] and of its Weyl key schedule.
constexpr std::uint32_t kMultiplier0 = 0xD2511F53U;
constexpr std::uint32_t kMultiplier1 = 0xCD9E8D57U;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9U;
constexpr std::uint32_t kWeyl1 = 0xBB67AE85U;
constexpr int kRounds = 10;
constexpr double kTwoPow53 = 9007199254740992.0;

std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x & 0xFFFFFFFFU); }
std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32U); }

std::uint64_t join(std::uint32_t hi, std::uint32_t lo) { return (std::uint64_t{hi} << 32U) | lo; }

// In (0, 1), the greatest of which are rounded to whole steps: log() of both ends stays finite.
double open_uniform(std::uint64_t bits) {
  return std::min((static_cast<double>(bits >> 11U) + 0.5) / kTwoPow53, 1.0 - 1.0 / kTwoPow53);
}

}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMultiplier0} * counter[0];
    const std::uint64_t product1 = std::uint64_t{kMultiplier1} * counter[2];
    counter = {high(product1) ^ counter[1] ^ key[0], low(product1), high(product0) ^ counter[3] ^ key[1],
               low(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

std::uint64_t hash_name(std::string_view name) {
  std::uint64_t hash = 0xCBF29CE484222325ULL;
  for (const char c : name) {
    hash ^= static_cast<unsigned char>(c);
    hash *= 0x100000001B3ULL;
  }
  return hash;
}

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t z = a + 0x9E3779B97F4A7C15ULL * (b + 1);
  z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27U)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31U);
}

RandomStream::RandomStream(std::uint64_t seed, std::string_view purpose, std::uint64_t a, std::uint64_t b) {
  const std::uint64_t key = mix(mix(mix(seed, hash_name(purpose)), a), b);
  key_ = {low(key), high(key)};
}

std::array<std::uint32_t, 4> RandomStream::block(std::uint64_t index, std::uint64_t second) const {
  return philox4x32({low(index), high(index), low(second), high(second)}, key_);
}

std::uint64_t RandomStream::bits(std::uint64_t index, std::uint64_t second) const {
  const auto word = block(index, second);
  return join(word[1], word[0]);
}

double RandomStream::uniform(std::uint64_t index, std::uint64_t second) const {
  return static_cast<double>(bits(index, second) >> 11U) / kTwoPow53;
}

double RandomStream::normal(std::uint64_t index, std::uint64_t second) const {
  const auto word = block(index, second);
  const double radius = std::sqrt(-2.0 * std::log(open_uniform(join(word[1], word[0]))));
  return radius * std::cos(2.0 * std::numbers::pi * open_uniform(join(word[3], word[2])));
}

double RandomStream::gumbel(std::uint64_t index, std::uint64_t second) const {
  return -std::log(-std::log(open_uniform(bits(index, second))));
}

}  // namespace collegium
