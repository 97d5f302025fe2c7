// SPDX-License-Identifier: Apache-2.0
#include "tests/comm/verb_cases.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <numeric>

#include "collegium/base/rng.h"
#include "collegium/comm/shared_memory.h"

namespace collegium::comm {

namespace {

constexpr std::array kReducible = {at::kDouble, at::kFloat, at::kBFloat16, at::kLong};

// The tensor that `rank` contributes, known to all ranks.
at::Tensor data_of(int rank, std::int64_t rows, std::int64_t width, at::ScalarType dtype,
                   std::uint64_t salt = 0) {
  const RandomStream random(17, "comm test", static_cast<std::uint64_t>(rank), salt);
  at::Tensor tensor = at::empty({rows, width}, at::kDouble);
  auto* values = tensor.data_ptr<double>();
  for (std::int64_t i = 0; i < tensor.numel(); ++i)
    values[i] = 200.0 * random.uniform(static_cast<std::uint64_t>(i)) - 100.0;
  return tensor.to(dtype);
}

// The reduction of the ranks' tensors as reduce.h promises it: in rank order, bfloat16 in float32.
at::Tensor reduced(int size, std::int64_t rows, std::int64_t width, at::ScalarType dtype, ReduceOp op) {
  const at::ScalarType wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
  at::Tensor result = data_of(0, rows, width, dtype).to(wide);
  for (int rank = 1; rank < size; ++rank) {
    const at::Tensor next = data_of(rank, rows, width, dtype).to(wide);
    result = op == ReduceOp::kSum   ? result + next
             : op == ReduceOp::kMax ? at::maximum(result, next)
                                    : at::minimum(result, next);
  }
  return result.to(dtype);
}

// Uneven on purpose; rank 1 (and every fifth after it) has nothing.
std::int64_t rows_of(int rank) { return rank % 5 == 1 ? 0 : 3 + 2 * rank; }
std::int64_t rows_between(int from, int to) { return (from + 2 * to) % 4 == 0 ? 0 : 1 + (3 * from + to) % 5; }

std::vector<std::int64_t> rows_of_all(int size) {
  std::vector<std::int64_t> rows;
  for (int rank = 0; rank < size; ++rank) rows.push_back(rows_of(rank));
  return rows;
}

std::int64_t total(const std::vector<std::int64_t>& rows) {
  return std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
}

void expect_same(const at::Tensor& actual, const at::Tensor& expected, const Communicator& comm) {
  EXPECT_TRUE(at::equal(actual, expected)) << "on rank " << comm.rank() << " of " << comm.size() << ", dtype "
                                           << c10::toString(actual.scalar_type());
}

void all_reduce_equals_the_sum_in_rank_order(Communicator& comm) {
  for (const at::ScalarType dtype : kReducible) {
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      // 0 and 1 elements, fewer than ranks, and enough for several parts and slices of different size.
      for (const std::int64_t rows :
           {std::int64_t{0}, std::int64_t{1}, std::int64_t{5}, std::int64_t{30011}}) {
        const std::int64_t width = rows == 1 ? 1 : 3;
        const at::Tensor tensor = data_of(comm.rank(), rows, width, dtype);
        comm.all_reduce(tensor, op).wait();
        expect_same(tensor, reduced(comm.size(), rows, width, dtype, op), comm);
      }
    }
  }
}

void all_gather_takes_uneven_and_empty_shares(Communicator& comm) {
  const std::vector<std::int64_t> rows = rows_of_all(comm.size());
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kByte}) {
    for (const std::int64_t width : {4, 20011}) {
      const at::Tensor output = at::empty({total(rows), width}, dtype);
      comm.all_gather(data_of(comm.rank(), rows_of(comm.rank()), width, at::kLong).abs().to(dtype), output,
                      rows)
          .wait();
      std::vector<at::Tensor> parts;
      for (int r = 0; r < comm.size(); ++r)
        parts.push_back(data_of(r, rows_of(r), width, at::kLong).abs().to(dtype));
      expect_same(output, at::cat(parts), comm);
    }
  }
  const at::Tensor equal = at::empty({2 * comm.size(), 3}, at::kDouble);
  comm.all_gather(data_of(comm.rank(), 2, 3, at::kDouble), equal).wait();
  expect_same(equal.narrow(0, 2 * (comm.size() - 1), 2), data_of(comm.size() - 1, 2, 3, at::kDouble), comm);
}

