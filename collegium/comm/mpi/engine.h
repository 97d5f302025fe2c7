// SPDX-License-Identifier: Apache-2.0
#pragma once

// The one user of the MPI library: posts messages, looks at their progress, waits with a deadline.

#include <mpi.h>

#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "collegium/comm/mpi/mpi.h"

namespace collegium::comm {

/// One operation: stages of messages; a stage begins when all messages of the former one are through.
class MpiOperation {
 public:
  using Stage = std::function<void(MpiOperation&)>;

  MpiOperation(Call call, std::string name, Group group, MPI_Comm comm);

  void add_stage(Stage stage) { stages_.push_back(std::move(stage)); }
  /// Group ranks; messages of no bytes are skipped unless `even_empty`.
  void send(const void* data, std::int64_t bytes, int to, int tag, bool even_empty = false);
  void recv(void* data, std::int64_t bytes, int from, int tag, bool even_empty = false);

  /// The rows of `pieces`, in order, from or into their places behind `base`. Both sides cut alike; where
  /// there are no rows, an empty message goes all the same.
  void send_pieces(const char* base, const std::vector<Piece>& pieces, std::int64_t row_bytes, int to,
                   int tag);
  void recv_pieces(char* base, const std::vector<Piece>& pieces, std::int64_t row_bytes, int from, int tag);

  const Call& call() const { return call_; }
  const Group& group() const { return group_; }
  const std::string& name() const { return name_; }
  Timeline timeline() const { return timeline_; }
  bool done() const { return done_; }
  const std::optional<std::string>& error() const { return error_; }

  /// What     Looks at the messages once and begins the next stage when it may. After the last the stages and
  ///          the memory they hold are gone. What is through now ended now, or where nobody has looked since
  ///          `last_look`, at some time after that: then this is taken, as more is not known.
  void advance(std::optional<Clock::time_point> last_look);
  /// Ranks whose messages are not through.
  std::vector<int> missing_ranks() const;
  void release();

 private:
  struct Message {
    int peer = 0;
    std::int64_t bytes = 0;
    bool receives = false;
  };

  /// Whether all messages are through; what goes wrong with one becomes the error.
  bool messages_done();
  void begin_next_stage();
  void complete(std::size_t index, const MPI_Status& status);

  Call call_;
  std::string name_;
  Group group_;
  MPI_Comm comm_;
  std::vector<Stage> stages_;
  std::size_t next_stage_ = 0;
  std::vector<MPI_Request> requests_;
  std::vector<Message> messages_;
  std::size_t num_open_ = 0;
  bool done_ = false;
  std::optional<std::string> error_;
  Timeline timeline_;
};

/// MPI from initialisation to the end of the process. MPI is called under one lock, so MPI_THREAD_SERIALIZED
/// is enough.
class MpiEngine {
 public:
  explicit MpiEngine(const MpiOptions& options);
  ~MpiEngine();
  MpiEngine(const MpiEngine&) = delete;
  MpiEngine& operator=(const MpiEngine&) = delete;

  MPI_Comm comm() const { return comm_; }
  const MpiOptions& options() const { return options_; }
  Group world_group() const;
  /// The largest tag of a message that this MPI takes: from 2^15 - 1 on, by the standard.
  int most_tag() const { return most_tag_; }
  /// Context ids that are free on this rank from here on; see MpiCommunicator.
  int next_context() const { return next_context_; }
  void set_next_context(int context) { next_context_ = context; }

  /// This rank failed: the end of the engine must wait for nobody.
  void give_up() { failed_ = true; }

  /// Begins the operation, and moves on those that are under way.
  void start(const std::shared_ptr<MpiOperation>& operation);
  /// Throws NoAnswer: time-out; CommError: what went wrong with a message.
  void wait(const std::shared_ptr<MpiOperation>& operation);
  bool done(const std::shared_ptr<MpiOperation>& operation);
  /// What     Waits for what nobody waited for.
  /// Throws   as wait().
  void wait_for_all();

 private:
  void advance_all(std::optional<Clock::time_point> last_look);

  const MpiOptions options_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int most_tag_ = 0;
  int next_context_ = 2;
  bool more_ranks_than_cores_ = false;
  std::mutex mutex_;
  std::list<std::shared_ptr<MpiOperation>> active_;
  Clock::time_point last_look_;
  bool failed_ = false;
};

}  // namespace collegium::comm
