// SPDX-License-Identifier: Apache-2.0
#pragma once

// A described cluster network and when it would have delivered messages. Pure arithmetic: no clock, no
// communication.

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "collegium/comm/call.h"

namespace collegium::comm {

struct Link {
  double bytes_per_s = 0.0;  ///< of one rank, each direction
  double latency_s = 0.0;
};

/// Ranks [0, ranks_per_node) are node 0, and so on. Every rank has one port to its node and one to the other
/// nodes, both full duplex.
struct Network {
  int nodes = 1;
  int ranks_per_node = 1;
  std::array<Link, 2> links;  ///< within a node, between nodes; the scale factor is applied already

  int node_of(int world_rank) const { return world_rank / ranks_per_node; }
};

/// What     Reads "nodes=2x2,intra=300GB/s:2us,inter=50GB/s:10us" (nodes x ranks per node,
///          bandwidth:latency), optionally with ",scale=16": every transfer takes that many times longer.
///          With ranks per core as scale, the network is slowed as much as the computation of ranks that
///          share cores. Units: B/s, KB/s, MB/s, GB/s (powers of 1000); s, ms, us, ns.
/// Throws   ConfigError naming the part that is wrong.
Network parse_network(const std::string& text);

/// One rank as the network sees it when a call begins; times in seconds of any common clock.
struct PortState {
  double posted = 0.0;
  std::array<double, 2> sends_until{};     ///< each port (links' order) is busy sending until then
  std::array<double, 2> receives_until{};  ///< ... receiving
};

/// What     When each rank has sent and received everything of one round in which rank i sends bytes[i][j]
///          to j.
/// Math     A sending port serves its messages in turns: the one of b bytes is sent at start + (sum over
///          the port's messages of min(b', b)) / bandwidth, start = max(posted, port free), and arrives
///          `latency` later. A receiving port is through when the bytes of all messages have passed since
///          their heads came. Alone, a message takes latency + bytes / bandwidth; an even exchange takes
///          latency + (bytes of the busiest port) / bandwidth. Messages of no bytes are not sent, unless
///          `even_empty`.
/// Order    ports are those before the round on entry, after it on return.
std::vector<double> simulate_round(const Network& network, std::span<const Member> members,
                                   std::span<const std::vector<std::int64_t>> bytes,
                                   std::span<PortState> ports, bool even_empty);

/// What     When each rank has finished a collective call. `bytes[i]` is bytes_to_ranks() of rank i; for an
///          all_reduce two rounds are simulated, the second beginning on each rank when the first has ended
///          there.
std::vector<double> simulate_collective(const Network& network, std::span<const Member> members,
                                        const Call& call, std::span<const std::vector<std::int64_t>> bytes,
                                        std::span<PortState> ports);

}  // namespace collegium::comm
