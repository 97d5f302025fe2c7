// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/specialization.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"

namespace collegium::train {

namespace {

using Table = std::vector<std::vector<std::int64_t>>;

Table count_by_domain(const SequenceLoads& loads, const std::vector<std::int64_t>& domain,
                      std::int64_t num_domains) {
  const std::size_t num_experts = loads.choices.empty() ? 0 : loads.choices[0].size();
  Table table(static_cast<std::size_t>(num_domains), std::vector<std::int64_t>(num_experts, 0));
  for (std::size_t sequence = 0; sequence < domain.size(); ++sequence) {
    auto& row = table[static_cast<std::size_t>(domain[sequence])];
    for (std::size_t expert = 0; expert < num_experts; ++expert)
      row[expert] += loads.choices[sequence][expert];
  }
  return table;
}

// Fisher-Yates with counter-based draws.
std::vector<std::int64_t> shuffled(std::vector<std::int64_t> labels, const RandomStream& stream,
                                   std::uint64_t shuffle) {
  for (std::size_t i = labels.size(); i > 1; --i) {
    std::swap(labels[i - 1], labels[stream.bits(i, shuffle) % i]);
  }
  return labels;
}

}  // namespace

double normalized_mutual_information(const Table& counts) {
  double total = 0.0;
  std::vector<double> by_domain(counts.size(), 0.0);
  std::vector<double> by_expert(counts.empty() ? 0 : counts[0].size(), 0.0);
  for (std::size_t d = 0; d < counts.size(); ++d) {
    for (std::size_t e = 0; e < by_expert.size(); ++e) {
      const auto count = static_cast<double>(counts[d][e]);
      by_domain[d] += count;
      by_expert[e] += count;
      total += count;
    }
  }
  if (total == 0.0) return 0.0;
  double information = 0.0;
  double entropy = 0.0;
  for (std::size_t d = 0; d < counts.size(); ++d) {
    if (by_domain[d] == 0.0) continue;
    entropy -= by_domain[d] / total * std::log(by_domain[d] / total);
    for (std::size_t e = 0; e < by_expert.size(); ++e) {
      const auto count = static_cast<double>(counts[d][e]);
      if (count > 0.0) information += count / total * std::log(count * total / (by_domain[d] * by_expert[e]));
    }
  }
  return entropy > 0.0 ? information / entropy : 0.0;
}

LayerSpecialization specialization(const SequenceLoads& loads, std::int64_t layer, std::int64_t num_domains,
                                   std::int64_t num_shuffles, std::uint64_t seed) {
  COLLEGIUM_CHECK(loads.domain.size() == loads.choices.size(), "{} labels for {} sequences",
                  loads.domain.size(), loads.choices.size());
  LayerSpecialization result;
  result.layer = layer;
  const Table counts = count_by_domain(loads, loads.domain, num_domains);
  for (const auto& row : counts) {
    const auto total = static_cast<double>(std::accumulate(row.begin(), row.end(), std::int64_t{0}));
    std::vector<double> share;
    for (const std::int64_t count : row)
      share.push_back(total > 0.0 ? static_cast<double>(count) / total : 0.0);
    result.share.push_back(share);
  }
  result.nmi = normalized_mutual_information(counts);
  const RandomStream stream(seed, "specialization/shuffle", static_cast<std::uint64_t>(layer));
  for (std::int64_t i = 0; i < num_shuffles; ++i) {
    const auto labels = shuffled(loads.domain, stream, static_cast<std::uint64_t>(i));
    const double nmi = normalized_mutual_information(count_by_domain(loads, labels, num_domains));
    result.nmi_shuffled += nmi / static_cast<double>(num_shuffles);
    result.nmi_shuffled_max = std::max(result.nmi_shuffled_max, nmi);
  }
  return result;
}

}  // namespace collegium::train