void reduce_scatter_takes_uneven_and_empty_shares(Communicator& comm) {
  const std::vector<std::int64_t> rows = rows_of_all(comm.size());
  for (const at::ScalarType dtype : kReducible) {
    for (const std::int64_t width : {4, 10007}) {
      const at::Tensor output = at::empty({rows_of(comm.rank()), width}, dtype);
      comm.reduce_scatter(data_of(comm.rank(), total(rows), width, dtype), output, ReduceOp::kSum, rows)
          .wait();
      const at::Tensor all = reduced(comm.size(), total(rows), width, dtype, ReduceOp::kSum);
      std::int64_t begin = 0;
      for (int r = 0; r < comm.rank(); ++r) begin += rows_of(r);
      expect_same(output, all.narrow(0, begin, rows_of(comm.rank())), comm);
    }
  }
}

void broadcast_gives_the_root_s_bits(Communicator& comm) {
  for (int root = 0; root < comm.size(); ++root) {
    for (const std::int64_t rows : {0, 1, 50021}) {
      const at::Tensor tensor = data_of(comm.rank(), rows, 3, at::kFloat);
      comm.broadcast(tensor, root).wait();
      expect_same(tensor, data_of(root, rows, 3, at::kFloat), comm);
    }
  }
}

void all_to_all_moves_uneven_rows(Communicator& comm) {
  std::vector<std::int64_t> send_rows;
  std::vector<std::int64_t> recv_rows;
  for (int r = 0; r < comm.size(); ++r) {
    send_rows.push_back(rows_between(comm.rank(), r));
    recv_rows.push_back(rows_between(r, comm.rank()));
  }
  for (const at::ScalarType dtype : {at::kBFloat16, at::kDouble}) {
    for (const std::int64_t width : {1, 7, 30011}) {
      std::vector<at::Tensor> sent;
      std::vector<at::Tensor> expected;
      for (int r = 0; r < comm.size(); ++r) {
        sent.push_back(data_of(comm.rank(), rows_between(comm.rank(), r), width, dtype,
                               1 + static_cast<std::uint64_t>(r)));
        expected.push_back(data_of(r, rows_between(r, comm.rank()), width, dtype,
                                   1 + static_cast<std::uint64_t>(comm.rank())));
      }
      const at::Tensor output = at::empty({total(recv_rows), width}, dtype);
      comm.all_to_all(at::cat(sent), output, send_rows, recv_rows).wait();
      expect_same(output, at::cat(expected), comm);
    }
  }
}

// Rank r has for every rank p one block for each of p's (p % 3) + 1 "experts"; some are empty.
std::int64_t block_rows(int from, int to, int block, std::int64_t scale) {
  return (from + to + 2 * block) % 4 == 0 ? 0 : scale + (3 * from + to + block) % 5;
}

at::Tensor block_data(int from, int to, int block, std::int64_t scale, std::int64_t width) {
  return data_of(from, block_rows(from, to, block, scale), width, at::kBFloat16,
                 100 + 10 * static_cast<std::uint64_t>(to) + static_cast<std::uint64_t>(block));
}

