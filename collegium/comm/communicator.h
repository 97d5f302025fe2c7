// SPDX-License-Identifier: Apache-2.0
#pragma once

// What ranks say to each other. Backends: local/ (ranks are threads of one process) and mpi/. Decorators wrap
// a communicator and are one: ledger (counts, times, cross-checks), emulated (the speed of a described
// network).
//
// Rules for all verbs. Every rank of the group makes the same collective calls in the same order; a rank's
// communicators are used by one thread at a time. Tensors are dense, row-major, on the CPU. A contribution of
// zero rows is always legal. Verbs that return a Work only start the operation. Reductions add in rank order,
// so all ranks and all runs get the same bits, whatever the backend.

#include <memory>
#include <span>
#include <string>

#include "collegium/comm/call.h"
#include "collegium/comm/errors.h"
#include "collegium/comm/work.h"

namespace collegium::comm {

/// Always owned by a std::shared_ptr; shared_from_this() is how a decorator gets hold of one.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return group_.rank; }
  int size() const { return group_.size(); }
  const std::string& name() const { return group_.name; }
  const Group& group() const { return group_; }
  /// The node (machine, or described machine) of a rank of this group.
  int node(int group_rank) const { return group_.members.at(static_cast<std::size_t>(group_rank)).node; }
  /// Where this rank is in the program: shared by all its groups, read when a call starts. Set with
  /// WhereScope.
  Where& where() const { return *group_.where; }

  /// What     Element-wise sum, maximum or minimum over the ranks, in place.
  /// Shape    the same on all ranks.
  /// Dtype    float64, float32, bfloat16 (added in float32, rounded once), int64.
  /// Comm     2·bytes·(size-1)/size sent per rank.
  Work all_reduce(const at::Tensor& tensor, ReduceOp op = ReduceOp::kSum);

  /// What     Every rank gets the rows of all ranks, in rank order.
  /// Shape    input [rows_r, ...], output [sum of rows, ...]; `rows` lists rows_r of every rank and is the
  ///          same on all of them; left empty, every rank contributes as many.
  /// Dtype    any.
  /// Comm     bytes(input)·(size-1) sent per rank.
  Work all_gather(const at::Tensor& input, const at::Tensor& output, std::span<const std::int64_t> rows = {});

  /// What     Rank r gets its rows of the element-wise reduction of all inputs.
  /// Shape    input [sum of rows, ...], output [rows_r, ...]; `rows` as in all_gather.
  /// Dtype    as all_reduce.
  /// Comm     bytes of the other ranks' rows sent per rank.
  Work reduce_scatter(const at::Tensor& input, const at::Tensor& output, ReduceOp op = ReduceOp::kSum,
                      std::span<const std::int64_t> rows = {});

  /// What     The root's tensor on all ranks, in place.
  /// Shape    the same on all ranks.
  /// Dtype    any.
  /// Comm     bytes·(size-1) sent by the root.
  Work broadcast(const at::Tensor& tensor, int root);

  /// What     Rank r sends its next send_rows[p] rows to each rank p and gets recv_rows[p] rows from it, in
  ///          rank order.
  /// Shape    input [sum send_rows, ...], output [sum recv_rows, ...]; recv_rows[p] here = send_rows[r] on
  ///          p. Both left empty: input and output are cut into equal parts.
  /// Dtype    any.
  /// Comm     bytes of the rows for other ranks sent per rank.
  Work all_to_all(const at::Tensor& input, const at::Tensor& output,
                  std::span<const std::int64_t> send_rows = {}, std::span<const std::int64_t> recv_rows = {});

  /// What     The same in blocks, which may lie in another order on either side: what experts compute on is
  ///          by expert, what travels by rank. Rows of this rank for itself may stay where they are.
  /// Shape    as above; send.rows[p] here = recv.rows[r] on p, unless they stay.
  /// Dtype    any.
  /// Comm     as above.
  Work all_to_all(const at::Tensor& input, const at::Tensor& output, const RankBlocks& send,
                  const RankBlocks& recv);

  /// What     A tensor to one rank. Messages of one pair and tag arrive in order. May complete only after
  ///          the receiver has called recv.
  /// Shape    as the receiver's.
  /// Dtype    any.
  /// Comm     bytes(tensor). `tag` is in [0, 4095].
  Work send(const at::Tensor& tensor, int destination, int tag = 0);
  /// What     The tensor that `source` sends with the same tag.
  Work recv(const at::Tensor& tensor, int source, int tag = 0);

  /// What     Returns when every rank of the group has called it.
  void barrier();

  /// What     New groups: ranks of the same colour, ordered by (key, rank). Collective over this group.
  /// Returns  This rank's group, called `name`; nothing for a negative colour.
  virtual std::shared_ptr<Communicator> split(int color, int key, const std::string& name) = 0;

  /// What     Starts a call whose arguments were checked: what the verbs do, and decorators pass on.
  virtual Work start(Call call) = 0;

 protected:
  explicit Communicator(Group group) : group_(std::move(group)) {}

  /// The group that split() makes for this rank, agreed with the others; no members for a negative colour.
  Group agree_on_split(int color, int key, const std::string& name);

 private:
  Call prepare(Operation operation, const at::Tensor& input, const at::Tensor& output) const;
  Call prepare_all_to_all(const at::Tensor& input, const at::Tensor& output,
                          std::span<const std::int64_t> send_rows,
                          std::span<const std::int64_t> recv_rows) const;

  Group group_;
};

}  // namespace collegium::comm
