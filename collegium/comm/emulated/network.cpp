// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/emulated/network.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <string_view>

#include "collegium/base/error.h"

namespace collegium::comm {

namespace {

[[noreturn]] void refuse(std::string_view field, std::string_view value, std::string_view rule) {
  throw ConfigError(
      fmt::format("network: {}{}: {}", field, value.empty() ? "" : fmt::format(" = \"{}\"", value), rule));
}

// A positive number with a unit of the table.
double quantity(std::string_view field, std::string_view text,
                const std::map<std::string_view, double>& units, std::string_view rule) {
  double value = 0.0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view unit = text.substr(static_cast<std::size_t>(result.ptr - text.data()));
  if (result.ec != std::errc() || !units.contains(unit)) refuse(field, text, rule);
  value *= units.at(unit);
  if (!(value >= 0.0) || !std::isfinite(value)) refuse(field, text, rule);
  return value;
}

Link parse_link(std::string_view field, std::string_view text) {
  const std::size_t colon = text.find(':');
  if (colon == std::string_view::npos)
    refuse(field, text, "write bandwidth:latency, for instance 50GB/s:10us");
  const Link link = {.bytes_per_s = quantity(field, text.substr(0, colon),
                                             {{"B/s", 1.0}, {"KB/s", 1e3}, {"MB/s", 1e6}, {"GB/s", 1e9}},
                                             "a bandwidth in B/s, KB/s, MB/s or GB/s"),
                     .latency_s = quantity(field, text.substr(colon + 1),
                                           {{"s", 1.0}, {"ms", 1e-3}, {"us", 1e-6}, {"ns", 1e-9}},
                                           "a latency in s, ms, us or ns")};
  if (link.bytes_per_s <= 0.0) refuse(field, text, "the bandwidth must be positive");
  return link;
}

int parse_count(std::string_view field, std::string_view text) {
  int value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec != std::errc() || result.ptr != text.data() + text.size() || value < 1)
    refuse(field, text, "write nodes x ranks per node, both at least 1, for instance 2x4");
  return value;
}

struct Arrival {
  double head = 0.0;
  double tail = 0.0;
  double duration = 0.0;
  std::size_t link = 0;
};

std::size_t link_between(const Member& a, const Member& b) { return a.node == b.node ? 0 : 1; }

}  // namespace

Network parse_network(const std::string& text) {
  std::map<std::string_view, std::string_view> fields;
  for (std::string_view rest = text; !rest.empty();) {
    const std::string_view part = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(part.size() + 1, rest.size()));
    const std::size_t equals = part.find('=');
    if (equals == std::string_view::npos) refuse(part, "", "write name=value");
    const auto [known, is_new] = fields.emplace(part.substr(0, equals), part.substr(equals + 1));
    if (!is_new) refuse(known->first, part.substr(equals + 1), "given twice");
  }
  for (const auto& [name, value] : fields) {
    if (name != "nodes" && name != "intra" && name != "inter" && name != "scale")
      refuse(name, value, "unknown; known are nodes, intra, inter, scale");
  }
  for (const char* name : {"nodes", "intra", "inter"}) {
    if (!fields.contains(name)) refuse(name, "", "must be given");
  }
  Network network;
  const std::string_view nodes = fields["nodes"];
  const std::size_t cross = nodes.find('x');
  if (cross == std::string_view::npos)
    refuse("nodes", nodes, "write nodes x ranks per node, for instance 2x4");
  network.nodes = parse_count("nodes", nodes.substr(0, cross));
  network.ranks_per_node = parse_count("nodes", nodes.substr(cross + 1));
  if (network.nodes > kMostRanks / network.ranks_per_node)
    refuse("nodes", nodes, fmt::format("at most {} ranks in all", kMostRanks));
  network.links = {parse_link("intra", fields["intra"]), parse_link("inter", fields["inter"])};
  const double scale =
      fields.contains("scale") ? quantity("scale", fields["scale"], {{"", 1.0}}, "a positive number") : 1.0;
  if (scale <= 0.0) refuse("scale", fields["scale"], "must be positive");
  for (Link& link : network.links) {
    link.bytes_per_s /= scale;
    link.latency_s *= scale;
    // So that times are nanoseconds of 63 bits, for messages of up to 9e12 bytes.
    constexpr double kSlowest = 1e3;
    constexpr double kLongest = 1e6;
    if (link.bytes_per_s < kSlowest || link.latency_s > kLongest)
      refuse("scale", fields["scale"], "leaves a link less than 1 KB/s, or a latency above 1e6 s");
  }
  return network;
}