// What travels lies by rank, what experts compute on by block, and back.
void all_to_all_orders_blocks(Communicator& comm) {
  const auto blocks_of = [](int rank) { return rank % 3 + 1; };
  // Rows of 2 and of 1000 values: blocks below and above what MPI sends as one message each.
  for (const auto& [scale, width] : {std::pair{1, 2}, {0, 5}, {60, 1000}}) {
    RankBlocks by_rank;
    RankBlocks by_block{.rows = {}, .block_major = true};
    std::vector<at::Tensor> outgoing;
    std::vector<at::Tensor> incoming;
    for (int peer = 0; peer < comm.size(); ++peer) {
      by_rank.rows.emplace_back();
      by_block.rows.emplace_back();
      for (int block = 0; block < blocks_of(peer); ++block) {
        by_rank.rows.back().push_back(block_rows(comm.rank(), peer, block, scale));
        outgoing.push_back(block_data(comm.rank(), peer, block, scale, width));
      }
      for (int block = 0; block < blocks_of(comm.rank()); ++block)
        by_block.rows.back().push_back(block_rows(peer, comm.rank(), block, scale));
    }
    for (int block = 0; block < blocks_of(comm.rank()); ++block) {
      for (int peer = 0; peer < comm.size(); ++peer)
        incoming.push_back(block_data(peer, comm.rank(), block, scale, width));
    }
    const at::Tensor sent = at::cat(outgoing);
    const at::Tensor expected = at::cat(incoming);
    const at::Tensor arrived = at::empty_like(expected);
    comm.all_to_all(sent, arrived, by_rank, by_block).wait();
    expect_same(arrived, expected, comm);
    const at::Tensor returned = at::empty_like(sent);
    comm.all_to_all(arrived, returned, by_block, by_rank).wait();
    expect_same(returned, sent, comm);
  }
}

// `sent` with ones where rows of the rank for itself lie.
at::Tensor with_own_rows(const at::Tensor& sent, const RankBlocks& by_rank, int rank) {
  std::int64_t before = 0;
  for (int peer = 0; peer < rank; ++peer) before += total(by_rank.rows[static_cast<std::size_t>(peer)]);
  const std::int64_t own = total(by_rank.rows[static_cast<std::size_t>(rank)]);
  return at::cat({sent.narrow(0, 0, before), at::ones({own, sent.size(1)}, sent.options()),
                  sent.narrow(0, before, sent.size(0) - before)});
}

// Rows of a rank for itself: among what experts compute on they keep their place, and they are not among what
// travels.
void all_to_all_leaves_own_rows(Communicator& comm) {
  constexpr double kUntouched = -5.0;
  for (const auto& [scale, width] : {std::pair{1, 2}, {0, 5}, {60, 1000}}) {
    RankBlocks by_rank{.rows = {}, .block_major = false, .stays = comm.rank()};
    RankBlocks by_block{.rows = {}, .block_major = true, .stays = comm.rank()};
    std::vector<at::Tensor> outgoing = {at::empty({0, width}, at::kBFloat16)};
    std::vector<at::Tensor> incoming;
    constexpr int kBlocks = 2;
    for (int peer = 0; peer < comm.size(); ++peer) {
      by_rank.rows.emplace_back();
      by_block.rows.emplace_back();
      for (int block = 0; block < kBlocks; ++block) {
        by_block.rows.back().push_back(block_rows(peer, comm.rank(), block, scale));
        if (peer == comm.rank()) continue;
        by_rank.rows.back().push_back(block_rows(comm.rank(), peer, block, scale));
        outgoing.push_back(block_data(comm.rank(), peer, block, scale, width));
      }
    }
    for (int block = 0; block < kBlocks; ++block) {
      for (int peer = 0; peer < comm.size(); ++peer) {
        incoming.push_back(block_data(peer, comm.rank(), block, scale, width));
        if (peer == comm.rank()) incoming.back().fill_(kUntouched);
      }
    }
    const at::Tensor sent = at::cat(outgoing);
    const at::Tensor expected = at::cat(incoming);
    const at::Tensor arrived = at::full_like(expected, kUntouched);
    comm.all_to_all(sent, arrived, by_rank, by_block).wait();
    expect_same(arrived, expected, comm);
    const at::Tensor returned = at::empty_like(sent);
    Work work = comm.all_to_all(arrived, returned, by_block, by_rank);
    // The caller may do with its own rows what it likes while others travel.
    const auto rank = static_cast<std::size_t>(comm.rank());
    const RankBlocks all{.rows = by_block.rows, .block_major = true, .stays = -1};
    const std::vector<std::vector<Piece>> places = lay_out(all);
    for (const Piece& own : places[rank]) arrived.narrow(0, own.begin, own.rows).fill_(1.0);
    work.wait();
    expect_same(returned, sent, comm);
    // On both sides among the others.
    by_rank.rows[rank] = by_block.rows[rank];
    const at::Tensor again = at::full_like(expected, kUntouched);
    comm.all_to_all(with_own_rows(sent, by_rank, comm.rank()), again, by_rank, by_block).wait();
    expect_same(again, expected, comm);
  }
}

