// SPDX-License-Identifier: Apache-2.0
#pragma once

// Counter-based random numbers. A value is a pure function of (key, index): nothing is carried from one draw
// to the next, so weights, noise and data order do not depend on the number of ranks, threads or restarts.

#include <array>
#include <cstdint>
#include <string_view>

namespace collegium {

/// What     One 128-bit block of Philox4x32 with 10 rounds.
/// Ref      [Salmon2011, Sec 3.3]: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key);

/// What     A stable 64-bit hash of a name (FNV-1a), for keys such as tensor names.
std::uint64_t hash_name(std::string_view name);

/// What     Mixes two 64-bit words into one (the finaliser of SplitMix64 over their combination).
std::uint64_t mix(std::uint64_t a, std::uint64_t b);

/// What     A stream of random numbers addressed by index.
/// Order    Deterministic: the same key and index give the same value on every machine and thread.
class RandomStream {
 public:
  /// The key is usually built from (seed, purpose, step, layer): RandomStream(seed, "router/jitter", step,
  /// layer).
  RandomStream(std::uint64_t seed, std::string_view purpose, std::uint64_t a = 0, std::uint64_t b = 0);

  /// 64 random bits for `index` (and a second coordinate, for instance token and expert).
  std::uint64_t bits(std::uint64_t index, std::uint64_t second = 0) const;
  /// Uniform in [0, 1), 53 bits.
  double uniform(std::uint64_t index, std::uint64_t second = 0) const;
  /// Standard normal N(0, 1) (Box-Muller on one Philox block).
  double normal(std::uint64_t index, std::uint64_t second = 0) const;
  /// Standard Gumbel(0, 1): -log(-log(u)), u in (0, 1).
  double gumbel(std::uint64_t index, std::uint64_t second = 0) const;

 private:
  std::array<std::uint32_t, 4> block(std::uint64_t index, std::uint64_t second) const;

  std::array<std::uint32_t, 2> key_;
};

}  // namespace collegium
