// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which experts take which domain.

#include <cstdint>
#include <string>
#include <vector>

#include "collegium/base/fields.h"

namespace collegium::train {

/// Choices of one layer: rows are sequences, with the domain each belongs to.
struct SequenceLoads {
  std::vector<std::int64_t> domain;                ///< per sequence
  std::vector<std::vector<std::int64_t>> choices;  ///< per sequence, per expert
};

struct LayerSpecialization {
  std::int64_t layer = 0;
  std::vector<std::vector<double>> share;  ///< [domain][expert]: share of the domain's choices
  double nmi = 0.0;  ///< I(expert; domain) / H(domain): 0 = unrelated, 1 = the expert tells the domain
  double nmi_shuffled = 0.0;      ///< mean over shuffles of the sequences' labels: what chance gives
  double nmi_shuffled_max = 0.0;  ///< the largest of them
};
template <class Fields>
void describe(Fields& fields, LayerSpecialization& s) {
  fields("layer", s.layer, "decoder layer");
  fields("share", s.share, "[domain][expert] share of the domain's choices");
  fields("nmi", s.nmi, "normalised mutual information of expert and domain");
  fields("nmi_shuffled", s.nmi_shuffled, "its mean under shuffled labels");
  fields("nmi_shuffled_max", s.nmi_shuffled_max, "its largest value under shuffled labels");
}

/// What     I(expert; domain) / H(domain) of a table of counts [domain][expert], natural logarithms; 0 when
///          H is 0.
double normalized_mutual_information(const std::vector<std::vector<std::int64_t>>& counts);

/// What     The table of one layer and its null: labels permuted among sequences `num_shuffles` times.
/// Order    Deterministic: the shuffles follow from `seed`.
LayerSpecialization specialization(const SequenceLoads& loads, std::int64_t layer, std::int64_t num_domains,
                                   std::int64_t num_shuffles, std::uint64_t seed);

}  // namespace collegium::train
