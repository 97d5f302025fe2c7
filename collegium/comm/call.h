// SPDX-License-Identifier: Apache-2.0
#pragma once

// An operation as data: what a communicator's verbs produce, backends execute and decorators look at.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace collegium::comm {

enum class Operation : std::uint8_t {
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kBroadcast,
  kAllToAll,
  kSend,
  kRecv,
  kBarrier
};

enum class ReduceOp : std::uint8_t { kSum, kMax, kMin };

constexpr int kMostRanks = 1 << 14;  ///< of a world; more than that is a slip

/// What     The operation as the verbs spell it: "all_to_all".
std::string_view operation_name(Operation operation);

/// What     Whether the operation concerns two ranks (send, recv) rather than the whole group.
bool is_point_to_point(Operation operation);

/// Where in the program a rank is; the ledger sums by it and errors name it.
struct Where {
  std::int64_t step = -1;   ///< optimizer step, -1 = none
  std::int64_t layer = -1;  ///< layer of the model, -1 = none
  std::string phase;  ///< for instance "dispatch", "combine backward", "gradients"; at most 31 characters
};

/// What     "step 3, layer 2, dispatch", leaving out what is not set; empty when nothing is.
std::string describe_where(const Where& where);

/// Sets the place for the calls started while the scope lives, and puts the former one back.
class WhereScope {
 public:
  WhereScope(Where& current, Where next) : current_(current), former_(std::move(current)) {
    current_ = std::move(next);
  }
  ~WhereScope() { current_ = std::move(former_); }
  WhereScope(const WhereScope&) = delete;
  WhereScope& operator=(const WhereScope&) = delete;

 private:
  Where& current_;
  Where former_;
};

/// One rank of a group, seen from the whole world.
struct Member {
  int world_rank = 0;
  int node = 0;
};

/// The ranks that communicate, in group order, and this rank's place among them.
struct Group {
  std::string name;  ///< the axis: "world", "ep", "dp"; errors and the ledger use it
  int rank = 0;
  std::vector<Member> members;
  std::shared_ptr<Where> where;  ///< shared by all groups of this rank

  int size() const { return static_cast<int>(members.size()); }
};

/// Rows that go to, or come from, each rank of a group, cut into blocks. A sender and its receiver cut alike.
struct RankBlocks {
  std::vector<std::vector<std::int64_t>> rows;  ///< [rank][block]; ranks may have different numbers of blocks
  /// How they lie in the tensor: false: all blocks of rank 0, then of rank 1; true: the first blocks of all
  /// ranks, then the second blocks of all ranks.
  bool block_major = false;
  /// The rank that leaves its rows for itself where they are: they lie in the tensor, or there are none, and
  /// nothing is copied; the caller may write and read them while the call is under way. On both sides of a
  /// call or on neither; -1 = they are copied like the others.
  int stays = -1;
};

/// A run of rows in a tensor.
struct Piece {
  std::int64_t begin = 0;
  std::int64_t rows = 0;
};

/// One rank's part of an operation. Rows are slices along dim 0; operations on whole tensors have one entry
/// of numel() rows of one element.
struct Call {
  Operation operation = Operation::kBarrier;
  at::Tensor input;                     ///< what this rank contributes (undefined: nothing)
  at::Tensor output;                    ///< what this rank receives; the input itself for in-place operations
  std::vector<std::int64_t> send_rows;  ///< all_to_all, reduce_scatter: rows of the input for each rank
  std::vector<std::int64_t> recv_rows;  ///< all_to_all, all_gather: rows of the output from each rank
  /// all_to_all in blocks, else empty: where each rank's blocks lie, and the cut_number() of them.
  std::vector<std::vector<Piece>> send_pieces;
  std::vector<std::vector<Piece>> recv_pieces;
  std::vector<std::int64_t> send_cuts;
  std::vector<std::int64_t> recv_cuts;
  std::int64_t elements = 0;  ///< of the input (recv: of the output)
  std::int64_t row_elements = 1;
  at::ScalarType dtype = at::kByte;
  ReduceOp reduce = ReduceOp::kSum;
  int peer = -1;  ///< broadcast: root; send: destination; recv: source
  int tag = 0;    ///< send and recv
  Where where;

  std::int64_t row_bytes() const { return row_elements * static_cast<std::int64_t>(c10::elementSize(dtype)); }
};

/// What     Where the blocks lie, without those that stay or have no rows: what Call::send_pieces and
///          recv_pieces hold.
std::vector<std::vector<Piece>> lay_out(const RankBlocks& blocks);

/// What     all_to_all: the rows for (from) one rank, in or out of blocks; none when there are no rows.
std::vector<Piece> pieces_to(const Call& call, int rank);
std::vector<Piece> pieces_from(const Call& call, int rank);

/// What     A number that stands for the sizes of a rank's blocks; 0 for one block or none, which are no cut.
std::int64_t cut_number(const std::vector<Piece>& pieces);

/// What     Bytes that this rank sends to each rank of the group, itself excluded, by the algorithm all
///          backends use: every block goes straight to the rank that needs it. all_reduce is a reduce-
///          scatter of equal slices followed by an all-gather of them.
std::vector<std::int64_t> bytes_to_ranks(const Call& call, const Group& group);

/// What     First element of slice `index` when `count` elements are cut into `slices` slices whose sizes
///          differ by at most one: where all_reduce cuts. slice_begin(count, slices, slices) is count.
std::int64_t slice_begin(std::int64_t count, int slices, int index);

/// What     "all_to_all (call 7 of group 'ep'; step 3, layer 2, dispatch)": how errors name a call.
std::string describe_call(const Call& call, const Group& group, std::uint64_t number);

/// What     "ranks 1, 3 (world ranks 5, 7)": how errors name ranks of a group.
std::string describe_ranks(const Group& group, std::span<const int> ranks);

}  // namespace collegium::comm