void all_to_all_of_nothing_is_legal(Communicator& comm) {
  const std::vector<std::int64_t> none(static_cast<std::size_t>(comm.size()), 0);
  comm.all_to_all(at::empty({0, 8}), at::empty({0, 8}), none, none).wait();
  // Everything to the last rank: all others receive nothing.
  std::vector<std::int64_t> send_rows = none;
  send_rows.back() = 2;
  std::vector<std::int64_t> recv_rows = none;
  if (comm.rank() == comm.size() - 1) recv_rows.assign(recv_rows.size(), 2);
  const at::Tensor output = at::empty({total(recv_rows), 8});
  comm.all_to_all(at::full({2, 8}, static_cast<double>(comm.rank())), output, send_rows, recv_rows).wait();
  for (std::int64_t i = 0; i < output.size(0); ++i)
    EXPECT_TRUE(at::equal(output[i], at::full({8}, static_cast<double>(i / 2))));
}

void many_operations_may_be_under_way(Communicator& comm) {
  const Communicator& c = comm;
  std::vector<at::Tensor> tensors;
  std::vector<Work> works;
  for (int i = 0; i < 6; ++i) {
    tensors.push_back(at::full({50000}, static_cast<double>(c.rank() + i), at::kDouble));
    works.push_back(comm.all_reduce(tensors.back()));
  }
  for (int i = 5; i >= 0; --i) {
    works[static_cast<std::size_t>(i)].wait();
    EXPECT_TRUE(works[static_cast<std::size_t>(i)].done());
    const double expected = c.size() * (c.size() - 1) / 2.0 + c.size() * i;
    EXPECT_EQ(tensors[static_cast<std::size_t>(i)][49999].item<double>(), expected);
  }
}

void messages_of_a_pair_arrive_in_order(Communicator& comm) {
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  std::vector<at::Tensor> sent;
  std::vector<at::Tensor> received;
  std::vector<Work> works;
  for (const std::int64_t rows : {1, 0, 60013}) {
    for (const int tag : {0, 3}) {
      sent.push_back(data_of(comm.rank(), rows, 2, at::kFloat, static_cast<std::uint64_t>(tag)));
      received.push_back(at::empty({rows, 2}));
      works.push_back(comm.recv(received.back(), previous, tag));
      works.push_back(comm.send(sent.back(), next, tag));
    }
  }
  for (Work& work : works) work.wait();
  std::size_t i = 0;
  for (const std::int64_t rows : {1, 0, 60013}) {
    for (const int tag : {0, 3})
      expect_same(received[i++], data_of(previous, rows, 2, at::kFloat, static_cast<std::uint64_t>(tag)),
                  comm);
  }
}

