// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/signals.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <mutex>
#include <thread>

#include "collegium/base/error.h"
#include "collegium/base/temporary_folder.h"

namespace collegium::cli {

namespace {

// mpirun passes SIGUSR1 on to the ranks. Who reads or writes meanwhile goes on; nothing waits for a signal.
void handle_signals(void (*handler)(int)) {
  struct sigaction action{};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) sigaction(signal, &action, nullptr);
}

volatile std::sig_atomic_t requested = 0;

void on_signal(int signal) {
  if (requested != 0) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  requested = 1;
}

// A handler may not remove files; a thread that waits for its message may.
std::array<int, 2> signal_pipe = {-1, -1};

volatile std::sig_atomic_t removing = 0;

void pass_on(int signal) {
  removing = 1;
  if (::write(signal_pipe[1], &signal, sizeof(signal)) < 0) ::_exit(1);
}

void end_after_removal() {
  int signal = 0;
  while (::read(signal_pipe[0], &signal, sizeof(signal)) != sizeof(signal)) {
  }
  // Who is filling a folder may make it once more, and then finds that its files are gone. mpirun ends all
  // ranks as soon as one has ended, so one with nothing to do ends no sooner.
  constexpr int kTimes = 10;
  constexpr std::chrono::milliseconds kPause{20};
  for (int i = 0; i < kTimes; ++i) {
    TemporaryFolder::remove_all();
    std::this_thread::sleep_for(kPause);
  }
  std::signal(signal, SIG_DFL);
  ::kill(::getpid(), signal);
}

void start_removal_thread() {
  if (::pipe2(signal_pipe.data(), O_CLOEXEC) != 0) throw Error("cannot make a pipe for signals");
  std::thread(end_after_removal).detach();
  handle_signals(pass_on);
}

}  // namespace

void install_stop_signals() { handle_signals(on_signal); }

bool stop_requested() { return requested != 0; }

void remove_temporary_folders_on_signals() {
  static std::once_flag started;
  std::call_once(started, start_removal_thread);
}

void let_removal_end() {
  while (removing != 0) ::pause();
}

}  // namespace collegium::cli
