// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/communicator.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

namespace collegium::comm {

namespace {

constexpr int kMaxTag = 4095;

std::int64_t sum(std::span<const std::int64_t> values) {
  return std::accumulate(values.begin(), values.end(), std::int64_t{0});
}

std::int64_t elements_per_row(const at::Tensor& tensor) {
  std::int64_t elements = 1;
  for (std::int64_t dim = 1; dim < tensor.dim(); ++dim) elements *= tensor.size(dim);
  return elements;
}

void check_tensor(std::string_view verb, std::string_view name, const at::Tensor& tensor) {
  COLLEGIUM_CHECK(tensor.defined(), "{}: {} is undefined", verb, name);
  COLLEGIUM_CHECK(tensor.device().is_cpu(), "{}: {} is on {}, must be on the CPU", verb, name,
                  tensor.device().str());
  COLLEGIUM_CHECK(tensor.is_contiguous(), "{}: {} must be contiguous, its strides are not", verb, name);
}

void check_reducible(std::string_view verb, at::ScalarType dtype) {
  const bool known =
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kLong;
  COLLEGIUM_CHECK(known, "{}: dtype {} cannot be reduced, must be float64, float32, bfloat16 or int64", verb,
                  c10::toString(dtype));
}

void check_peer(std::string_view verb, std::string_view name, int peer, const Group& group) {
  COLLEGIUM_CHECK(peer >= 0 && peer < group.size(), "{}: {} = {}, group '{}' has ranks 0 to {}", verb, name,
                  peer, group.name, group.size() - 1);
}

// Rows per rank as the caller gave them, or equal shares of `total`.
std::vector<std::int64_t> rows_or_equal(std::string_view verb, std::string_view name,
                                        std::span<const std::int64_t> rows, std::int64_t total, int size) {
  if (rows.empty()) {
    COLLEGIUM_CHECK(total % size == 0, "{}: {} are not given and {} rows do not divide over {} ranks", verb,
                    name, total, size);
    return std::vector<std::int64_t>(static_cast<std::size_t>(size), total / size);
  }
  COLLEGIUM_CHECK(static_cast<int>(rows.size()) == size, "{}: {} has {} entries for {} ranks", verb, name,
                  rows.size(), size);
  for (const std::int64_t count : rows) COLLEGIUM_CHECK(count >= 0, "{}: {} holds {} < 0", verb, name, count);
  COLLEGIUM_CHECK(sum(rows) == total, "{}: {} sum to {}, the tensor has {} rows", verb, name, sum(rows),
                  total);
  return {rows.begin(), rows.end()};
}

std::vector<std::int64_t> rows_per_rank(std::string_view name, const RankBlocks& blocks) {
  std::vector<std::int64_t> rows;
  rows.reserve(blocks.rows.size());
  for (const std::vector<std::int64_t>& of_rank : blocks.rows) {
    for (const std::int64_t count : of_rank)
      COLLEGIUM_CHECK(count >= 0, "all_to_all: a block of {} has {} < 0 rows", name, count);
    rows.push_back(sum(of_rank));
  }
  return rows;
}

}  // namespace

Call Communicator::prepare(Operation operation, const at::Tensor& input, const at::Tensor& output) const {
  const std::string_view verb = operation_name(operation);
  check_tensor(verb, "input", input);
  check_tensor(verb, "output", output);
  COLLEGIUM_CHECK(input.scalar_type() == output.scalar_type(), "{}: input is {}, output is {}", verb,
                  c10::toString(input.scalar_type()), c10::toString(output.scalar_type()));
  Call call;
  call.operation = operation;
  call.input = input;
  call.output = output;
  call.elements = input.numel();
  call.dtype = input.scalar_type();
  call.where = where();
  return call;
}

Work Communicator::all_reduce(const at::Tensor& tensor, ReduceOp op) {
  Call call = prepare(Operation::kAllReduce, tensor, tensor);
  check_reducible("all_reduce", call.dtype);
  call.reduce = op;
  return start(std::move(call));
}

Work Communicator::all_gather(const at::Tensor& input, const at::Tensor& output,
                              std::span<const std::int64_t> rows) {
  Call call = prepare(Operation::kAllGather, input, output);
  COLLEGIUM_CHECK(input.dim() > 0 && output.dim() > 0, "all_gather: input and output need a dim of rows");
  call.row_elements = elements_per_row(input);
  COLLEGIUM_CHECK(call.row_elements == elements_per_row(output),
                  "all_gather: a row of input has {} elements, one of output {}", call.row_elements,
                  elements_per_row(output));
  call.recv_rows = rows_or_equal("all_gather", "rows", rows, output.size(0), size());
  const std::int64_t own = call.recv_rows[static_cast<std::size_t>(rank())];
  COLLEGIUM_CHECK(input.size(0) == own, "all_gather: input has {} rows, this rank's share of output is {}",
                  input.size(0), own);
  return start(std::move(call));
}

Work Communicator::reduce_scatter(const at::Tensor& input, const at::Tensor& output, ReduceOp op,
                                  std::span<const std::int64_t> rows) {
  Call call = prepare(Operation::kReduceScatter, input, output);
  check_reducible("reduce_scatter", call.dtype);
  COLLEGIUM_CHECK(input.dim() > 0 && output.dim() > 0, "reduce_scatter: input and output need a dim of rows");
  call.reduce = op;
  call.row_elements = elements_per_row(input);
  COLLEGIUM_CHECK(call.row_elements == elements_per_row(output),
                  "reduce_scatter: a row of input has {} elements, one of output {}", call.row_elements,
                  elements_per_row(output));
  call.send_rows = rows_or_equal("reduce_scatter", "rows", rows, input.size(0), size());
  const std::int64_t own = call.send_rows[static_cast<std::size_t>(rank())];
  COLLEGIUM_CHECK(output.size(0) == own,
                  "reduce_scatter: output has {} rows, this rank's share of input is {}", output.size(0),
                  own);
  return start(std::move(call));
}

Work Communicator::broadcast(const at::Tensor& tensor, int root) {
  check_peer("broadcast", "root", root, group_);
  Call call = prepare(Operation::kBroadcast, tensor, tensor);
  call.peer = root;
  return start(std::move(call));
}

Call Communicator::prepare_all_to_all(const at::Tensor& input, const at::Tensor& output,
                                      std::span<const std::int64_t> send_rows,
                                      std::span<const std::int64_t> recv_rows) const {
  Call call = prepare(Operation::kAllToAll, input, output);
  COLLEGIUM_CHECK(input.dim() > 0 && output.dim() > 0, "all_to_all: input and output need a dim of rows");
  call.row_elements = elements_per_row(input);
  COLLEGIUM_CHECK(call.row_elements == elements_per_row(output),
                  "all_to_all: a row of input has {} elements, one of output {}", call.row_elements,
                  elements_per_row(output));
  call.send_rows = rows_or_equal("all_to_all", "send_rows", send_rows, input.size(0), size());
  call.recv_rows = rows_or_equal("all_to_all", "recv_rows", recv_rows, output.size(0), size());
  return call;
}

Work Communicator::all_to_all(const at::Tensor& input, const at::Tensor& output,
                              std::span<const std::int64_t> send_rows,
                              std::span<const std::int64_t> recv_rows) {
  return start(prepare_all_to_all(input, output, send_rows, recv_rows));
}

Work Communicator::all_to_all(const at::Tensor& input, const at::Tensor& output, const RankBlocks& send,
                              const RankBlocks& recv) {
  COLLEGIUM_CHECK(send.stays == recv.stays && (send.stays == -1 || send.stays == rank()),
                  "all_to_all: rows of rank {} and of rank {} stay, must be those of rank {} or of none (-1)",
                  send.stays, recv.stays, rank());
  Call call = prepare_all_to_all(input, output, rows_per_rank("send", send), rows_per_rank("recv", recv));
  if (send.stays >= 0) {
    call.send_rows[static_cast<std::size_t>(send.stays)] = 0;
    call.recv_rows[static_cast<std::size_t>(recv.stays)] = 0;
  }
  call.send_pieces = lay_out(send);
  call.recv_pieces = lay_out(recv);
  for (const auto& pieces : call.send_pieces) call.send_cuts.push_back(cut_number(pieces));
  for (const auto& pieces : call.recv_pieces) call.recv_cuts.push_back(cut_number(pieces));
  return start(std::move(call));
}

Work Communicator::send(const at::Tensor& tensor, int destination, int tag) {
  check_peer("send", "destination", destination, group_);
  COLLEGIUM_CHECK(tag >= 0 && tag <= kMaxTag, "send: tag = {}, must be in [0, {}]", tag, kMaxTag);
  Call call = prepare(Operation::kSend, tensor, tensor);
  call.output = at::Tensor();
  call.peer = destination;
  call.tag = tag;
  return start(std::move(call));
}

Work Communicator::recv(const at::Tensor& tensor, int source, int tag) {
  check_peer("recv", "source", source, group_);
  COLLEGIUM_CHECK(tag >= 0 && tag <= kMaxTag, "recv: tag = {}, must be in [0, {}]", tag, kMaxTag);
  Call call = prepare(Operation::kRecv, tensor, tensor);
  call.input = at::Tensor();
  call.peer = source;
  call.tag = tag;
  return start(std::move(call));
}

void Communicator::barrier() {
  Call call;
  call.where = where();
  start(std::move(call)).wait();
}

Group Communicator::agree_on_split(int color, int key, const std::string& name) {
  const at::Tensor own = at::empty({1, 2}, at::kLong);
  own.data_ptr<std::int64_t>()[0] = color;
  own.data_ptr<std::int64_t>()[1] = key;
  const at::Tensor all = at::empty({size(), 2}, at::kLong);
  all_gather(own, all).wait();
  const auto* values = all.data_ptr<std::int64_t>();
  std::vector<std::ptrdiff_t> ranks;
  for (std::ptrdiff_t r = 0; r < size() && color >= 0; ++r) {
    if (values[2 * r] == color) ranks.push_back(r);
  }
  std::stable_sort(ranks.begin(), ranks.end(),
                   [&](std::ptrdiff_t a, std::ptrdiff_t b) { return values[2 * a + 1] < values[2 * b + 1]; });
  Group group{.name = name, .rank = 0, .members = {}, .where = group_.where};
  for (const std::ptrdiff_t r : ranks) {
    if (r == rank()) group.rank = group.size();
    group.members.push_back(group_.members[static_cast<std::size_t>(r)]);
  }
  return group;
}

}  // namespace collegium::comm