std::vector<double> simulate_round(const Network& network, std::span<const Member> members,
                                   std::span<const std::vector<std::int64_t>> bytes,
                                   std::span<PortState> ports, bool even_empty) {
  const std::size_t size = members.size();
  std::vector<double> ends(size);
  std::vector<std::vector<Arrival>> arrivals(size);
  for (std::size_t from = 0; from < size; ++from) {
    ends[from] = ports[from].posted;
    std::array<double, 2> sent_s = {0.0, 0.0};
    for (std::size_t to = 0; to < size; ++to) {
      if (to == from || (bytes[from][to] == 0 && !even_empty)) continue;
      const std::size_t link = link_between(members[from], members[to]);
      const double start = std::max(ports[from].posted, ports[from].sends_until[link]);
      sent_s[link] += static_cast<double>(bytes[from][to]) / network.links[link].bytes_per_s;
      // The port serves all its messages in turns, so a message is through when every other one has got as
      // far, or ended.
      double shared_bytes = 0.0;
      for (std::size_t other = 0; other < size; ++other) {
        if (other != from && link_between(members[from], members[other]) == link)
          shared_bytes += static_cast<double>(std::min(bytes[from][other], bytes[from][to]));
      }
      const Link& wire = network.links[link];
      arrivals[to].push_back({.head = start + wire.latency_s,
                              .tail = start + wire.latency_s + shared_bytes / wire.bytes_per_s,
                              .duration = static_cast<double>(bytes[from][to]) / wire.bytes_per_s,
                              .link = link});
    }
    for (std::size_t link = 0; link < 2; ++link) {
      if (sent_s[link] == 0.0) continue;
      double& sends_until = ports[from].sends_until[link];
      sends_until = std::max(ports[from].posted, sends_until) + sent_s[link];
      ends[from] = std::max(ends[from], sends_until);
    }
  }
  for (std::size_t to = 0; to < size; ++to) {
    std::stable_sort(arrivals[to].begin(), arrivals[to].end(),
                     [](const Arrival& a, const Arrival& b) { return a.head < b.head; });
    for (const Arrival& arrival : arrivals[to]) {
      double& receives_until = ports[to].receives_until[arrival.link];
      receives_until = std::max(receives_until, arrival.head) + arrival.duration;
      ends[to] = std::max({ends[to], receives_until, arrival.tail});
    }
  }
  return ends;
}

std::vector<double> simulate_collective(const Network& network, std::span<const Member> members,
                                        const Call& call, std::span<const std::vector<std::int64_t>> bytes,
                                        std::span<PortState> ports) {
  if (call.operation != Operation::kAllReduce)
    return simulate_round(network, members, bytes, ports, call.operation == Operation::kBarrier);
  const auto size = static_cast<int>(members.size());
  std::vector<std::int64_t> slice;
  for (int r = 0; r < size; ++r)
    slice.push_back((slice_begin(call.elements, size, r + 1) - slice_begin(call.elements, size, r)) *
                    call.row_bytes());
  const std::vector<std::vector<std::int64_t>> scatter(members.size(), slice);
  std::vector<std::vector<std::int64_t>> gather;
  for (const std::int64_t own : slice) gather.emplace_back(members.size(), own);
  const std::vector<double> scattered = simulate_round(network, members, scatter, ports, false);
  for (std::size_t r = 0; r < members.size(); ++r) ports[r].posted = scattered[r];
  return simulate_round(network, members, gather, ports, false);
}

}  // namespace collegium::comm