void split_makes_groups_by_colour_and_key(Communicator& comm) {
  // Even and odd ranks, each in reverse order; the last rank stays out.
  const bool out = comm.size() > 2 && comm.rank() == comm.size() - 1;
  const auto half = comm.split(out ? -1 : comm.rank() % 2, -comm.rank(), "half");
  ASSERT_EQ(half == nullptr, out);
  const auto same = comm.split(0, comm.rank(), "same");
  if (half) {
    EXPECT_EQ(half->name(), "half");
    EXPECT_EQ(half->group().members[static_cast<std::size_t>(half->rank())].world_rank,
              comm.group().members[static_cast<std::size_t>(comm.rank())].world_rank);
    const at::Tensor ranks = at::empty({half->size()}, at::kLong);
    half->all_gather(at::full({1}, comm.rank(), at::kLong), ranks).wait();
    for (int r = 1; r < half->size(); ++r)
      EXPECT_EQ(ranks[r - 1].item<std::int64_t>(), ranks[r].item<std::int64_t>() + 2);
    // A split of a split, and both levels in use in between.
    const auto alone = half->split(half->rank(), 0, "alone");
    EXPECT_EQ(alone->size(), 1);
    const at::Tensor one = at::ones({3});
    alone->all_reduce(one).wait();
    EXPECT_TRUE(at::equal(one, at::ones({3})));
    half->barrier();
  }
  const at::Tensor count = at::ones({1}, at::kLong);
  same->all_reduce(count).wait();
  EXPECT_EQ(count.item<std::int64_t>(), comm.size());
  comm.barrier();
}

void reruns_give_the_same_bits(Communicator& comm) {
  const at::Tensor first = data_of(comm.rank(), 40009, 1, at::kFloat);
  comm.all_reduce(first).wait();
  for (int run = 0; run < 3; ++run) {
    const at::Tensor again = data_of(comm.rank(), 40009, 1, at::kFloat);
    comm.all_reduce(again).wait();
    expect_same(again, first, comm);
  }
  const at::Tensor root_s = first.clone();
  comm.broadcast(root_s, 0).wait();
  expect_same(root_s, first, comm);
}

void shared_memory_is_one_for_all_ranks(Communicator& comm) {
  constexpr std::int64_t kOfRank = 5000;  // more than a page
  const std::int64_t bytes = kOfRank * comm.size();
  const auto memory = SharedMemory::create(comm, bytes);
  EXPECT_EQ(memory->bytes(), bytes);
  EXPECT_TRUE(
      std::all_of(memory->data(), memory->data() + bytes, [](std::byte b) { return b == std::byte{0}; }));
  comm.barrier();
  for (int round = 1; round < 4; ++round) {
    const auto value = [round](int rank) { return static_cast<std::byte>(16 * round + rank); };
    std::fill_n(memory->data() + kOfRank * comm.rank(), kOfRank, value(comm.rank()));
    comm.barrier();
    for (int rank = 0; rank < comm.size(); ++rank) {
      const std::byte* of_rank = memory->data() + kOfRank * rank;
      EXPECT_TRUE(std::all_of(of_rank, of_rank + kOfRank, [&](std::byte b) { return b == value(rank); }))
          << "rank " << comm.rank() << " reads of rank " << rank << " in round " << round;
    }
    comm.barrier();
  }
}

}  // namespace

const std::vector<VerbCase>& verb_cases() {
  static const std::vector<VerbCase> kCases = {
      {"all_reduce", all_reduce_equals_the_sum_in_rank_order},
      {"all_gather", all_gather_takes_uneven_and_empty_shares},
      {"reduce_scatter", reduce_scatter_takes_uneven_and_empty_shares},
      {"broadcast", broadcast_gives_the_root_s_bits},
      {"all_to_all", all_to_all_moves_uneven_rows},
      {"all_to_all_in_blocks", all_to_all_orders_blocks},
      {"all_to_all_leaves_own_rows", all_to_all_leaves_own_rows},
      {"all_to_all_of_nothing", all_to_all_of_nothing_is_legal},
      {"many_under_way", many_operations_may_be_under_way},
      {"send_recv", messages_of_a_pair_arrive_in_order},
      {"split", split_makes_groups_by_colour_and_key},
      {"reruns", reruns_give_the_same_bits},
      {"shared_memory", shared_memory_is_one_for_all_ranks}};
  return kCases;
}

void disagree_on_blocks(Communicator& comm) {
  const RankBlocks send{.rows = {{1, 2}, {1, 2}}, .block_major = false};
  RankBlocks recv = send;
  if (comm.rank() == 1) recv.rows[0] = {2, 1};
  comm.all_to_all(at::ones({6, 3}), at::ones({6, 3}), send, recv).wait();
}

}  // namespace collegium::comm
